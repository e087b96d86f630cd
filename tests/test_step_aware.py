"""The step-aware preference model: the published numbers, the equality with its CLIP, and its folder."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_losses_golden import golden
from torch import Tensor, nn

from mmalign.errors import UserError
from mmalign.models.step_aware import (
    ClipInputs,
    StepAwareCLIP,
    modulated_block,
    modulated_pooling,
    open_step_aware,
    save_step_aware,
    sinusoid,
)

PROMPTS = ["a red ball", "two cats"]


@pytest.fixture(scope="module")
def opened() -> tuple[StepAwareCLIP, ClipInputs]:
    return open_step_aware("tiny")


@pytest.fixture(scope="module")
def clip_folder(opened: tuple[StepAwareCLIP, ClipInputs], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    opened[0].clip.save_pretrained(folder)
    opened[1].processor.save_pretrained(folder)
    return folder


def pixels_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def disturbed(model: StepAwareCLIP) -> StepAwareCLIP:
    """The same model after some training, as far as its time goes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for modulation in (*model.modulations, model.final_modulation):
            modulation.weight.add_(torch.randn(modulation.weight.shape, generator=generator))
    return model


# The published numbers


def golden_part(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in golden("spm_block").items() if name.startswith(prefix)}


def test_block_and_pooled_output_repeat_the_published_numbers() -> None:
    from transformers import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    arrays = golden("spm_block")
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2, hidden_act="gelu")
    config._attn_implementation = "eager"
    layer, modulation = CLIPEncoderLayer(config).double(), nn.Linear(16, 96).double()
    weights = golden_part("w_layer.")
    modulation.load_state_dict({name: weights.pop(f"adaLN_modulation.1.{name}") for name in ("weight", "bias")})
    layer.load_state_dict(weights)
    condition = nn.functional.silu(arrays["time_cond"])
    output = modulated_block(layer, arrays["hidden_in"], modulation(condition))
    torch.testing.assert_close(output, arrays["layer_out"], rtol=1e-6, atol=1e-6)

    norm, final = nn.LayerNorm(16, eps=config.layer_norm_eps).double(), nn.Linear(16, 32).double()
    norm.load_state_dict({"weight": arrays["final_ln_weight"], "bias": arrays["final_ln_bias"]})
    final.load_state_dict({"weight": arrays["final_adaln_weight"], "bias": arrays["final_adaln_bias"]})
    pooled = modulated_pooling(norm, arrays["layer_out"], final(condition))
    torch.testing.assert_close(pooled, arrays["pooled_out"], rtol=1e-6, atol=1e-6)


def test_time_embedding_repeats_the_published_numbers() -> None:
    arrays = golden("spm_block")
    waves = sinusoid(arrays["timesteps"])
    torch.testing.assert_close(waves.double(), arrays["sinusoid"], rtol=0, atol=1e-4)  # float32 angles up to 951
    model = open_step_aware("tiny")[0].double()
    model.time_embedding.load_state_dict(golden_part("w_temb.mlp."))
    torch.testing.assert_close(model.embed_time(arrays["timesteps"]), arrays["time_cond"], rtol=0, atol=1e-4)


def test_nearby_timesteps_stay_apart_in_bfloat16() -> None:
    waves = sinusoid(torch.tensor([751, 752]))
    assert waves.dtype == torch.float32
    model = disturbed(open_step_aware("tiny")[0]).bfloat16()
    embedded = model.embed_time(torch.tensor([751, 752]))
    assert embedded.dtype == torch.bfloat16
    assert not torch.equal(embedded[0], embedded[1])


# The equality with its CLIP


@pytest.mark.parametrize("timestep", [0, 1, 401, 999])
def test_before_training_it_is_its_clip_exactly_at_every_timestep(
    opened: tuple[StepAwareCLIP, ClipInputs], timestep: int
) -> None:
    model, inputs = opened
    images = inputs.pixels(pixels_of(4, 3, 20, 24), resize="shortest")
    tokens = inputs.tokens(PROMPTS)
    with torch.no_grad():
        assert torch.equal(
            model.image_features(images, torch.full((4,), timestep)), model.clip.get_image_features(images).pooler_output
        )
        scores = model(images.view(2, 2, *images.shape[1:]), torch.full((2, 2), timestep), tokens)
        expected = model.clip(input_ids=tokens, pixel_values=images).logits_per_image
    for row in range(2):
        torch.testing.assert_close(scores[row], expected[2 * row : 2 * row + 2, row], rtol=1e-6, atol=1e-6)


def test_the_constructor_never_leaves_the_published_bias_of_all_ones(opened: tuple[StepAwareCLIP, ClipInputs]) -> None:
    trap = golden("spm_block")["class_init_adaln_bias"]
    assert (trap == 1).all()
    for modulation in opened[0].modulations:
        assert modulation.bias.shape == trap.shape
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.bias.chunk(6)
        assert (gate_1 == 1).all() and (gate_2 == 1).all()
        assert all((part == 0).all() for part in (shift_1, scale_1, shift_2, scale_2, modulation.weight))
    assert (opened[0].final_modulation.bias == 0).all() and (opened[0].final_modulation.weight == 0).all()


def test_the_first_time_weights_are_small_and_come_from_the_seed() -> None:
    first, same, other = (open_step_aware("tiny", seed=seed)[0].time_embedding[0].weight for seed in (3, 3, 4))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert 0.019 < float(first.detach().std()) < 0.021


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_part_that_can_know_the_time_gets_a_gradient(checkpointing: bool) -> None:
    model, inputs = open_step_aware("tiny")
    model.requires_grad_(True).train()
    model.gradient_checkpointing = checkpointing
    images = inputs.pixels(pixels_of(4, 3, 16, 16), resize="squash").view(2, 2, 3, 16, 16)
    scores = model(images, torch.tensor([[3, 3], [800, 800]]), inputs.tokens(PROMPTS))
    (scores[:, 0] - scores[:, 1]).sum().backward()
    for modulation in (*model.modulations, model.final_modulation):
        assert float(modulation.weight.grad.abs().max()) > 0
    assert float(model.clip.text_projection.weight.grad.abs().max()) > 0
    assert float(model.clip.vision_model.embeddings.patch_embedding.weight.grad.abs().max()) > 0


def test_after_training_the_score_depends_on_the_timestep_of_each_image_alone() -> None:
    model, inputs = open_step_aware("tiny")
    disturbed(model)
    images = inputs.pixels(pixels_of(1, 3, 16, 16).expand(3, -1, -1, -1), resize="squash")[None]
    with torch.no_grad():
        scores = model(images, torch.tensor([[10, 900, 10]]), inputs.tokens(PROMPTS[:1]))[0]
    torch.testing.assert_close(scores[0], scores[2])
    assert abs(float(scores[0] - scores[1])) > 1e-3


# What it reads


def test_a_square_is_resized_the_same_in_training_and_scoring_and_an_oblong_is_not(
    opened: tuple[StepAwareCLIP, ClipInputs],
) -> None:
    inputs = opened[1]
    square, oblong = pixels_of(1, 3, 40, 40), pixels_of(1, 3, 20, 40)
    assert torch.equal(inputs.pixels(square, resize="squash"), inputs.pixels(square, resize="shortest"))
    squashed, cropped = inputs.pixels(oblong, resize="squash"), inputs.pixels(oblong, resize="shortest")
    assert squashed.shape == cropped.shape == (1, 3, 16, 16)
    assert not torch.allclose(squashed, cropped, atol=0.1)
    middle = nn.functional.interpolate(oblong, (16, 32), mode="bicubic", align_corners=False).clamp(0, 1)[..., 8:24]
    mean, std = (torch.tensor(getattr(inputs.processor.image_processor, name)) for name in ("image_mean", "image_std"))
    torch.testing.assert_close(cropped, (middle - mean[:, None, None]) / std[:, None, None])


def test_bicubic_overshoot_is_cut_before_normalising(opened: tuple[StepAwareCLIP, ClipInputs]) -> None:
    edge = torch.zeros(1, 3, 12, 12)
    edge[..., 6:] = 1.0
    ours = opened[1].pixels(edge, resize="squash")
    black, white = (opened[1].pixels(torch.full((1, 3, 16, 16), value), resize="squash") for value in (0.0, 1.0))
    assert (ours >= black).all() and (ours <= white).all()


# Its folder


def test_a_saved_model_is_read_back_to_the_last_bit(tmp_path: Path) -> None:
    model, inputs = open_step_aware("tiny")
    folder = save_step_aware(disturbed(model), inputs, tmp_path / "model")
    again, read = open_step_aware(str(folder))
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert torch.equal(read.tokens(PROMPTS), inputs.tokens(PROMPTS))
    image = pixels_of(2, 3, 21, 30)
    assert torch.equal(read.pixels(image, resize="shortest"), inputs.pixels(image, resize="shortest"))
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_it_starts_from_any_clip_folder(clip_folder: Path) -> None:
    model, inputs = open_step_aware(str(clip_folder))
    image = inputs.pixels(pixels_of(1, 3, 16, 16), resize="squash")
    plain = open_step_aware("tiny")[0].clip.get_image_features(image).pooler_output
    torch.testing.assert_close(model.image_features(image, torch.tensor([500])), plain, rtol=0, atol=1e-6)


def published_names(model: StepAwareCLIP) -> dict[str, Tensor]:
    """The model's weights under the names of the authors' checkpoint files."""

    def name(key: str) -> str:
        head, _, rest = key.partition(".")
        if head == "modulations":
            number, _, leaf = rest.partition(".")
            return f"model.vision_model.encoder.layers.{number}.adaLN_modulation.1.{leaf}"
        prefix = {"final_modulation": "vision_model.adaLN_modulation.1", "time_embedding": "t_embedder.mlp"}
        return f"model.{prefix[head]}.{rest}" if head in prefix else f"model.{rest}"

    return {name(key): value for key, value in model.state_dict().items()}


def test_the_authors_checkpoint_is_read(tmp_path: Path, clip_folder: Path) -> None:
    trained = disturbed(open_step_aware("tiny")[0])
    weights = published_names(trained)
    weights["model.text_model.embeddings.position_ids"] = torch.arange(16)[None]
    torch.save(weights, tmp_path / "final_ckpt.bin")
    model, _ = open_step_aware(str(clip_folder), published=str(tmp_path / "final_ckpt.bin"))
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in model.state_dict().items())
    del weights["model.vision_model.encoder.layers.1.adaLN_modulation.1.bias"]
    torch.save(weights, tmp_path / "cut.bin")
    with pytest.raises(UserError, match=r"published: got a checkpoint with keys 1 missing: modulations\.1\.bias"):
        open_step_aware(str(clip_folder), published=str(tmp_path / "cut.bin"))


def test_a_damaged_folder_is_refused_with_its_fault(tmp_path: Path) -> None:
    model, inputs = open_step_aware("tiny")
    folder = save_step_aware(model, inputs, tmp_path / "model")
    weights: dict[str, Any] = load_file(folder / "model.safetensors")
    del weights["clip.logit_scale"]
    weights["more"] = torch.zeros(1)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"1 missing: clip\.logit_scale; 1 unexpected: more"):
        open_step_aware(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"want model\.safetensors in it"):
        open_step_aware(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not readable as JSON"):
        open_step_aware(str(folder))
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"clip: got .*want a folder or hub id with a CLIP model"):
        open_step_aware(str(folder))
