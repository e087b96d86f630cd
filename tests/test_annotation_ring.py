"""From a real browser to trained weights: images are judged by keyboard, exported by the page's own link, and trained on."""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from annotation_stores import opened
from annotation_votes import images, protocol
from judging_pages import BROWSER, WAIT_MS, launched, until
from judging_pages import served as server_of
from runs import final_weights, train

from mmalign.annotation.store import Store
from mmalign.importers import trl
from mmalign.records import comparison

pytestmark = BROWSER
KEYS = ("ArrowLeft", "ArrowRight", "ArrowLeft", "t", "ArrowRight")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Store, str]]:
    store = opened(f"sqlite:///{tmp_path / 'votes.db'}")
    with server_of(store) as url:
        yield store, url
    store.close()


def test_what_is_judged_in_a_browser_is_exported_and_trained_on(served: tuple[Store, str], tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    store, url = served
    project = store.create_project("ring", "image", protocol()).id
    store.add(project, [images(n) for n in range(len(KEYS))])
    with sync_playwright() as playwright:
        browser = launched(playwright)
        page = browser.new_page()
        page.set_default_timeout(WAIT_MS)
        page.goto(f"{url}/judge/{project}")
        for number, key in enumerate(KEYS):
            page.wait_for_selector("#choices:not(.arming) .choice:not([aria-disabled=true])")
            page.keyboard.press(key)
            until(page, lambda count=number + 1: len(store.votes(project)) == count)
        archive = page.request.get(f"{url}/api/projects/{project}/export?format=trl", timeout=WAIT_MS)
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
