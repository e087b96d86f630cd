"""From a real browser to trained weights: images are judged by keyboard, exported by the page's own link, and trained on."""

import io
import socket
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from annotation_votes import images, protocol
from judging_pages import BROWSER, CHROMIUM
from runs import final_weights, train

from mmalign.annotation.store import Store
from mmalign.apps.server import Settings, create_app
from mmalign.importers import trl
from mmalign.records import comparison

pytestmark = BROWSER
KEYS = ("ArrowLeft", "ArrowRight", "ArrowLeft", "t", "ArrowRight")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Store, str]]:
    import uvicorn

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    store = Store.open(str(tmp_path / "votes.db"))
    server = uvicorn.Server(uvicorn.Config(create_app(store, Settings(port=port)), port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield store, f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)
    store.close()


def test_what_is_judged_in_a_browser_is_exported_and_trained_on(served: tuple[Store, str], tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    store, url = served
    project = store.create_project("ring", "image", protocol()).id
    store.add(project, [images(n) for n in range(len(KEYS))])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"{url}/judge/{project}")
        for number, key in enumerate(KEYS):
            page.wait_for_selector("#choices:not(.arming) .choice:not([aria-disabled=true])", timeout=30_000)
            page.keyboard.press(key)
            _wait(lambda count=number + 1: len(store.votes(project)) == count)
        archive = page.request.get(f"{url}/api/projects/{project}/export?format=trl")
        assert archive.ok, archive.text()
        zipfile.ZipFile(io.BytesIO(archive.body())).extractall(tmp_path / "data")
        browser.close()
    [folder] = [card.parent for card in (tmp_path / "data").rglob("README.md")]
    given = {item.comparison.prompt.text: item.comparison for item in store.items(project)}
    votes = {vote.comparison: vote for vote in store.votes(project)}
    assert [votes[f"row{n}"].shown.choice for n in range(len(KEYS))] == ["left", "right", "left", "tie", "right"]
    rows = [comparison(row) for row in trl(path=str(folder)).dataset]
    assert len(rows) == 4 and "a red 3" not in {row.prompt.text for row in rows}
    for row in rows:
        known = given[row.prompt.text]
        vote = votes[known.id]
        seen = vote.order[0 if vote.shown.choice == "left" else 1]
        assert row.candidates[0].key() == known.candidates[seen].key()  # what stood on that side of the screen is chosen
    run = train(tmp_path / "run", data={"importer": {"name": "trl", "path": str(folder)}}, training={"steps": 1})
    assert any(bool(weight.any()) for weight in final_weights(run).values())


def _wait(done: object, seconds: float = 30.0) -> None:
    assert callable(done)
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until
        time.sleep(0.02)
