"""How much memory a diffusion training step needs: an arithmetic of parameter counts and options, in GB of 2^30 bytes.

Source: parameter counts from the public configs; activations counted with saved-tensor hooks in bf16 with fused attention
(SD 1.5, SDXL, SD3, FLUX.1; PixArt and SANA block by block). What is scaled from those, not counted, is said where it stands.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Literal

from mmalign.errors import UserError

GB = 2**30
# State per trained weight. adafactor, counted on the UNets' shapes: 2.1 for SD 1.5 (its 3 x 3 kernels hardly factor), 0.4
# for SDXL; the larger stands here.
OPTIMISER_BYTES: Mapping[str, float] = MappingProxyType({"adamw": 8, "adamw_8bit": 2, "adafactor": 2.1})


@dataclass(frozen=True, kw_only=True)
class Size:
    """A family at its native resolution: weights by part, and GB of activations per image (half a pair) in bf16."""

    denoiser: int
    encoders: int
    lora_per_rank: int
    latent_side: int
    full: float
    full_checkpointed: float
    lora: float
    lora_checkpointed: float


def _sd(denoiser: int, encoders: int, lora_per_rank: int, latent_side: int) -> Size:
    """SD 1.x and 2.x: counted for full tuning of SD 1.5 at 64 x 64; LoRA by SDXL's ratio; sides by latent area."""
    area = (latent_side / 64) ** 2
    full, checkpointed = 1.7 / 2 * area, 0.29 / 2 * area
    return Size(
        denoiser=denoiser,
        encoders=encoders,
        lora_per_rank=lora_per_rank,
        latent_side=latent_side,
        full=full,
        full_checkpointed=checkpointed,
        lora=full * 14.5 / 12.8,
        lora_checkpointed=checkpointed * 0.91 / 1.1,
    )


def _pixart(denoiser: int, lora_per_rank: int) -> Size:
    """PixArt at 1024 px with the T5-XXL encoder and 300 tokens, which alpha cuts to 120."""
    return Size(
        denoiser=denoiser,
        encoders=83_653_863 + 4_762_310_656,
        lora_per_rank=lora_per_rank,
        latent_side=128,
        full=5.74,
        full_checkpointed=0.28,
        lora=6.79,
        lora_checkpointed=0.28,
    )


_VAE_16 = 83_819_683  # with 16 channels
_T5_XXL = 4_762_310_656


def _sd3(denoiser: int, lora_per_rank: int, *activations: float) -> Size:
    """SD3 and SD 3.5 at 1024 px with both CLIPs and T5; activations full, with checkpointing, LoRA, with checkpointing."""
    full, full_checkpointed, lora, lora_checkpointed = activations
    return Size(
        denoiser=denoiser,
        encoders=_VAE_16 + 123_650_304 + 694_659_840 + _T5_XXL,
        lora_per_rank=lora_per_rank,
        latent_side=128,
        full=full,
        full_checkpointed=full_checkpointed,
        lora=lora,
        lora_checkpointed=lora_checkpointed,
    )


SIZES: Mapping[str, Size] = MappingProxyType(
    {
        "sd15": _sd(859_520_964, 83_653_863 + 123_060_480, 199_296, 64),
        "sd2": _sd(865_910_724, 83_653_863 + 340_387_840, 207_488, 96),
        "sdxl": Size(
            denoiser=2_567_463_684,
            encoders=83_653_863 + 123_060_480 + 694_659_840,
            lora_per_rank=1_451_520,
            latent_side=128,
            full=12.8 / 2,
            full_checkpointed=1.1 / 2,
            lora=14.5 / 2,
            lora_checkpointed=0.91 / 2,
        ),
        "sd3": _sd3(2_028_328_000, 586_752, 6.42, 0.343, 5.49, 0.317),
        "sd3.5-medium": _sd3(2_243_171_520, 586_752, 11.18, 0.343, 8.76, 0.317),
        "sd3.5-large": _sd3(8_056_627_520, 1_473_792, 22.22, 0.822, 18.38, 0.782),
        "flux": Size(
            denoiser=11_901_408_320,
            encoders=_VAE_16 + 123_060_480 + _T5_XXL,
            lora_per_rank=2_801_664,
            latent_side=128,
            full=39.73,
            full_checkpointed=1.58,
            lora=35.18,
            lora_checkpointed=1.53,
        ),
        "pixart_alpha": _pixart(611_349_152, 863_152),
        "pixart_sigma": _pixart(610_856_096, 860_336),
        "sana": Size(
            denoiser=1_604_462_752,
            encoders=312_250_275 + 2_614_341_888,
            lora_per_rank=537_600,
            latent_side=32,
            full=3.33,
            full_checkpointed=0.11,
            lora=3.11,
            lora_checkpointed=0.09,
        ),
    }
)


# Families whose models differ in size; every other family is one entry of SIZES, by its own name.
MODELS: Mapping[str, tuple[str, ...]] = MappingProxyType({"sd3": ("sd3", "sd3.5-medium", "sd3.5-large")})


def known_size(family: str, num_parameters: int) -> str | None:
    """The entry of SIZES for a family's network of so many weights, within 5 %; None for one that was not counted."""
    entries = [name for name in MODELS.get(family, (family,)) if name in SIZES]
    return next((name for name in entries if abs(num_parameters / SIZES[name].denoiser - 1) < 0.05), None)


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """GB by purpose.

    Not counted: the CUDA context and workspace (about 1 GB), fragmentation, validation images, the second half of a VAE
    kept in float32 (0.2 GB), and under checkpointing the one block that is being recomputed, which grows with the batch:
    many pairs need more than this says.
    """

    weights: float
    gradients: float
    optimiser: float
    autocast: float
    reference: float
    encoders: float
    ema: float
    activations: float

    @property
    def total(self) -> float:
        """The sum, in GB."""
        return float(sum(asdict(self).values()))

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {gigabytes:.2f}" for name, gigabytes in asdict(self).items() if gigabytes >= 0.005)
        return f"about {self.total:.2f} GB ({parts or 'all parts below 0.01'})"


def memory_estimate(
    *,
    num_parameters: int,
    num_trained: int,
    num_samples: int,
    activations_per_sample: float,
    num_encoder_parameters: int = 0,
    precision: Literal["no", "bf16", "fp16"] = "bf16",
    optimiser: str = "adamw",
    reference_copy: bool = False,
    ema: bool = False,
) -> MemoryEstimate:
    """Memory of one optimiser step.

    trained weights: 4 bytes + 4 gradient + state of the optimiser, and in half precision 2 of the copy that autocast
    makes for the forward and the graph keeps for the backward pass; reference copy: 4, as the weights it was taken from;
    frozen weights and encoders: 2 bytes in half precision, else 4. SD 1.5 full with AdamW: 859.5 M * 16 bytes = 12.8 GB
    without the autocast copy. SDXL LoRA: 4.8 GB + 0.2 GB.

    Args:
        num_parameters: weights of the denoiser, LoRA not included.
        num_trained: weights that get gradients: equal to num_parameters for full tuning, otherwise the LoRA's.
        num_samples: images in one backward pass: pairs * 2, or one per pair where candidates go one at a time.
        activations_per_sample: GB in bf16, from `activations`; float32 doubles it.
        num_encoder_parameters: VAE and text encoders kept on the device; 0 with a prepared cache.
        precision: of the autocast, as in the train config.
        optimiser: a name in OPTIMISER_BYTES.
        reference_copy: whether a frozen copy of the denoiser is kept (full tuning without cached reference errors).
        ema: whether an average of the trained weights is kept.
    Raises:
        UserError: unknown optimiser.
    """
    if optimiser not in OPTIMISER_BYTES:
        raise UserError(f"memory estimate: got optimiser {optimiser!r}, want one of {', '.join(OPTIMISER_BYTES)}.")
    frozen_bytes = 4 if precision == "no" else 2
    num_frozen = 0 if num_trained == num_parameters else num_parameters
    return MemoryEstimate(
        weights=(4 * num_trained + frozen_bytes * num_frozen) / GB,
        gradients=4 * num_trained / GB,
        optimiser=OPTIMISER_BYTES[optimiser] * num_trained / GB,
        autocast=(0 if precision == "no" else 2) * num_trained / GB,
        reference=4 * num_parameters / GB if reference_copy else 0.0,
        encoders=frozen_bytes * num_encoder_parameters / GB,
        ema=4 * num_trained / GB if ema else 0.0,
        activations=num_samples * activations_per_sample * (2 if precision == "no" else 1),
    )


def activations(family: str, *, lora: bool, checkpointing: bool, latent_side: float | None = None) -> float:
    """GB of activations per image in bf16; grows with the latent's area (None: the family's native side).

    Raises:
        UserError: a family whose activations were not counted.
    """
    if family not in SIZES:
        raise UserError(f"memory estimate: got family {family!r}, want one of {', '.join(SIZES)}.")
    size = SIZES[family]
    by_options = {
        (False, False): size.full,
        (False, True): size.full_checkpointed,
        (True, False): size.lora,
        (True, True): size.lora_checkpointed,
    }
    return by_options[lora, checkpointing] * ((latent_side or size.latent_side) / size.latent_side) ** 2


def family_estimate(
    family: str,
    *,
    lora_rank: int | None,
    checkpointing: bool,
    pairs: int,
    precision: Literal["no", "bf16", "fp16"] = "bf16",
    optimiser: str = "adamw",
    cached: bool = False,
) -> MemoryEstimate:
    """The estimate for a stock model of a family, at its native resolution.

    Args:
        lora_rank: None for full tuning.
        pairs: in one backward pass.
        cached: latents, text embeddings and reference errors are prepared: no encoders, no reference copy.
    Raises:
        UserError: unknown family or optimiser.
    """
    per_sample = activations(family, lora=lora_rank is not None, checkpointing=checkpointing)
    size = SIZES[family]
    return memory_estimate(
        num_parameters=size.denoiser,
        num_trained=size.denoiser if lora_rank is None else lora_rank * size.lora_per_rank,
        num_samples=2 * pairs,
        activations_per_sample=per_sample,
        num_encoder_parameters=0 if cached else size.encoders,
        precision=precision,
        optimiser=optimiser,
        reference_copy=lora_rank is None and not cached,
    )
