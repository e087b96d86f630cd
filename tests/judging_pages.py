"""The judging page in a real browser: a site with its projects, and what a person does and sees there.

The fixtures are in `judging_browser`, which a test module takes with `pytest_plugins`.
"""

import io
import itertools
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmalign.annotation.protocol import Protocol
from mmalign.annotation.store import Store
from mmalign.annotation.votes import Vote
from mmalign.apps.server import Settings, create_app
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
WAIT_MS = 60_000  # of a machine that does other things
SHARED_MEMORY = Path("/dev/shm")
STATE = """() => ({toasts: window.toasts, asked: window.asked, shown: document.body.dataset.shown, kept: {...localStorage},
    live: document.querySelector("#live")?.textContent, focus: document.hasFocus(), at: document.activeElement?.outerHTML})"""
STILL = """() => Promise.allSettled(document.getAnimations().filter(
    one => Number.isFinite(one.effect.getComputedTiming().endTime)).map(one => one.finished))"""


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


def launched(playwright: Any) -> Any:
    """Chromium. Its processes share memory that Playwright puts into files, whose writing waits for a busy disk: not here."""
    roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2**30
    files = ["--disable-dev-shm-usage"] if roomy else []
    return playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], ignore_default_args=files)


@contextmanager
def served(store: Store) -> Iterator[str]:
    """A server of the store in a thread; the address."""
    import uvicorn

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = int(listener.getsockname()[1])
        server = uvicorn.Server(uvicorn.Config(create_app(store, Settings(port=port)), log_level="error"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
        server.should_exit = True
        thread.join(WAIT_MS / 1000)
        assert not thread.is_alive()


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


def until(page: Any, true: Callable[[], bool]) -> None:
    """Wait while the page goes on."""
    end = time.monotonic() + WAIT_MS / 1000
    while not true():
        assert time.monotonic() < end, "it does not happen"
        page.wait_for_timeout(20)


def settled(page: Any) -> None:
    """Wait until what was done is painted."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def toasted(page: Any, words: str) -> None:
    """Wait until the toast has said it, though it may be gone since."""
    try:
        page.wait_for_function("words => window.toasts.some(toast => toast.includes(words))", arg=words, polling=20)
    except Exception as fault:
        raise AssertionError(f"{words!r} was not told; instead: {page.evaluate(STATE)}") from fault


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

    page.evaluate(STILL)
    levels = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    only = {"type": "rule", "values": list(rules)} if rules else {"type": "tag", "values": levels}
    found = Axe().run(page, options={"runOnly": only, "resultTypes": ["violations"]}).response["violations"]
    return [f"{page.url}: {one['id']}: {one['nodes'][0]['html']}" for one in found]
