"""Servers of the annotation apps for tests, and browsers' manners without a browser: cookies, the page's token, Origin."""

import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from mmalign.annotation.accounts import SCRYPT
from mmalign.annotation.protocol import Protocol
from mmalign.annotation.store import Store
from mmalign.apps.server import Settings, create_app
from mmalign.records import Comparison, Content, Media

URL = "http://127.0.0.1:7870"
PLAIN = {"overlap_share": 0.0, "gold_share": 0.0, "repeat_share": 0.0, "min_dwell_ms": 0}
PASSWORD = "correct horse battery"
MAKERS = ("secret-model-a", "secret-model-b")
PEOPLE = {"ada": "admin", "rev": "reviewer", "ann": "annotator", "ben": "annotator"}


def texts(count: int = 4, k: int = 2) -> list[Comparison]:
    return [
        Comparison(
            id=f"row-{n}",
            prompt=Content(text=f"question {n}"),
            candidates=tuple(Content(text=f"answer {n} number {c} ${{1+1}} <img src=x onerror=alert(1)>") for c in range(k)),
            provenance=tuple({"model": MAKERS[c % 2], "seed": 987654} for c in range(k)),
            where=f"/secret/folder/rows.jsonl:{n}",
        )
        for n in range(count)
    ]


def png(seed: int, size: tuple[int, int] = (24, 16)) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "PNG")
    return stream.getvalue()


def images(folder: Path, count: int = 3) -> list[Comparison]:
    rows = []
    for n in range(count):
        files = [folder / f"{maker}-{n}.png" for maker in MAKERS]
        for place, file in enumerate(files):
            file.write_bytes(png(2 * n + place))
        candidates = tuple(Content(images=(Media(path=str(file)),)) for file in files)
        made = tuple({"model": maker} for maker in MAKERS)
        rows.append(Comparison(id=f"row-{n}", prompt=Content(text=f"scene {n}"), candidates=candidates, provenance=made))
    return rows


OPEN: list[Store] = []


@pytest.fixture(autouse=True)
def stores_are_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Import it where sites are made. A password costs a two-thousandth: what is tested is who is let in."""
    monkeypatch.setitem(SCRYPT, "n", 16)
    yield
    while OPEN:
        OPEN.pop().close()


class Site:
    """One store and a server before it; `restart` makes both anew, as after a crash."""

    def __init__(self, folder: Path, *, team: bool = False, seed: int | None = None, **settings: Any) -> None:
        self.folder = folder
        self.seed = seed
        self.settings = Settings(accounts=team, uploads=folder / "uploads", **settings)
        self.store = self._open()
        if team:
            self.store.add_account("ada", PASSWORD, "admin")
        self.app = create_app(self.store, self.settings)

    def _open(self) -> Store:
        rng = None if self.seed is None else random.Random(self.seed)
        OPEN.append(Store.open(str(self.folder / "judgements.db"), rng=rng))
        return OPEN[-1]

    def restart(self) -> None:
        self.store.close()
        self.store = self._open()
        self.app = create_app(self.store, self.settings)

    def project(self, rows: list[Comparison], kind: str = "text", **protocol: Any) -> int:
        project = self.store.create_project(f"project {len(self.store.projects())}", kind, Protocol(**{**PLAIN, **protocol}))
        added = self.store.add(project.id, rows)
        assert added.num_faults == 0, added.faults
        return project.id

    def browser(self, name: str | None = None, password: str = PASSWORD) -> "Browser":
        browser = Browser(self.app)
        if name is not None:
            if self.store.account(name) is None:
                self.store.add_account(name, PASSWORD, PEOPLE[name])
            reply = browser.post("/api/login", {"name": name, "password": password})
            assert reply.status_code == 200, reply.text
        if name is not None or not self.settings.accounts:
            browser.csrf = browser.get("/api/session").json()["csrf"]
        return browser


class Browser:
    """Keeps cookies, and sends what a page of this server sends with every change."""

    def __init__(self, app: Any, url: str = URL) -> None:
        self.url = url
        self.client = TestClient(app, base_url=url, follow_redirects=False, raise_server_exceptions=True)
        self.csrf = ""

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.client.get(path, headers={name.replace("_", "-"): value for name, value in headers.items()})

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        usual = {"origin": self.url, "sec-fetch-site": "same-origin", "x-csrf-token": self.csrf}
        return self.client.post(path, json=body, headers={**usual, **named})

    def next(self, project: int) -> dict[str, Any]:
        reply = self.get(f"/api/projects/{project}/next")
        assert reply.status_code == 200, reply.text
        return reply.json()

    def show(self, project: int) -> dict[str, Any]:
        """Take what is current and say that it is on the screen."""
        current = self.next(project)["current"]
        told = self.post(f"/api/projects/{project}/displayed", {"assignment": current["assignment"]})
        assert told.json() == {"displayed": True}
        return current

    def vote(self, project: int, current: dict[str, Any], choice: str = "left", **more: Any) -> dict[str, Any]:
        body = {"assignment": current["assignment"], "revision": current["revision"], "choice": choice, **more}
        reply = self.post(f"/api/projects/{project}/vote", body)
        assert reply.status_code == 200, reply.text
        return reply.json()
