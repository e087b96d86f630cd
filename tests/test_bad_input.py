"""Bad input to `mmalign train`: one clear message with place and remedy, exit code 2; odd images that must work."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs import (
    SIZES,
    comparison_of,
    encoded,
    final_weights,
    forget_accelerate,
    preference_data,
    train,
    tree,
    write_config,
    write_rows,
)

from mmalign import cli

Row = dict[str, Any]


def run(folder: Path, values: dict[str, Any], *words: str) -> int:
    forget_accelerate()
    return cli.main(["train", str(write_config(folder / "config.yaml", values)), *words])


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown_key": ({"loss": {"name": "dpo", "betta": 5}}, r"config\.yaml: loss\.betta: unknown key\. Did you mean beta\?"),
    "unknown_loss": ({"loss": "dpoo"}, r"loss.*: got 'dpoo', want one of .* Did you mean dpo\?"),
    "wrong_type": ({"training": {"batch_size": "two"}}, r"training\.batch_size: got \W*two.*want"),
    "missing_key": ({"training": {"optimiser": {"name": "adamw"}}}, r"training\.optimiser\.learning_rate: missing"),
    "no_length": ({"training": {"steps": None}}, r"steps, epochs: got both or neither, want exactly one"),
    "negative": ({"training": {"accumulation": 0}}, r"training.*accumulation: got 0, want a positive number"),
    "missing_data": (
        {"data": {"importer": {"name": "comparisons", "path": "absent.parquet"}}},
        r"absent\.parquet: got no such",
    ),
    "resolution": ({"adapter": {"resolution": 33}}, r"adapter.*resolution: got 33, want multiples of 8"),
    "family": ({"adapter": {"family": "sdxl"}}, r"sd15.*sdxl|sdxl.*sd15"),
    "unknown_family": ({"adapter": {"family": "sd14"}}, r"family.*sd14.*sd15"),
    "no_model": ({"adapter": {"model": "/absent/model"}}, r"/absent/model"),
    "scores": ({"loss": "rank_dpo"}, r"loss\.rank_dpo: needs the data scores.*data\.view \(ranked"),
    "labels": ({"loss": "kto"}, r"loss\.kto: needs the data labels.*unpaired"),
    "wanted": ({"source": {"name": "offline", "wanted": 0.8}}, r"source\.wanted: got 0\.8, and examples without labels"),
    "wanted_percent": (
        {"source": {"name": "offline", "wanted": 80}},
        r"source\.wanted: got 80\.0, want a share between 0 and 1",
    ),
    "candidates": ({"data": {"view": "best"}}, r"loss\.dpo: got 1 candidates a prompt, want 2"),
    "cache": ({"adapter": {"cache": "absent_cache"}}, r"absent_cache.*got no cache, want one\. Run `mmalign prepare`"),
    "crop": ({"adapter": {"cache": "c", "crop": "random"}}, r"crop: got random with a cache.*Use crop: center"),
    "guard": ({"adapter": {"winner_guard": {"mu": 2}}}, r"adapter\.winner_guard\.mu: got 2\.0, want .* 0 to 1"),
    "rank_0": ({"adapter": {"lora": {"rank": 0}}}, r"adapter\.lora\.rank: got 0, want 1 or more, or lora: null"),
    "alpha_0": ({"adapter": {"lora": {"alpha": 0}}}, r"adapter\.lora\.alpha: got 0\.0, want a positive number"),
    "no_targets": ({"adapter": {"lora": {"targets": []}}}, r"adapter\.lora\.targets: got an empty list, want"),
    "dropout_1": ({"adapter": {"lora": {"dropout": 1}}}, r"adapter\.lora\.dropout: got 1\.0, want a share from 0"),
    "uphill": ({"training": {"optimiser": {"learning_rate": -1e-3}}}, r"optimiser\.learning_rate: got -0\.001, want a finite"),
    "no_rate": ({"training": {"optimiser": {"learning_rate": float("inf")}}}, r"optimiser\.learning_rate: got inf, want"),
    "betas": ({"training": {"optimiser": {"betas": [0.9, 1.0]}}}, r"optimiser\.betas: got \[0\.9, 1\.0\], want numbers from 0"),
    "ema": ({"training": {"ema_decay": 1.5}}, r"ema_decay: got 1\.5, want a number between 0 and 1"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_faulty_config_is_told_with_place_and_remedy_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    changes, message = CONFIGS[name]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(tmp_path, tree(tmp_path / "out", **changes)) == 2
    told = capsys.readouterr().err
    assert re.search(message, told), told
    assert "Traceback" not in told
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "here").iterdir())


def test_all_faults_of_a_config_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = tree(tmp_path / "out", loss={"name": "dpo", "betta": 5}, training={"batch_size": "two"}, outptu="x")
    assert run(tmp_path, values, "sed=3") == 2
    told = capsys.readouterr().err
    for fault in (r"loss\.betta", r"training\.batch_size", r"outptu: unknown key", r"command line: sed: unknown key"):
        assert re.search(fault, told), told


def test_a_safeguard_for_pairs_is_refused_for_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"adapter": {"winner_guard": {"mu": 0.9}}, "loss": "rank_dpo", "data": {"view": "ranked"}}
    assert run(tmp_path, tree(tmp_path / "out", rows=preference_data(4, 4), **changes)) == 2
    assert re.search(r"adapter\.winner_guard: got 4 candidates, want pairs", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def jsonl(folder: Path, *rows: Row) -> Path:
    for name, size in (("a.png", (32, 32)), ("b.png", (40, 32))):
        (folder / name).write_bytes(encoded(*size, seed=0))
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


GOOD: Row = {"prompt": "a cat", "candidates": [{"image": "a.png"}, {"image": "b.png"}], "ranks": [1, 2]}
ROWS: dict[str, tuple[Row, str]] = {
    "one_image": ({**GOOD, "candidates": [{"image": "a.png"}], "ranks": [1]}, r"got 1 candidate, want at least 2"),
    "empty_prompt": ({**GOOD, "prompt": " "}, r"got an empty prompt, want a text\. Write one or remove the row"),
    "label_out_of_range": ({**GOOD, "ranks": None, "prob": 1.5}, r"got prob 1\.5, want a probability from 0 to 1"),
    "missing_image": ({**GOOD, "candidates": [{"image": "a.png"}, {"image": "absent.png"}]}, r"absent\.png is missing"),
    "unknown_key": ({**GOOD, "rank": [1, 2]}, r"got the unknown key rank\. Did you mean ranks\?"),
    "not_finite": ({**GOOD, "ranks": [1, float("nan")]}, r"got ranks .*want finite numbers"),
    "number_of_ranks": ({**GOOD, "ranks": [1, 2, 3]}, r"got 3 ranks for 2 candidates"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_faulty_row_is_told_with_file_and_row_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    row, message = ROWS[name]
    assert run(tmp_path, tree(tmp_path / "out", rows=jsonl(tmp_path, GOOD, row, GOOD))) == 2
    told = capsys.readouterr().err
    assert re.search(rf"pairs\.jsonl:2: .*{message}", told), told
    assert "Traceback" not in told
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_image_is_told_without_what_only_python_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = jsonl(tmp_path, GOOD)
    (tmp_path / "b.png").write_bytes(b"no image")
    assert run(tmp_path, tree(tmp_path / "out", rows=rows)) == 2
    told = capsys.readouterr().err
    assert re.search(r"pairs\.jsonl:1: candidate 2 \(.*b\.png\): got a damaged image \(of no known format\), want", told), told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_truncated_image_stops_the_run_with_its_row_and_leaves_nothing_half_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], num_workers: int
) -> None:
    rows = [comparison_of(n, [encoded(32, 32, n), encoded(32, 32, 50 + n)[: 400 if n == 2 else None]]) for n in range(4)]
    data = write_rows(rows, tmp_path / "data.parquet")
    values = tree(tmp_path / "out", rows=data, source={"name": "offline", "num_workers": num_workers})
    assert run(tmp_path, values, "training.steps=9") == 2
    told = capsys.readouterr().err
    assert re.search(r"data\.parquet:3.*candidate 2.*got a damaged image .*Replace it or remove the row", told), told
    assert "Traceback" not in told
    assert not (tmp_path / "out").exists()
    # Beyond the images that are checked at the start, the run stops where it meets the damaged one.
    assert run(tmp_path, values, "training.steps=9", "data.check_images=0") == 2
    assert re.search(r"data\.parquet:3.*candidate 2.*got a damaged image", capsys.readouterr().err)
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_view_whose_examples_differ_in_size_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [comparison_of(n, [encoded(32, 32, 10 * n + i) for i in range(2 + n % 2)]) for n in range(4)]
    changes = {"loss": "rank_dpo", "data": {"view": "ranked"}, "training": {"batch_size": 4}}
    assert run(tmp_path, tree(tmp_path / "out", rows=write_rows(rows, tmp_path / "data.parquet"), **changes)) == 2
    assert re.search(r"data\.parquet:2: 3\. Set data\.view\.num_candidates", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_run_is_neither_overwritten_nor_resumed_as_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = tree(tmp_path / "out", training={"checkpoint_every": 1})
    assert run(tmp_path, values) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert run(tmp_path, values) == 2
    assert run(tmp_path, values, "resume=latest", "loss.beta=7") == 2
    told = capsys.readouterr().err
    assert re.search(r"output: .* holds a run already.*resume=latest.*overwrite=true", told)
    assert re.search(r"is of another run.*beta: was 500.*is now 7", told)
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def sixteen_bit(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 65536, (36, 40), dtype=np.uint16)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


ODD = {
    "cmyk": lambda seed: encoded(40, 36, seed, "CMYK", "JPEG"),
    "sixteen_bit": sixteen_bit,
    "greyscale": lambda seed: encoded(40, 36, seed, "L"),
    "rgba": lambda seed: encoded(40, 36, seed, "RGBA"),
    "palette": lambda seed: encoded(40, 36, seed, "P"),
    "mixed_sizes": lambda seed: encoded(*SIZES[seed % 3], seed),
    "tiny": lambda seed: encoded(3, 2, seed),
}


@pytest.mark.parametrize("kind", ODD)
def test_images_of_every_kind_and_size_train(tmp_path: Path, kind: str) -> None:
    rows = [comparison_of(n, [ODD[kind](2 * n), encoded(32, 32, 99 + n)]) for n in range(4)]
    output = train(tmp_path / "out", rows=write_rows(rows, tmp_path / "data.parquet"))
    assert all(value.isfinite().all() for value in final_weights(output).values())
