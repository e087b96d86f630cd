"""Methods of `mmalign relabel`: rows without their media in, for every row what becomes of it out."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.curation.density_ratio import density_ratio as density_ratios
from mmalign.curation.edits import Edit, Relabelled, order_labels
from mmalign.curation.followup_labels import followups
from mmalign.curation.grounding import r3_reward
from mmalign.curation.judged import judged
from mmalign.curation.likelihood import likelihood
from mmalign.curation.order import best_and_worst, check_judges, known_judges, numbers_of
from mmalign.curation.reward_conditioning import GOAL, reward_conditioned
from mmalign.curation.self_labels import confidence_threshold, implicit_rewards, label_probs
from mmalign.curation.voting import denoised, preference_strength, standardised
from mmalign.records import PHI, Comparison, Dropped

Outcome = tuple[Edit, ...] | Dropped


def reward_augmented(rows: Sequence[Comparison], *, by: str, template: str = GOAL, check: str | None = None) -> Relabelled:
    """Every pair twice: asked for the chosen response's score, and, turned round, for that of the rejected one.

    Source: reward-augmented preference data (arXiv 2410.08067). Lists give their best and worst candidate's scores as goals, so
        only pairs are taken.

    Args:
        by: the judge whose scores are the goals; its order is the row's order.
        template: of the system prompt, a text with {score}; it should tell the scale.
        check: a second judge, say the mean of fine-grained ratings; rows in which it contradicts the first are left out.
    """
    check_judges(rows, [by] if check is None else [by, check])
    outcomes: list[Outcome] = []
    for row in rows:
        pair = _pair(row, by)
        if isinstance(pair, Dropped):
            outcomes.append(pair)
            continue
        chosen, rejected = pair
        scores = row.scores[by]
        if check is not None and (check not in row.scores or row.scores[check][chosen] < row.scores[check][rejected]):
            outcomes.append(Dropped(f"{check} does not agree with {by}"))
            continue
        outcomes.append(
            tuple(
                Edit(
                    suffix="#low" if turned else "#high",
                    system=system,
                    labels={**order_labels((chosen == 0) != turned), "margin": None},
                    note={"goal": scores[rejected if turned else chosen], "turned": turned},
                )
                for system, turned in reward_conditioned(scores[chosen], scores[rejected], template)
            )
        )
    return Relabelled(outcomes=outcomes)


def voting(
    rows: Sequence[Comparison],
    *,
    judges: tuple[str, ...] = (),
    flip: float = 0.0,
    labels: Literal["hard", "soft"] = "hard",
    temperature: float = 1.0,
    margin: bool = False,
    standardise: bool = False,
    order: str = "ranks",
) -> Relabelled:
    """Pairs turned, softened or given a margin by how strongly several judges vote for their label.

    mu = mean over judges of r(chosen) - r(rejected);  prob = sigma(mu / temperature);  margin = max(mu, 0)

    Source: Secrets of RLHF II (arXiv 2401.06080), ten reward models.

    Args:
        judges: who votes; none: all there are but the phi of `mmalign rank`.
        flip: share of all pairs, of lowest strength, that are turned where the judges lean against them. Published: about 0.2.
        labels: hard, or soft.
        temperature: of soft labels, in the judges' units.
        margin: give every pair a margin.
        standardise: bring judges of different units to one: each divided by the standard deviation of its scores.
        order: the label that is voted on: `ranks`, or a judge's name.
    """
    names = judges or tuple(judge for judge in known_judges(rows) if judge not in (PHI, order))
    check_judges(rows, names)
    pairs: dict[int, tuple[int, int]] = {}
    outcomes: list[Outcome] = []
    for place, row in enumerate(rows):
        pair = _pair(row, order)
        lacking = [name for name in names if name not in row.scores]
        outcomes.append(
            pair if isinstance(pair, Dropped) else Dropped(f"not judged by {', '.join(lacking)}" if lacking else "")
        )
        if not isinstance(pair, Dropped) and not lacking:
            pairs[place] = pair
    if not names or not pairs:
        return Relabelled(outcomes=outcomes)
    votes = torch.tensor([[rows[place].scores[name] for place in pairs] for name in names], dtype=torch.float64)
    if standardise:
        votes = standardised(votes.flatten(1)).reshape(votes.shape)
    mean, deviation = preference_strength(_column(votes, pairs, 0), _column(votes, pairs, 1))
    said = denoised(mean.tolist(), flip=flip, labels=labels, temperature=temperature, margin=margin)
    for place, one, mu, sd in zip(pairs, said, mean.tolist(), deviation.tolist(), strict=True):
        first = (pairs[place][0] == 0) != one.flipped
        soft = None if one.prob is None else one.prob if first else 1 - one.prob
        new = {**order_labels(first if soft is None else soft > 0.5, soft), **({"margin": one.margin} if margin else {})}
        note = {"strength": mu, "deviation": sd, "flipped": one.flipped, "judges": list(names)}
        outcomes[place] = (Edit(labels=new, note=note),)
    turned = sum(one.flipped for one in said)
    told = f"{len(pairs)} pairs voted on by {len(names)} judges, {turned} turned, {int((mean < 0).sum())} of negative strength"
    return Relabelled(outcomes=outcomes, told=(told,))


def density_ratio(
    rows: Sequence[Comparison], *, strong: str, weak: str, lengths: str | None = None, label: str = "density_ratio"
) -> Relabelled:
    """Candidates ranked by log p_strong - log p_weak, which is kept as a judge's scores.

    Source: CDR / DrSow (arXiv 2411.02481).

    Args:
        strong, weak: names under which the rows have each response's summed log-probability by an aligned model and by its base
            or SFT checkpoint, nats.
        lengths: name of the number of tokens under the strong model; None: sums.
        label: name of the new judge.
    """
    wanted = [one for one in (strong, weak, lengths) if one is not None]
    check_judges(rows, wanted)
    outcomes: list[Outcome] = []
    for row in rows:
        lacking = [one for one in wanted if one not in row.scores]
        if lacking:
            outcomes.append(Dropped(f"no {', '.join(lacking)}"))
            continue
        columns = [torch.tensor(row.scores[one], dtype=torch.float64) for one in wanted]
        outcomes.append((_ranked(label, tuple(density_ratios(*columns).tolist()), {"strong": strong, "weak": weak}),))
    return Relabelled(outcomes=outcomes)


def r3(
    rows: Sequence[Comparison],
    *,
    relevance: str,
    mode: Literal["open", "closed"] = "open",
    label: str = "r3",
) -> Relabelled:
    """Candidates ranked by a reward by rule, which is kept as a judge's scores.

    open: relevance * words / 100 * unique trigrams / trigrams;  closed: relevance * unique trigrams / trigrams

    Source: R3 (naver-ai/RRR), whose relevance is the dot product of a retriever's embeddings of prompt and response.

    Args:
        relevance: name under which the rows have each response's relevance.
        mode: open-ended questions; or closed ones, where length earns nothing.
        label: name of the new judge.
    """
    check_judges(rows, [relevance])
    outcomes: list[Outcome] = []
    for row in rows:
        if relevance not in row.scores:
            outcomes.append(Dropped(f"no {relevance}"))
            continue
        scores = tuple(
            r3_reward("", candidate.words(), relevance=partial(_given, found), mode=mode)
            for candidate, found in zip(row.candidates, row.scores[relevance], strict=True)
        )
        outcomes.append((_ranked(label, scores, {"relevance": relevance, "mode": mode}),))
    return Relabelled(outcomes=outcomes)


def _given(value: float, prompt: str, response: str) -> float:
    return value


def _ranked(label: str, scores: tuple[float, ...], note: dict[str, str]) -> Edit:
    """A new judge's scores, and the order that they give."""
    ranks = tuple(1.0 + sum(other > score for other in scores) for score in scores)
    return Edit(scores={label: scores}, labels={"ranks": ranks, "prob": None}, note=note)


def self_labels(
    rows: Sequence[Comparison],
    *,
    policy: str,
    reference: str,
    beta: float = 0.1,
    quantile: float = 0.1,
    smoothing: float = 0.1,
    label: str = "implicit_reward",
) -> Relabelled:
    """Pairs labelled by a policy's implicit rewards, softly where it is in doubt itself.

    reward = beta (log pi - log pi_ref);  prob = 1 above the threshold, else 1 - smoothing

    Source: SPA (ICLR 2025, arXiv 2406.04412). Its trainer looks at the last 50 margins as it goes; here all margins are known,
        so the threshold is the quantile of all of them.

    Args:
        policy, reference: names under which the rows have each response's summed log-probability, nats.
        beta: published 0.1.
        quantile: share of pairs in doubt. Published: 0.1.
        smoothing: of their labels. Published: 0.1.
        label: name of the judge as whom the rewards are kept.
    """
    confidence_threshold([0.0], quantile)  # settings are checked before rows
    label_probs([], 0.0, smoothing=smoothing)
    check_judges(rows, [policy, reference])
    outcomes: list[Outcome] = [_self_rewarded(row, policy, reference, beta, label) for row in rows]
    decided = {place: one[0].scores[label] for place, one in enumerate(outcomes) if not isinstance(one, Dropped)}
    if not decided:
        return Relabelled(outcomes=outcomes)
    margins = [abs(one - other) for one, other in decided.values()]
    threshold = confidence_threshold(margins, quantile)
    probs = label_probs(margins, threshold, smoothing=smoothing)
    for (place, (one, other)), prob, margin in zip(decided.items(), probs, margins, strict=True):
        edit = Edit(
            scores={label: (one, other)},
            labels=order_labels(one > other, prob if one > other else 1 - prob),
            note={"margin": margin, "threshold": threshold, "policy": policy, "reference": reference},
        )
        outcomes[place] = (edit,)
    doubted = sum(prob < 1 for prob in probs)
    return Relabelled(
        outcomes=outcomes, told=(f"{len(probs)} pairs labelled, {doubted} in doubt (margin up to {threshold:.4g})",)
    )


def _self_rewarded(row: Comparison, policy: str, reference: str, beta: float, label: str) -> Outcome:
    lacking = [one for one in (policy, reference) if one not in row.scores]
    if lacking or len(row.candidates) != 2:
        return Dropped(f"no {', '.join(lacking)}" if lacking else f"{len(row.candidates)} candidates, want 2")
    logps = torch.tensor([row.scores[policy], row.scores[reference]], dtype=torch.float64)
    one, other = implicit_rewards(logps[:1], logps[1:], beta)[0].tolist()
    return Dropped("tie") if one == other else (Edit(scores={label: (one, other)}),)


def ratings(rows: Sequence[Comparison], *, by: str, temperature: float = 1.0, margin: bool = False) -> Relabelled:
    """Soft labels of pairs from the gap of one judge's scores: prob = sigma((s_0 - s_1) / temperature).

    Source: Bradley and Terry (1952).

    Args:
        by: the judge.
        temperature: in the judge's units.
        margin: give every pair the gap as its margin too.
    """
    check_judges(rows, [by])
    plain = [replace(row, prob=None, ranks=None) for row in rows]
    made = voting(plain, judges=(by,), labels="soft", temperature=temperature, margin=margin, order=by)
    return replace(made, told=(f"mean prob of the better one {_mean_prob(made):.3f}",) if made.told else ())


def _mean_prob(made: Relabelled) -> float:
    probs = [one[0].labels["prob"] for one in made.outcomes if not isinstance(one, Dropped)]
    return fmean(max(prob, 1 - prob) for prob in probs)


def _pair(row: Comparison, by: str) -> tuple[int, int] | Dropped:
    if len(row.candidates) != 2:
        return Dropped(f"{len(row.candidates)} candidates, want 2; `mmalign pairs` makes pairs of lists")
    values = numbers_of(row, by)
    return values if isinstance(values, Dropped) else best_and_worst(row, by)


def _column(
    votes: Float[Tensor, "judges n 2"], pairs: dict[int, tuple[int, int]], which: Literal[0, 1]
) -> Float[Tensor, "judges n"]:
    places = torch.tensor([pair[which] for pair in pairs.values()])
    return votes.gather(2, places.expand(len(votes), -1)[..., None])[..., 0]


RELABELS: dict[str, Callable[..., Relabelled]] = {
    "reward_augmented": reward_augmented,
    "voting": voting,
    "ratings": ratings,
    "density_ratio": density_ratio,
    "r3": r3,
    "self_labels": self_labels,
    "judge": judged,
    "likelihood": likelihood,
    "followups": followups,
}
