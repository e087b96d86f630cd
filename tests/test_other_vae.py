"""adapter.vae: another autoencoder encodes, decodes and is saved; one that does not fit is refused."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from runs import config_of, final_weights, train, tree
from test_step_reward import LATENT
from test_step_reward import opened as step_reward
from tiny import tiny_folder, tiny_pipeline

from mmalign import makers
from mmalign.errors import UserError
from mmalign.experiment import read_examples
from mmalign.generate import GenerateConfig
from mmalign.prepare import main as prepare


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A VAE of the tiny pipeline's shape with weights of its own."""
    pipeline = tiny_pipeline("sd15", tmp_path / "other", seed=7)
    vae = diffusers.AutoencoderKL.from_pretrained(pipeline / "vae")
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def opened(tmp_path: Path, **adapter: Any) -> Any:
    return config_of(tree(tmp_path / "out", adapter=adapter)).adapter.build().open()


def weight_of(vae: Any) -> torch.Tensor:
    return vae.decoder.conv_in.weight


def test_the_vae_of_a_folder_encodes_and_decodes(tmp_path: Path, other: Path) -> None:
    policy, plain = opened(tmp_path, vae=str(other)), opened(tmp_path)
    wanted = diffusers.AutoencoderKL.from_pretrained(other)
    assert torch.equal(weight_of(policy.pipe.vae), weight_of(wanted))
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean = policy.encoding.encode(pixels)["mean"]
    with torch.no_grad():
        moments = wanted.encode(pixels.float() / 127.5 - 1).latent_dist.mean
    torch.testing.assert_close(mean, moments * wanted.config.scaling_factor)
    assert not torch.allclose(mean, plain.encoding.encode(pixels)["mean"], atol=1e-3)
    assert not torch.allclose(policy.decode(mean), plain.decode(mean), atol=1e-3)
    assert not any(parameter.requires_grad for parameter in policy.pipe.vae.parameters())


def test_a_pipeline_folder_stands_for_its_vae(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sd15", tmp_path / "other", seed=7)
    policy = opened(tmp_path, vae=str(pipeline))
    assert torch.equal(weight_of(policy.pipe.vae), weight_of(diffusers.AutoencoderKL.from_pretrained(pipeline / "vae")))


def test_a_vae_that_forbids_half_precision_is_kept_in_float32_and_one_that_does_not_is_not(tmp_path: Path) -> None:
    for forbids, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        changes = {"vae": {"force_upcast": forbids}}
        pipeline = tiny_pipeline("sd15", tmp_path / f"other-{forbids}", **changes)
        assert opened(tmp_path, vae=str(pipeline), dtype="bfloat16").pipe.vae.dtype == dtype


def test_the_step_reward_adapter_takes_one_too(tmp_path: Path, other: Path) -> None:
    policy, _ = step_reward(tmp_path, LATENT, vae=str(other))
    wanted = diffusers.AutoencoderKL.from_pretrained(other)
    assert torch.equal(weight_of(policy.images.pipe.vae), weight_of(wanted))


def test_a_cache_that_another_vae_filled_is_refused(tmp_path: Path, other: Path) -> None:
    cache = str(tmp_path / "cache")
    prepare(config_of(tree(tmp_path / "out", adapter={"cache": cache})))
    with pytest.raises(UserError, match="vae"):
        opened(tmp_path, cache=cache, vae=str(other))
    filled = str(tmp_path / "other-cache")
    config = config_of(tree(tmp_path / "out", adapter={"cache": filled, "vae": str(other)}))
    prepare(config)
    policy, examples = config.adapter.build().open(), read_examples(config.data)[0]
    fresh = opened(tmp_path, vae=str(other))
    for one, reader in ((policy, policy), (fresh, fresh)):
        inputs = one.prepare(reader.collate([reader.item(examples[0], 0)])).inputs
        assert torch.isfinite(inputs.noisy).all()
    cached, online = (one.prepare(one.collate([one.item(examples[0], 0)])).inputs.noisy for one in (policy, fresh))
    torch.testing.assert_close(cached, online)


def test_a_full_fine_tune_is_saved_with_it_and_the_run_records_it(tmp_path: Path, other: Path) -> None:
    output = train(tmp_path / "run", adapter={"lora": None, "vae": str(other)}, training={"steps": 1})
    saved = diffusers.StableDiffusionPipeline.from_pretrained(output / "pipeline", safety_checker=None)
    assert torch.equal(weight_of(saved.vae), weight_of(diffusers.AutoencoderKL.from_pretrained(other)))
    assert final_weights(output)
    assert f"vae: {other}" in (output / "config.yaml").read_text()


def test_a_lora_is_sampled_with_the_vae_of_its_run_and_the_rows_tell_it(tmp_path: Path, other: Path) -> None:
    output = train(
        tmp_path / "run", adapter={"lora": {"rank": 2}, "vae": str(other)}, training={"steps": 1, "checkpoint_every": 1}
    )
    made = GenerateConfig(
        family="sd15", model=str(tiny_folder("sd15")), lora=str(output), prompts=("a",), device="cpu", output=tmp_path / "out"
    )
    wanted = weight_of(diffusers.AutoencoderKL.from_pretrained(other))
    for place in (output, output / "checkpoint-1", output / "pytorch_lora_weights.safetensors"):
        (maker,) = replace(made, lora=str(place)).makers
        pipe = makers.opened(maker)
        assert torch.equal(weight_of(pipe.vae), wanted)
        assert makers.provenance_of(maker, pipe, {})["files"]["vae"] == makers.fingerprint(other)
    moved = shutil.copytree(output, tmp_path / "moved", ignore=shutil.ignore_patterns("config.yaml"))
    (plain,) = replace(made, lora=str(moved)).makers
    pipe = makers.opened(plain)
    assert not torch.equal(weight_of(pipe.vae), wanted)
    assert "vae" not in makers.provenance_of(plain, pipe, {})["files"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"latent_channels": 8}, "8 latent channels at 1/4 of the sides, want 4 at 1/4"),
        (
            {
                "block_out_channels": (8, 8),
                "down_block_types": ("DownEncoderBlock2D",) * 2,
                "up_block_types": ("UpDecoderBlock2D",) * 2,
            },
            "4 latent channels at 1/2 of the sides, want 4 at 1/4",
        ),
    ],
)
def test_a_vae_of_other_latents_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    own = diffusers.AutoencoderKL.from_pretrained(tiny_folder("sd15") / "vae").config
    config = {name: value for name, value in own.items() if not name.startswith("_")}
    diffusers.AutoencoderKL.from_config({**config, **changes}).save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match=told):
        opened(tmp_path, vae=str(tmp_path / "vae"))


def test_a_vae_of_another_class_and_an_absent_one_are_refused(tmp_path: Path) -> None:
    diffusers.AutoencoderTiny(latent_channels=4).save_pretrained(tmp_path / "tiny")
    with pytest.raises(UserError, match="which is a AutoencoderTiny, want a AutoencoderKL"):
        opened(tmp_path, vae=str(tmp_path / "tiny"))
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        with pytest.raises(UserError, match=rf"adapter\.vae: got .*{name}, which diffusers cannot load") as told:
            opened(tmp_path, vae=str(tmp_path / name))
        assert "\n" not in str(told.value)


def test_a_vae_of_another_scale_is_taken_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = tiny_pipeline("sd15", tmp_path / "other", vae={"scaling_factor": 0.5})
    with caplog.at_level(logging.WARNING):
        opened(tmp_path, vae=str(pipeline))
    assert "scaling_factor 0.5" in caplog.text
