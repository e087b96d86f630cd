"""What a source hands to the loop, and what the loop and the command line ask of a source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from mmalign.errors import UserError
from mmalign.sources.order import Order


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One micro-batch on the device, all random draws made.

    Args:
        inputs: has `.measures(network)`, `.logps(network)`, `.settle(network)`, `.candidates(slice)`, `.num_candidates`,
            `.readings(logps)`.
        side: side data by the names of the losses' data parameters.
        reference: the reference's measures where they are known already, by their names: `policy`, its logps.
        ids: of the examples, for messages.
        notes: what the source wants logged beside the metrics.
    """

    inputs: Any
    side: Mapping[str, Tensor]
    ids: Sequence[str]
    reference: Mapping[str, Float[Tensor, "batch m"]] | None = None
    notes: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Stream(Protocol):
    """A source that was opened for one run. One with a memory also has `state_dict` and `load_state_dict`, alike on all
    processes, which a checkpoint keeps.
    """

    def batches(self, order: Order, first_step: int, last_step: int) -> Iterator[Prepared]:
        """This process's micro-batches from step `first_step` up to, without, `last_step`."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a loss will see of a source's micro-batches.

    Args:
        num_candidates: k.
        side: side data of one example, by the names of the losses' data parameters.
        errors: whether log-likelihoods are denoising errors, on which beta has several conventions.
        measures: what the likelihood can measure beside the logps.
    """

    num_candidates: int
    side: Mapping[str, Any]
    errors: bool = True
    measures: frozenset[str] = frozenset()


def check_samples(adapter: Any, source: str) -> None:
    """Refuse an adapter whose model is not sampled with.

    Raises:
        UserError: it has no noise schedule to sample on.
    """
    if not hasattr(adapter, "winner_guard"):
        raise UserError(f"source: got {source} with an adapter that makes no samples, want adapter: diffusion.")


def check_answers(adapter: Any, source: str) -> None:
    """Refuse an adapter whose model writes no answers, or a reference that only knows given ones.

    Raises:
        UserError: it is not the adapter of texts, or it has a cache.
    """
    if not getattr(adapter, "answers", False):
        raise UserError(f"source: got {source} with an adapter that writes no answers, want adapter: text.")
    if adapter.cache is not None:
        raise UserError(f"adapter.cache: got one with source: {source}, whose answers are new in every step. Set it to null.")


@runtime_checkable
class Source(Protocol):
    """Settings of a source, as YAML gives them.

    `online` says whether it makes its own samples, so that a pass over the data has no length in steps.
    """

    online: ClassVar[bool]

    def check(self, examples: Any, adapter: Any) -> None:
        """Refuse examples or an adapter's settings that it cannot work with, before a model is opened."""

    def shape(self, examples: Any) -> Shape:
        """What the loss will see."""

    def open(self, examples: Any, policy: Any, *, accelerator: Any, seed: int) -> Stream:
        """Begin, with the opened adapter."""
