"""Speed of the annotation apps on this machine's loopback: vote to next pair, 50 people at once, a project of 100 000 pairs.

    python benchmarks/annotation.py --out benchmarks/results/annotation.json
    python benchmarks/annotation.py --only gate --plant-fault                    # the gate must refuse: exit 1

Votes are counted before anything is timed: people at once, every fifth vote sent twice, the server killed and started again in
between. One vote lost or doubled, and nothing is timed: exit status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from annotation_clients import GateError, Person, counted, judge_for, judge_until_told
from annotation_server import Server, filled_with_images, filled_with_texts, people_of

GOALS = {
    "loopback: vote to next pair shown, p50 ms": 150.0,
    "100 ms, 20 Mbit/s: vote to next pair shown, p50 ms": 150.0,
    "50 people, 3 s a vote: reply p95 ms": 150.0,
    "100 000 pairs: start to first pair, s": 5.0,
    "100 000 pairs: growth while judging, MB": 16.0,
}
Case = Callable[[Path, argparse.Namespace], dict[str, Any]]


def gate(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """People at once, votes sent twice, a server that is killed: every vote that was cast is there, once."""
    store = folder / "gate.db"
    project, tokens = filled_with_texts(store, 400, people_of(20))
    server = Server(store)

    async def trial() -> list[Person]:
        people = [Person(server.url, server.cookie(token), project, number) for number, token in enumerate(tokens)]
        work = [asyncio.create_task(judge_until_told(person, num_votes=12)) for person in people]
        await asyncio.sleep(2.0)
        server.kill()
        server.start()
        await asyncio.gather(*work)
        return people

    try:
        people = asyncio.run(trial())
    finally:
        server.stop()
    if options.plant_fault:
        people[0].cast["a vote that is not there"] = "left"
    return counted(store, project, people)


def in_browser(folder: Path, options: argparse.Namespace, *, slow: bool) -> dict[str, Any]:
    """Key press to the next pair decoded and painted, in Chromium; pairs of 0.5 MB."""
    from annotation_browser import measured

    num_votes = options.slow_votes if slow else options.votes
    store = folder / f"browser-{slow}.db"
    project, [token] = filled_with_images(store, num_votes + 8, people_of(1))
    with Server(store) as server:
        return measured(server, project, token, num_votes=num_votes, slow=slow)


def together(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """50 people at once: about 3 s a vote with images fetched, then without a pause."""
    store = folder / "together.db"
    project, tokens = filled_with_images(store, 120, people_of(50), votes_per_item=50)
    with Server(store) as server:

        async def trial(think_s: float, seconds: float) -> list[Person]:
            people = [Person(server.url, server.cookie(token), project, number) for number, token in enumerate(tokens)]
            await asyncio.gather(*(judge_for(person, seconds, think_s=think_s) for person in people))
            return people

        warm = asyncio.run(trial(3.0, 4.0))  # everybody has come in
        used = server.cpu_seconds()
        paced = asyncio.run(trial(3.0, options.seconds))
        used = server.cpu_seconds() - used
        hurried = asyncio.run(trial(0.0, options.seconds / 2))
        rss = server.megabytes()
    told = counted(store, project, [*warm, *paced, *hurried])
    return {
        "paced": _replies(paced, options.seconds),
        "hurried": _replies(hurried, options.seconds / 2),
        "server_cpu_ms_a_vote": round(1000 * used / sum(len(person.waits) for person in paced), 1),
        "server_mb": rss,
        **told,
    }


def _replies(people: list[Person], seconds: float) -> dict[str, Any]:
    waits = [wait for person in people for wait in person.waits]
    return {"votes": len(waits), "votes_per_s": len(waits) / seconds, **_spread(waits)}


def _spread(milliseconds: list[float]) -> dict[str, float]:
    ordered = sorted(milliseconds)
    return {
        "p50_ms": round(statistics.median(ordered), 1),
        "p95_ms": round(ordered[int(0.95 * (len(ordered) - 1))], 1),
        "max_ms": round(ordered[-1], 1),
    }


def large(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A project of many pairs: intake, start to first pair, and memory before and after judging."""
    store = folder / "large.db"
    start = time.perf_counter()
    project, tokens = filled_with_texts(store, options.pairs, people_of(4))
    intake = time.perf_counter() - start
    start = time.perf_counter()
    with Server(store) as server:

        async def judge(num_votes: int) -> list[Person]:
            people = [Person(server.url, server.cookie(token), project, number) for number, token in enumerate(tokens)]
            await asyncio.gather(*(judge_until_told(person, num_votes=num_votes) for person in people))
            return people

        first = asyncio.run(judge(1))
        opened = time.perf_counter() - start
        warm = asyncio.run(judge(50))
        before = server.megabytes()
        people = asyncio.run(judge(200))
        after = server.megabytes()
    told = counted(store, project, [*first, *warm, *people])
    waits = [wait for person in people for wait in person.waits]
    return {
        "pairs": options.pairs,
        "intake_s": round(intake, 1),
        "start_to_first_vote_s": round(opened, 2),
        "mb_before": before,
        "mb_after": after,
        "file_mb": round(store.stat().st_size / 2**20, 1),
        **_spread(waits),
        **told,
    }


CASES: dict[str, Case] = {
    "gate": gate,
    "loopback": lambda folder, options: in_browser(folder, options, slow=False),
    "slow link": lambda folder, options: in_browser(folder, options, slow=True),
    "together": together,
    "large": large,
}


def outcomes(found: dict[str, Any], pairs: int) -> dict[str, float]:
    """The numbers that the goals are about, of the cases that ran."""
    told: dict[str, float] = {}
    names = list(GOALS)
    if "loopback" in found:
        told[names[0]] = found["loopback"]["p50_ms"]
    if "slow link" in found:
        told[names[1]] = found["slow link"]["p50_ms"]
    if "together" in found:
        told[names[2]] = found["together"]["paced"]["p95_ms"]
    if "large" in found and pairs >= 100_000:
        told[names[3]] = found["large"]["start_to_first_vote_s"]
        told[names[4]] = round(found["large"]["mb_after"] - found["large"]["mb_before"], 1)
    return told


def machine() -> dict[str, Any]:
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, shared with other work",
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "load_average": [round(one, 1) for one in os.getloadavg()],
    }


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), help="the gate always runs")
    parser.add_argument("--votes", type=int, default=40, help="in the browser on loopback")
    parser.add_argument("--slow-votes", type=int, default=25, help="in the browser on the slow link")
    parser.add_argument("--seconds", type=float, default=24.0, help="of 50 people at once")
    parser.add_argument("--pairs", type=int, default=100_000, help="of the large project")
    parser.add_argument("--nice", type=int, default=0, help="priority on a machine that is shared: -15 needs root; it is told")
    parser.add_argument("--plant-fault", action="store_true", help="check the gate: a vote that was lost must be found out")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    if options.nice:
        os.nice(options.nice)  # the server inherits it
    results: dict[str, Any] = {"before": machine(), "nice": options.nice, "cases": {}}
    folder = Path(tempfile.mkdtemp(prefix="mmalign-annotation-"))
    start = time.perf_counter()
    try:
        for name in dict.fromkeys(["gate", *options.only]):
            began = time.perf_counter()
            results["cases"][name] = CASES[name](folder, options)
            results["cases"][name]["took_s"] = round(time.perf_counter() - began, 1)
            print(f"{name}: {json.dumps(results['cases'][name])}", flush=True)
    except GateError as fault:
        print(f"{fault} Nothing is claimed.", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    results["after"] = machine()
    results["seconds"] = round(time.perf_counter() - start, 1)
    results["goals"] = {
        name: {"goal": GOALS[name], "found": value, "met": value <= GOALS[name]}
        for name, value in outcomes(results["cases"], options.pairs).items()
    }
    for name, one in results["goals"].items():
        print(f"{'met ' if one['met'] else 'MISSED'} {name}: {one['found']} (goal {one['goal']:g})")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
