"""How likely the steps of a sampler are: the likelihood of successors of one noisy state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.likelihoods.networks import Measures, Network, exact, folded


@dataclass(frozen=True, kw_only=True)
class TransitionInputs:
    """k successors of one sampler step, whose likelihood is the Gaussian density of the step.

    logp = mean over dimensions of log Normal(next_noisy; sample_weight * noisy + output_weight * output, std)

    Successors of one and the same x_t (an axis of size 1 in `noisy`) cost one network pass.

    Source: Black et al. 2023 (DDPO), section 4.3; mean over dimensions as in the published code of SPO.
    Args:
        noisy: x_t, once if the successors share it, else one each.
        next_noisy: the k successors.
        timestep: what the network is given.
        sample_weight, output_weight, std: the step, from `Schedule.step`.
        condition, unconditional: keyword arguments of the network, one per prompt; with `unconditional` the output is
            unconditional + guidance_scale * (conditional - unconditional), both in one call.
        guidance_scale: used only with `unconditional`. Published (SPO): 5.
    """

    noisy: Float[Tensor, "batch m *dims"]
    next_noisy: Float[Tensor, "batch k *dims"]
    timestep: Tensor
    sample_weight: Float[Tensor, "batch m"]
    output_weight: Float[Tensor, "batch m"]
    std: Float[Tensor, "batch m"]
    condition: Mapping[str, Tensor] = field(default_factory=dict)
    unconditional: Mapping[str, Tensor] | None = None
    guidance_scale: float = 1.0

    @property
    def num_candidates(self) -> int:
        """k, the number of successors."""
        return self.next_noisy.shape[1]

    def readings(self, logps: Float[Tensor, "batch k"]) -> dict[str, Float[Tensor, "batch k"]]:
        """Other names under which these logps are logged: none."""
        return {}

    def logps(self, network: Network) -> Float[Tensor, "batch k"]:
        """Mean log-density per dimension of every successor, in nats; float32 whatever the autocast."""
        extra = (1,) * (self.noisy.ndim - 2)
        output = self._output(network)
        sample_weight, output_weight, std = (
            exact(weight).reshape(weight.shape + extra) for weight in (self.sample_weight, self.output_weight, self.std)
        )
        mean = sample_weight * exact(self.noisy) + output_weight * output
        deviation = (exact(self.next_noisy) - mean) / std
        log_density = -0.5 * deviation.square() - std.log() - 0.5 * math.log(2 * math.pi)
        return log_density.flatten(2).mean(2)

    def measures(self, network: Network) -> Measures:
        """All that losses may ask of one pass: `policy`, the logps."""
        return {"policy": self.logps(network)}

    def refer(self, network: Network, *, drift: bool = False) -> tuple[Measures, TransitionInputs]:
        """The reference's measures, without a graph, and these inputs.

        Raises:
            ValueError: `drift` is asked for, which is not defined for sampler steps.
        """
        if drift:
            raise ValueError("drift: is not defined for sampler steps. Leave the loss that asks for it out.")
        with torch.no_grad():
            return self.measures(network), self

    def settle(self, network: Network) -> tuple[Measures, TransitionInputs]:
        """Measures without a graph, and these inputs, whose candidates are independent already."""
        with torch.no_grad():
            return self.measures(network), self

    def candidates(self, part: slice) -> TransitionInputs:
        """The same inputs with only some of the k successors; a shared x_t stays shared."""
        own = {
            name: getattr(self, name)[:, part] if self.noisy.shape[1] > 1 else getattr(self, name)
            for name in ("noisy", "timestep", "sample_weight", "output_weight", "std")
        }
        return replace(self, next_noisy=self.next_noisy[:, part], **own)

    def _output(self, network: Network) -> Tensor:
        noisy, timestep = self.noisy.flatten(0, 1), self.timestep.flatten(0, 1)
        condition = folded(self.condition, self.noisy.shape[1], frozenset())
        if self.unconditional is None:
            return exact(network(noisy, timestep, **condition)).reshape(self.noisy.shape)
        unconditional = folded(self.unconditional, self.noisy.shape[1], frozenset())
        both = {name: torch.cat([unconditional[name], condition[name]]) for name in condition}
        output = exact(network(torch.cat([noisy, noisy]), torch.cat([timestep, timestep]), **both))
        without, with_prompt = output.chunk(2)
        return (without + self.guidance_scale * (with_prompt - without)).reshape(self.noisy.shape)
