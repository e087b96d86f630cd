"""`mmalign generate` with a tiny model: rows that read back, seeds, restarts, and what is refused."""

import json
import shutil
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from runs import train
from tiny import IMAGE_SIZE, tiny_folder, tiny_pipeline

from mmalign.config import command_line
from mmalign.errors import UserError
from mmalign.generate import GenerateConfig, Generator, main, read_prompts
from mmalign.makers import bar_label
from mmalign.models.diffusion import Denoiser, add_lora, find_family, open_pipeline, save_lora, trainable_parameters
from mmalign.models.sampling import image_seed
from mmalign.records import comparison, read

PROMPTS = ("a red cube", "two dogs", "the sea")


def settings(output: Path, **changes: Any) -> GenerateConfig:
    plain = GenerateConfig(
        family="sd15",
        model=str(tiny_folder("sd15")),
        prompts=PROMPTS,
        num_candidates=2,
        steps=2,
        guidance_scale=3.0,
        device="cpu",
        output=output,
    )
    return replace(plain, **changes)


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted((folder / "media").iterdir())}


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("config.yaml", "environment.json")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_rows_read_back_as_comparisons_with_seeds_and_settings(tmp_path: Path) -> None:
    made = main(settings(tmp_path / "out"))
    assert (made.num_prompts, made.num_images) == (3, 6)
    rows = [comparison(row) for row in read(tmp_path / "out")]
    assert [row.prompt.text for row in rows] == list(PROMPTS)
    seeds = [entry["seed"] for row in rows for entry in row.provenance]
    assert seeds == [image_seed(0, index, number) for index in range(3) for number in range(2)]
    assert len(set(seeds)) == 6
    entry = rows[0].provenance[0]
    assert (entry["steps"], entry["guidance_scale"], entry["scheduler"]) == (2, 3.0, "PNDMScheduler")
    assert rows[0].candidates[0].images[0].open().size == (IMAGE_SIZE, IMAGE_SIZE)


def test_an_image_is_the_stock_pipelines_for_its_recorded_seed(tmp_path: Path) -> None:
    main(settings(tmp_path / "out", batch_size=1))
    row = comparison(read(tmp_path / "out")[1])
    pipe = open_pipeline("sd15", tiny_folder("sd15"))
    generator = torch.Generator().manual_seed(row.provenance[1]["seed"])
    image = pipe(PROMPTS[1], num_inference_steps=2, guidance_scale=3.0, generator=generator).images[0]
    assert np.array_equal(np.asarray(image), np.asarray(row.candidates[1].images[0].open()))


def test_images_do_not_depend_on_batch_size(tmp_path: Path) -> None:
    for batch_size in (1, 4):
        main(settings(tmp_path / str(batch_size), batch_size=batch_size))
    one, four = pixels(tmp_path / "1"), pixels(tmp_path / "4")
    assert list(one) == list(four)
    for name in one:
        assert np.abs(one[name] - four[name]).max() <= 1
    assert (tmp_path / "1" / "comparisons.jsonl").read_bytes() == (tmp_path / "4" / "comparisons.jsonl").read_bytes()
    assert len({image.tobytes() for image in one.values()}) == 6


@pytest.mark.parametrize("cut", [0, 1, 25])
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, cut: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    main(settings(whole, batch_size=1))
    main(settings(killed, batch_size=1))
    rows = killed / "comparisons.jsonl"
    lines = rows.read_bytes().splitlines(keepends=True)
    rows.write_bytes(lines[0] + lines[1][:cut])
    (killed / "media" / "000001-01.png").unlink()
    (killed / "media" / "000002-01.png").unlink()
    (killed / "media" / ".000001-01.png.partial").write_bytes(b"half")
    kept = killed / "media" / "000002-00.png"
    before = kept.stat().st_mtime_ns

    assert main(settings(killed, batch_size=1)).num_images == 2
    assert contents(killed) == contents(whole)
    assert kept.stat().st_mtime_ns == before


def test_a_finished_run_makes_nothing_and_a_higher_limit_makes_the_rest(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(settings(out, limit=2)).num_images == 4
    before = contents(out)
    assert main(settings(out, limit=2)).num_images == 0
    assert contents(out) == before
    assert main(settings(out, batch_size=1)).num_images == 2
    assert len(read(out)) == 3


def test_other_settings_in_the_same_folder_are_refused_by_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(settings(out, limit=1))
    before = contents(out)
    for changes, told in [
        ({"steps": 3}, "steps: was 2, is now 3"),
        ({"prompts": (*PROMPTS, "more")}, "prompts: was '3 prompts"),
        ({"seed": 1, "guidance_scale": 1.0}, "seed: was 0, is now 1; guidance_scale: was 3.0, is now 1.0"),
    ]:
        with pytest.raises(UserError, match=told):
            main(settings(out, **changes))
    assert contents(out) == before


def test_a_model_that_changed_at_the_same_path_is_refused(tmp_path: Path) -> None:
    model = tiny_pipeline("sd15", tmp_path / "model")
    config = settings(tmp_path / "out", model=str(model), limit=1)
    main(config)
    tiny_pipeline("sd15", model, seed=1)
    with pytest.raises(UserError, match="files of model: was"):
        main(config)


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds no generation\.json"):
        main(settings(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_lora_changes_the_images_by_its_scale(tmp_path: Path) -> None:
    pipe = open_pipeline("sd15", tiny_folder("sd15"))
    denoiser = Denoiser("sd15", pipe.unet)
    add_lora(denoiser, rank=2)
    with torch.no_grad():
        for parameter in trainable_parameters(denoiser):
            parameter.normal_(std=0.3)
    save_lora(find_family("sd15"), denoiser, tmp_path / "lora")
    folders = [tmp_path / name for name in ("base", "off", "half", "on")]
    main(settings(folders[0], limit=1))
    for folder, scale in zip(folders[1:], (0.0, 0.5, 1.0), strict=True):
        main(settings(folder, limit=1, lora=str(tmp_path / "lora"), lora_scale=scale))
    base, off, half, on = (pixels(folder)["000000-00.png"] for folder in folders)
    assert np.array_equal(base, off)
    assert np.abs(half - base).max() > 0
    assert np.abs(on - half).max() > 0
    (tmp_path / "lora" / "README.md").write_text("the run's card, written later")
    assert main(settings(folders[3], limit=1, lora=str(tmp_path / "lora"))).num_images == 0, "only the weights count"
    entry = comparison(read(folders[2])[0]).provenance[0]
    assert (entry["lora"], entry["lora_scale"]) == (str(tmp_path / "lora"), 0.5)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_half_precision_samples_as_the_stock_pipeline_does(tmp_path: Path, family: str) -> None:
    folder = tiny_folder(family)
    main(settings(tmp_path / "out", family=family, model=str(folder), dtype="bfloat16", limit=1, size=(32, 32)))
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    seeds = [torch.Generator().manual_seed(image_seed(0, 0, number)) for number in range(2)]
    stock = pipe([PROMPTS[0]] * 2, generator=seeds, num_inference_steps=2, guidance_scale=3.0, height=32, width=32).images
    for number, image in enumerate(stock):
        assert np.array_equal(pixels(tmp_path / "out")[f"000000-{number:02d}.png"], np.asarray(image).astype(int))


def test_the_sampler_and_the_size_can_be_chosen(tmp_path: Path) -> None:
    main(settings(tmp_path / "out", limit=1, scheduler="DDIMScheduler", size=(16, 40)))
    row = comparison(read(tmp_path / "out")[0])
    assert row.provenance[0]["scheduler"] == "DDIMScheduler"
    assert row.candidates[0].images[0].open().size == (40, 16)


def test_an_unknown_sampler_or_lora_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Did you mean DDIMScheduler\?"):
        main(settings(tmp_path / "a", scheduler="DDIMSchedular"))
    with pytest.raises(UserError, match="want a folder with pytorch_lora_weights"):
        main(settings(tmp_path / "b", lora=str(tmp_path)))
    pipe = open_pipeline("sdxl", tiny_folder("sdxl"))
    denoiser = Denoiser("sdxl", pipe.unet)
    add_lora(denoiser, rank=2)
    save_lora(find_family("sdxl"), denoiser, tmp_path / "sdxl")
    with pytest.raises(UserError, match=r"do not fit this model \(size mismatch for .*, the shape .* and \d+ more\)") as told:
        main(settings(tmp_path / "c", lora=str(tmp_path / "sdxl")))
    assert "\n" not in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["sdxl"], "nothing half-written"


def test_prompts_come_from_text_json_lines_or_a_list(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("ein Würfel\ntwo dogs\n", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text('{"prompt": "ein Würfel", "id": 3}\n"two dogs"\n', encoding="utf-8")
    wanted = ["ein Würfel", "two dogs"]
    assert read_prompts(str(tmp_path / "p.txt")) == read_prompts(str(tmp_path / "p.jsonl")) == read_prompts(wanted) == wanted


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("p.txt", "a\n \nb\n", r"p\.txt:2: got an empty prompt"),
        ("p.txt", "", r"p\.txt: got no prompts"),
        ("p.jsonl", '"a"\n{"prompt": 3}\n', r"p\.jsonl:2: got .*want"),
        ("p.jsonl", '"a"\n{"prompt": \n', r"p\.jsonl:2: got no valid JSON"),
        ("p.jsonl", '{"prompt": ""}\n', r"p\.jsonl:1: got an empty prompt"),
        ("p.csv", "a", r"want a \.txt or \.jsonl"),
    ],
)
def test_unusable_prompts_are_refused_with_file_and_line(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=told):
        main(settings(tmp_path / "out", prompts=str(tmp_path / name)))
    assert not (tmp_path / "out").exists(), "nothing half-written"
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(str(tmp_path / "absent.txt"))


def test_faults_of_the_settings_are_told_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["family=sd15", "model=x", "prompts=[a]", f"output={tmp_path / 'out'}"]
    for extra, told in [
        ("num_candidates=1", "num_candidates: got 1, want 2 or more"),
        ("size=[500, 512]", "size: got [500, 512], want multiples of 8"),
        ("stepz=3", "stepz: unknown key. Did you mean steps?"),
        ("dtype=fp16", "dtype: got 'fp16', want one of float32, float16, bfloat16"),
    ]:
        assert command_line(GenerateConfig, main, [*words, extra]) == 2
        assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_makes_images_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("a cat\n")
    words = ["--family", "sd15", "--model", str(tiny_folder("sd15")), "--prompts", str(tmp_path / "p.txt"), "--steps", "1"]
    words += ["--num-candidates=2", "--output", str(tmp_path / "out"), "device=cpu"]
    assert command_line(GenerateConfig, main, words) == 0
    assert str(tmp_path / "out" / "comparisons.jsonl") in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "comparisons.jsonl").read_text())["candidates"]) == 2


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("comparisons.jsonl", b"garbage\n", r"comparisons\.jsonl:1: got 'garbage'"),
        ("comparisons.jsonl", b"[1]\n", r"comparisons\.jsonl:1: got"),
        ("comparisons.jsonl", b"\xe9\n", r"comparisons\.jsonl:1: got"),
        ("generation.json", b"{half", r"generation\.json: got no valid JSON"),
        ("generation.json", b"\xe9", r"generation\.json: got no valid JSON"),
    ],
)
def test_a_file_of_the_folder_that_was_spoilt_is_named(tmp_path: Path, file: str, content: bytes, named: str) -> None:
    main(settings(tmp_path / "out", prompts=PROMPTS[:1], steps=1))
    (tmp_path / "out" / file).write_bytes(content)
    with pytest.raises(UserError, match=named):
        main(settings(tmp_path / "out", prompts=PROMPTS[:1], steps=1))
    assert (tmp_path / "out" / file).read_bytes() == content


@pytest.mark.parametrize("name", ["letter.txt", "letter.txt/below"])
def test_an_output_that_is_no_folder_is_refused_before_the_model_is_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / "letter.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"letter\.txt is a file"):
        main(settings(tmp_path / name, model=str(tmp_path / "no model")))


def test_prompts_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red cube\ntwo dogs", encoding="utf-8-sig")
    assert read_prompts(str(tmp_path / "prompts.txt")) == ["a red cube", "two dogs"]


def makers(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"family": None, "model": None, "generators": tuple(Generator(**entry) for entry in entries)}


SMALL = {"name": "small", "family": "sd15", "model": str(tiny_folder("sd15"))}
LARGE = {"name": "large", "family": "sdxl", "model": str(tiny_folder("sdxl")), "num_candidates": 1, "guidance_scale": 5.0}


def test_several_models_make_one_row_each_with_its_own_settings(tmp_path: Path) -> None:
    assert main(settings(tmp_path / "both", **makers(SMALL, LARGE))).num_images == 9
    main(settings(tmp_path / "small"))
    main(settings(tmp_path / "large", family="sdxl", model=LARGE["model"], num_candidates=3, guidance_scale=5.0, batch_size=1))
    both, small, large = (pixels(tmp_path / name) for name in ("both", "small", "large"))
    for index in range(3):
        for number in range(2):
            assert np.array_equal(both[f"{index:06d}-{number:02d}.png"], small[f"{index:06d}-{number:02d}.png"])
        assert np.abs(both[f"{index:06d}-02.png"] - large[f"{index:06d}-02.png"]).max() <= 1, "the seed of its number"
    row = comparison(read(tmp_path / "both")[0])
    assert [p["generator"] for p in row.provenance] == ["small", "small", "large"]
    assert [p["guidance_scale"] for p in row.provenance] == [3.0, 3.0, 5.0]
    assert len({p["seed"] for p in row.provenance}) == 3
    assert row.provenance[2]["scheduler"] == "EulerDiscreteScheduler"


def test_every_image_says_itself_how_it_was_made(tmp_path: Path) -> None:
    main(settings(tmp_path / "out", limit=1, size=(16, 40)))
    row = comparison(read(tmp_path / "out")[0])
    for candidate, origin in zip(row.candidates, row.provenance, strict=True):
        with Image.open(candidate.images[0].path or "") as image:
            assert json.loads(image.info["mmalign"]) == origin
            image.verify()  # the checksum of the chunk too
    entry = row.provenance[0]
    assert (entry["size"], entry["dtype"], entry["generator"]) == ([16, 40], "float32", str(tiny_folder("sd15")))
    assert entry["versions"] == {
        name: metadata.version(name) for name in ("mmalign", "torch", "diffusers", "transformers", "peft")
    }
    assert entry["files"]["model"] in (tmp_path / "out" / "generation.json").read_text()


def test_an_image_that_was_not_made_here_does_not_get_a_row(tmp_path: Path) -> None:
    main(settings(tmp_path / "out", limit=1))
    place = tmp_path / "out" / "media" / "000000-00.png"
    Image.open(place).copy().save(place)
    (tmp_path / "out" / "comparisons.jsonl").unlink()
    with pytest.raises(UserError, match=r"000000-00\.png: got an image that generate did not make"):
        main(settings(tmp_path / "out", limit=1))


@pytest.mark.parametrize("lost", [["000000-01.png"], ["000001-00.png", "000002-01.png"], ["000001-01.png", "000002-00.png"]])
def test_killed_within_a_batch_it_ends_byte_for_byte_as_if_never_stopped(tmp_path: Path, lost: list[str]) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        main(settings(folder, batch_size=4))
    (killed / "comparisons.jsonl").unlink()
    for name in lost:
        (killed / "media" / name).unlink()
    kept = {p.name: p.stat().st_mtime_ns for p in (killed / "media").iterdir()}
    assert main(settings(killed, batch_size=4)).num_images == len(lost)
    assert contents(killed) == contents(whole)
    assert {name: (killed / "media" / name).stat().st_mtime_ns for name in kept} == kept


def test_rows_that_are_lacking_are_written_from_the_images_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    main(settings(tmp_path / "out"))
    file = tmp_path / "out" / "comparisons.jsonl"
    rows = file.read_bytes()
    file.write_bytes(rows.splitlines(keepends=True)[1])
    assert main(settings(tmp_path / "out")).num_images == 0
    assert file.read_bytes() == rows


def test_other_settings_of_a_generator_are_refused_by_name_but_not_another_batch_size(tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(settings(out, limit=1, **makers(SMALL, LARGE)))
    assert main(settings(out, limit=1, **makers({**SMALL, "batch_size": 1}, LARGE))).num_images == 0
    with pytest.raises(UserError, match=r"generators\.large\.steps: was null, is now 3"):
        main(settings(out, limit=1, **makers(SMALL, {**LARGE, "steps": 3})))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"family": None}, "family: got none, want one"),
        (makers({"name": "a", "family": "sd15"}), "generators: a: model: got none"),
        (makers(SMALL, SMALL), "got the names small, small, want each once"),
        (makers({**SMALL, "num_candidates": 1}), "num_candidates: got 1, want 2 or more"),
        (makers(SMALL, {**LARGE, "steps": 0}), "generators: large: steps: got 0, want 1 or more"),
        (makers(SMALL, {**LARGE, "guidance_scale": -3}), r"generators: large: guidance_scale: got -3, want 0 or more"),
        (makers(SMALL, {**LARGE, "size": (12, 16)}), r"generators: large: size: got \[12, 16\]"),
    ],
)
def test_generators_that_cannot_be_are_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        settings(tmp_path / "out", **changes)


def test_a_fault_of_the_second_model_is_told_before_the_first_image(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model"):
        main(settings(tmp_path / "out", **makers(SMALL, {**LARGE, "model": str(tmp_path / "no model")})))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def runs_with_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA and a full fine-tune of two steps, with a checkpoint of each step."""
    folder = tmp_path_factory.mktemp("runs")
    training = {"checkpoint_every": 1, "keep_checkpoints": 2, "optimiser": {"name": "adamw", "learning_rate": 1e-2}}
    return {name: train(folder / name, training=training, adapter={"lora": lora}) for name, lora in LORAS.items()}


LORAS: dict[str, Any] = {"lora": {"rank": 2}, "full": None}


@pytest.mark.parametrize("kind", LORAS)
def test_checkpoints_are_sampled_by_their_path(tmp_path: Path, runs_with_checkpoints: dict[str, Path], kind: str) -> None:
    run = runs_with_checkpoints[kind]
    places = {f"checkpoint-{step}": run / f"checkpoint-{step}" for step in (1, 2)}
    places["result"] = run / "pipeline" if kind == "full" else run
    for name, place in places.items():
        changes = {"model": str(place)} if kind == "full" else {"lora": str(place)}
        main(settings(tmp_path / name, limit=1, **changes))
    first, last, result = (pixels(tmp_path / name)["000000-00.png"] for name in places)
    assert np.array_equal(last, result)
    assert not np.array_equal(first, last)


def test_a_checkpoint_of_the_other_kind_or_without_its_run_is_refused(
    tmp_path: Path, runs_with_checkpoints: dict[str, Path]
) -> None:
    lora, full = (runs_with_checkpoints[kind] / "checkpoint-1" for kind in ("lora", "full"))
    with pytest.raises(UserError, match=r"which holds a LoRA only\. Name it as lora"):
        main(settings(tmp_path / "a", model=str(lora)))
    with pytest.raises(UserError, match=r"which holds all weights\. Name it as model"):
        main(settings(tmp_path / "b", lora=str(full)))
    shutil.copytree(lora, tmp_path / "alone" / "checkpoint-1")
    with pytest.raises(UserError, match=r"want the checkpoint in the folder of its run"):
        main(settings(tmp_path / "c", lora=str(tmp_path / "alone" / "checkpoint-1")))
    (tmp_path / "alone" / "checkpoint-1" / "trainer_state.json").unlink()
    with pytest.raises(UserError, match="got an incomplete checkpoint"):
        main(settings(tmp_path / "d", lora=str(tmp_path / "alone" / "checkpoint-1")))
    assert [path.name for path in tmp_path.iterdir()] == ["alone"], "nothing half-written"


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("/home/me/.cache/mmalign/tiny/sd15-1f0c", "sd15-1f0c"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "stable-diffusion-xl-base-1.0"),
        ("/x/hub/models--Qwen--Qwen2.5-3B/snapshots/0123456789abcdef", "Qwen2.5-3B"),
        ("runs/tuned/", "tuned"),
        ("m" * 40, "m" * 27 + "..."),
    ],
)
def test_a_progress_bar_is_labelled_with_the_models_own_name(name: str, label: str) -> None:
    assert bar_label(name) == label
