from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import subprocess
import sys

import pytest

import mmalign
from mmalign.cli import VERBS, main

SLOW = ("torch", "numpy", "pydantic", "diffusers", "transformers", "datasets", "accelerate", "peft", "gradio", "PIL")


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_every_verb(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: mmalign VERB")
    for verb, (_, _, line) in VERBS.items():
        assert verb in out
        assert line in out


def test_help_loads_nothing_slow() -> None:
    program = (
        f"import sys\nfrom mmalign.cli import main\nmain(['--help'])\nsys.exit(str([m for m in {SLOW} if m in sys.modules]))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stderr.strip() == "[]"


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["doctor"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_who_has_seen_enough_is_no_fault(words: list[str], unbuffered: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    told = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    run = subprocess.run([sys.executable, "-m", "mmalign", *words], stdout=writing, stderr=subprocess.PIPE, text=True, env=told)
    os.close(writing)
    assert run.returncode == 0 and "BrokenPipe" not in run.stderr


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mmalign {mmalign.__version__}\n"


@pytest.mark.parametrize(("wrong", "right"), [("trian", "train"), ("validate_data", "validate-data"), ("doktor", "doctor")])
def test_an_unknown_verb_is_answered_with_the_nearest(wrong: str, right: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([wrong]) == 2
    captured = capsys.readouterr()
    assert f"got {wrong!r}, want one of" in captured.err
    assert captured.err.endswith(f"Did you mean {right}?\n")
    assert captured.out == ""


def test_the_package_runs_as_a_module() -> None:
    run = subprocess.run([sys.executable, "-m", "mmalign", "nonsense"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "got 'nonsense'" in run.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_main_and_a_frozen_config(verb: str) -> None:
    module_name, class_name, _ = VERBS[verb]
    module = importlib.import_module(module_name)
    cls = getattr(module, class_name)
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    assert all(one.kw_only for one in dataclasses.fields(cls))
    assert list(inspect.signature(module.main).parameters) == ["config"]
    assert module.main.__doc__


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: mmalign {verb} ")


def test_a_verb_gets_its_settings_and_tells_its_faults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--jsn"]) == 2
    assert capsys.readouterr().err == "command line: jsn: unknown key. Did you mean json?\n"
