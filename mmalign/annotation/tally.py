"""Tally: the votes of a project in a store as ballots and as a dashboard, and the items that its votes ask for next."""

from mmalign.annotation.ballots import Ballot, dense, judged
from mmalign.annotation.dashboard import Dashboard, dashboard
from mmalign.annotation.items import Item
from mmalign.annotation.protocol import agrees
from mmalign.annotation.selection import in_random_slice, priorities
from mmalign.annotation.store import Store
from mmalign.annotation.votes import Vote
from mmalign.errors import UserError

MOST_PRIORITIES = 2000


def source_of(origin: dict[str, object]) -> str:
    """Who made a candidate, as its provenance tells: its source, generator, adapter or model; empty where none is named."""
    named = origin.get("source") or origin.get("generator")
    if named and named != origin.get("model"):
        return str(named)
    other = next((origin[key] for key in ("lora", "tuned", "model", "predictions") if origin.get(key)), named)
    return str(other or "")


def ballots_of(store: Store, project: int) -> list[Ballot]:
    """The latest votes of a project as ballots, in the order they were cast; those of the calibration round are left out.

    Args:
        store: it is read, a page in memory at a time, without images.
        project: its number.
    """
    share = store.project(project).protocol.random_share
    votes = [vote for vote in store.each_vote(project) if vote.kind != "calibration"]
    wanted = {vote.item for vote in votes}
    made = {item.id: _made(item) for item in store.items(project, media=False) if item.id in wanted}
    return [_ballot(vote, *made[vote.item], share) for vote in votes]


def _made(item: Item) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The sources of an item's candidates, where all are known, and their lengths in words, where they are texts."""
    row = item.comparison
    sources = tuple(source_of(origin) for origin in row.provenance)
    texts = not any(candidate.media() for candidate in row.candidates)
    lengths = tuple(len(candidate.words().split()) for candidate in row.candidates) if texts else ()
    return sources if all(sources) else (), lengths


def _ballot(vote: Vote, sources: tuple[str, ...], lengths: tuple[int, ...], share: float) -> Ballot:
    ranks = vote.ranks or ((1,) * vote.k if vote.choice == "both_bad" else None)
    return Ballot(
        item=str(vote.item),
        rater=vote.annotator,
        choice=vote.choice,
        ranks=None if ranks is None else tuple(map(float, dense(ranks))),
        strength=None if vote.strength is None else float(vote.strength),
        order=vote.order,
        sources=sources,
        lengths=lengths,
        right=None if vote.answer is None else agrees(vote.verdict, vote.answer),
        repeat=vote.repeats is not None,
        active=vote.kind == "active",
        strewn=vote.kind != "active" and in_random_slice(str(vote.item), random_share=share, seed=vote.project),
        seconds=None if vote.dwell_ms is None else vote.dwell_ms / 1000,
    )


def select(store: Store, project: int, *, most: int = MOST_PRIORITIES) -> int:
    """Ask for the pairs that the votes leave most uncertain, in place of those asked for before; return how many.

    Pairs of the random slice, a share `random_share` of the protocol, are never asked for: they come by the random draws alone,
    see `selection`. Worth calling again after every few dozen votes.

    Args:
        most: pairs asked for at once.

    Raises:
        UserError: a random_share of 0, which leaves nothing that statistics could rest on.
    """
    share = store.project(project).protocol.random_share
    if share == 0:
        raise UserError(
            "random_share: got 0, want more: without a random slice no unbiased number is left. Make a new project."
        )
    pairs: dict[str, tuple[str, ...]] = {}
    waiting = []
    for item in store.items(project, media=False):
        if item.role == "ordinary" and len(item.comparison.candidates) == 2:
            pairs[str(item.id)] = _made(item)[0]
            if item.slots_left > 0 and not in_random_slice(str(item.id), random_share=share, seed=project):
                waiting.append(str(item.id))
    cast = [(one.item, _share(one)) for one in judged(ballots_of(store, project)) if one.item in pairs]
    found = priorities(cast, pairs, waiting=waiting, random_share=0.0, seed=project)
    first = sorted(found, key=lambda pair: -found[pair])[:most]
    store.prioritise(project, {int(pair): found[pair] for pair in first})
    return len(first)


def _share(ballot: Ballot) -> float:
    return {"a": 0.0, "b": 1.0}.get(ballot.choice, 0.5)


def dashboard_of(store: Store, project: int, *, num_resamples: int = 200) -> Dashboard:
    """Say everything about the votes of a project in a store; worth keeping for a minute, since it reads every vote.

    Args:
        num_resamples: of the bootstrap intervals.
    """
    num_items = store.progress(project).items
    return dashboard(ballots_of(store, project), num_items=num_items, num_resamples=num_resamples, seed=project)
