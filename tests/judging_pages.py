"""The judging page in a real browser: a site with its projects, and what a person does and sees there.

The fixtures are in `judging_browser`, which a test module takes with `pytest_plugins`.
"""

import io
import itertools
import os
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmalign.annotation.protocol import Protocol
from mmalign.annotation.store import Store
from mmalign.annotation.votes import Vote
from mmalign.records import Comparison, Content, Media

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
NO_BROWSER = CHROMIUM is None and not os.environ.get("CI")  # there they fail instead
BROWSER = [
    pytest.mark.browser,
    pytest.mark.skipif(
        NO_BROWSER,
        reason="NO BROWSER: the judging page is NOT tested. Install chromium (Debian: apt-get install chromium).",
    ),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
QUICK: dict[str, Any] = {"min_dwell_ms": 0, "gold_share": 0, "repeat_share": 0, "order": "data", "overlap_share": 0}
WAIT_MS = 15_000


@dataclass
class Site:
    """A running server and the store behind it."""

    store: Store
    url: str
    folder: Path

    def project(self, rows: Sequence[Comparison], kind: str = "image", **protocol: Any) -> int:
        project = self.store.create_project(f"Project {next(NUMBERS)}", kind, Protocol(**{**QUICK, **protocol}))
        added = self.store.add(project.id, rows)
        assert added.added == len(rows), added.faults
        return project.id

    def votes(self, project: int, count: int) -> list[Vote]:
        """Wait until so many verdicts are stored, and a little longer for one too many."""
        until = time.monotonic() + WAIT_MS / 1000
        while len(found := self.store.votes(project, latest=False)) < count and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.15)
        found = self.store.votes(project, latest=False)
        assert len(found) == count, [(vote.assignment, vote.choice) for vote in found]
        return found


NUMBERS = itertools.count(1)


def png(shade: Sequence[int] | int, size: tuple[int, int] = (48, 32)) -> bytes:
    seed = np.random.default_rng(np.atleast_1d(shade))
    stream = io.BytesIO()
    Image.fromarray(seed.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def image_pairs(count: int, k: int = 2, size: tuple[int, int] = (48, 32)) -> list[Comparison]:
    return [
        Comparison(
            id=f"row{n}",
            prompt=Content(text=f"prompt {n}"),
            candidates=tuple(Content(images=(Media(data=png([n, c], size)),)) for c in range(k)),
        )
        for n in range(count)
    ]


def text_pairs(*texts: tuple[str, str], prompt: str = "Explain.") -> list[Comparison]:
    return [
        Comparison(id=f"text{n}", prompt=Content(text=prompt), candidates=tuple(Content(text=text) for text in pair))
        for n, pair in enumerate(texts)
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ready(page: Any, other_than: str | None = None) -> str:
    """Wait until a verdict can be given, on another assignment than before where one is named; return the assignment."""
    page.wait_for_function(
        "before => document.body.dataset.shown && document.body.dataset.shown !== before"
        " && document.querySelector('#choices .choice') && !document.querySelector('#choices.arming')",
        arg=other_than,
        polling=20,
    )
    return str(page.evaluate("document.body.dataset.shown"))


def press(page: Any, key: str) -> str:
    """Give a verdict by a key and wait for the next assignment."""
    before = str(page.evaluate("document.body.dataset.shown"))
    page.keyboard.press(key)
    return ready(page, before)


def pixels(page: Any, selector: str) -> np.ndarray:
    """The pixels of the screen that an element takes; it must begin and end at whole ones."""
    box = page.locator(selector).evaluate("e => (({x, y, right, bottom}) => [x, y, right, bottom])(e.getBoundingClientRect())")
    ends = [edge * page.evaluate("devicePixelRatio") for edge in box]
    assert ends == pytest.approx([round(end) for end in ends], abs=1e-3), ends
    left, top, right, bottom = map(round, ends)
    return np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))[top:bottom, left:right]


def ready_text(page: Any) -> str:
    return str(page.locator("#prompt").inner_text()).strip()


def violations(page: Any, *, rules: Sequence[str] = ()) -> list[str]:
    """What axe finds on a page as it stands, by all rules of WCAG 2.2 A and AA and best practice, or by those named."""
    from axe_playwright_python.sync_playwright import Axe

    levels = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    only = {"type": "rule", "values": list(rules)} if rules else {"type": "tag", "values": levels}
    found = Axe().run(page, options={"runOnly": only, "resultTypes": ["violations"]}).response["violations"]
    return [f"{page.url}: {one['id']}: {one['nodes'][0]['html']}" for one in found]
