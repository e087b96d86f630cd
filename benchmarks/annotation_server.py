"""What the benchmark of the annotation apps serves: filled stores, and the real server in a process of its own."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from mmalign.annotation.protocol import Protocol
from mmalign.annotation.store import Store
from mmalign.records import Comparison, Content, Media

SIDE = 296  # random pixels of this size make a PNG of 0.26 MB: 0.5 MB a pair
PATIENCE_S = 60.0
QUICK: dict[str, Any] = {"min_dwell_ms": 0, "gold_share": 0.0, "repeat_share": 0.05, "overlap_share": 0.1, "repeat_gap": 5}


def people_of(count: int) -> list[str]:
    return [f"person {number}" for number in range(count)]


def filled_with_texts(place: Path, count: int, people: list[str]) -> tuple[int, list[str]]:
    """A store with a project of text pairs, and a session of each person."""

    def rows() -> Iterator[Comparison]:
        for n in range(count):
            answers = tuple(Content(text=f"Answer {side} to question {n}. " * 8) for side in "ab")
            yield Comparison(id=f"row{n}", prompt=Content(text=f"Question {n}?"), candidates=answers)

    return _filled(place, "text", rows(), people, votes_per_item=1)


def filled_with_images(place: Path, count: int, people: list[str], *, votes_per_item: int = 1) -> tuple[int, list[str]]:
    """A store with a project of image pairs of 0.5 MB, and a session of each person."""
    folder = place.with_suffix(".images")
    folder.mkdir()

    def rows() -> Iterator[Comparison]:
        random = np.random.default_rng(0)
        for n in range(count):
            contents = []
            for side in "ab":
                stream = io.BytesIO()
                pixels = random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
                file = folder / f"{n}-{side}.png"
                file.write_bytes(stream.getvalue())
                contents.append(Content(images=(Media(path=str(file)),)))
            yield Comparison(id=f"row{n}", prompt=Content(text=f"Prompt {n}"), candidates=tuple(contents))

    return _filled(place, "image", rows(), people, votes_per_item=votes_per_item)


def _filled(
    place: Path, kind: str, rows: Iterator[Comparison], people: list[str], *, votes_per_item: int
) -> tuple[int, list[str]]:
    store = Store.open(str(place))
    try:
        protocol = Protocol(**QUICK, votes_per_item=votes_per_item, overlap_votes=max(3, votes_per_item))
        project = store.create_project("benchmark", kind, protocol).id
        added = store.add(project, rows)
        assert not added.num_faults, added
        store.add_account("admin", "a password that is long", "admin")
        return project, [store.open_session(store.add_account(name).id) for name in people]
    finally:
        store.close()


class Server:
    """`mmalign annotate` on a store, in a process of its own, on loopback."""

    def __init__(self, store: Path) -> None:
        self.store = store
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "mmalign.annotate", "images", "--store", str(self.store), "--port", str(self.port)]
        environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, "--share-with", "team"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            try:
                urllib.request.urlopen(f"{self.url}/static/base.css", timeout=5).read()
                return
            except urllib.error.HTTPError:
                return
            except OSError:
                if self.process.poll() is not None:
                    break
                time.sleep(0.05)
        raise RuntimeError(f"the server did not come up: exit status {self.process.poll()}")

    def kill(self) -> None:
        """End it without a word, as a power cut does."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """Ask it to end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()

    def cookie(self, token: str) -> dict[str, str]:
        return {f"mmalign_session_{self.port}": token}

    def megabytes(self) -> float:
        """Resident memory."""
        return round(psutil.Process(self.process.pid).memory_info().rss / 2**20, 1)

    def cpu_seconds(self) -> float:
        """Processor time that the server has used so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)
