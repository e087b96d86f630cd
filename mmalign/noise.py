"""Noise schedules: variance-preserving diffusion (epsilon, v or sample prediction) and rectified flow.

A timestep is an index `0 ... T-1`, the larger the noisier, in every schedule. Symbols, used in every formula of this file:

    x_t = alpha_t * clean + sigma_t * noise
    variance preserving: alpha^2 + sigma^2 = 1;  rectified flow: alpha = 1 - sigma
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One stochastic sampler step: x_previous ~ Normal(sample_weight * x_t + output_weight * network output, std)."""

    sample_weight: Float[Tensor, "*shape"]
    output_weight: Float[Tensor, "*shape"]
    std: Float[Tensor, "*shape"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How clean data becomes noise, and what the network predicts. Build one with `vp_schedule` or `flow_schedule`.

    Args:
        alpha, sigma: weight of data and of noise at each timestep, noisier upwards.
        network_timesteps: the value that the network is given at each timestep.
        prediction: epsilon: noise; v_prediction: alpha noise - sigma clean; sample: clean; flow: noise - clean.
    """

    alpha: Float[Tensor, " timesteps"]
    sigma: Float[Tensor, " timesteps"]
    network_timesteps: Float[Tensor, " timesteps"] | Int[Tensor, " timesteps"]
    prediction: Prediction

    @property
    def num_timesteps(self) -> int:
        """T, the number of timesteps."""
        return len(self.alpha)

    def coefficients(
        self, timestep: Int[Tensor, "*shape"], like: Float[Tensor, "..."]
    ) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """alpha and sigma at `timestep`, shaped to multiply `like`, in its dtype and on its device."""
        return _gather(self.alpha, timestep, like), _gather(self.sigma, timestep, like)

    def add_noise(
        self, clean: Float[Tensor, "*shape"], noise: Float[Tensor, "*shape"], timestep: Int[Tensor, "..."]
    ) -> Float[Tensor, "*shape"]:
        """x_t of clean data under this noise; `timestep` has the leading axes of `clean`."""
        alpha, sigma = self.coefficients(timestep, clean)
        return alpha * clean + sigma * noise

    def target(
        self, clean: Float[Tensor, "*shape"], noise: Float[Tensor, "*shape"], timestep: Int[Tensor, "..."]
    ) -> Float[Tensor, "*shape"]:
        """What the network should say about x_t."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return clean
        if self.prediction == "flow":
            return noise - clean
        alpha, sigma = self.coefficients(timestep, clean)
        return alpha * noise - sigma * clean

    def clean(
        self, noisy: Float[Tensor, "*shape"], output: Float[Tensor, "*shape"], timestep: Int[Tensor, "..."]
    ) -> Float[Tensor, "*shape"]:
        """The clean data that x_t and a network output imply (x0-hat). Infinite for epsilon prediction at alpha = 0."""
        sample_weight, output_weight = self._clean_weights(*self.coefficients(timestep, noisy))
        return sample_weight * noisy + output_weight * output

    def epsilon(
        self, noisy: Float[Tensor, "*shape"], output: Float[Tensor, "*shape"], timestep: Int[Tensor, "..."]
    ) -> Float[Tensor, "*shape"]:
        """The noise that x_t and a network output imply."""
        sample_weight, output_weight = self._epsilon_weights(*self.coefficients(timestep, noisy))
        return sample_weight * noisy + output_weight * output

    def snr(self, timestep: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Signal-to-noise ratio alpha^2 / sigma^2."""
        alpha, sigma = self.alpha.to(timestep.device)[timestep], self.sigma.to(timestep.device)[timestep]
        return (alpha / sigma) ** 2

    def network_timestep(self, timestep: Int[Tensor, "*shape"]) -> Tensor:
        """The value that the network is given for these timesteps."""
        return self.network_timesteps.to(timestep.device)[timestep]

    def step(self, timestep: Int[Tensor, "*shape"], previous: Int[Tensor, "*shape"], *, eta: float = 1.0) -> Step:
        """One DDIM step from `timestep` to the less noisy `previous`, as weights on x_t and on the network output.

        std^2 = eta^2 (1 - a_p) / (1 - a_t) (1 - a_t / a_p),  a = alpha^2
        mean = sqrt(a_p) x0-hat + sqrt(1 - a_p - std^2) epsilon-hat

        Source: Song et al. 2020 (DDIM), eq. 12 and 16.
        Raises:
            ValueError: for rectified flow, whose sampler is not DDIM.
        """
        if self.prediction == "flow":
            raise ValueError(
                "step: got a rectified-flow schedule, want a variance-preserving one; DDIM is not defined for flow."
            )
        alpha, sigma = self.alpha.to(timestep.device)[timestep], self.sigma.to(timestep.device)[timestep]
        alpha_previous = self.alpha.to(previous.device)[previous]
        variance_previous = self.sigma.to(previous.device)[previous] ** 2
        std = eta * (variance_previous / sigma**2 * (1 - (alpha / alpha_previous) ** 2)).sqrt()  # eq. 16
        direction = (variance_previous - std**2).clamp(min=0).sqrt()
        clean_sample, clean_output = self._clean_weights(alpha, sigma)
        noise_sample, noise_output = self._epsilon_weights(alpha, sigma)
        return Step(
            sample_weight=alpha_previous * clean_sample + direction * noise_sample,  # eq. 12
            output_weight=alpha_previous * clean_output + direction * noise_output,
            std=std,
        )

    def sde_step(self, timestep: Int[Tensor, "*shape"], previous: Int[Tensor, "*shape"], *, noise_level: float = 0.7) -> Step:
        """One stochastic step of rectified flow from `timestep` to the less noisy `previous`.

        s = noise_level sqrt(sigma / (1 - sigma));  d = sigma_previous - sigma < 0;  std = s sqrt(-d)
        mean = x (1 + s^2 d / (2 sigma)) + v d (1 + s^2 (1 - sigma) / (2 sigma))

        Source: Liu et al. 2025 (Flow-GRPO, arXiv 2505.05470), eq. 9, published noise_level 0.7; at sigma 1 the published
            code puts sigma_previous into the denominator of s.
        Raises:
            ValueError: for a variance-preserving schedule, whose stochastic step is `step`.
        """
        if self.prediction != "flow":
            raise ValueError(f"sde_step: got a schedule of {self.prediction} prediction, want rectified flow; use step.")
        sigma, after = self.sigma.to(timestep.device)[timestep], self.sigma.to(previous.device)[previous]
        d = after - sigma
        squared = noise_level**2 * sigma / (1 - torch.where(sigma >= 1, after, sigma))
        return Step(
            sample_weight=1 + squared * d / (2 * sigma),
            output_weight=d * (1 + squared * (1 - sigma) / (2 * sigma)),
            std=(squared * -d).sqrt(),
        )

    def index_of(self, network_timestep: Tensor) -> Int[Tensor, "*shape"]:
        """The timestep for which the network is given this value; the inverse of `network_timestep`."""
        values = self.network_timesteps.to(network_timestep)
        return torch.searchsorted(values, network_timestep.contiguous()).clamp(max=self.num_timesteps - 1)

    def _clean_weights(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (on x_t, on the output) whose sum is x0-hat."""
        if self.prediction == "epsilon":
            return 1 / alpha, -sigma / alpha
        if self.prediction == "v_prediction":
            return alpha, -sigma
        if self.prediction == "flow":
            return torch.ones_like(alpha), -sigma
        return torch.zeros_like(alpha), torch.ones_like(alpha)

    def _epsilon_weights(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (on x_t, on the output) whose sum is the implied noise."""
        if self.prediction == "epsilon":
            return torch.zeros_like(alpha), torch.ones_like(alpha)
        if self.prediction == "v_prediction":
            return sigma, alpha
        if self.prediction == "flow":
            return torch.ones_like(alpha), alpha
        return 1 / sigma, -alpha / sigma


def vp_schedule(
    *,
    alphas_cumprod: Float[Tensor, " timesteps"],
    prediction: Literal["epsilon", "v_prediction", "sample"] = "epsilon",
) -> Schedule:
    """A variance-preserving schedule from the cumulative products of its alphas (alpha^2 in this file's symbols)."""
    return Schedule(
        alpha=alphas_cumprod.sqrt(),
        sigma=(1 - alphas_cumprod).sqrt(),
        network_timesteps=torch.arange(len(alphas_cumprod)),
        prediction=prediction,
    )


def flow_schedule(*, num_timesteps: int = 1000, shift: float = 1.0, dtype: torch.dtype = torch.float32) -> Schedule:
    """Rectified flow: sigma = shift s / (1 + (shift - 1) s) at s = 1/T ... 1; the network is given sigma * T.

    Source: Esser et al. 2024 (SD3), section 5.3.2; shift 3 for SD3 at 1024 px.
    """
    uniform = torch.arange(1, num_timesteps + 1, dtype=torch.float64) / num_timesteps
    sigma = (shift * uniform / (1 + (shift - 1) * uniform)).to(dtype)
    return Schedule(alpha=1 - sigma, sigma=sigma, network_timesteps=sigma * num_timesteps, prediction="flow")


def scaled_linear_alphas_cumprod(
    num_timesteps: int = 1000, start: float = 0.00085, end: float = 0.012, *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, " timesteps"]:
    """Stable Diffusion's schedule: betas are the squares of an even grid between sqrt(start) and sqrt(end)."""
    betas = torch.linspace(start**0.5, end**0.5, num_timesteps, dtype=dtype) ** 2
    return torch.cumprod(1 - betas, dim=0)


def zero_terminal_snr(alphas_cumprod: Float[Tensor, " timesteps"]) -> Float[Tensor, " timesteps"]:
    """The schedule shifted and scaled in sqrt(alphas_cumprod) so that its last timestep is pure noise.

    Source: Lin et al. 2023, algorithm 1.
    """
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def error_factor(
    schedule: Schedule, timestep: Int[Tensor, "*shape"], source: Prediction, to: Prediction
) -> Float[Tensor, "*shape"]:
    """What a squared error of a `source` prediction must be multiplied by to be the squared error of a `to` prediction.

    sample error = (sigma/alpha)^2 epsilon error = sigma^2 v error = sigma^2 flow error
    """
    alpha, sigma = schedule.alpha.to(timestep.device)[timestep], schedule.sigma.to(timestep.device)[timestep]
    to_sample = {
        "epsilon": (sigma / alpha) ** 2,
        "v_prediction": sigma**2,
        "flow": sigma**2,
        "sample": torch.ones_like(sigma),
    }
    return to_sample[source] / to_sample[to]


def uniform(u: Float[Tensor, "*shape"], num_timesteps: int) -> Int[Tensor, "*shape"]:
    """Every timestep equally often; `u` is uniform on [0, 1). The default of every published diffusion method."""
    return _index(u, num_timesteps)


def timestep_range(u: Float[Tensor, "*shape"], num_timesteps: int, *, low: int, high: int) -> Int[Tensor, "*shape"]:
    """Timesteps `low` to `high`, both included, equally often.

    Raises:
        ValueError: unless 0 <= low <= high < num_timesteps.
    """
    if not 0 <= low <= high < num_timesteps:
        raise ValueError(f"timesteps: got range {low} to {high}, want 0 <= low <= high < {num_timesteps}.")
    return low + _index(u, high - low + 1)


def logit_normal(
    u: Float[Tensor, "*shape"], num_timesteps: int, *, mean: float = 0.0, std: float = 1.0
) -> Int[Tensor, "*shape"]:
    """Timesteps at sigmoid(Normal(mean, std)) of the schedule: more in the middle.

    Source: Esser et al. 2024 (SD3), section 3.1. Published: mean 0, std 1.
    Raises:
        ValueError: unless std is positive.
    """
    if not std > 0:
        raise ValueError(f"timesteps: got std {std}, want a positive number. For one timestep alone use fixed.")
    normal = torch.special.ndtri(u.double().clamp(1e-12, 1 - 1e-12))
    return _index(torch.sigmoid(mean + std * normal), num_timesteps)


def fixed(u: Float[Tensor, "*shape"], num_timesteps: int, *, values: tuple[int, ...]) -> Int[Tensor, "*shape"]:
    """Only the listed timesteps, equally often.

    Raises:
        ValueError: for an empty list or a value outside 0 ... num_timesteps - 1.
    """
    if not values or not all(0 <= value < num_timesteps for value in values):
        raise ValueError(f"timesteps: got values {list(values)}, want one or more in 0 ... {num_timesteps - 1}.")
    return torch.tensor(values, device=u.device)[_index(u, len(values))]


TIMESTEPS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform,
    "range": timestep_range,
    "logit_normal": logit_normal,
    "fixed": fixed,
}


def min_snr(schedule: Schedule, timestep: Int[Tensor, "*shape"], *, gamma: float = 5.0) -> Float[Tensor, "*shape"]:
    """Weight of the squared error at a timestep: min(SNR, gamma) on the error of the clean data, whatever is predicted.

    epsilon: min(SNR, gamma) / SNR;  v: min(SNR, gamma) / (SNR + 1);  flow: sigma^2 min(SNR, gamma)

    Source: Hang et al. 2023 (arXiv 2303.09556), section 3.4. Published: gamma 5. No author of a preference method uses it.
    Raises:
        ValueError: unless gamma is positive.
    """
    if not gamma > 0:
        raise ValueError(f"weights: got gamma {gamma}, want a positive number.")
    sigma = schedule.sigma.to(timestep.device)[timestep]
    alpha = schedule.alpha.to(timestep.device)[timestep]
    # min(SNR, gamma) alpha^2 or sigma^2 in place of a ratio that is 0/0 at the ends of a schedule
    if schedule.prediction == "epsilon":
        return torch.minimum(torch.ones_like(sigma), gamma * (sigma / alpha) ** 2)
    if schedule.prediction == "sample":
        return schedule.snr(timestep).clamp(max=gamma)
    return torch.minimum(alpha**2, gamma * sigma**2)  # sigma^2 min(SNR, gamma), for v and for flow


def error_of(schedule: Schedule, timestep: Int[Tensor, "*shape"], *, prediction: Prediction) -> Float[Tensor, "*shape"]:
    """Weight that turns the squared error of the network's own prediction into that of another one.

    `prediction: epsilon` on rectified flow gives the errors the weight (1 - sigma)^2, which is the exact change of variables of
    Flow-DPO's beta_t; its authors report that the constant weight works better (VideoAlign, arXiv 2501.13918).
    Raises:
        ValueError: v of variance-preserving diffusion for a model of rectified flow, or the reverse.
    """
    flow = schedule.prediction == "flow"
    if prediction == ("v_prediction" if flow else "flow"):
        kinds = ("rectified flow", "epsilon, sample or flow") if flow else ("diffusion", "epsilon, v_prediction or sample")
        raise ValueError(f"weights: got prediction {prediction} for a model of {kinds[0]}, which has none, want {kinds[1]}.")
    return error_factor(schedule, timestep, schedule.prediction, prediction)


TIMESTEP_WEIGHTS: dict[str, Callable[..., Tensor]] = {"min_snr": min_snr, "error_of": error_of}


def beta_conventions(beta: float, num_elements: int) -> dict[str, float]:
    """The same strength of preference in the conventions of the field; mmalign's is the first.

    Args:
        beta: on 1/2 * mean squared error, as in the published Diffusion-DPO code.
        num_elements: latent elements of one image, C * H * W.
    """
    return {
        "mean, with 1/2": beta,
        "mean, without 1/2": beta / 2,
        "sum, with 1/2": beta / num_elements,
        "sum, without 1/2": beta / (2 * num_elements),
    }


def _index(u: Tensor, count: int) -> Tensor:
    return (u.double() * count).long().clamp(0, count - 1)


def _gather(values: Tensor, timestep: Tensor, like: Tensor) -> Tensor:
    gathered = values.to(device=like.device, dtype=like.dtype)[timestep.to(like.device)]
    return gathered.reshape(gathered.shape + (1,) * (like.ndim - gathered.ndim))
