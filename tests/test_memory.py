import pytest
import torch

from mmalign.errors import UserError
from mmalign.families import FAMILIES
from mmalign.memory import SIZES, activations, family_estimate, known_size, memory_estimate


def test_full_tuning_of_sd15_repeats_the_published_floor() -> None:
    estimate = family_estimate("sd15", lora_rank=None, checkpointing=False, pairs=1, cached=True)
    assert estimate.weights + estimate.gradients + estimate.optimiser == pytest.approx(12.8, abs=0.05)
    assert estimate.activations == pytest.approx(1.7)
    assert estimate.reference == 0


def test_full_tuning_of_sdxl_repeats_the_published_floor() -> None:
    estimate = family_estimate("sdxl", lora_rank=None, checkpointing=True, pairs=2)
    assert estimate.weights + estimate.gradients + estimate.optimiser == pytest.approx(38.3, abs=0.05)
    assert estimate.reference == pytest.approx(9.6, abs=0.05), "float32, as the weights it is a copy of"
    assert estimate.autocast == pytest.approx(4.8, abs=0.05)
    assert estimate.encoders == pytest.approx(1.7, abs=0.05)
    assert estimate.activations == pytest.approx(2.2)


def test_lora_of_sdxl_is_its_base_and_a_little() -> None:
    estimate = family_estimate("sdxl", lora_rank=8, checkpointing=False, pairs=1, cached=True)
    assert estimate.weights + estimate.gradients + estimate.optimiser == pytest.approx(4.8 + 0.2, abs=0.05)
    assert estimate.reference == 0
    assert estimate.total == pytest.approx(4.95 + 14.5, abs=0.05)


def test_lora_of_sd3_and_flux_is_their_base_and_t5_unless_cached() -> None:
    medium, large, flux = (
        family_estimate(name, lora_rank=16, checkpointing=True, pairs=1) for name in ("sd3", "sd3.5-large", "flux")
    )
    assert medium.weights == pytest.approx(2 * 2.028e9 / 2**30, abs=0.05)
    assert large.weights == pytest.approx(2 * 8.057e9 / 2**30, abs=0.1)
    assert flux.weights == pytest.approx(2 * 11.9e9 / 2**30, abs=0.2)
    assert medium.encoders == pytest.approx(10.5, abs=0.1), "mostly T5"
    assert family_estimate("flux", lora_rank=16, checkpointing=True, pairs=1, cached=True).total < 28


def test_the_number_of_weights_tells_the_models_of_a_family_apart() -> None:
    assert known_size("sd3", 2_028_328_000) == "sd3"
    assert known_size("sd3", 2_243_171_520) == "sd3.5-medium"
    assert known_size("sd3", 8_056_627_520) == "sd3.5-large"
    assert known_size("flux", 11_891_178_560) == "flux", "schnell has no guidance embedding"
    assert known_size("sd3", 4_000_000_000) is None
    assert known_size("sd15", 10_000) is None
    assert known_size("yours", 859_520_964) is None


def published_networks() -> dict[str, torch.nn.Module]:
    """SD3, SD 3.5 and FLUX.1 dev with the numbers of their public configs, without memory."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    medium = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
    large = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
    second = {"dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"}
    with torch.device("meta"):
        return {
            "sd3": SD3Transformer2DModel(**medium, pos_embed_max_size=192),
            "sd3.5-medium": SD3Transformer2DModel(**medium, **second, pos_embed_max_size=384),
            "sd3.5-large": SD3Transformer2DModel(**large, qk_norm="rms_norm", pos_embed_max_size=192),
            "flux": FluxTransformer2DModel(guidance_embeds=True),
        }


def test_counts_of_sd3_and_flux_are_those_of_their_published_configs() -> None:
    for name, network in published_networks().items():
        assert sum(parameter.numel() for parameter in network.parameters()) == SIZES[name].denoiser
        targets = FAMILIES["flux" if name == "flux" else "sd3"].lora_targets
        layers = [m for n, m in network.named_modules() if n.endswith(tuple(f".{target}" for target in targets))]
        assert sum(layer.in_features + layer.out_features for layer in layers) == SIZES[name].lora_per_rank


def test_the_parts_by_hand() -> None:
    giga = 2**30
    estimate = memory_estimate(
        num_parameters=3 * giga,
        num_trained=giga,
        num_samples=4,
        activations_per_sample=0.5,
        num_encoder_parameters=giga,
        precision="no",
        optimiser="adamw_8bit",
        reference_copy=True,
        ema=True,
    )
    parts = (estimate.weights, estimate.gradients, estimate.optimiser, estimate.reference, estimate.encoders)
    assert parts == (4 + 12, 4, 2, 12, 4)
    assert (estimate.ema, estimate.activations, estimate.total) == (4, 4, 46)
    assert str(estimate).startswith("about 46.00 GB (weights 16.00, gradients 4.00")


def test_half_precision_keeps_a_float32_reference_and_adds_the_copies_of_autocast() -> None:
    full, half = (
        memory_estimate(
            num_parameters=2**30, num_trained=2**30, num_samples=0, activations_per_sample=0, precision=p, reference_copy=True
        )
        for p in ("no", "bf16")
    )
    assert (full.reference, half.reference) == (4, 4)
    assert (full.autocast, half.autocast) == (0, 2)


def test_autocast_keeps_a_half_precision_copy_of_trained_weights_for_the_backward_pass() -> None:
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.bfloat16 and tensor.shape[-1] != 3:
            kept.append(tensor.numel())
        return tensor

    network = torch.nn.Sequential(torch.nn.Linear(3, 5, bias=False), torch.nn.Linear(5, 7, bias=False))
    pixels = torch.ones(1, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        network(pixels)
    assert 5 * 7 in kept


@pytest.mark.parametrize("family", SIZES)
def test_activations_grow_with_the_area_and_shrink_under_checkpointing(family: str) -> None:
    side = SIZES[family].latent_side
    native = activations(family, lora=True, checkpointing=False)
    assert activations(family, lora=True, checkpointing=False, latent_side=2 * side) == pytest.approx(4 * native)
    assert activations(family, lora=True, checkpointing=True) < native / 4


def test_unknown_families_and_optimisers_are_refused() -> None:
    with pytest.raises(UserError, match="got family 'sd9', want one of sd15, sd2, sdxl"):
        activations("sd9", lora=True, checkpointing=True)
    with pytest.raises(UserError, match="got optimiser 'sgd', want one of adamw, adamw_8bit, adafactor"):
        family_estimate("sd15", lora_rank=4, checkpointing=True, pairs=1, optimiser="sgd")
