"""The training noise schedule of a pipeline, read from its sampler."""

import inspect
import math
from typing import Any

from mmalign.errors import UserError
from mmalign.models.latents import spatial_factor
from mmalign.noise import Schedule, flow_schedule, vp_schedule


def schedule_of(pipe: Any, size: tuple[int, int] | None = None) -> Schedule:
    """The training noise schedule that the pipeline's sampler was made for.

    Variance preserving: read from the scheduler's config through diffusers' DDPMScheduler: betas, prediction type,
    zero-terminal SNR. Rectified flow: T and shift; where the shift depends on the resolution (FLUX, Qwen-Image), it is the one
    that the pipeline samples this size with.
    Args:
        size: (height, width) in pixels, for shifts that depend on it.
    Raises:
        UserError: a sampler with neither betas nor flow sigmas (EDM), or a shift that depends on a size that is not given.
    """
    from diffusers import DDPMScheduler

    config = pipe.scheduler.config
    if is_flow(pipe):
        return flow_schedule(num_timesteps=config.num_train_timesteps, shift=_shift(pipe, size))
    if config.get("beta_schedule") is None and config.get("trained_betas") is None:
        got = type(pipe.scheduler).__name__
        raise UserError(f"scheduler: got {got}, which has no betas, want one of a variance-preserving model (DDIM ...).")
    known = inspect.signature(DDPMScheduler.__init__).parameters
    scheduler = DDPMScheduler.from_config({name: value for name, value in config.items() if name in known})
    return vp_schedule(alphas_cumprod=scheduler.alphas_cumprod, prediction=scheduler.config.prediction_type)


def is_flow(pipe: Any) -> bool:
    """Whether the pipeline's sampler is one of rectified flow."""
    config = pipe.scheduler.config
    return (
        type(pipe.scheduler).__name__.startswith("FlowMatch")
        or bool(config.get("use_flow_sigmas"))
        or config.get("prediction_type") == "flow_prediction"
    )


def _shift(pipe: Any, size: tuple[int, int] | None) -> float:
    config = pipe.scheduler.config
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift") or config.get("flow_shift") or 1.0)
    if size is None:
        raise UserError("scheduler: its shift depends on the resolution, which is not given. Set adapter.resolution.")
    tokens = math.prod(side // (2 * spatial_factor(pipe)) for side in size)
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = base + (most - base) * (tokens - low) / (high - low)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
