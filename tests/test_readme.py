"""What README.md shows is run: its Python blocks, its whole turn, the commands of its table."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from mmalign.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def clone(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache-home"))
    return tmp_path


@pytest.mark.parametrize("code", blocks("python"), ids=range(len(blocks("python"))))
def test_python_block_runs(code: str) -> None:
    exec(code, {"__name__": "readme"})


def test_the_loss_shown_trains_by_its_address(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (block for block in blocks("python") if "def exponential" in block)
    package = clone / "your_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "losses.py").write_text(code)
    monkeypatch.syspath_prepend(str(clone))
    overrides = ["loss.name=your_package.losses:exponential", "loss.beta=500", "training.steps=1"]
    assert main(["train", "configs/smoke_dpo_sd15.yaml", *overrides]) == 0


def test_the_whole_turn_runs_line_by_line(clone: Path) -> None:
    (turn,) = (block for block in blocks("bash") if "mmalign evaluate" in block)
    for line in turn.strip().splitlines():
        program, *arguments = shlex.split(line)
        assert program == "mmalign"
        assert main(arguments) == 0, line
    assert (clone / "runs" / "ring" / "report" / "report.html").exists()


def commands_of_the_table() -> list[str]:
    return re.findall(r"\| `(mmalign train [^`]+)` \|", README)


@pytest.mark.parametrize("command", commands_of_the_table())
def test_command_of_the_table_has_a_plan(command: str, clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*shlex.split(command)[1:], "--dry-run"]) == 0
    assert "examples of" in capsys.readouterr().out


def test_every_loss_and_file_that_is_named_is_there() -> None:
    from mmalign.losses import LOSSES

    assert all(f"`{name}`" in README for name in LOSSES)
    for name in re.findall(r"`((?:configs/)?[\w/]+\.yaml)`", README):
        assert (ROOT / name).exists() or (ROOT / "configs" / name).exists(), name


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script: Any = (ROOT / ".ci" / "run").read_text()
    assert "grep -m 1 'pytest' README.md" in script
    (first,) = [line for line in README.splitlines() if "pytest" in line][:1]
    assert first.startswith("python3 -m venv .venv && .venv/bin/pip install")
    assert len(README.splitlines()) < 200
