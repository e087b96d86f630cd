"""People who judge over HTTP as the page does, and the count of their votes in the store."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from mmalign.annotation.store import Store

TWICE_EVERY = 5
RETRY_S = 0.1
PATIENCE_S = 60.0


class GateError(Exception):
    """A vote was lost or doubled: nothing may be timed."""


@dataclass
class Person:
    """One client.

    Args:
        cast: assignment -> the verdict that was sent and answered as stored or as a duplicate.
        waits: ms from sending a vote to its answer, which names what is next.
        refused: answers that were neither.
    """

    url: str
    cookies: dict[str, str]
    project: int
    number: int
    cast: dict[str, str] = field(default_factory=dict)
    waits: list[float] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    duplicates: int = 0


async def judge_until_told(person: Person, *, num_votes: int) -> None:
    """Cast so many votes; what is not answered is sent again until it is, as the page does."""
    async with _client(person) as client:
        headers, state = await _opened(client, person)
        while len(person.cast) < num_votes and (shown := state["current"]) is not None:
            state = await _judge(client, headers, person, shown)


async def judge_for(person: Person, seconds: float, *, think_s: float) -> None:
    """Judge until the time is over, with pauses of about `think_s`, and fetch the images of what comes next meanwhile."""
    chance = random.Random(person.number)
    async with _client(person) as client:
        headers, state = await _opened(client, person)
        await asyncio.sleep(chance.random() * think_s)
        until = time.perf_counter() + seconds
        while time.perf_counter() < until and (shown := state["current"]) is not None:
            if think_s:
                await _fetch(client, state["ahead"])
                await asyncio.sleep(think_s * (0.5 + chance.random()))
            state = await _judge(client, headers, person, shown)


def _client(person: Person) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=person.url, cookies=person.cookies, timeout=30.0)


async def _opened(client: httpx.AsyncClient, person: Person) -> tuple[dict[str, str], dict[str, Any]]:
    session = (await _patiently(client, "GET", "/api/session")).json()
    headers = {"x-csrf-token": session["csrf"], "origin": person.url}
    return headers, (await _patiently(client, "GET", f"/api/projects/{person.project}/next")).json()


async def _judge(client: httpx.AsyncClient, headers: dict[str, str], person: Person, shown: dict[str, Any]) -> dict[str, Any]:
    """Vote on what is shown, some votes twice, and return what is next."""
    place = f"/api/projects/{person.project}"
    told = {"assignment": shown["assignment"]}
    await _patiently(client, "POST", f"{place}/displayed", json=told, headers=headers)
    choice = ("left", "right", "tie", "both_bad")[ord(shown["assignment"][0]) % 4]
    body = {**told, "revision": shown["revision"], "choice": choice, "dwell_ms": 900}
    start = time.perf_counter()
    reply = (await _patiently(client, "POST", f"{place}/vote", json=body, headers=headers)).json()
    person.waits.append(1000 * (time.perf_counter() - start))
    if reply["status"] == "refused":
        person.refused.append(reply["reason"])
    else:
        person.cast[shown["assignment"]] = choice
    if len(person.cast) % TWICE_EVERY == 0:
        again = {**body, "choice": "left" if choice != "left" else "right"}
        echo = (await _patiently(client, "POST", f"{place}/vote", json=again, headers=headers)).json()
        person.duplicates += echo["status"] == "duplicate"
        if echo["status"] != "duplicate":
            raise GateError(f"a vote that was sent twice was answered {echo['status']} the second time.")
        return dict(echo)
    return dict(reply)


async def _patiently(client: httpx.AsyncClient, method: str, path: str, **what: Any) -> httpx.Response:
    """Send until there is an answer: a server that was killed comes back."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            reply = await client.request(method, path, **what)
            reply.raise_for_status()
            return reply
        except httpx.TransportError:
            if time.monotonic() > until:
                raise
            await asyncio.sleep(RETRY_S)


async def _fetch(client: httpx.AsyncClient, shown: dict[str, Any] | None) -> None:
    for key in _media(shown):
        (await _patiently(client, "GET", key)).read()


def _media(value: Any) -> list[str]:
    """Addresses of media in what is shown."""
    if isinstance(value, dict):
        return [one for inner in value.values() for one in _media(inner)]
    if isinstance(value, list):
        return [one for inner in value for one in _media(inner)]
    return [value] if isinstance(value, str) and value.startswith("/media/") else []


def counted(store: Path, project: int, people: list[Person]) -> dict[str, Any]:
    """Hold what is stored against what people cast.

    Raises:
        GateError: a vote that was answered is not there, is another one, is there twice, or nobody cast it.
    """
    opened = Store.open(str(store))
    try:
        votes = opened.votes(project, latest=False)
        items = {item.id: item.want for item in opened.items(project, media=False)}
    finally:
        opened.close()
    cast = {assignment: choice for person in people for assignment, choice in person.cast.items()}
    stored = Counter(vote.assignment for vote in votes)
    doubled = [one for one, count in stored.items() if count > 1]
    once = Counter((vote.item, vote.annotator) for vote in votes if vote.repeats is None)
    lost = [one for one in cast if one not in stored]
    changed = [vote.assignment for vote in votes if cast.get(vote.assignment, vote.shown.choice) != vote.shown.choice]
    strange = [one for one in stored if one not in cast]
    surplus = Counter(vote.item for vote in votes if vote.repeats is None and vote.verdict.choice != "skip")
    over = [item for item, count in surplus.items() if count > items[item]]
    faults = {"lost": lost, "doubled": doubled, "changed": changed, "uncast": strange, "too many on an item": over}
    faults["twice by one person"] = [str(who) for who, count in once.items() if count > 1]
    if any(faults.values()):
        raise GateError(f"of {len(cast)} votes {', '.join(f'{len(v)} {name}' for name, v in faults.items() if v)}.")
    told = {"votes_cast": len(cast), "lost": 0, "doubled": 0, "sent_twice": sum(person.duplicates for person in people)}
    return {**told, "refused": dict(Counter(reason for person in people for reason in person.refused))}
