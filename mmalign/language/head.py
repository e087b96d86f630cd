"""Log-probabilities from hidden states and the weights of the output layer, without logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_BYTES = {"cpu": 2**26, "cuda": 2**28}  # of one tile of logits, see `tile_rows`
PER_TOKEN, SHARED = (0, 3), (1, 2, 4)  # of the inputs of _Sums: those with a row a token, and those that all tokens share


@dataclass(frozen=True, kw_only=True)
class Head:
    """What turns a hidden state into logits: softcap * tanh(z / softcap),  z = scale * (h W^T + b + inner outer^T).

    Args:
        weight: W.
        bias: b.
        inner, outer: a low-rank addition, with the adapter's factor in it: `inner` of each hidden state, `outer` of each word.
        scale: Granite's 1 / `logits_scaling`, Cohere's `logit_scale`.
        softcap: Gemma's `final_logit_softcapping`: 30.
    """

    weight: Float[Tensor, "vocab dim"]
    bias: Float[Tensor, " vocab"] | None = None
    inner: Float[Tensor, "n rank"] | None = None
    outer: Float[Tensor, "vocab rank"] | None = None
    scale: float = 1.0
    softcap: float | None = None


def slot_sums(
    hidden: Float[Tensor, "n dim"],
    head: Head,
    target: Int[Tensor, " n"],
    slot: Int[Tensor, " n"],
    counts: tuple[int, ...],
    *,
    weight: Float[Tensor, " n"] | None = None,
    wanted: frozenset[str] = frozenset(),
    rows: int | None = None,
    accumulators: int = 2,
    opposed: tuple[tuple[int, int], ...] | None = None,
) -> dict[str, Float[Tensor, " slots"]]:
    """Sums over the tokens of every slot of their log-probabilities, tile by tile.

    logps_s = sum_{t in s} w_t log softmax(z_t)[target_t],  in float32 or better whatever the autocast
    agreement_s = sum_{t in s, w_t != 0} (log p_t - log sum_v p_tv^2),  entropy_s = -sum_t sum_v p_tv log p_tv,  both detached

    The loss reaches a token through its slot's sum alone, so that its gradient is one number a slot times a gradient that is
    known as soon as the tile's logits are. It is formed then, and the logits are computed once, where the output layer is
    frozen or the slots are few: a trainable one needs an accumulator of its size a slot, or one for two slots whose gradients
    are opposite. Else the backward pass computes the logits again.
    Args:
        hidden: states that predict.
        head: the output layer.
        target: tokens predicted.
        slot: of each token, ascending.
        counts: tokens of each slot.
        weight: w; None: 1.
        wanted: of "agreement" and "entropy".
        rows: tokens in a tile; None: see `tile_rows`.
        accumulators: how many of them a trainable output layer may have, where memory allows it; 0: none.
        opposed: pairs of slots, all of them, of which the second one's gradient is minus the first one's, as it is under a
            loss of their difference. Where it is not, the gradient of what all tokens share is NaN. None: none is known.
    """
    how: dict[str, Any] = {"rows": rows, "accumulators": accumulators, "opposed": opposed}
    job = Job.of(hidden, head, target, slot, counts, factor=weight, wanted=wanted, **how)
    logps, agreement, entropy = _Sums.apply(hidden, head.weight, head.bias, head.inner, head.outer, job)
    values = {"logps": logps, "agreement": agreement, "entropy": entropy}
    return {name: value for name, value in values.items() if name == "logps" or name in wanted}


def target_logits(hidden: Float[Tensor, "n dim"], head: Head, target: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Logits of given tokens alone, in float32 or better, with a gradient.

    Args:
        hidden: states that predict.
        head: the output layer.
        target: of each state, the token.
    """
    exact = torch.promote_types(torch.promote_types(hidden.dtype, head.weight.dtype), torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = (hidden.to(exact) * head.weight[target].to(exact)).sum(1)
        if head.inner is not None and head.outer is not None:
            logits = logits + (head.inner.to(exact) * head.outer[target].to(exact)).sum(1)
        if head.bias is not None:
            logits = logits + head.bias[target]
        logits = logits * head.scale
        return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


@torch.no_grad()
def likeliest(
    hidden: Float[Tensor, "n dim"], head: Head, *, rows: int | None = None, but: Int[Tensor, " n"] | None = None
) -> Int[Tensor, " n"]:
    """The token of the largest logit of each state, tile by tile.

    Args:
        hidden: states that predict.
        head: the output layer.
        rows: see `slot_sums`.
        but: of each state a token that it may not be: the second likeliest takes its place.
    """
    target = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    job = Job.of(hidden, head, target, target, (len(hidden),), rows=rows)
    tensors = (hidden, head.weight, head.bias, head.inner, head.outer)
    with torch.autocast(hidden.device.type, enabled=False):
        words = head.weight.to(job.dtype)
        for tile in job.tiles():
            logits = tile_logits(tensors, job, words, tile)[0]
            if but is not None:
                logits = logits.scatter(1, but[tile][:, None], -torch.inf)
            target[tile] = logits.argmax(1)
    return target


def tile_rows(vocab: int, device: torch.device) -> int:
    """Tokens whose float32 logits fill 64 MiB (CPU) or 256 MiB (CUDA), but 128 to 1024."""
    return max(128, min(1024, TILE_BYTES.get(device.type, TILE_BYTES["cuda"]) // (4 * vocab)))


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a sweep over the tokens does; no field takes a gradient."""

    target: Tensor
    slot: Tensor
    factor: Tensor | None
    counts: tuple[int, ...]
    scale: float
    softcap: float | None
    wanted: frozenset[str]
    rows: int
    accumulators: int
    opposed: tuple[tuple[int, int], ...] | None
    dtype: torch.dtype
    exact: torch.dtype
    graph: bool

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        head: Head,
        target: Tensor,
        slot: Tensor,
        counts: tuple[int, ...],
        *,
        factor: Tensor | None = None,
        wanted: frozenset[str] = frozenset(),
        rows: int | None = None,
        accumulators: int = 0,
        opposed: tuple[tuple[int, int], ...] | None = None,
    ) -> Job:
        """That of these hidden states under this head; see `slot_sums`."""
        dtype = _compute_dtype(hidden, head.weight)
        return cls(
            target=target,
            slot=slot,
            factor=factor,
            counts=counts,
            scale=head.scale,
            softcap=head.softcap,
            wanted=wanted,
            rows=rows or tile_rows(head.weight.shape[0], hidden.device),
            accumulators=accumulators,
            opposed=opposed,
            dtype=dtype,
            exact=torch.promote_types(dtype, torch.float32),
            graph=torch.is_grad_enabled(),
        )

    def tiles(self) -> Iterator[slice]:
        """Slices of the tokens, one a tile."""
        return (slice(start, start + self.rows) for start in range(0, len(self.target), self.rows))

    @property
    def signed(self) -> list[list[tuple[int, bool]]]:
        """Of each total, its slots, and whether each is taken off."""
        if self.opposed is None:
            return [[(slot, False)] for slot in range(len(self.counts))]
        return [[(plus, False), (minus, True)] for plus, minus in self.opposed]

    def worth(self, grad: Float[Tensor, " slots"]) -> Float[Tensor, " totals"]:
        """Gradient of each total: of its slots', NaN where two of them are not opposite; no synchronisation."""
        if self.opposed is None:
            return grad
        plus, minus = (torch.stack([grad[pair[n]] for pair in self.opposed]) for n in (0, 1))
        return torch.where(plus == -minus, plus, torch.full_like(plus, torch.nan))


@dataclass
class _Total:
    """A sum of matrix products, which takes no memory before the first."""

    exact: torch.dtype
    value: Tensor | None = None

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add left @ right."""
        if self.value is None:
            self.value = _product(left, right, self.exact)
        elif left.dtype == self.exact:
            self.value.addmm_(left, right)
        elif left.is_cuda:
            torch.addmm(self.value, left, right, out_dtype=self.exact, out=self.value)
        else:
            self.value += torch.mm(left, right)


@dataclass(kw_only=True)
class Gradients:
    """Gradients by the number of the input: a row a token, or totals of slots (`Job.signed`; one for all: `merged`)."""

    merged: bool
    of_tokens: dict[int, Tensor] = field(default_factory=dict)
    of_slots: dict[int, list[_Total]] = field(default_factory=dict)

    @classmethod
    def empty(cls, tensors: Any, needed: tuple[int, ...], job: Job, *, merged: bool) -> Gradients:
        """For those inputs that need one."""
        totals = 1 if merged else len(job.signed)
        return cls(
            merged=merged,
            of_tokens={number: torch.empty_like(tensors[number]) for number in needed if number in PER_TOKEN},
            of_slots={number: [_Total(job.exact) for _ in range(totals)] for number in needed if number in SHARED},
        )

    def total(self) -> dict[int, Tensor]:
        """Of merged gradients, into which the gradient of every slot went already."""
        found = {number: total.value for number, (total,) in self.of_slots.items() if total.value is not None}
        return self.of_tokens | found

    def scaled(self, grad: Tensor, job: Job) -> dict[int, Tensor]:
        """Times the gradient of every slot. The totals are combined in the place of the first, and are gone."""
        of_token, worth = grad[job.slot][:, None], job.worth(grad)
        found = {number: kept * of_token for number, kept in self.of_tokens.items()}
        for number, totals in self.of_slots.items():
            combined: Tensor | None = None
            for number_of_total, total in enumerate(totals):
                value, total.value = total.value, None
                if value is not None and combined is None:
                    combined = value.mul_(worth[number_of_total])
                elif value is not None and combined is not None:
                    combined.addcmul_(value, worth[number_of_total])
            if combined is not None:
                found[number] = combined
        return found


class _Sums(torch.autograd.Function):
    """(hidden, weight, bias, inner, outer) -> sums of every slot."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, job = inputs
        needed = tuple(number for number in range(5) if job.graph and ctx.needs_input_grad[number])
        shared = any(number in SHARED for number in needed)
        once = bool(needed) and (not shared or has_room(tensors, needed, job))
        gradients = Gradients.empty(tensors, needed, job, merged=False) if once else None
        out = _sweep(tensors, job, job.factor, gradients, job.wanted)
        ctx.job, ctx.needed, ctx.gradients = job, needed, gradients
        ctx.kinds = [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors]
        # Per-token gradients survive a backward pass, accumulators do not: a second one computes them again.
        ctx.save_for_backward(*(tensors if shared or not once else ()))
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        job, gradients, grad = ctx.job, ctx.gradients, grad.to(ctx.job.exact)
        if gradients is None:
            factor = grad[job.slot] if job.factor is None else grad[job.slot] * job.factor
            gradients = Gradients.empty(ctx.saved_tensors, ctx.needed, job, merged=True)
            _sweep(ctx.saved_tensors, job, factor, gradients, frozenset())
            found = gradients.total()
        else:
            ctx.gradients = None if gradients.of_slots else gradients
            found = gradients.scaled(grad, job)
        return (*(in_kind(found.get(number), ctx.kinds[number]) for number in range(5)), None)


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """That of the model's own output layer: autocast's, but for float64, which it leaves alone."""
    own = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(hidden.device.type) and own != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return own


def has_room(tensors: Any, needed: tuple[int, ...], job: Job) -> bool:
    """Whether a total a slot may be held: as many as `accumulators` allows, in a quarter of what is free on CUDA."""
    if len(job.signed) > job.accumulators:
        return False
    device = job.target.device
    if device.type != "cuda":
        return True
    size = len(job.signed) * job.exact.itemsize * sum(tensors[number].numel() for number in needed if number in SHARED)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return bool(size <= (torch.cuda.mem_get_info(device)[0] + cached) / 4)


def in_kind(found: Tensor | None, kind: tuple[torch.Size, torch.dtype] | None) -> Tensor | None:
    """A gradient in its input's shape and dtype."""
    return None if found is None or kind is None else found.view(kind[0]).to(kind[1])


def _sweep(
    tensors: Any, job: Job, factor: Tensor | None, gradients: Gradients | None, wanted: frozenset[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of every slot; on the way, into `gradients`, those of sum_t factor_t log p_t."""
    hidden, weight = tensors[:2]
    tokens = torch.empty(3, len(job.target), dtype=torch.float64, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        words = weight.to(job.dtype)
        for tile in job.tiles():
            _sweep_tile(tensors, job, words, tile, factor, gradients, wanted, tokens)
    weights = 1 if job.factor is None else job.factor.double()
    tokens[0] *= weights
    sums = tokens.new_zeros(3, len(job.counts)).index_add_(1, job.slot, tokens).to(job.exact)
    return sums[0], sums[1], sums[2]


def _sweep_tile(
    tensors: Any,
    job: Job,
    words: Tensor,
    tile: slice,
    factor: Tensor | None,
    gradients: Gradients | None,
    wanted: frozenset[str],
    tokens: Tensor,
) -> None:
    """One tile of `_sweep`, into `tokens` and `gradients`; its logits are gone when the next tile's are made."""
    logits, slope = tile_logits(tensors, job, words, tile)
    in_place = logits.device.type == "cpu"  # torch reads each row before it writes it there
    logp = torch.log_softmax(logits, 1, out=logits) if in_place else torch.log_softmax(logits, 1)
    tokens[0, tile] = logp.gather(1, job.target[tile, None])[:, 0].double()
    if gradients is None and not wanted:
        return
    p = torch.exp(logp, out=logits)
    if "agreement" in wanted:
        tokens[1, tile] = tokens[0, tile] - 2 * torch.linalg.vector_norm(p, dim=1).double().log()
    if "entropy" in wanted:
        tokens[2, tile] = torch.special.entr(p, out=None if in_place else logp).sum(1).double()
    del logp
    if gradients is not None:
        p.scatter_add_(1, job.target[tile, None], p.new_full((len(p), 1), -1.0))
        if slope is not None:
            p.mul_(slope.square_().neg_().add_(1))
        add_gradients(gradients, tensors, job, tile, p, words, factor)


def tile_logits(tensors: Any, job: Job, words: Tensor, tile: slice) -> tuple[Tensor, Tensor | None]:
    """Logits of a tile's tokens, and tanh(z / softcap) where they are capped.

    Args:
        tensors: hidden, weight, bias, inner, outer.
        job: whose `dtype` the product is taken in.
        words: the weight in that dtype.
        tile: the tokens.
    """
    hidden, _, bias, inner, outer = tensors
    logits = _product(hidden[tile].to(job.dtype), words.T, job.exact)
    if inner is not None:
        logits.addmm_(inner[tile].to(job.exact), outer.to(job.exact).T)
    if bias is not None:
        logits += bias
    if job.scale != 1:
        logits *= job.scale
    if job.softcap is None:
        return logits, None
    slope = logits.div_(job.softcap).tanh_()
    return slope * job.softcap, slope


def add_gradients(
    gradients: Gradients, tensors: Any, job: Job, tile: slice, error: Tensor, words: Tensor, factor: Tensor | None
) -> None:
    """Add what a tile gives, from its error p - onehot(target); factors go onto the narrower matrix of each product."""
    hidden, _, _, inner, outer = tensors
    by_token = error.new_full((len(error), 1), -job.scale)
    if factor is not None:
        by_token *= factor[tile, None]
    rough = error.to(job.dtype)
    if 0 in gradients.of_tokens:
        gradients.of_tokens[0][tile] = _product(rough, words, job.exact).mul_(by_token)
    if 3 in gradients.of_tokens:
        gradients.of_tokens[3][tile] = (error @ outer.to(job.exact)).mul_(by_token)
    for number, total, piece, less in _pieces(gradients, job, tile):
        by = -by_token[piece] if less else by_token[piece]
        if number == 1:
            total.add(rough[piece].T, (hidden[tile][piece].to(job.exact) * by).to(job.dtype))
        elif number == 2:
            total.add(error[piece].T, by)
        else:
            total.add(error[piece].T, inner[tile][piece].to(job.exact) * by)


def _pieces(gradients: Gradients, job: Job, tile: slice) -> Iterator[tuple[int, _Total, slice, bool]]:
    """Input number, total, rows of the tile that it gets and whether they are taken off it, for all that all tokens share."""
    size = min(tile.stop, len(job.target)) - tile.start
    ends = list(accumulate(job.counts))
    for number, totals in gradients.of_slots.items():
        if gradients.merged:
            yield number, totals[0], slice(0, size), False
            continue
        for total, slots in zip(totals, job.signed, strict=True):
            for slot, less in slots:
                start, end = ends[slot] - job.counts[slot], ends[slot]
                piece = slice(max(start - tile.start, 0), min(end - tile.start, size))
                if piece.start < piece.stop:
                    yield number, total, piece, less


def _product(left: Tensor, right: Tensor, exact: torch.dtype) -> Tensor:
    """left @ right in `exact`: rounded to it once on CUDA, where a product of half precision can be written out in full."""
    if left.dtype != exact and left.is_cuda:
        return torch.mm(left, right, out_dtype=exact)
    return torch.mm(left, right).to(exact)
