"""How the benchmarks measure: the gate before the clock, interleaved CPU time, FLOPs, live bytes, synchronisations."""

from __future__ import annotations

import gc
import statistics
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LOSS_TOLERANCE = 1e-5  # of max(1, |loss|)
GRADIENT_TOLERANCE = 5e-5  # relative L2
UNRELIABLE = 1.5  # max / min of the rounds' ratios above which no ratio is claimed


class GateError(Exception):
    """Two variants that should compute the same do not: nothing may be timed."""


@dataclass(frozen=True)
class Answer:
    """What one backward pass gave: the loss, and the gradient of every trained parameter by name."""

    loss: float
    gradient: Mapping[str, Tensor]


def gate(name: str, ours: Answer, peer: Answer) -> dict[str, float]:
    """The distances between two answers.

    Raises:
        GateError: they are not the same up to float32 rounding, or the peer's gradient is zero (which would prove nothing).
    """
    if ours.gradient.keys() != peer.gradient.keys():
        raise GateError(f"{name}: got gradients of {len(ours.gradient)} parameters, want the peer's {len(peer.gradient)}.")
    square = {"gap": 0.0, "norm": 0.0}
    for key, value in peer.gradient.items():
        square["gap"] += float((ours.gradient[key].double() - value.double()).square().sum())
        square["norm"] += float(value.double().square().sum())
    if not square["norm"] > 0:
        raise GateError(f"{name}: got a zero or NaN gradient of the peer, want one to compare with.")
    loss_gap = abs(ours.loss - peer.loss)
    gradient_gap = (square["gap"] / square["norm"]) ** 0.5
    fine = loss_gap <= LOSS_TOLERANCE * max(1.0, abs(peer.loss)) and gradient_gap <= GRADIENT_TOLERANCE
    if not fine:
        raise GateError(
            f"{name}: got loss {ours.loss:.8g}, want {peer.loss:.8g} (gap {loss_gap:.2g}); gradient off by {gradient_gap:.2g} "
            f"relative L2, want at most {GRADIENT_TOLERANCE:g}. Nothing is timed."
        )
    return {"loss": ours.loss, "loss_gap": loss_gap, "gradient_gap": gradient_gap}


def gate_equal(name: str, ours: Tensor, peer: Tensor) -> None:
    """Refuse to time two readings of the same data that differ by more than float32 rounding.

    Raises:
        GateError: they differ.
    """
    if ours.shape != peer.shape or not torch.allclose(ours, peer, rtol=0, atol=1e-6):
        raise GateError(f"{name}: got other values than the peer's. Nothing is timed.")


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the peer: median, lowest and highest of the rounds."""

    median: float
    low: float
    high: float
    seconds: float

    @property
    def spread(self) -> float:
        """Highest over lowest."""
        return self.high / self.low

    @property
    def reliable(self) -> bool:
        """Whether the rounds agree well enough to claim the median."""
        return self.spread <= UNRELIABLE


def interleaved(steps: Mapping[str, Callable[[], object]], *, peer: str, rounds: int) -> dict[str, Ratio]:
    """Process CPU time of every step, in the order A..Z, Z..A a round, as ratios peer / step of the same round."""
    spent: dict[str, list[float]] = {name: [] for name in steps}
    gc.freeze()  # so that collecting before every step looks only at what the steps left
    for _ in range(rounds):
        here = dict.fromkeys(steps, 0.0)
        for name in [*steps, *reversed(steps)]:
            here[name] += _cpu_seconds(steps[name])
        for name, seconds in here.items():
            spent[name].append(seconds / 2)
    gc.unfreeze()
    ratios = {name: [p / s for p, s in zip(spent[peer], spent[name], strict=True)] for name in steps}
    return {
        name: Ratio(statistics.median(values), min(values), max(values), statistics.median(spent[name]))
        for name, values in ratios.items()
    }


def _cpu_seconds(step: Callable[[], object]) -> float:
    gc.collect()
    gc.disable()
    try:
        start = time.process_time()
        step()
        return time.process_time() - start
    finally:
        gc.enable()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside the block and still alive: `peak` is their maximum. Deterministic.

    What existed before the block (weights, batches) is not counted. Free gradients before it starts, or they go missing
    from the peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self._known.setdefault(storage, True)
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage not in self._known:
                self._known[storage] = True
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return out

    def _add(self, num_bytes: int) -> None:
        self.live += num_bytes
        self.peak = max(self.peak, self.live)


class Dispatches(TorchDispatchMode):
    """Counts operations, collectives, and waits: operations whose result the host must have (`.item()`, `bool`).

    `waits` names the function of ours (file:function) that asked. Copies to the host (`.cpu()`, `.tolist()`) cannot be seen
    where the device is the host.
    """

    WAITING = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "equal"})
    OURS = ("mmalign", "benchmarks")

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.collectives = 0
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, rest = func.name().partition("::")
        self.operations += 1
        self.collectives += namespace in ("c10d", "_c10d_functional")
        if rest.partition(".")[0] in self.WAITING:
            self.waits[_asking()] += 1
        return func(*args, **(kwargs or {}))


def _asking() -> str:
    """The innermost function of this project on the stack."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if any(part in path.parts for part in Dispatches.OURS) and path.name != Path(__file__).name:
            return f"{path.name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def resident_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages under these tensors."""
    return sum({storage.data_ptr(): storage.nbytes() for storage in _storages(list(tensors))}.values())


def _storages(tree: Any) -> list[Any]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
