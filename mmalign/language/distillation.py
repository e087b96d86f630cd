"""How far a policy is from a teacher's distributions, from hidden states and output layers, without logits of all tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmalign.language.head import SHARED, Gradients, Head, Job, add_gradients, has_room, in_kind, tile_logits


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What a frozen teacher makes of the scored tokens of a layout.

    Args:
        states, head: its hidden states that predict, and its output layer.
        reference_states, reference_head: those of the model that the teacher was tuned from; None: no advantage.
        top_k: words of each token that the teacher finds likeliest, all that is looked at; None: the whole vocabulary.
    """

    states: Float[Tensor, "n dim"]
    head: Head
    reference_states: Float[Tensor, "n reference_dim"] | None = None
    reference_head: Head | None = None
    top_k: int | None = None

    def take(self, index: Int[Tensor, " some"]) -> Lesson:
        """Of some of the scored tokens alone."""
        before = None if self.reference_states is None else self.reference_states[index]
        head, reference_head = (
            one if one is None or one.inner is None else replace(one, inner=one.inner[index])
            for one in (self.head, self.reference_head)
        )
        assert head is not None
        return replace(self, states=self.states[index], head=head, reference_states=before, reference_head=reference_head)


def distilled_sums(
    hidden: Float[Tensor, "n dim"],
    head: Head,
    lesson: Lesson,
    target: Int[Tensor, " n"],
    slot: Int[Tensor, " n"],
    counts: tuple[int, ...],
    *,
    wanted: frozenset[str],
    rows: int | None = None,
    accumulators: int = 2,
) -> dict[str, Float[Tensor, " slots"]]:
    """Sums over the tokens of every slot of what a teacher has to say about the policy's distributions, tile by tile.

    teacher_divergence_s = sum_{t in s} KL(q_t || p_t) = sum_t sum_a q_t(a) (log q_t(a) - log p_t(a))
    advantage_s = sum_{t in s} sum_a p_t(a) (log q_t(a) - log r_t(a))

    with p the policy, q the teacher, r the teacher's reference; the gradient is the policy's alone. With `top_k`, KL is
    from q renormalised over those words, and the advantage of all others is 0.

    Source: Gao et al. 2025 (ADPA), whose code keeps the 50 likeliest words of the teacher.
    Args:
        hidden: states of the policy that predict.
        head: its output layer.
        lesson: what the teacher makes of the same tokens.
        target: tokens predicted.
        slot: of each token, ascending.
        counts: tokens of each slot.
        wanted: of "teacher_divergence" and "advantage".
        rows, accumulators: see `slot_sums`.
    Raises:
        ValueError: vocabularies of different size, or an advantage without the teacher's reference.
    """
    taught = [lesson.head] if lesson.reference_head is None else [lesson.head, lesson.reference_head]
    sizes = {len(one.weight) for one in (head, *taught)}
    if len(sizes) > 1:
        raise ValueError(f"lesson: got vocabularies of {sorted(sizes)} words, want one size.")
    if "advantage" in wanted and (lesson.reference_head is None or lesson.reference_states is None):
        raise ValueError("lesson: got no reference of the teacher, which the advantage is over.")
    job = Job.of(hidden, head, target, slot, counts, rows=rows, accumulators=accumulators)
    with_reference = "advantage" in wanted
    work = _Work(
        job=job,
        names=tuple(sorted(wanted)),
        teacher=_Frozen.of(lesson.states, lesson.head, job),
        reference=_Frozen.of(lesson.reference_states, lesson.reference_head, job) if with_reference else None,
        top_k=lesson.top_k,
    )
    return dict(zip(work.names, _Distilled.apply(hidden, head.weight, head.bias, head.inner, head.outer, work), strict=True))


@dataclass(frozen=True)
class _Frozen:
    """A model that is read and not trained."""

    tensors: tuple[Tensor | None, ...]
    job: Job

    @classmethod
    def of(cls, states: Any, head: Any, like: Job) -> _Frozen:
        tensors = (states, head.weight, head.bias, head.inner, head.outer)
        job = Job.of(states, head, like.target, like.slot, like.counts, rows=like.rows)
        return cls(tuple(None if tensor is None else tensor.detach() for tensor in tensors), job)

    def log_probabilities(self) -> Iterator[Tensor]:
        """Of every tile, in the policy's tiles."""
        weight = self.tensors[1]
        assert weight is not None
        words = weight.to(self.job.dtype)
        for tile in self.job.tiles():
            yield torch.log_softmax(tile_logits(self.tensors, self.job, words, tile)[0], 1)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What a sweep over the tokens does; no field takes a gradient."""

    job: Job
    names: tuple[str, ...]
    teacher: _Frozen
    reference: _Frozen | None
    top_k: int | None


class _Distilled(torch.autograd.Function):
    """(hidden, weight, bias, inner, outer) -> a sum of every slot for each name.

    As in `slot_sums`, gradients are formed in the forward pass but for what a slot's sum is worth, where there is room.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *tensors, work = inputs
        needed = tuple(number for number in range(5) if work.job.graph and ctx.needs_input_grad[number])
        shared = any(number in SHARED for number in needed)
        room = not shared or (len(work.names) == 1 and has_room(tensors, needed, work.job))
        gradients = _empty(tensors, needed, work, merged=False) if needed and room else None
        out = _sweep(tensors, work, gradients, None)
        ctx.work, ctx.needed, ctx.gradients = work, needed, gradients
        ctx.kinds = [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors]
        ctx.save_for_backward(*(tensors if shared or gradients is None else ()))
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        work, gradients = ctx.work, ctx.gradients
        job = work.job
        worth = {name: grad.to(job.exact) for name, grad in zip(work.names, grads, strict=True)}
        if gradients is None:
            gradients = _empty(ctx.saved_tensors, ctx.needed, work, merged=True)
            _sweep(ctx.saved_tensors, work, gradients, {name: grad[job.slot] for name, grad in worth.items()})
            found = [one.total() for one in gradients.values()]
        else:
            ctx.gradients = None if any(one.of_slots for one in gradients.values()) else gradients
            found = [one.scaled(worth[name], job) for name, one in gradients.items()]
        parts = ([one[number] for one in found if number in one] for number in range(5))
        return (*(in_kind(_sum(one), kind) for one, kind in zip(parts, ctx.kinds, strict=True)), None)


def _sum(parts: list[Tensor]) -> Tensor | None:
    """In the place of the first."""
    for part in parts[1:]:
        parts[0].add_(part)
    return parts[0] if parts else None


def _empty(tensors: Any, needed: tuple[int, ...], work: _Work, *, merged: bool) -> dict[str, Gradients]:
    return {name: Gradients.empty(tensors, needed, work.job, merged=merged) for name in work.names}


def _sweep(tensors: Any, work: _Work, gradients: dict[str, Gradients] | None, factors: dict[str, Tensor] | None) -> Tensor:
    """Sums of every name and slot; on the way, into `gradients`, those of sum_t factor_t value_t."""
    job = work.job
    tokens = torch.empty(len(work.names), len(job.target), dtype=torch.float64, device=job.target.device)
    teacher = work.teacher.log_probabilities()
    reference = None if work.reference is None else work.reference.log_probabilities()
    with torch.autocast(tokens.device.type, enabled=False):
        words = tensors[1].to(job.dtype)
        for tile in job.tiles():
            logits, slope = tile_logits(tensors, job, words, tile)
            logp = torch.log_softmax(logits, 1)
            p = torch.exp(logp, out=logits)
            logq = next(teacher).to(p)
            where = None if work.top_k is None else logq.topk(min(work.top_k, logq.shape[1]), dim=1).indices
            gains = None if reference is None else logq - next(reference).to(p)
            for number, name in enumerate(work.names):
                if gains is not None and name == "advantage":
                    values, error = _advantage(p, gains, where)
                else:
                    values, error = _divergence(logp, p, logq, where)
                tokens[number, tile] = values.double()
                if gradients is not None:
                    if slope is not None:
                        error.mul_(1 - slope.square())
                    add_gradients(gradients[name], tensors, job, tile, error, words, None if factors is None else factors[name])
    return tokens.new_zeros(len(work.names), len(job.counts)).index_add_(1, job.slot, tokens).to(job.exact)


def _divergence(logp: Tensor, p: Tensor, logq: Tensor, where: Tensor | None) -> tuple[Tensor, Tensor]:
    """KL(q || p) of each token, and minus its derivative by the logits: q - p."""
    if where is None:
        q = logq.exp()
        return (q * (logq - logp)).sum(1), q - p
    kept = logq.gather(1, where).log_softmax(1)
    q = kept.exp()
    return (q * (kept - logp.gather(1, where))).sum(1), p.neg().scatter_add_(1, where, q)


def _advantage(p: Tensor, gains: Tensor, where: Tensor | None) -> tuple[Tensor, Tensor]:
    """V = sum_a p(a) A(a) of each token, and minus its derivative by the logits: p (V - A)."""
    if where is None:
        values = (p * gains).sum(1)
        return values, p * (values[:, None] - gains)
    parts = p.gather(1, where) * gains.gather(1, where)
    values = parts.sum(1)
    return values, (p * values[:, None]).scatter_add_(1, where, -parts)
