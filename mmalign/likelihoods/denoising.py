"""How well a network denoises noisy candidates: the likelihood of diffusion and flow models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmalign.likelihoods.networks import Measures, Network, exact, folded

Safeguard = Callable[[Float[Tensor, "batch k *dims"]], Float[Tensor, "batch k"]]


@dataclass(frozen=True, kw_only=True)
class DenoisingInputs:
    """k noisy candidates a prompt, whose likelihood is the quality of the network's denoising.

    logp = -1/2 * error_weight * mean((network(noisy) - target)^2)

    Source: the evidence lower bound of Ho et al. 2020 with its published constant weighting, mean instead of sum.
    Args:
        noisy: x_t of every candidate.
        timestep: what the network is given, one per candidate.
        target: what the network should predict.
        condition: keyword arguments of the network, `(batch, ...)`: one per prompt, or one per candidate where listed.
        per_candidate: names in `condition` whose tensors are `(batch, k, ...)`.
        error_weight: factor of each candidate's error, e.g. min-SNR. None: 1.
        safeguard: residuals -> factor of each candidate's gradient, such as `winner_guard`.
        gradient_scale: the safeguard's settled answer; see `settle`.
        reference_output: what the reference said, once `refer` has kept it: the measure `drift` is taken from there.
    """

    noisy: Float[Tensor, "batch k *dims"]
    timestep: Tensor
    target: Float[Tensor, "batch k *dims"]
    condition: Mapping[str, Tensor] = field(default_factory=dict)
    per_candidate: frozenset[str] = frozenset()
    error_weight: Float[Tensor, "batch k"] | None = None
    safeguard: Safeguard | None = None
    gradient_scale: Float[Tensor, "batch k"] | None = None
    reference_output: Float[Tensor, "batch k *dims"] | None = None

    @property
    def num_candidates(self) -> int:
        """k, the number of candidates a prompt."""
        return self.noisy.shape[1]

    def readings(self, logps: Float[Tensor, "batch k"]) -> dict[str, Float[Tensor, "batch k"]]:
        """Other names under which these logps are logged: the (weighted) mean squared error."""
        return {"mse": -2 * logps}

    def logps(self, network: Network) -> Float[Tensor, "batch k"]:
        """Log-likelihood of every candidate up to a constant, in nats per dimension; float32 whatever the autocast."""
        return self._measured(network)[0]["policy"]

    def measures(self, network: Network) -> Measures:
        """All that losses may ask of one pass: `policy`, the logps; and after `refer` has kept the reference's output, `drift`,
        the mean squared distance of the network's output from it.
        """
        return self._measured(network)[0]

    def refer(self, network: Network, *, drift: bool = False) -> tuple[Measures, DenoisingInputs]:
        """The reference's measures, without a graph, and these inputs, which keep its output where `drift` is asked for."""
        with torch.no_grad():
            output = self._output(network)
            logps, _ = self._logps_and_scale(output)
        return {"policy": logps}, replace(self, reference_output=output) if drift else self

    def settle(self, network: Network) -> tuple[Measures, DenoisingInputs]:
        """Measures without a graph, and these inputs with whatever depends on all candidates at once fixed.

        The candidates of the inputs returned can be forwarded and back-propagated alone, with the exact joint gradient.
        """
        with torch.no_grad():
            measures, scale = self._measured(network)
        return measures, replace(self, safeguard=None, gradient_scale=scale)

    def candidates(self, part: slice) -> DenoisingInputs:
        """The same inputs with only some of the k candidates.

        Raises:
            ValueError: if a safeguard, which must see all candidates, is not settled yet.
        """
        if self.safeguard is not None:
            raise ValueError("candidates: the safeguard needs all candidates at once. Call settle first.")
        return replace(
            self,
            noisy=self.noisy[:, part],
            timestep=self.timestep[:, part],
            target=self.target[:, part],
            condition={k: v[:, part] if k in self.per_candidate else v for k, v in self.condition.items()},
            error_weight=None if self.error_weight is None else self.error_weight[:, part],
            gradient_scale=None if self.gradient_scale is None else self.gradient_scale[:, part],
            reference_output=None if self.reference_output is None else self.reference_output[:, part],
        )

    def _output(self, network: Network) -> Tensor:
        condition = folded(self.condition, self.num_candidates, self.per_candidate)
        output = network(self.noisy.flatten(0, 1), self.timestep.flatten(0, 1), **condition)
        return exact(output).reshape(self.noisy.shape)

    def _measured(self, network: Network) -> tuple[Measures, Tensor | None]:
        output = self._output(network)
        logps, scale = self._logps_and_scale(output)
        measures = {"policy": logps}
        if self.reference_output is not None:
            measures["drift"] = (output - self.reference_output).square().flatten(2).mean(2)
        return measures, scale

    def _weighed(self, residual: Tensor) -> Tensor:
        """Gradients of the weighed errors with respect to the output, up to a common factor."""
        if self.error_weight is None:
            return residual
        return residual * self.error_weight.reshape(self.error_weight.shape + (1,) * (residual.ndim - 2))

    def _logps_and_scale(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        residual = output - exact(self.target)
        scale = self.gradient_scale if self.safeguard is None else self.safeguard(self._weighed(residual.detach()))
        logps = -0.5 * residual.square().flatten(2).mean(2)
        if self.error_weight is not None:
            logps = logps * self.error_weight
        if scale is not None:
            logps = logps.detach() + scale * (logps - logps.detach())
        return logps, scale


def winner_guard(
    residual: Float[Tensor, "batch 2 *dims"],
    tie: Bool[Tensor, " batch"] | None = None,
    *,
    mu: float = 0.9,
    per: Literal["pair", "batch"] = "pair",
) -> Float[Tensor, "batch 2"]:
    """Diffusion-SDPO's safeguard: how much of the loser's gradient may pass so that the winner's error does not rise.

    lambda = clip((1 - mu) |g_w|^2 / <g_w, g_l>, 0, 1) where <g_w, g_l> > 0, else 1;  g = residual of the candidate

    The loss value is unchanged. The guarantee is first order, in the space of network outputs.

    Source: arXiv 2511.03317 and its published code, which takes one lambda per micro-batch (`per="batch"`).
    Args:
        residual: network output minus target, chosen first, detached.
        tie: pairs without a winner to guard; both their gradients pass whole.
        mu: how much of the winner's descent is kept. Published: 0.9 (SD 1.5), 0.6 (SDXL).
        per: one lambda for each pair (ours, finer), or one for the batch (published).
    """
    chosen, rejected = residual.flatten(2).unbind(1)
    squared_norm, inner = chosen.square().sum(1), (chosen * rejected).sum(1)
    if per == "batch":
        squared_norm, inner = squared_norm.sum().expand_as(inner), inner.sum().expand_as(inner)
    ratio = (1 - mu) * squared_norm / torch.where(inner > 0, inner, torch.ones_like(inner))
    scale = torch.where(inner > 0, ratio.clamp(0, 1), torch.ones_like(inner))
    if tie is not None:
        scale = torch.where(tie, torch.ones_like(scale), scale)
    return torch.stack([torch.ones_like(scale), scale], dim=1)
