"""Pairs labelled by a judge that sees each of them in both orders, with its verdicts on disk as they come."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from tqdm import tqdm

from mmalign.config import Choice, Table, resolved
from mmalign.curation.edits import Edit, Relabelled, order_labels
from mmalign.curation.judging import PairJudge, Verdicts, both_orders
from mmalign.curation.memory import Memory, key_of
from mmalign.curation.texts import spoken
from mmalign.errors import UserError
from mmalign.records import Comparison, Dropped
from mmalign.records.table import in_batches

NOT_PART_OF_THE_VERDICT = ("batch_size", "device")  # settings that change speed only


def judged(
    rows: Sequence[Comparison],
    journal: Path | None = None,
    *,
    judge: Annotated[Choice, Table("mmalign.curation:JUDGES")],
    soft: bool = False,
    inconsistent: Literal["drop", "tie"] = "drop",
    own: str | None = None,
    group: int = 64,
) -> Relabelled:
    """Pairs labelled by a judge in both orders.

    prob = (P(a better | a, b shown) + P(a better | b, a shown)) / 2

    Source: Judging LLM-as-a-Judge (arXiv 2306.05685), position swap; self-preference: DBG (arXiv 2506.02592).

    Args:
        journal: where verdicts are kept as they are given, so that an interrupted run goes on. Not a setting.
        judge: a name of JUDGES with its settings.
        soft: keep prob as a soft label.
        inconsistent: what becomes of a pair on which the two orders disagree: `drop`, or `tie` (prob 0.5).
        own: name under `model` in the provenance of responses that the judge wrote itself. Rows with one such response and a
            label measure its self-preference: its probability for its own response minus that of the label.
        group: pairs judged between two writes of the journal.

    Raises:
        UserError: settings without a meaning, a model that cannot be opened or asked, a journal that cannot be read.
    """
    if group < 1:
        raise UserError(f"group: got {group}, want 1 or more.")
    asked: PairJudge = judge.build()
    memory = Memory(journal=journal, judge=asked.name, settings=_settings(judge))
    pairs = [row for row in rows if len(row.candidates) == 2]
    known = memory.known()
    due = list({key: row for row in pairs if (key := key_of(row)) not in known}.values())
    for some in tqdm(list(in_batches(due, group)), desc="judge", unit="group", disable=None):
        verdicts = _asked(asked, some)
        both = zip(verdicts.forward.tolist(), verdicts.backward.tolist(), strict=True)
        details = [{"forward": forward, "backward": backward} for forward, backward in both]
        known |= memory.add(some, [(prob, 1 - prob) for prob in verdicts.prob.tolist()], details)
    said = {key: (float(one["forward"]), float(one["backward"])) for key, one in known.items()}
    outcomes: list[tuple[Edit, ...] | Dropped] = []
    for row in rows:
        if len(row.candidates) != 2:
            outcomes.append(Dropped(f"{len(row.candidates)} candidates, want 2; `mmalign pairs` makes pairs of lists"))
        else:
            outcomes.append(_outcome(asked.name, *said[key_of(row)], soft=soft, inconsistent=inconsistent))
    return Relabelled(outcomes=outcomes, told=_told(pairs, said, own, len(due)))


def _asked(judge: PairJudge, rows: Sequence[Comparison]) -> Verdicts:
    prompts = [spoken(row.prompt) for row in rows]
    texts = [[row.candidates[place].words() for row in rows] for place in (0, 1)]
    verdicts = both_orders(judge, prompts, *texts)
    for name, values in (("forward", verdicts.forward), ("backward", verdicts.backward)):
        wrong = [row for row, value in zip(rows, values.tolist(), strict=True) if not 0 <= value <= 1]
        if wrong:
            raise UserError(f"{wrong[0].where or wrong[0].id}: got no probability from {judge.name} ({name}), want 0 to 1.")
    return verdicts


def _outcome(name: str, forward: float, backward: float, *, soft: bool, inconsistent: str) -> tuple[Edit, ...] | Dropped:
    prob = (forward + backward) / 2
    note = {"judge": name, "forward": forward, "backward": backward}
    if (forward - 0.5) * (backward - 0.5) <= 0:
        if inconsistent == "drop":
            return Dropped(f"{name} says another one in the other order")
        return (Edit(labels=order_labels(True, 0.5), note=note),)
    return (Edit(labels=order_labels(prob > 0.5, prob if soft else None), note=note),)


def _told(
    rows: Sequence[Comparison], known: dict[str, tuple[float, float]], own: str | None, num_asked: int
) -> tuple[str, ...]:
    if not rows:
        return ()
    numbers = torch.tensor([known[key_of(row)] for row in rows], dtype=torch.float64)
    verdicts = Verdicts(forward=numbers[:, 0], backward=numbers[:, 1])
    told = [
        f"{num_asked} pairs judged in both orders, {len(rows) - num_asked} kept from before",
        f"same verdict in both orders: {float(verdicts.consistent.double().mean()):.1%}; "
        f"the response shown first gains {verdicts.position_bias:+.3f}",
    ]
    if own is not None:
        biases = [bias for row, prob in zip(rows, verdicts.prob.tolist(), strict=True) for bias in _bias(row, prob, own)]
        mean = f"{sum(biases) / len(biases):+.3f}" if biases else "not measured"
        told.append(f"self-preference (DBG): {mean} over {len(biases)} labelled pairs with one response of {own}")
    return tuple(told)


def _bias(row: Comparison, prob: float, own: str) -> list[float]:
    """The judge's probability for its own response minus that of the label, where there are both; else nothing."""
    models = [origin.get("model") for origin in row.provenance]
    if models.count(own) != 1:
        return []
    if row.prob is not None:
        gold = row.prob
    elif row.ranks is not None:
        gold = 0.5 + 0.5 * ((row.ranks[0] < row.ranks[1]) - (row.ranks[0] > row.ranks[1]))
    else:
        return []
    return [prob - gold if models[0] == own else gold - prob]


def _settings(judge: Choice) -> dict[str, Any]:
    kept = {name: value for name, value in judge.settings.items() if name not in NOT_PART_OF_THE_VERDICT}
    plain: dict[str, Any] = resolved({"judge": judge.name, **kept})
    return plain
