"""Before and after training, judged blind: two output folders become pairs, and their votes a win rate with its interval."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.annotation.ballots import Ballot, by_item, judged
from mmalign.annotation.pooling import pooled
from mmalign.errors import UserError
from mmalign.records import Comparison, Content, comparison, read

if TYPE_CHECKING:
    from mmalign.statistics import WinRate

BEFORE, AFTER = "before", "after"
Key = tuple[str, str, Any]
Made = tuple[Content, Content, dict[str, Any]]


def comparisons_of(before: str | Path, after: str | Path) -> Iterator[Comparison]:
    """Yield a pair for each prompt and seed of two output folders of `mmalign generate` or `mmalign answer`.

    The first candidate is the one before; who judges sees neither, since sides are drawn anew for every showing. The
    provenance tells `source: before` or `after`, which rankings and `blind_win_rate` go by. Where both made the same, the
    store has nothing to ask and says so.

    Args:
        before, after: folders, or files of comparisons, made from the same prompts with the same seeds.

    Raises:
        UserError: a candidate without a seed, a prompt and seed given twice, or one that the other side lacks.
    """
    old, new = _made(before), _made(after)
    for name, present, absent in (("after", old, new), ("before", new, old)):
        missing = [key for key in present if key not in absent]
        if missing:
            words = present[missing[0]][0].words()
            raise UserError(
                f"{name}: got nothing for {len(missing)} of {len(present)} prompts and seeds, the first {words[:80]!r} with "
                f"seed {missing[0][2]}. Make both sides from the same prompts with the same seeds."
            )
    for number, (key, (prompt, candidate, origin)) in enumerate(old.items(), 1):
        _, other, other_origin = new[key]
        yield Comparison(
            id=f"{number:06d}-{key[2]}",
            prompt=prompt,
            candidates=(candidate, other),
            provenance=({**origin, "source": BEFORE}, {**other_origin, "source": AFTER}),
        )


def _made(place: str | Path) -> dict[Key, Made]:
    """(hash and words of the prompt, seed) -> prompt, candidate and provenance."""
    found: dict[Key, Made] = {}
    for entry in read(place, least=1):
        row = comparison(entry, least=1)
        origins = row.provenance or ({},) * len(row.candidates)
        for number, (candidate, origin) in enumerate(zip(row.candidates, origins, strict=True), 1):
            where = f"{row.where or row.id}: candidate {number}"
            if not isinstance(origin.get("seed"), int | str):
                raise UserError(
                    f"{where}: got no seed in its provenance, want one to pair it by. What `mmalign generate` and "
                    "`mmalign answer` make carries it."
                )
            prompt = row.prompt_of(number - 1)
            key = (prompt.key(), prompt.words(), origin["seed"])
            if key in found:
                raise UserError(f"{where}: got its prompt with seed {key[2]} again, want it once. Remove the copy.")
            found[key] = (prompt, candidate, origin)
    return found


def blind_win_rate(ballots: Iterable[Ballot]) -> "WinRate | None":
    """How often the candidate after training was preferred, by item; None where nothing of the kind was judged.

    An item is won, lost or tied by the majority of its votes; both bad is a tie, and counts as half, as a tie does. The
    interval is Wilson's over items: the votes on one item are no independent evidence.
    """
    import torch

    from mmalign.statistics import win_rate

    kept = [one for one in judged(ballots) if sorted(one.sources) == [AFTER, BEFORE]]
    gains = []
    for own in by_item(kept).values():
        verdict, place = pooled(own), own[0].sources.index(AFTER)
        prob = 0.5 if verdict.prob is None else verdict.prob
        gains.append(prob - 0.5 if place == 0 else 0.5 - prob)
    if not gains:
        return None
    after = torch.tensor(gains, dtype=torch.float64)
    return win_rate(torch.zeros_like(after), after)
