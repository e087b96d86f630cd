"""Encoded rows of a micro-batch as the sequences that a language model runs, and which of their tokens are scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmalign.errors import UserError
from mmalign.language.chat import Encoded
from mmalign.likelihoods import Tokens
from mmalign.likelihoods.tokens import first_difference, shared_heads

Scored = tuple[Tensor, int, Tensor]  # token ids, their context, which of them are scored


def tokens_of(
    rows: Sequence[Encoded],
    num_candidates: int,
    num_extras: int = 0,
    *,
    wanted: frozenset[str],
    from_difference: bool = False,
    weights: Sequence[Sequence[Sequence[float]]] | None = None,
) -> Tokens:
    """Candidates of all rows, then the further completions, name by name.

    Args:
        rows: of each the candidates first, then its further completions.
        num_candidates: k.
        num_extras: further completions of each row.
        wanted: measures; `shared` asks for heads, `joint` for scored contexts.
        from_difference: leave out the tokens that all candidates of a row begin with, where they answer one prompt.
        weights: of each row and candidate, factors of the scored tokens' log-probabilities; those of further completions may
            follow, and are 1 else.
    Raises:
        UserError: weights leave a candidate without a scored token.
    """
    contexts: list[Tensor] = []
    media: list[Any | None] = []
    sequences: list[list[Scored]] = []
    for row in rows:
        first = len(contexts)
        contexts += [torch.tensor(ids) for ids in row.contexts]
        media += row.media or (None,) * len(row.contexts)
        members = zip(row.continuations, row.context_of, row.scored, strict=True)
        sequences.append([(torch.tensor(ids), first + owner, _mask(len(ids), places)) for ids, owner, places in members])
        if "joint" in wanted and any(row.given):  # what is still prompt is scored with it
            own = list(zip(sequences[-1], row.given, strict=True))
            media[first:] = [media[owner] for (_, owner, _), _ in own]
            contexts[first:] = [torch.cat([contexts[owner], ids[:given]]) for (ids, owner, _), given in own]
            sequences[-1] = [(ids[given:], first + n, scored[given:]) for n, ((ids, _, scored), given) in enumerate(own)]
        if from_difference:
            sequences[-1] = _from_difference(sequences[-1], num_candidates)
    chosen = [sequence for row in sequences for sequence in row[:num_candidates]]
    chosen += [row[num_candidates + n] for n in range(num_extras) for row in sequences]
    told = None if weights is None else [one for row in weights for one in row[:num_candidates]]
    if told is not None and weights is not None and len(weights[0]) > num_candidates:
        told += [row[num_candidates + n] for n in range(num_extras) for row in weights]
    joint = tuple(torch.ones(len(context) - 1) for context in contexts) if "joint" in wanted else None
    tokens = Tokens(
        contexts=tuple(contexts),
        continuations=tuple(ids for ids, _, _ in chosen),
        context_of=tuple(owner for _, owner, _ in chosen),
        weights=_weights(chosen, told),
        context_weights=joint,
        heads=_heads(chosen, len(rows), num_candidates) if "shared" in wanted else None,
        media=_told(media),
    )
    unused = len(set(tokens.context_of)) < len(contexts)
    return tokens.select(range(len(chosen))) if unused else tokens


def mismatched_of(rows: Sequence[Encoded]) -> Tokens:
    """Each prompt with the answer of another row, for KTO's anchor: that of the row before, the first with the last one's.

    Source: TRL's KTOTrainer, which shifts the answers of a batch by one place.
    Raises:
        UserError: one row, whose answer would be its own.
    """
    if len(rows) < 2:
        raise UserError(
            "training.batch_size: got 1, want 2 or more: KTO's anchor pairs each prompt of a micro-batch with the answer of "
            "another. Or set adapter.mismatched to false."
        )
    answers = [rows[-1], *rows[:-1]]
    answered: list[Scored] = []
    for number, answer in enumerate(answers):
        ids, given = answer.continuations[0], answer.given[0]
        answered.append((torch.tensor(ids[given:]), number, _mask(len(ids), answer.scored[0])[given:]))
    return Tokens(
        contexts=tuple(torch.tensor(row.contexts[0] + row.continuations[0][: row.given[0]]) for row in rows),
        continuations=tuple(ids for ids, _, _ in answered),
        context_of=tuple(range(len(rows))),
        weights=_weights(answered, None),
        media=_told([row.media[0] if row.media else None for row in rows]),
    )


def noisy_of(rows: Sequence[Encoded], place: int, weights: Sequence[Sequence[Sequence[float]]] | None = None) -> Tokens:
    """Of every row one sequence more, behind its further completions: the best answer under the degraded image.

    Args:
        rows: as in `tokens_of`.
        place: of that sequence in a row.
        weights: as in `tokens_of`, of this sequence too.
    """
    told = None if weights is None else [row[place] for row in weights]
    answered: list[Scored] = []
    for number, row in enumerate(rows):
        ids = row.continuations[place]
        answered.append((torch.tensor(ids), number, _mask(len(ids), row.scored[place])))
    owners = [row.context_of[place] for row in rows]
    return Tokens(
        contexts=tuple(torch.tensor(row.contexts[owner]) for row, owner in zip(rows, owners, strict=True)),
        continuations=tuple(ids for ids, _, _ in answered),
        context_of=tuple(range(len(rows))),
        weights=_weights(answered, told),
        media=_told([row.media[owner] if row.media else None for row, owner in zip(rows, owners, strict=True)]),
    )


def _told(media: Sequence[Any | None]) -> tuple[Any | None, ...] | None:
    return None if all(one is None for one in media) else tuple(media)


def _mask(length: int, places: Sequence[int]) -> Tensor:
    mask = torch.zeros(length, dtype=torch.bool)
    mask[list(places)] = True
    return mask


def _from_difference(row: list[Scored], k: int) -> list[Scored]:
    """The row with what all its candidates begin with not scored; at least one token of each stays."""
    if k < 2 or len({owner for _, owner, _ in row[:k]}) > 1:
        return row
    common = first_difference([ids for ids, _, _ in row[:k]])
    found: list[Scored] = []
    for ids, owner, scored in row[:k]:
        places = scored.nonzero()[:, 0]
        kept = torch.arange(len(ids)) >= min(common, int(places[-1]))
        found.append((ids, owner, scored & kept))
    return found + row[k:]


def _weights(chosen: Sequence[Scored], told: Sequence[Sequence[float]] | None) -> tuple[Tensor, ...] | None:
    """1, or what is told of the scored tokens of the first sequences; 0 where a sequence is not scored."""
    if told is None and all(scored.numpy().all() for _, _, scored in chosen):
        return None
    weights = [scored.float() for _, _, scored in chosen]
    for (_, _, scored), weight, values in zip(chosen, weights, told or (), strict=False):
        behind = int(scored.sum())  # of what is told, the last ones: `score: difference` leaves the first out
        weight[scored] *= torch.tensor(values)[len(values) - behind :]
        if not weight.any():
            raise UserError(
                "adapter.token_weights: got weights of 0 for all scored tokens of an answer, want one above 0. Give it one, or "
                "filter the row."
            )
    return tuple(weights)


def _heads(chosen: Sequence[Scored], num_rows: int, k: int) -> tuple[int, ...]:
    """As many scored tokens as the row's shortest candidate has; further completions are all head."""
    counts = [int(scored.sum()) for _, _, scored in chosen]
    heads = (*shared_heads([counts[i * k : i * k + k] for i in range(num_rows)]), *counts[num_rows * k :])
    return tuple(int(scored.nonzero()[head - 1, 0]) + 1 for head, (_, _, scored) in zip(heads, chosen, strict=True))
