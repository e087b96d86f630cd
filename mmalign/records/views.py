"""Views: a comparison becomes the examples one kind of loss sees, samples best first. Ties are never won by position."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from mmalign.errors import UserError
from mmalign.records.clips import Corruption, corrupted
from mmalign.records.rows import Comparison, Content, Dropped, Example, Sample
from mmalign.records.verdicts import Pairs, paired, phi_of, scores_of, thinned, too_few, values_of

# What an absent side value means, for batches in which only some rows have it.
SIDE_DEFAULTS = {"prob": 1.0, "weight": 1.0, "margin": 0.0, "beta_scale": 1.0}
Ties = Literal["drop", "soft"]
Side = dict[str, float | tuple[float, ...]]


def pair(
    row: Comparison,
    *,
    by: str = "auto",
    ties: Ties = "drop",
    min_gap: float = 0.0,
    pairs: Pairs = "best_worst",
    margin: Literal["row", "gap"] = "row",
    prob: Literal["row", "gap"] = "row",
    temperature: float = 1.0,
    with_scores: bool = False,
) -> tuple[Example, ...] | Dropped:
    """Pairs (better, worse) with side data prob, weight and margin where the row has them.

    A tie is p = 0.5. It is dropped, or kept as a soft label; which of the two stands first then does not matter to a
    loss that honours prob. With soft ties every example carries prob, so that batches are uniform.

    Args:
        by: which judgement orders the candidates: `ranks` (prob included), a judge's name, or `auto`: ranks or prob if
            the row has them, else its only judge.
        ties: `drop`, or `soft` (prob 0.5).
        min_gap: score gaps below this are ties; in the judge's units. For scores only.
        pairs: the best against the worst candidate, the best against each other one, neighbours in the order, or all.
        margin: the row's own; or `gap`: s_better - s_worse, in the judge's units.
        prob: the row's own; or `gap`: sigma((s_better - s_worse) / temperature), for every pair; a tie stays 0.5.
        temperature: of `prob: gap`, in the judge's units.
        with_scores: side data `scores` = (s_better, s_worse) as well, in the judge's units.

    Gaps are those of the scores by `by`, or by the only judge where ranks order the row. Where ranks and scores disagree, a
    prob of the gap is below 0.5, and a margin of the gap would be negative: such a pair is left out.

    Raises:
        UserError: `auto` with several judges and no ranks, or whose scores are wanted; min_gap with ranks; a temperature
            that is not positive.
    """
    if not temperature > 0:
        raise UserError(f"view: got temperature {temperature}, want a positive number, in the judge's units.")
    found = _unusable(row) or _pairs(row, by, ties, min_gap, pairs)
    wanted = "gap" in (margin, prob) or with_scores
    scores = scores_of(row, by) if wanted and not isinstance(found, Dropped) else None
    if isinstance(found, Dropped) or isinstance(scores, Dropped):
        return found if isinstance(found, Dropped) else Dropped("no scores whose gap is wanted")
    examples = []
    for better, worse, side in found:
        tie = side.get("prob") == 0.5
        gap = 0.0 if tie or scores is None else scores[better] - scores[worse]
        if margin == "gap":
            if gap < 0:
                continue
            side["margin"] = gap
        if prob == "gap":
            side["prob"] = _sigmoid(gap / temperature)
        if with_scores and scores is not None:
            side["scores"] = (scores[better], scores[worse])
        examples.append(_example(row, (better, worse), side, "" if pairs == "best_worst" else f"#{better}-{worse}"))
    return tuple(examples) or Dropped("scores against the ranks")


def joint(
    row: Comparison, *, by: str = "auto", ties: Ties = "drop", min_gap: float = 0.0, pairs: Pairs = "best_worst"
) -> tuple[Example, ...] | Dropped:
    """Pairs as `pair`, of which each candidate may answer a prompt of its own: prompt and answer are preferred together.

    Source: DOVE (arXiv 2404.00530). For losses of the measure `joint`, which scores the prompt too.

    Args:
        by, ties, min_gap, pairs: as in `pair`.
    """
    found = too_few(row) or _pairs(row, by, ties, min_gap, pairs)
    if isinstance(found, Dropped):
        return found
    return tuple(_example(row, (b, w), side, "" if pairs == "best_worst" else f"#{b}-{w}") for b, w, side in found)


def step(
    row: Comparison, *, by: str = "auto", ties: Ties = "drop", min_gap: float = 0.0, pairs: Pairs = "best_worst"
) -> tuple[Example, ...] | Dropped:
    """Pairs as `pair`, of single steps of a solution: after the row's prefix, and without the end of a turn.

    Source: Step-DPO (arXiv 2406.18629): the verified steps are context, the first wrong step is rejected.

    Args:
        by, ties, min_gap, pairs: as in `pair`.
    """
    examples = pair(row, by=by, ties=ties, min_gap=min_gap, pairs=pairs)
    if isinstance(examples, Dropped):
        return examples
    return tuple(replace(e, samples=tuple(replace(s, ends_turn=False) for s in e.samples)) for e in examples)


def ranked(
    row: Comparison, *, by: str = "auto", num_candidates: int | None = None, raw_scores: bool = False
) -> tuple[Example, ...] | Dropped:
    """All k candidates, best first, with side data `scores` = phi in [0, 1].

    phi_i = (wins of i over the other k - 1 candidates, summed over n judges, a tie is half a win) / (n (k - 1))

    Source: RankDPO (arXiv 2410.18013), preference score; the half win for ties is ours. The raw scores stay in the row.

    Args:
        by: `auto`: the phi that `mmalign rank` kept in the row, else that of all judges' scores, else that of the ranks;
            `ranks`; or one judge's name.
        num_candidates: k of every example. Rows with more are thinned evenly from best to worst, phi unchanged; rows
            with fewer are dropped. None keeps each row's k.
        raw_scores: scores are those of the judge `by`, or of the only one, in its own units, which then order the row: for
            losses whose targets are made of rewards (info_nca, lipo, odpo).

    A row whose scores are all equal teaches nothing and is dropped as a tie.

    Raises:
        UserError: num_candidates below 2; `auto` with several judges and no ranks, or whose raw scores are wanted.
    """
    if num_candidates is not None and num_candidates < 2:
        raise UserError(f"view: got num_candidates {num_candidates}, want 2 or more, or null for all candidates of a row.")
    scores = _unusable(row) or (scores_of(row, by) if raw_scores else phi_of(row, by))
    if isinstance(scores, Dropped):
        return scores
    k = len(scores)
    if len(set(scores)) == 1:
        return Dropped("tie")
    order = sorted(range(k), key=lambda i: -scores[i])
    if num_candidates is not None:
        if k < num_candidates:
            return Dropped(f"{k} candidates, want {num_candidates}")
        order = thinned(order, num_candidates)
    return (_example(row, order, {"scores": tuple(scores[i] for i in order)}),)


def unpaired(
    row: Comparison,
    *,
    by: str = "auto",
    positive: Literal["best", "ever"] = "best",
    ties: Literal["drop", "positive", "negative"] = "drop",
    min_gap: float = 0.0,
    ends_turn: bool = True,
) -> tuple[Example, ...] | Dropped:
    """Each candidate alone, with side data `labels` = 1 (wanted) or 0 (unwanted).

    Source: Diffusion-KTO (NeurIPS 2024): an image is wanted if it ever won.

    Args:
        by: as in `pair`.
        positive: 1 for the best candidates only, or for each that beat another one. The same for pairs.
        ties: what a row becomes whose candidates are all equal: dropped, all 1, or all 0.
        min_gap: as in `pair`.
        ends_turn: False for candidates that are steps of a solution, after which the end of a turn is not scored.

    A candidate that stands alone is 1 if its score (a label of the importers `single_images` and `trl`) is above 0.
    """
    judged = values_of(row, by, min_gap) if row.candidates else Dropped("0 candidates")
    if isinstance(judged, Dropped):
        return judged
    values, _ = judged
    if len(values) == 1:
        return (_example(row, (0,), {"labels": float(values[0] > 0)}, ends_turn=ends_turn),)
    low, high = min(values), max(values)
    tie = high == low or high - low < min_gap
    if tie and ties == "drop":
        return Dropped("tie")

    def label(value: float) -> float:
        if tie:
            return float(ties == "positive")
        against = high if positive == "best" else low
        gap = max(min_gap, 0.0)
        if positive == "best":
            return float(against - value == 0 or against - value < gap)
        return float(value - against > 0 and value - against >= gap)

    return tuple(_example(row, (i,), {"labels": label(v)}, f"#{i}", ends_turn) for i, v in enumerate(values))


def best(row: Comparison, *, by: str = "auto", ties: Literal["drop", "all"] = "drop") -> tuple[Example, ...] | Dropped:
    """The best candidate alone, for supervised fine-tuning and as an expert; that of a single image is itself.

    Args:
        by: as in `pair`.
        ties: with several best candidates drop the row, or make one example of each of them.
    """
    if len(row.candidates) == 1:
        return (_example(row, (0,), {}),)
    judged = values_of(row, by, 0.0) if row.candidates else Dropped("0 candidates")
    if isinstance(judged, Dropped):
        return judged
    values, _ = judged
    winners = [i for i, v in enumerate(values) if v == max(values)]
    if len(winners) > 1 and ties == "drop":
        return Dropped("tie")
    return tuple(_example(row, (i,), {}, f"#{i}" if len(winners) > 1 else "") for i in winners)


def reward_weighted(
    row: Comparison, *, by: str = "auto", temperature: float = 1.0, baseline: float | None = None
) -> tuple[Example, ...] | Dropped:
    """Each candidate alone, with side data `weight` that grows with its score: reward-weighted fine-tuning with loss `sft`.

    weight = exp((score - baseline) / temperature);  without a baseline the weights of a prompt's k candidates have mean 1:
    k exp(score / temperature) / sum of exp(score / temperature)

    Source: Peters & Schaal 2007 (reward-weighted regression). The mean of 1 within a prompt is ours.

    Args:
        by: the judge whose scores count; `auto`: the only one.
        temperature: in the judge's units; the smaller, the more the best images count alone.
        baseline: the score of weight 1, in the judge's units. None: see above; single images need one.

    Raises:
        UserError: a temperature that is not positive; `auto` with several judges; single images without a baseline; a weight
            too large for a number.
    """
    if not temperature > 0:
        raise UserError(f"view: got temperature {temperature}, want a positive number, in the judge's units.")
    judged = values_of(replace(row, ranks=None, prob=None), by, 0.0) if row.candidates else Dropped("0 candidates")
    if isinstance(judged, Dropped):
        return judged
    values, _ = judged
    if baseline is None and len(values) == 1:
        raise UserError(
            f"{row.where or row.id}: got a single image and no baseline, so that its weight would be 1 whatever its score. Set "
            "the view's baseline to a typical score."
        )
    level = max(values) if baseline is None else baseline
    try:
        weights = [math.exp((value - level) / temperature) for value in values]
    except OverflowError as fault:
        raise UserError(
            f"{row.where or row.id}: the score {max(values):g} has a weight too large for a number. Raise the view's "
            f"temperature ({temperature:g}) or baseline ({level:g})."
        ) from fault
    factor = (len(values) / sum(weights) if baseline is None else 1.0) * (1.0 if row.weight is None else row.weight)
    plain = replace(row, weight=None)
    several = len(values) > 1
    return tuple(
        _example(plain, (i,), {"weight": factor * weight}, f"#{i}" if several else "") for i, weight in enumerate(weights)
    )


def prompts(row: Comparison) -> tuple[Example, ...]:
    """The prompt alone, for sources that make their own samples; candidates are not looked at."""
    sample = Sample(prompt=row.prompt, completion=Content())
    return (Example(id=row.id, samples=(sample,)),)


def blind(row: Comparison, *, by: str = "auto", num_candidates: int | None = None) -> tuple[Example, ...] | Dropped:
    """The best candidate, the worse ones, and last the blind one, which was made without seeing the image: for `blind_bpo`.

    Which one is blind, its provenance says: `{"source": "blind"}`, as `mmalign blind` writes it; its rank does not count. Side
    data `blind` = 1 tell the metrics of a run that the last candidate is a blind one.

    Source: Blind PO (arXiv 2503.14189).

    Args:
        by: what orders the others, as in `pair`.
        num_candidates: of every example, the blind one too: 3 are the paper's. Rows with more are thinned evenly from best to
            worst; rows with fewer are dropped. None keeps each row's.

    A row with several blind candidates makes an example of each of them.

    Raises:
        UserError: num_candidates below 3; as `pair`.
    """
    if num_candidates is not None and num_candidates < 3:
        raise UserError(
            f"view: got num_candidates {num_candidates}, want 3 or more (chosen, rejected, blind), or null for all."
        )
    made = [i for i, origin in enumerate(row.provenance) if origin.get("source") == "blind"]
    if not made:
        return Dropped("no blind candidate, want one made by mmalign blind")
    seeing = [i for i in range(len(row.candidates)) if i not in made]
    order = _best_and_worse(row, seeing, by)
    if isinstance(order, Dropped):
        return order
    if num_candidates is not None:
        if len(order) + 1 < num_candidates:
            return Dropped(f"{len(order) + 1} candidates, want {num_candidates}")
        order = thinned(order, num_candidates - 1)
    suffix = len(made) > 1
    return tuple(_example(row, (*order, i), {"blind": 1.0}, f"#{i}" if suffix else "") for i in made)


def crossed(row: Comparison) -> tuple[Example, ...] | Dropped:
    """Candidates in the row's order, each with the prompt it answers: for losses that score it under another's prompt too.

    Source: S-VCO (two responses, each right for its own image); SymMPO (the same of two similar images, and a rejected
        response to the first image).

    The first two candidates answer prompts of their own; a third one most often answers the first prompt.
    """
    if row.prompts is None:
        return Dropped("one prompt for all candidates, want prompts, one each")
    return too_few(row) or (_example(row, range(len(row.candidates)), {}),)


def retrieved(row: Comparison, *, by: str = "auto") -> tuple[Example, ...] | Dropped:
    """A pair under the row's own prompt, and as `degraded` the better candidate once more under another prompt's image.

    Source: Re-Align, whose other image is a similar one that was retrieved.

    The row has a candidate that says the same as an earlier one and answers a prompt of its own (`prompts`); its rank does not
    count.

    Args:
        by: as in `pair`.
    """
    said = [candidate.words() for candidate in row.candidates]
    copies = [i for i, words in enumerate(said) if words in said[:i]]
    if row.prompts is None or len(copies) != 1:
        return Dropped("not one candidate repeated under a prompt of its own")
    order = _best_and_worse(row, [i for i in range(len(said)) if i not in copies], by)
    if isinstance(order, Dropped):
        return order
    if said[order[0]] != said[copies[0]]:
        return Dropped("a repeated candidate that is not the better one")
    example = _example(row, (order[0], order[-1]), {})
    (again,) = _example(row, copies, {}).samples
    return (replace(example, extras={**example.extras, "degraded": again}),)


def clips(
    row: Comparison, *, by: str = "auto", how: Corruption = "shuffle", magnitude: int = 4
) -> tuple[Example, ...] | Dropped:
    """A pair under the row's video, and as `degraded` the better answer once more under the video with its clips corrupted.

    For losses with a preference of images (`mdpo`, `image_preference`), which the order of events then decides. TEMPLE itself
    makes rejected answers under such videos: `mmalign blind` with `degradation: clips`, and the view `pair`.

    Source: TEMPLE (arXiv 2503.16929), whose corruptions these are, the same in every epoch. Frames stand for clips.

    Args:
        by: as in `pair`.
        how: drop keeps one frame in `magnitude`, at random; reverse and shuffle move groups of frames.
        magnitude: groups that the frames make. Published: 16, 8, 4, 2, one stage of training each.

    Videos are several images of one message; a video in one file is not taken apart here (`adapter.degradation: clips` does).

    Raises:
        UserError: a magnitude below 2; as `pair`.
    """
    if magnitude < 2:
        raise UserError(f"view: got magnitude {magnitude}, want 2 or more; published: 16, 8, 4, 2.")
    prompt = corrupted(row.prompt, how, magnitude, row.id)
    found = Dropped("no video, want several images of one message") if prompt is None else pair(row, by=by)
    if prompt is None or isinstance(found, Dropped):
        return found
    return tuple(
        replace(example, extras={**example.extras, "degraded": replace(example.samples[0], prompt=prompt)}) for example in found
    )


def _best_and_worse(row: Comparison, places: Sequence[int], by: str) -> list[int] | Dropped:
    """The best of some candidates, then the others, best first; with several best ones it is a tie."""
    if len(places) < 2:
        return Dropped(f"{len(places)} candidates to compare, want 2 or more")
    part = replace(
        row,
        candidates=tuple(row.candidates[i] for i in places),
        ranks=None if row.ranks is None else tuple(row.ranks[i] for i in places),
        scores={judge: tuple(values[i] for i in places) for judge, values in row.scores.items()},
    )
    judged = values_of(part, by, 0.0)
    if isinstance(judged, Dropped):
        return judged
    values = dict(zip(places, judged[0], strict=True))
    order = sorted(places, key=lambda i: -values[i])
    return order if values[order[1]] < values[order[0]] else Dropped("tie")


def _unusable(row: Comparison) -> Dropped | None:
    """Return why a row is none for likelihoods given one prompt, if so."""
    # Images are not looked at: prompts that have some, one a candidate, are taken to differ.
    if row.prompts is not None and any(prompt != row.prompts[0] or prompt.media() for prompt in row.prompts):
        return Dropped("a prompt of its own for each candidate, want the view joint")
    return too_few(row)


def _pairs(row: Comparison, by: str, ties: Ties, min_gap: float, pairs: Pairs) -> list[tuple[int, int, Side]] | Dropped:
    """Return (better, worse, side data) of each pair that is no dropped tie."""
    judged = values_of(row, by, min_gap)
    if isinstance(judged, Dropped):
        return judged
    values, soft = judged
    found = []
    for better, worse in paired(sorted(range(len(values)), key=lambda i: -values[i]), pairs):
        gap = values[better] - values[worse]
        tie = gap == 0 or gap < min_gap
        if tie and ties == "drop":
            continue
        side: Side = {}
        if tie:
            side["prob"] = 0.5
        elif soft is not None or ties == "soft":
            side["prob"] = 1.0 if soft is None else max(soft, 1 - soft)
        if row.margin is not None:
            side["margin"] = 0.0 if tie else row.margin
        found.append((better, worse, side))
    return found or Dropped("tie")


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def _example(row: Comparison, order: Sequence[int], side: Side, suffix: str = "", ends_turn: bool = True) -> Example:
    def sample(prompt: Content, completion: Content, ends_turn: bool = True) -> Sample:
        return Sample(prompt=prompt, completion=completion, prefix=row.prefix, ends_turn=ends_turn)

    own = {"weight": row.weight, "beta_scale": row.beta_scale}
    return Example(
        id=row.id + suffix,
        samples=tuple(sample(row.prompt_of(i), row.candidates[i], ends_turn) for i in order),
        side=side | {name: value for name, value in own.items() if value is not None},
        extras={name: sample(row.prompt, content) for name, content in row.extras.items()},
    )


VIEWS: dict[str, Callable[..., tuple[Example, ...] | Dropped]] = {
    "pair": pair,
    "joint": joint,
    "step": step,
    "ranked": ranked,
    "unpaired": unpaired,
    "best": best,
    "reward_weighted": reward_weighted,
    "blind": blind,
    "crossed": crossed,
    "retrieved": retrieved,
    "clips": clips,
    "prompts": prompts,
}
