"""Every shipped config is read and says what it must; every smoke config trains into weights that stock diffusers loads."""

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mmalign.config import read_config, resolved
from mmalign.experiment import TrainConfig
from mmalign.families import FAMILIES, Family
from mmalign.language.tiny import tiny_folder as text_folder
from mmalign.models.tiny import tiny_folder
from mmalign.multimodal.tiny import tiny_folder as seeing_folder
from mmalign.train import main

CONFIGS = Path(__file__).parents[1] / "configs"


def _adapter(path: Path) -> str:
    return str(yaml.safe_load(path.read_text())["adapter"]["name"])


TRAINING = sorted(path for path in CONFIGS.glob("*.yaml"))
# Reward models make nothing themselves: tests/test_step_reward.py and the like train and load those.
SMOKE = {
    adapter: [path for path in TRAINING if path.name.startswith("smoke_") and _adapter(path) == adapter]
    for adapter in ("diffusion", "text", "image_text")
}


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache-home")


@pytest.mark.parametrize("path", TRAINING, ids=lambda p: p.stem)
def test_config_is_read_and_opens_with_method_command_and_hardware_or_scope(path: Path) -> None:
    config = read_config(TrainConfig, path)
    head = path.read_text().split("output:")[0]
    assert "mmalign" in head
    assert ("arXiv" in head and "Hardware" in head) if not path.name.startswith("smoke_") else "Smoke run" in head
    assert read_config(TrainConfig, None, _as_overrides(resolved(config))) == config


@pytest.mark.parametrize("path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_config_is_one_that_the_installed_accelerate_reads(path: Path) -> None:
    load = importlib.import_module("accelerate.commands.config.config_args").load_config_from_file
    assert load(str(path)).num_processes == yaml.safe_load(path.read_text())["num_processes"]


@pytest.mark.parametrize("path", SMOKE["diffusion"], ids=lambda p: p.stem)
def test_smoke_config_trains_and_its_weights_load_in_stock_diffusers(
    path: Path, tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
    monkeypatch.chdir(CONFIGS.parent)
    result = main(read_config(TrainConfig, path, [f"output={tmp_path / 'run'}"]))
    losses = [yaml.safe_load(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)
    family = FAMILIES[yaml.safe_load(path.read_text())["adapter"]["family"]]
    base = f'pipe = diffusers.{family.pipeline}.from_pretrained("{tiny_folder(family.name)}")'
    before = _image(family, _stock_pipeline([base]))
    after = _image(family, _stock_pipeline(result.loading.splitlines()))
    assert after.shape[-3:] == (32, 32, 3)
    assert not np.array_equal(before, after)


@pytest.mark.parametrize("path", SMOKE["text"], ids=lambda p: p.stem)
def test_smoke_config_of_texts_trains_and_its_weights_load_in_stock_transformers(
    path: Path, tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
    monkeypatch.chdir(CONFIGS.parent)
    result = main(read_config(TrainConfig, path, [f"output={tmp_path / 'run'}"]))
    losses = [yaml.safe_load(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)
    names: dict[str, Any] = {"transformers": importlib.import_module("transformers")}
    exec(result.loading, names)  # the very lines that the run prints
    base = names["transformers"].AutoModelForCausalLM.from_pretrained(text_folder())
    ids = names["tokenizer"](["a word"], return_tensors="pt")
    with torch.no_grad():
        difference = (names["model"](**ids).logits - base(**ids).logits).abs().max()
    assert difference > 1e-4


@pytest.mark.parametrize("path", SMOKE["image_text"], ids=lambda p: p.stem)
def test_smoke_config_of_images_and_texts_trains_and_its_weights_load_in_stock_transformers(
    path: Path, tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
    monkeypatch.chdir(CONFIGS.parent)
    config = read_config(TrainConfig, path, [f"output={tmp_path / 'run'}"])
    result = main(config)
    losses = [yaml.safe_load(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)
    names: dict[str, Any] = {"transformers": importlib.import_module("transformers")}
    exec(result.loading, names)  # the very lines that the run prints
    tiny = config.adapter.settings["tiny"]
    base = names["transformers"].AutoModelForImageTextToText.from_pretrained(seeing_folder(tiny))
    red = Image.new("RGB", (32, 32), "red")
    inputs = names["processor"](text=["<image>\nwhat?"], images=[[red]], return_tensors="pt")
    with torch.no_grad():
        difference = (names["model"](**inputs).logits - base(**inputs).logits).abs().max()
    assert difference > 1e-4


def _stock_pipeline(lines: list[str]) -> Any:
    names: dict[str, Any] = {"diffusers": importlib.import_module("diffusers")}
    exec("\n".join(lines), names)  # the very lines that the run prints
    names["pipe"].set_progress_bar_config(disable=True)
    return names["pipe"]


def _image(family: Family, pipe: Any) -> np.ndarray[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    length = {} if family.frame_multiple is None else {"num_frames": 1 + family.frame_multiple}
    options = {"height": 32, "width": 32, "num_inference_steps": 2, **length, **family.call_options(1.0, None, 1)}
    source = {"image": [Image.new("RGB", (32, 32), "white")]} if family.edits else {}
    return np.array(getattr(pipe(prompt=["a red disc"], generator=generator, **source, **options), family.output)[0])


def _as_overrides(values: dict[str, Any]) -> list[str]:
    return [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in values.items()]
