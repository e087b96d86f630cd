"""Settings that would turn an objective round, or make it infinite, are refused under their own names."""

import inspect
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from loss_inputs import settings_of
from runs import merged

from mmalign.adapters.text_lengths import SURVEYED
from mmalign.answerers import sees_by_run
from mmalign.config import read_config
from mmalign.errors import UserError
from mmalign.experiment import TrainConfig, build_objective, read_examples
from mmalign.held_out import run_config
from mmalign.losses import KNOWN_AS, LOSSES
from mmalign.objective import Objective, Term

NOT_NEGATIVE = {
    "hinge": ["margin"],
    "dro": ["margin"],
    "dpop": ["penalty"],
    "length_dpo": ["alpha"],
    "odpo": ["alpha"],
    "slic": ["delta", "nll_weight"],
    "simpo": ["gamma"],
    "alphapo": ["gamma"],
    "cpo": ["nll_weight"],
    "beta_dpo": ["alpha"],
    "bradley_terry": ["centring"],
    "kto": ["desirable_weight", "undesirable_weight"],
    "apo_zero_unpaired": ["desirable_weight", "undesirable_weight"],
    "tpo": ["alpha", "margin"],
    "blind_bpo": ["blind_weight"],
    "chip": ["kappa"],
    "symmpo": ["symmetric_weight", "regulariser"],
    "mmrlhf": ["scale"],
    "opa_dpo": ["image_weight", "anchor_weight"],
}
POSITIVE = {
    "rpo": ["reward_scale"],
    "mapo": ["snr", "scale"],
    "gpm": ["tau", "target"],
    "info_nca": ["temperature"],
    "nca": ["temperature"],
    "exo_listwise": ["temperature"],
    "rationale": ["gamma"],
    "selm": ["alpha"],
    "mmrlhf": ["slope"],
}
# Lawful on either side of zero, within limits of their own, or refused together with another.
ELSEWHERE = {
    ("chosen_anchor", "margin"),
    ("mdpo", "margin"),
    ("opa_dpo", "margin"),
    ("povid", "noisy_weight"),
    ("vdpo", "gamma"),
    ("alphapo", "alpha"),
    ("spo", "clip"),
    ("discopop", "tau"),
    ("beta_dpo", "rho"),
    ("ld_dpo", "alpha"),
    ("dckd", "chosen_weight"),
    ("dckd", "rejected_weight"),
}
NAMES = [name for name in LOSSES if name != "bpo"]  # another name of blind_bpo, under which its settings are told
WITH_BETA = [name for name in NAMES if "beta" in settings_of(name)]


def try_settings(name: str, **settings: Any) -> None:
    Objective([Term(name=name, loss=LOSSES[name], settings=settings)]).try_settings()


def pairs(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(name, setting) for name, settings in table.items() for setting in settings]


def test_every_number_of_every_loss_has_its_place_in_these_tables() -> None:
    common = {"beta", "label_smoothing", "divergence_alpha"}
    numbers = {(n, key) for n in NAMES for key, value in settings_of(n).items() if type(value) is float and key not in common}
    assert numbers == {*pairs(NOT_NEGATIVE), *pairs(POSITIVE), *ELSEWHERE}


@pytest.mark.parametrize(("name", "setting"), pairs(NOT_NEGATIVE))
def test_a_strength_that_would_pull_the_other_way_is_refused(name: str, setting: str) -> None:
    try_settings(name, **{setting: 0.0})
    with pytest.raises(UserError, match=rf"^loss\.{name}\.{setting}: got -0\.5, want zero or more\.$"):
        try_settings(name, **{setting: -0.5})


@pytest.mark.parametrize(("name", "setting"), pairs(POSITIVE))
@pytest.mark.parametrize("value", [0.0, -0.5])
def test_a_scale_that_is_not_positive_is_refused(name: str, setting: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^loss\.{name}\.{setting}: got {value}, want a positive number\.$"):
        try_settings(name, **{setting: value})


@pytest.mark.parametrize("name", WITH_BETA)
@pytest.mark.parametrize(
    ("value", "wanted"),
    [(0.0, "a positive"), (-0.1, "a positive"), (math.inf, "a finite"), (-math.inf, "a finite"), (math.nan, "a finite")],
)
def test_a_beta_that_is_not_positive_and_finite_is_refused(name: str, value: float, wanted: str) -> None:
    with pytest.raises(UserError, match=rf"^loss\.{name}\.beta: got {value}, want {wanted} number\.$"):
        try_settings(name, beta=value)


@pytest.mark.parametrize(("name", "setting"), [*pairs(NOT_NEGATIVE), *pairs(POSITIVE)])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_numbers_that_are_not_finite_are_refused(name: str, setting: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^loss\.{name}\.{setting}: got {value}, want a finite number\.$"):
        try_settings(name, **{setting: value})


def test_margins_given_one_per_pair_are_data_and_not_looked_at() -> None:
    margins = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    logps = torch.zeros(2, 2, dtype=torch.float64)
    for name in ("hinge", "dro"):
        assert inspect.signature(LOSSES[name]).parameters["margin"].kind is inspect.Parameter.KEYWORD_ONLY
        assert LOSSES[name](logps, logps, margin=margins).losses.tolist() == [0.0, 1.0]


def config_file(folder: Path, **changes: Any) -> Path:
    """A run on texts with these changes; its data are not there, and not looked for."""
    config = {
        "output": str(folder / "run"),
        "adapter": {"name": "text", "model": "none"},
        "data": {"importer": {"name": "trl", "path": "none.jsonl"}},
        "loss": "dpo",
        "training": {"steps": 1, "optimiser": {"name": "adamw", "learning_rate": 1e-3}},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(merged(config, changes)))
    return file


def seen(view: Any, **more: Any) -> dict[str, Any]:
    """A run whose rows are seen through this view."""
    return {"data": {"importer": {"name": "trl", "path": "none.jsonl"}, "view": view}, **more}


ONLINE = {"source": {"name": "online_pairs", "scorer": "text_length"}}
TAUGHT = {"adapter": {"teacher": {"model": "none"}}}
CACHED = {"adapter": {"cache": "folder"}}
MOVING = {"training": {"moving_reference": {"decay": 0.4, "every": 512}}}
REWARD = {"adapter": {"name": "text_reward", "model": "none"}}
IMAGES = {"adapter": {"name": "diffusion", "family": "sd15", "model": "none", "resolution": 32}}
STEP_REWARD = {"adapter": {**IMAGES["adapter"], "name": "step_reward", "reward": {"name": "step_aware", "clip": "none"}}}
SIGHTED = {"adapter": {"name": "image_text", "model": "none"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"name": "ipo", "label_smoothing": 0.1}}, r"loss\.label_smoothing: unknown key"),
        ({"loss": {"name": "hinge", "label_smoothing": 0.1}}, r"loss\.label_smoothing: unknown key"),
        ({"loss": {"name": "robust", "label_smoothing": 0.5}}, r"loss\.robust\.label_smoothing: got 0\.5, want .* below 0\.5"),
        ({"loss": {"name": "exo", "label_smoothing": 0.0}}, r"loss\.exo\.label_smoothing: got 0\.0, want above 0"),
        ({"loss": {"name": "simpo", "divergence": "js"}}, r"loss\.divergence: unknown key"),
        ({"loss": {"name": "kto", "divergence": "js"}}, r"loss\.divergence: unknown key"),
        ({"loss": {"name": "dpo", "divergence": "kl"}}, r"loss\.divergence: got 'kl', want one of reverse_kl"),
        ({"loss": {"name": "ld_dpo", "alpha": 2.0}}, r"loss\.ld_dpo\.alpha: got 2\.0, want 0 to 1"),
        ({"loss": {"name": "orpo", "beta": "auto"}}, r"loss\.orpo\.beta: got auto, want a number"),
        ({"loss": {"name": "kto", "beta": "auto"}}, r"loss\.kto\.beta: got auto, want a number"),
        (
            {"loss": {"name": "simpo"}, **CACHED},
            r"adapter\.cache: got folder, which would hold .* reference, and simpo asks for none",
        ),
        ({"loss": {"name": "orpo"}, **MOVING}, r"training\.moving_reference: orpo asks for no reference"),
        ({**CACHED, **MOVING}, r"adapter\.cache: got folder, a bank of reference logps, with a moving reference"),
        ({"loss": {"name": "simpo"}, "adapter": {"score": "difference"}}, r"adapter\.score: got difference with loss simpo"),
        ({"loss": {"name": "dove"}, "adapter": {"score": "difference"}}, r"adapter\.score: got difference with loss dove"),
        ({"loss": {"name": "dckd"}}, r"loss: asks for teacher_divergence, .* Set adapter\.teacher to the model that teaches"),
        ({"loss": {"name": "adpa"}, **TAUGHT}, r"loss: asks for advantage, which adapter text .* does not measure"),
        (TAUGHT, r"adapter\.teacher: got one, of which dpo learns nothing\. Set it to null"),
        ({"loss": {"name": "mdpo"}}, r"loss: asks for degraded, which adapter text with source offline does not measure"),
        ({"loss": {"name": "dpo", "weight": 0.0}}, r"loss\.dpo\.weight: got 0 of all losses"),
        (REWARD, r"loss: got dpo, which asks for a reference, which a reward model has not, want bradley_terry"),
        ({"loss": {"name": "selm"}, **REWARD}, r"loss: got selm, which asks for a reference"),
        ({"loss": {"name": "gpm"}, **REWARD}, r"loss: got gpm with adapter\.head scalar, want bradley_terry"),
        ({"adapter": {"quantization": "4bit"}}, r"adapter\.quantization: got it without lora"),
        ({"loss": {"name": "tr_dpo"}}, r"loss\.tr_dpo: is dpo by another name .* Set training\.moving_reference"),
        ({"loss": {"name": "mapo"}}, r"loss\.mapo: reads log-likelihoods as denoising errors, which these are not"),
        ({"loss": {"name": "gpm"}}, r"loss\.gpm: trains a reward model, want adapter: text_reward"),
        ({"loss": {"name": "bradley_terry"}}, r"loss\.bradley_terry: trains a reward model, want adapter: text_reward"),
        ({"loss": "bradley_terry", **SIGHTED}, r"loss\.bradley_terry: trains a reward model, which none of adapter"),
        ({"loss": "bradley_terry", **IMAGES}, r"loss\.bradley_terry: trains a reward model, want adapter: step_reward"),
        ({"loss": "gpm", **IMAGES}, r"loss\.gpm: trains a reward model, which none of adapter diffusion is"),
        ({"loss": [{"name": "dpo"}, {"name": "bradley_terry"}], **IMAGES}, r"loss\.bradley_terry: trains a reward model"),
        (STEP_REWARD, r"loss: got dpo, which asks for a reference, which a reward model has not, want bradley_terry"),
        ({"loss": "gpm", **STEP_REWARD}, r"loss: got gpm, which compares embeddings of texts, want bradley_terry"),
        ({"loss": "mapo", **STEP_REWARD}, r"loss\.mapo: reads log-likelihoods as denoising errors, which these are not"),
        ({"loss": "kto"}, r"loss\.kto: needs the data labels, the view gives none\..*unpaired gives labels"),
        ({"loss": "lipo"}, r"loss\.lipo: needs the data scores, the view gives none\..*ranked gives scores"),
        ({"loss": {"name": "sppo", "target": "scores"}}, r"loss\.sppo\.target: got scores on data without them"),
        (seen("unpaired"), r"loss\.dpo: got 1 candidates a prompt, want 2"),
        (seen("best"), r"loss\.dpo: got 1 candidates a prompt, want 2"),
        (seen("unpaired", loss="plackett_luce"), r"loss\.plackett_luce: got 1 candidates a prompt, want 2 or more"),
        (seen({"name": "ranked", "num_candidates": 4}), r"loss\.dpo: got 4 candidates a prompt, want 2"),
        (seen({"name": "pair", "margin": "gap"}, loss="aot"), r"loss: the data have margin .* which aot would pass over"),
        (seen({"name": "pair", "ties": "soft"}, loss="aot"), r"loss: the data have prob .* which aot would pass over"),
        (seen({"name": "pair", "temperature": 0.0}), r"view: got temperature 0\.0, want a positive number"),
        (seen("prompts", loss="kto", **ONLINE), r"loss\.kto: needs the data labels"),
        (seen("pair", source={"name": "self_play"}), r"data\.view: gives several candidates, want one answer an example"),
        (seen("prompts", source={"name": "self_play"}), r"data\.view: gives no answer, want one answer an example"),
        ({"source": {"name": "replay"}}, r"source: got replay with an adapter that makes no samples"),
        ({**CACHED, **seen("prompts"), **ONLINE}, r"adapter\.cache: got one with source: online_pairs"),
    ],
)
def test_what_does_not_go_together_is_refused_when_the_config_is_read(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        read_config(TrainConfig, config_file(tmp_path, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        CACHED,
        {"loss": {"name": "tr_dpo"}, **MOVING},
        {"loss": [{"name": "nll"}, {"name": "dckd"}], **TAUGHT},
        {"loss": {"name": "ld_dpo"}, "adapter": {"score": "difference"}},
        {"loss": [{"name": "dpo"}, {"name": "nll", "weight": 0.0}]},
        {"loss": {"name": "gpm"}, "adapter": {"name": "text_reward", "model": "none", "head": "gpm"}},
        {"loss": "bradley_terry", **STEP_REWARD},
        {"loss": "mapo", **IMAGES},
        {"loss": "odpo"},  # whose gap may be a column of the rows
        {"loss": {"name": "sppo"}},
        {"loss": "runs:nan_at_margin_7"},  # a loss of one's own, which must have the margins of the rows
        seen("ranked", loss="dpo"),  # of rows of two
        seen("ranked", loss="plackett_luce"),
        seen({"name": "ranked", "by": "helpfulness", "raw_scores": True, "num_candidates": 5}, loss="info_nca"),
        seen({"name": "pair", "by": "helpfulness", "margin": "gap"}, loss="odpo"),
        seen({"name": "pair", "with_scores": True}, loss="rpo"),
        seen({"name": "reward_weighted", "baseline": 1.0}, loss="sft"),
        seen({"name": "reward_weighted", "baseline": -2.0, "temperature": 0.005}, loss="sft"),
        seen({"name": "pair", "min_gap": 0.5}),
        seen({"name": "step", "min_gap": 0.1}),
        seen("unpaired", loss="bco"),
        seen("joint", loss="dove"),
        seen("step"),
        seen("best", loss="sft"),
        seen("best", source={"name": "self_play"}),
        seen("pair", **ONLINE),
        seen("prompts", loss=[{"name": "dpo"}, {"name": "selm"}], **ONLINE),
    ],
)
def test_what_goes_together_is_not_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    read_config(TrainConfig, config_file(tmp_path, **changes))


@pytest.mark.parametrize("changes", [{"loss": {"name": "tr_dpo"}}, {"loss": {"name": "mapo"}}])
def test_a_run_that_an_earlier_version_began_is_still_read(changes: dict[str, Any], tmp_path: Path) -> None:
    file = config_file(tmp_path, **changes)
    with pytest.raises(UserError, match="loss"):
        read_config(TrainConfig, file)
    name = changes["loss"]["name"]
    assert run_config(tmp_path).loss[0].name == name, "what evaluates a run reads it"
    assert not sees_by_run(str(tmp_path)), "what answers by its weights reads it"
    assert read_config(TrainConfig, file, ["resume=latest"]).loss[0].name == name


SCORED = {"prompt": "p", "chosen": "c", "rejected": "r", "chosen_score": 1.0}


def test_odpo_refuses_pairs_whose_chosen_answer_is_scored_below_the_other(tmp_path: Path) -> None:
    rows = [{**SCORED, "rejected_score": score} for score in (0.5, 2.0, 2.0)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"importer": {"name": "trl", "path": str(tmp_path / "rows.jsonl")}}

    def built(loss: str, **view: Any) -> Objective:
        changes = {"loss": loss, "data": {**data, "view": {"name": "pair", **view}}}
        config = read_config(TrainConfig, config_file(tmp_path, **changes))
        return build_objective(config, read_examples(config.data)[0])

    with pytest.raises(UserError, match=r"odpo: 2 of 3 examples \(first: .*rows\.jsonl:2\) .*margin: gap, or let"):
        built("odpo", with_scores=True)
    built("rpo", with_scores=True)  # whose margin may be below zero
    built("odpo", margin="gap")
    built("odpo", by="score", margin="gap")


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        (
            {"loss": [{"name": "dpo"}, {"name": "rationale"}]},
            {"rationale": "why"},
            r"rows\.jsonl:2: has no rationale, .* as 1 of 2 examples",
        ),
        ({"loss": "aot"}, {"prob": 0.8}, r"loss: the data have prob .* which aot would pass over"),
    ],
)
def test_what_some_rows_lack_or_bring_is_told_before_the_run(
    changes: dict[str, Any], more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    rows = [{"id": name, "prompt": name, "chosen": "c", "rejected": "r"} for name in "ab"]
    place = 0 if "rationale" in more else 1
    rows[place] = {**rows[place], **more}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"importer": {"name": "trl", "path": str(tmp_path / "rows.jsonl")}}
    config = read_config(TrainConfig, config_file(tmp_path, data=data, **changes))
    with pytest.raises(UserError, match=message):
        build_objective(config, read_examples(config.data)[0])


def test_the_name_that_another_library_has_for_a_loss_is_answered_with_ours(tmp_path: Path) -> None:
    for name, here in {"sigmoid": "dpo", "rdpo": "robust .*, or length_dpo .*", "js": "dpo with divergence: js"}.items():
        with pytest.raises(UserError, match=rf"got '{name}', want one of .*\. Here {name} is {here}\."):
            read_config(TrainConfig, config_file(tmp_path, loss={"name": name}))
    with pytest.raises(UserError, match=r"got 'Sigmoid', want one of .*\. Here Sigmoid is dpo\."):
        read_config(TrainConfig, config_file(tmp_path, loss="Sigmoid"))


@pytest.mark.parametrize("name", KNOWN_AS)
def test_what_is_written_for_the_name_of_another_library_is_read(name: str, tmp_path: Path) -> None:
    assert name not in LOSSES and name == name.lower()
    here = re.sub(r" \(.*?\)", "", KNOWN_AS[name])
    listed, _, note = here.partition(", a list of")
    several = [[{"name": one} for one in re.split(", | and ", listed)]] if note else []
    for choice in several or here.split(", or "):
        changes = {"loss": choice} if several else written(choice)
        told = read_config(TrainConfig, config_file(tmp_path, **changes)).loss
        assert [one.name for one in told] == [one["name"] for one in (choice if several else [changes["loss"]])]


def written(choice: str) -> dict[str, Any]:
    """A loss, and the setting that follows its name: `dpo with divergence: js`."""
    loss, _, setting = choice.partition(" with ")
    changes: dict[str, Any] = yaml.safe_load(setting) if setting else {}
    assert not setting or isinstance(changes, dict), f"{choice}: want a setting with its value"
    view = changes.pop("data.view", None)
    return {"loss": {"name": loss, **changes}, **(seen(view) if view else {})}


def test_gpo_on_scores_that_are_never_below_zero_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"prompt": "p", "completions": ["a", "b", "c"], "scores": [0.5, 0.0, -0.5]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    data = {"importer": {"name": "trl", "path": str(tmp_path / "rows.jsonl")}}
    for raw in (True, False):
        changes = {"loss": "gpo", "data": {**data, "view": {"name": "ranked", "raw_scores": raw}}}
        config = read_config(TrainConfig, config_file(tmp_path, **changes))
        build_objective(config, read_examples(config.data)[0])
        assert ("loss gpo: the scores of data.view ranked are 0 to 1" in caplog.text) is not raw


def test_what_a_pair_of_each_list_leaves_out_is_told(tmp_path: Path) -> None:
    row = {"prompt": "p", "chosen": "c", "rejected": ["r", "s"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    data = {"importer": {"name": "trl", "path": str(tmp_path / "rows.jsonl")}}

    def summary(**view: Any) -> str:
        config = read_config(TrainConfig, config_file(tmp_path, data={**data, "view": {"name": "pair", **view}}))
        return read_examples(config.data)[1]

    assert "1 examples; of more than 2 candidates the best and the worst alone" in summary()
    assert summary(pairs="best_vs_rest") == "1 rows: 2 examples"


@pytest.mark.parametrize("ties", ["drop", "soft"])
def test_what_stays_unused_of_several_best_answers_is_told(ties: str, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": chosen, "rejected": ["bad", "worse"]} for chosen in (["good", "fine"], "good")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    importer = {"name": "trl", "path": str(tmp_path / "rows.jsonl")}

    def read(pairs: str) -> tuple[set[str | None], str]:
        data = {"importer": importer, "view": {"name": "pair", "pairs": pairs, "ties": ties}}
        examples, told = read_examples(read_config(TrainConfig, config_file(tmp_path, data=data)).data)
        return {e.samples[0].completion.text for e in examples if e.side.get("prob") != 0.5}, told

    best, told = read("best_vs_rest")
    assert best == {"good"}
    assert told.endswith("examples; in 1 rows others are as good as the best, and above none (data.view.pairs: all)")
    every, told = read("all")
    assert every == {"good", "fine"} and told.endswith("examples")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"name": "simpo", "gamma": -1.0}, r"loss\.simpo\.gamma: got -1\.0, want zero or more"),
        ({"name": "dpo", "beta": math.inf}, r"loss\.dpo\.beta: got inf, want a finite number"),
        ([{"name": "dpo"}, {"name": "nll", "weight": -1.0}], r"loss\.nll\.weight: got -1\.0, want zero or more"),
    ],
)
def test_a_setting_that_turns_the_loss_round_is_told_with_the_config(tmp_path: Path, loss: Any, message: str) -> None:
    read_config(TrainConfig, config_file(tmp_path, loss=[{"name": "simpo"}, {"name": "nll", "weight": 0.0}]))
    with pytest.raises(UserError, match=message):
        read_config(TrainConfig, config_file(tmp_path, loss=loss))


def test_the_text_of_nll_tells_of_how_many_examples_the_mean_length_is() -> None:
    assert f"that of all examples, or of {SURVEYED} that are spread evenly over more" in inspect.getdoc(LOSSES["nll"])
