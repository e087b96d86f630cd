from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

import mmalign
from mmalign.config import (
    Choice,
    Table,
    check_folder,
    command_line,
    describe,
    differences,
    import_address,
    read_config,
    resolved,
    settings_of,
    write_resolved,
)
from mmalign.config.schema import nearest
from mmalign.config.writing import git_state
from mmalign.errors import UserError


def dpo(policy: float, reference: float, prob: float | None = None, *, beta: float = 0.1, smoothing: float = 0.0) -> float:
    return beta * (policy - reference)


def hinge(policy: float, *, margin: float | Float[Tensor, " batch"] = 1.0, weight_decay: float) -> float:
    return max(0.0, margin - policy)  # type: ignore[type-var, return-value]


@dataclass(frozen=True, kw_only=True)
class Ramp:
    low: int = 0
    high: int = 1000

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"low: got {self.low}, want less than high ({self.high}).")


LOSSES: dict[str, Any] = {"dpo": dpo, "hinge": hinge}
STEPS: dict[str, Any] = {"ramp": Ramp, "far": "fractions:Fraction"}
Loss = Annotated[Choice, Table(LOSSES, extra={"weight": (float, 1.0)}, widen={"beta": float | Literal["auto"], "unheard": int})]


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr: got {self.lr}, want more than 0.")
        if self.betas[0] > self.betas[1]:
            raise ValueError("the first beta is above the second.")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a verb might need."""

    data: str = field(metadata={"help": "a dataset", "positional": True})
    num_steps: Annotated[int, Field(gt=0)] = 100
    out: Path = Path("runs/here")
    dry_run: bool = False
    resume: bool | str = False
    max_grad_norm: float | None = 1.0
    precision: Literal["bf16", "fp16", "no"] = "no"
    tags: tuple[str, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)
    optimiser: Optimiser = field(default_factory=Optimiser)
    second: Optimiser | None = None
    loss: tuple[Loss, ...] = field(default_factory=lambda: (Table(LOSSES).choose("dpo"),))
    timesteps: Annotated[Choice, Table(lambda: STEPS)] | None = None


def write(folder: Path, text: str) -> Path:
    path = folder / "x.yaml"
    path.write_text(text)
    return path


def read(folder: Path, text: str, *overrides: str) -> Settings:
    return read_config(Settings, write(folder, text), overrides)


def faults(folder: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the error, the folder's name cut off."""
    with pytest.raises(UserError) as caught:
        read(folder, text, *overrides)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def test_a_config_gets_its_defaults_and_its_given_values(tmp_path: Path) -> None:
    config = read(tmp_path, "data: pairs\noptimiser: {lr: 1e-4}\n")
    assert config == Settings(data="pairs", optimiser=Optimiser(lr=1e-4))


def test_numbers_without_a_point_before_the_exponent_are_numbers(tmp_path: Path) -> None:
    for text, value in {"1e-5": 1e-5, "2E3": 2000.0, "-1.5e+2": -150.0, ".5": 0.5, "3": 3.0, ".inf": math.inf}.items():
        assert read(tmp_path, f"data: x\nmax_grad_norm: {text}\n").max_grad_norm == value


def test_no_and_on_and_dates_and_times_are_text(tmp_path: Path) -> None:
    config = read(tmp_path, "data: x\ntags: [no, on, 2024-01-01, 1:30, yes, '5']\n")
    assert config.tags == ("no", "on", "2024-01-01", "1:30", "yes", "5")


def test_an_integer_with_a_leading_zero_is_decimal(tmp_path: Path) -> None:
    assert read(tmp_path, "data: x\nnum_steps: 010\n").num_steps == 10
    assert read(tmp_path, "data: x\nnum_steps: 0x10\n").num_steps == 16


def test_all_faults_are_told_at_once_each_with_its_place(tmp_path: Path) -> None:
    text = "num_stepps: 3\nloss: {name: dpo, betta: 1}\noptimiser: {lr: '3'}\nprecision: bf17\nmax_grad_norm: [1]\n"
    assert faults(tmp_path, text, "dry_run=3") == [
        "x.yaml: num_stepps: unknown key. Did you mean num_steps?",
        "x.yaml: data: missing; want text.",
        "command line: dry_run: got 3, want true or false.",
        "x.yaml: max_grad_norm: got [1], want a number or null.",
        "x.yaml: precision: got 'bf17', want one of bf16, fp16, no. Did you mean bf16?",
        "x.yaml: optimiser.lr: got '3', want a number.",
        "x.yaml: loss.betta: unknown key. Did you mean beta?",
    ]


def test_a_key_like_no_other_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    assert faults(tmp_path, "data: x\noptimiser: {zzz: 1}\n") == ["x.yaml: optimiser.zzz: unknown key. Known here: lr, betas."]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("data: 5", "data: got 5, want text. Put it in quotes."),
        ("data: null", "data: got null, want text."),
        ("data: x\nnum_steps: 1.5", "num_steps: got 1.5, want an integer."),
        ("data: x\nnum_steps: true", "num_steps: got true, want an integer."),
        ("data: x\nnum_steps: 0", "num_steps: got 0: input should be greater than 0."),
        ("data: x\nmax_grad_norm: true", "max_grad_norm: got true, want a number or null."),
        ("data: x\ntags: [a, 3]", "tags.1: got 3: input should be a valid string."),
        ("data: x\nsizes: {a: b}", "sizes.a: got 'b': input should be a valid integer."),
        ("data: x\nsizes: 3", "sizes: got 3, want keys, each an integer."),
        ("data: x\noptimiser: 3", "optimiser: got 3, want keys of its own: lr, betas."),
        ("data: x\noptimiser: null", "optimiser: got null, want keys of its own: lr, betas."),
        ("data: x\noptimiser: {betas: [1]}", "optimiser.betas.1: got [1]: field required."),
        ("data: x\noptimiser: {lr: -1}", "optimiser.lr: got -1.0, want more than 0."),
        ("data: x\noptimiser: {betas: [1, 0]}", "optimiser: the first beta is above the second."),
        ("data: x\nloss: 3", "loss: got 3, want a list, each a name with settings."),
        ("data: x\nloss: [3]", "loss.0: got 3, want a name or {name: ..., settings}. Known: dpo, hinge."),
        ("data: x\nloss: [{beta: 1}]", "loss.0.name: missing; want one of dpo, hinge."),
        ("data: x\nloss: [{name: 3}]", "loss.0.name: got 3, want one of dpo, hinge."),
        ("data: x\nloss: hinge", "loss.weight_decay: missing; want a number."),
        ("data: x\nloss: {name: hinge, weight_decay: 1, margin: a}", "loss.margin: got 'a', want a number."),
        ("data: x\nloss: {name: dpo, beta: sometimes}", "loss.beta: got 'sometimes', want a number or auto."),
        ("data: x\ntimesteps: {name: ramp, low: 7, high: 3}", "timesteps.low: got 7, want less than high (3)."),
    ],
)
def test_a_wrong_value_is_told_with_what_was_wanted(tmp_path: Path, text: str, fault: str) -> None:
    assert faults(tmp_path, text) == [f"x.yaml: {fault}"]


def test_an_unknown_name_is_answered_with_the_nearest_and_the_whole_table(tmp_path: Path) -> None:
    [fault] = faults(tmp_path, "data: x\nloss: [dpo, {name: dop}]\n")
    assert fault.startswith("x.yaml: loss.1.name: got 'dop', want one of dpo, hinge. Did you mean dpo?")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("dop", "dpo"), ("dpoo", "dpo"), ("dppo", "dpop"), ("kot", "kto"), ("sipmo", "simpo"), ("xyz", None)],
)
def test_two_letters_that_changed_places_are_the_likeliest_slip(typed: str, meant: str | None) -> None:
    known = ["ipo", "dpop", "ld_dpo", "kto", "simpo", "dpo", "orpo"]
    assert nearest(typed, known) == (f" Did you mean {meant}?" if meant else "")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        *(("flow_dpo", "dpo"), ("diffusion_kto", "kto"), ("ipo_scale_free", "ipo"), ("vqa", "vqa_score")),
        *(("SDXL", "sdxl"), ("FLUX.1", "flux"), ("qwen", "qwen_image"), ("xyz", None)),
    ],
)
def test_a_name_in_capitals_or_with_a_word_more_or_less_is_recognised(typed: str, meant: str | None) -> None:
    known = ["ld_dpo", "dpo", "kto", "ipo", "vqa_score", "sdxl", "flux", "qwen_image", "qwen_image_edit"]
    assert nearest(typed, known) == (f" Did you mean {meant}?" if meant else "")


def test_a_key_given_twice_is_a_fault_with_both_lines(tmp_path: Path) -> None:
    text = "data: x\noptimiser:\n  lr: 1\n  lr: 2\ndata: y\n"
    assert faults(tmp_path, text) == [
        "x.yaml: optimiser.lr: given twice, in lines 3 and 4. Keep one.",
        "x.yaml: data: given twice, in lines 1 and 5. Keep one.",
    ]


def test_a_value_inside_itself_is_a_fault(tmp_path: Path) -> None:
    assert faults(tmp_path, "data: &a [*a]\n") == ["x.yaml: data.0: line 1 refers to itself. Write the value out."]


def test_broken_yaml_is_told_with_its_line(tmp_path: Path) -> None:
    [fault] = faults(tmp_path, "data: x\nloss: [dpo\nout: y\n")
    assert fault.startswith("x.yaml:3: not YAML: ")


def test_a_file_of_no_keys_is_refused(tmp_path: Path) -> None:
    assert faults(tmp_path, "- a\n- b\n") == ["x.yaml: got list, want keys with values (`key: value` lines)."]


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "y.yaml").write_bytes(b"data: \xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        read_config(Settings, tmp_path / "y.yaml")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such file"):
        read_config(Settings, tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        read_config(Settings, tmp_path)


def test_an_empty_file_and_no_file_are_all_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, "", "data=x") == read_config(Settings, None, ["data=x"]) == Settings(data="x")


def test_without_a_file_a_missing_key_is_asked_of_the_command_line() -> None:
    with pytest.raises(UserError, match=r"^command line: data: missing; want text\.$"):
        read_config(Settings)


def test_a_plain_name_a_mapping_and_a_list_of_one_are_the_same(tmp_path: Path) -> None:
    plain, mapping, listed = (read(tmp_path, f"data: x\nloss: {text}\n") for text in ("dpo", "{name: dpo}", "[dpo]"))
    assert plain == mapping == listed
    assert plain.loss[0].settings == {"beta": 0.1, "smoothing": 0.0}
    assert plain.loss[0].extra == {"weight": 1.0}


def test_a_choice_builds_with_data_settings_and_later_words(tmp_path: Path) -> None:
    [loss] = read(tmp_path, "data: x\nloss: {name: dpo, beta: 2}\n").loss
    assert loss.build(3.0, 1.0) == 4.0
    assert loss.build(3.0, 1.0, beta=5.0) == 10.0
    assert loss.with_settings(beta=10.0).build(3.0, 1.0) == 20.0
    assert loss.settings["beta"] == 2.0


def test_a_widened_setting_takes_the_wider_value(tmp_path: Path) -> None:
    assert read(tmp_path, "data: x\nloss: {name: dpo, beta: auto}\n").loss[0].settings["beta"] == "auto"


def test_a_setting_that_may_be_a_tensor_takes_its_yaml_part(tmp_path: Path) -> None:
    [loss] = read(tmp_path, "data: x\nloss: {name: hinge, weight_decay: 0, margin: 2}\n").loss
    assert loss.settings == {"margin": 2.0, "weight_decay": 0.0}


def test_positional_parameters_are_data_and_no_settings(tmp_path: Path) -> None:
    assert set(settings_of(dpo)) == {"beta", "smoothing"}
    assert faults(tmp_path, "data: x\nloss: {name: dpo, prob: 1}\n") == [
        "x.yaml: loss.prob: unknown key. Known here: beta, smoothing, weight."
    ]


def test_settings_are_read_through_partial_functions_and_classes() -> None:
    class Thing:
        def __init__(self, data: int, *, size: int) -> None: ...

    assert set(settings_of(functools.partial(dpo, 1.0))) == {"beta", "smoothing"}
    assert settings_of(Thing)["size"].annotation is int


def test_an_address_names_a_thing_outside_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere.py").write_text("def mine(policy, *, power: float = 2.0):\n    return policy**power\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    [loss] = read(tmp_path, "data: x\nloss: {name: 'elsewhere:mine', power: 3}\n").loss
    assert loss.name == "elsewhere:mine"
    assert loss.build(2.0) == 8.0


@pytest.mark.parametrize("address", ["nowhere_at_all:thing", "math:nothing", ":thing", "math:"])
def test_an_address_that_cannot_be_imported_is_a_fault(tmp_path: Path, address: str) -> None:
    [fault] = faults(tmp_path, f"data: x\nloss: '{address}'\n")
    assert fault.startswith(f"x.yaml: loss.name: cannot import '{address}'")


def test_an_entry_of_a_table_may_be_an_address(tmp_path: Path) -> None:
    config = read(tmp_path, "data: x\ntimesteps: far\n")
    assert config.timesteps is not None
    assert config.timesteps.build(1, 2) == import_address("fractions:Fraction")(1, 2)


def test_a_table_may_be_an_address() -> None:
    table = Table(f"{__name__}:LOSSES")
    assert table.choose("dpo", beta=3).settings["beta"] == 3.0


def test_choosing_in_python_is_checked_like_yaml() -> None:
    with pytest.raises(UserError, match=r"dpo: betta: unknown key\. Did you mean beta\?"):
        Table(LOSSES).choose("dpo", betta=3)


def test_an_extra_key_without_default_is_required() -> None:
    table = Table(LOSSES, extra={"share": (float, dataclasses.MISSING)})
    assert table.choose("dpo", share=1).extra == {"share": 1.0}
    with pytest.raises(UserError, match="share: missing; want a number"):
        table.choose("dpo")


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    text = "data: x\nloss: {name: dpo, beta: 1}\noptimiser: {lr: 1}\n"
    config = read(tmp_path, text, "loss.beta=3", "optimiser.betas=[0, 1e-1]", "second.lr=2", "loss.smoothing=0.2")
    assert config.loss[0].settings == {"beta": 3.0, "smoothing": 0.2}
    assert config.optimiser == Optimiser(lr=1.0, betas=(0.0, 0.1))
    assert config.second == Optimiser(lr=2.0)


@pytest.mark.parametrize("loss", ["dpo", "[dpo]", "{name: dpo}", "[{name: dpo}]"])
@pytest.mark.parametrize("key", ["loss.beta", "loss.0.beta"])
def test_an_override_finds_the_one_loss_however_it_is_written(tmp_path: Path, loss: str, key: str) -> None:
    assert read(tmp_path, f"data: x\nloss: {loss}\n", f"{key}=3").loss[0].settings["beta"] == 3.0


def test_an_override_reaches_into_a_list_by_number(tmp_path: Path) -> None:
    text = "data: x\nloss: [dpo, {name: dpo, weight: 2}]\n"
    assert [c.extra["weight"] for c in read(tmp_path, text, "loss.1.weight=5", "loss.0.weight=4").loss] == [4.0, 5.0]
    assert faults(tmp_path, text, "loss.beta=5") == [
        "command line: loss.beta: loss is a list of 2. Say which one by its number, from 0."
    ]
    assert faults(tmp_path, text, "loss.2.beta=5") == [
        "command line: loss.2.beta: loss is a list of 2. Say which one by its number, from 0."
    ]


def test_an_override_changes_a_setting_of_the_default_choice(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class One:
        loss: Loss = field(default_factory=lambda: Table(LOSSES).choose("dpo", beta=7, smoothing=0.3))
        optimiser: Optimiser = field(default_factory=lambda: Optimiser(lr=5.0))

    config = read_config(One, None, ["loss.smoothing=0.4", "optimiser.betas=[0, 0]"])
    assert config.loss.settings == {"beta": 7.0, "smoothing": 0.4}
    assert config.optimiser == Optimiser(lr=5.0, betas=(0.0, 0.0))


def test_faults_of_overrides_name_the_command_line(tmp_path: Path) -> None:
    assert faults(tmp_path, "data: x\nloss: {name: dpo}\n", "loss.betta=3", "nothing", "a..b=3", "tags={a: 1, a: 2}") == [
        "command line: got 'nothing', want key=value, as in loss.beta=2000.",
        "command line: got 'a..b=3', want key=value, as in loss.beta=2000.",
        "command line: tags.a: given twice, in lines 1 and 1. Keep one.",
    ]
    assert faults(tmp_path, "data: x\nloss: {name: dpo}\n", "loss.betta=3", "optimiser.lr=0", "new.key=1") == [
        "command line: new: unknown key. Known here: data, num_steps, out, dry_run, resume, max_grad_norm, precision, "
        "tags, sizes, optimiser, second, loss, timesteps.",
        "command line: optimiser.lr: got 0.0, want more than 0.",
        "command line: loss.betta: unknown key. Did you mean beta?",
    ]


def test_an_override_into_a_plain_value_is_a_fault(tmp_path: Path) -> None:
    assert faults(tmp_path, "data: x\nnum_steps: 3\n", "num_steps.a=1") == [
        "command line: num_steps.a: num_steps is 3, which has no keys."
    ]


def test_an_override_that_is_no_yaml_is_told_to_be_quoted(tmp_path: Path) -> None:
    [fault] = faults(tmp_path, "", "data=a: b: c")
    assert fault.startswith("command line: data: got 'a: b: c', which is not YAML")
    assert read(tmp_path, "", 'data="a: b: c"').data == "a: b: c"


def test_a_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    text = "data: 'no'\ntags: ['1e-5', '5', 'null', 'true', x]\nloss: [dpo, {name: dpo, beta: auto}]\ntimesteps: ramp\n"
    config = read(tmp_path, text)
    write_resolved(config, tmp_path / "run")
    again = read_config(Settings, tmp_path / "run/config.yaml")
    assert again == config
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["timesteps"] == {"name": "ramp", "low": 0, "high": 1000}
    assert resolved(config)["loss"][1] == {"name": "dpo", "beta": "auto", "smoothing": 0.0, "weight": 1.0}


def test_the_environment_is_written_beside_the_config(tmp_path: Path) -> None:
    write_resolved(Settings(data="x"), tmp_path)
    written = json.loads((tmp_path / "environment.json").read_text())
    assert written["mmalign"] == mmalign.__version__
    assert written["packages"]["torch"].startswith("2.")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "environment.json"]


def test_the_git_state_tells_commit_and_dirt(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert git_state(tmp_path) is None
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    state = git_state(tmp_path)
    assert state is not None
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (tmp_path / "new").write_text("")
    assert git_state(tmp_path) == {**state, "dirty": True}


def test_differences_name_key_old_and_new() -> None:
    old = {"lr": 1.0, "loss": [{"name": "dpo", "beta": 5}], "nan": math.nan, "gone": 1, "tags": ["a"]}
    new = {"lr": 1.0, "loss": [{"name": "dpo", "beta": 6}], "nan": math.nan, "come": "x", "tags": ["a", "b"]}
    assert differences(old, new) == [
        "loss.0.beta: was 5, is now 6",
        "gone: was 1, is now absent",
        'tags: was ["a"], is now ["a", "b"]',
        "come: was absent, is now 'x'",
    ]
    assert differences(old, old) == []


def test_the_description_lists_keys_types_and_defaults() -> None:
    lines = describe(Settings).splitlines()
    rows = {line.split()[0]: line for line in lines}
    assert "text" in rows["data"]
    assert "required" in rows["data"]
    assert rows["data"].endswith("text; a dataset")
    assert "a number" in rows["optimiser.lr"]
    assert "1e-05" in rows["optimiser.lr"]
    assert "one of dpo, hinge" in rows["loss"]


def test_help_takes_the_words_of_the_docstring() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Told:
        """Two sizes.

        Args:
            width, height: of the picture,
                in pixels.
            depth: in bits.

        Not an argument: never shown.
        """

        width: int = 1
        height: int = 2
        depth: int = field(default=8, metadata={"help": "its own words"})

    rows = {line.split()[0]: line for line in describe(Told).splitlines()}
    assert rows["width"].endswith("an integer; of the picture, in pixels.")
    assert rows["height"].endswith("an integer; of the picture, in pixels.")
    assert rows["depth"].endswith("an integer; its own words")
    assert len(rows) == 4


def test_help_for_a_key_tells_its_names_with_their_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(Settings, lambda config: None, ["--help", "loss", "num_steps"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("loss is one of:\n\ndpo")
    assert re.search(r"^  beta +0\.1 +a number or auto$", out, re.M)
    assert re.search(r"^  weight_decay +required +a number$", out, re.M)
    assert re.search(r"^  weight +1\.0 +a number$", out, re.M)
    assert re.search(r"^num_steps +100 +an integer$", out, re.M)


def test_help_for_an_unknown_key_ends_in_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(Settings, lambda config: None, ["--help", "los"]) == 2
    assert capsys.readouterr().err == "--help los: unknown key. Did you mean loss?\n"


def test_a_description_leaves_lazy_tables_alone() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Lazy:
        loss: Annotated[Choice, Table("module_that_is_not_there:LOSSES")]

    assert "a name of module_that_is_not_there:LOSSES" in describe(Lazy)


def test_a_config_class_with_positional_fields_is_a_programming_error() -> None:
    @dataclass
    class Loose:
        a: int = 1

    with pytest.raises(TypeError, match="keyword-only"):
        read_config(Loose)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["x.yaml"], Settings(data="here")),
        (["--config", "x.yaml", "dry_run=true"], Settings(data="here", dry_run=True)),
        (["--config=x.yaml", "--dry-run"], Settings(data="here", dry_run=True)),
        (["--dry-run", "x.yaml"], Settings(data="here", dry_run=True)),
        (["--dry-run", "false", "x.yaml"], Settings(data="here")),
        (["x.yaml", "--num-steps=7", "--out", "there"], Settings(data="here", num_steps=7, out=Path("there"))),
        (["x.yaml", "--optimiser.lr", "1e-3"], Settings(data="here", optimiser=Optimiser(lr=1e-3))),
        (["x.yaml", "--resume", "latest"], Settings(data="here", resume="latest")),
        (["x.yaml", "--resume", "--dry-run"], Settings(data="here", resume=True, dry_run=True)),
        (["x.yaml", "--max-grad-norm", "null"], Settings(data="here", max_grad_norm=None)),
        (["pairs.jsonl", "--num-steps", "2"], Settings(data="pairs.jsonl", num_steps=2)),
    ],
)
def test_the_command_line_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], expected: Settings) -> None:
    write(tmp_path, "data: here\n")
    monkeypatch.chdir(tmp_path)
    seen: list[Settings] = []
    assert command_line(Settings, seen.append, argv) == 0
    assert seen == [expected]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a.yaml", "b.yaml"], "command line: got two configs, a.yaml and b.yaml, want one."),
        (["--out"], "command line: out: no value given. Write --out VALUE."),
        (["--config"], "command line: config: no value given."),
        (["--optimiser.lr", "--dry-run"], "command line: optimiser.lr: no value given."),
        (["data=x", "--dry-runn"], "command line: dry_runn: unknown key. Did you mean dry_run?"),
    ],
)
def test_a_faulty_command_line_ends_in_2_with_the_reason(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(Settings, lambda config: None, argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.out == ""


def test_a_stray_word_is_refused_where_nothing_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(Optimiser, lambda config: None, ["word"]) == 2
    assert capsys.readouterr().err.startswith("command line: got 'word', want CONFIG.yaml, key=value or --key value.")


def test_what_main_returns_is_printed_and_its_exit_code_used(capsys: pytest.CaptureFixture[str]) -> None:
    class Report:
        exit_code = 3

        def __str__(self) -> str:
            return "two rows are broken"

    assert command_line(Optimiser, lambda config: Report(), []) == 3
    assert capsys.readouterr().out == "two rows are broken\n"


def test_user_faults_of_main_end_in_2_and_interrupts_in_130(capsys: pytest.CaptureFixture[str]) -> None:
    def fault(config: Optimiser) -> None:
        raise UserError("pairs.jsonl:17: got one image, want two.")

    def interrupt(config: Optimiser) -> None:
        raise KeyboardInterrupt

    assert command_line(Optimiser, fault, []) == 2
    assert capsys.readouterr().err == "pairs.jsonl:17: got one image, want two.\n"
    assert command_line(Optimiser, interrupt, []) == 130


def test_faults_of_the_program_are_not_hidden() -> None:
    def broken(config: Optimiser) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        command_line(Optimiser, broken, [])


def test_help_prints_usage_docstring_and_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(Settings, lambda config: None, ["--help"], prog="mmalign verb") == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: mmalign verb [CONFIG.yaml] DATA ")
    assert "What a verb might need." in out
    assert "optimiser.betas" in out


def test_info_goes_to_stderr_plainly_and_warnings_say_so(tmp_path: Path) -> None:
    program = (
        "import logging, sys\nfrom dataclasses import dataclass\nfrom mmalign.config import command_line\n"
        "@dataclass(frozen=True, kw_only=True)\nclass C: pass\n"
        "def main(config):\n"
        "    logging.getLogger('mmalign.x').info('all is well')\n"
        "    logging.getLogger('mmalign.x').warning('beta is large')\n"
        "    logging.getLogger('chatty.library').info('GET /')\n"
        "sys.exit(command_line(C, main, []))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stderr == "all is well\nwarning: beta is large\n"
    assert run.stdout == ""


def test_reading_a_config_never_loads_torch(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom dataclasses import dataclass\nfrom mmalign.config import read_config\n"
        "@dataclass(frozen=True, kw_only=True)\nclass C:\n    a: int = 1\n"
        "assert read_config(C, None, ['a=2']).a == 2\nassert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_resolved_values_are_written_beside_those_of_another_run(tmp_path):
    write_resolved(Settings(data="x"), tmp_path)
    write_resolved(Settings(data="y"), tmp_path, config="other.yaml", versions="other.json")
    assert read_config(Settings, tmp_path / "config.yaml").data == "x"
    assert read_config(Settings, tmp_path / "other.yaml").data == "y"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(UserError, match="cannot"):
        check_folder(tmp_path / "closed" / "below")
