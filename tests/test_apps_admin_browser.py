"""The pages of administrators in a real browser: they work under their content security policy, and data on them stay data."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from judging_pages import NO_BROWSER, launched, violations
from judging_processes import running
from judging_sites import PASSWORD, texts

from mmalign.annotation.protocol import Protocol, Verdict
from mmalign.annotation.store import Store

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        NO_BROWSER,
        reason="NO BROWSER: the pages of administrators are NOT tested. Install chromium (Debian: apt-get install chromium).",
    ),
]
EVIL = "<img src=x onerror=alert(1)> ${alert(2)}"
PATIENCE_MS = 150_000  # Gradio and the statistics are loaded on the first look


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    database, accounts = tmp_path / "judgements.db", tmp_path / "accounts.yaml"
    judged_project(database)
    accounts.write_text(f"ada: {{role: admin, password: {PASSWORD}}}")
    accounts.chmod(0o600)
    with running("text", "--store", str(database), "--port", "0", "--accounts", str(accounts)) as server:
        yield database, server.url


def judged_project(database: Path) -> None:
    store = Store.open(str(database))
    project = store.create_project(EVIL, "text", Protocol(min_dwell_ms=0, overlap_share=1.0, gold_share=0, repeat_share=0))
    store.add(project.id, texts(3))
    for name in (EVIL, "ben"):
        account = store.add_account(name)
        for _ in range(3):
            shown = store.take(project.id, account.id)
            assert shown is not None and store.displayed(shown.assignment, account.id)
            first = Verdict(choice="left" if "number 0" in str(shown.candidates[0].text) else "right")
            assert store.vote(shown.assignment, 1, first, account.id).status == "stored"
    store.close()


def test_an_administrator_signs_in_sees_the_votes_makes_a_project_and_uploads_data(
    site: tuple[Path, str], tmp_path: Path
) -> None:
    from playwright.sync_api import sync_playwright

    database, url = site
    data = tmp_path / "mine.jsonl"
    row = {"id": "1", "prompt": {"text": "x"}, "candidates": [{"text": "one"}, {"text": "other"}]}
    data.write_text(json.dumps(row) + "\n" + json.dumps({**row, "id": "2", "candidates": [{"text": "one"}]}) + "\n")
    faults: list[str] = []
    with sync_playwright() as play:
        browser = launched(play)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(PATIENCE_MS)
        page.on("dialog", lambda dialog: faults.append(f"dialog {dialog.message}") or dialog.dismiss())
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda one: faults.append(one.text) if "Content Security Policy" in one.text else None)
        page.on("request", lambda one: faults.append(one.url) if not one.url.startswith((url, "data:", "blob:")) else None)
        page.goto(f"{url}/admin/")
        page.get_by_label("Name").fill("ada")
        page.get_by_label("Password").fill(PASSWORD)
        with page.expect_navigation(url=f"{url}/admin/", wait_until="load"):
            page.get_by_role("button", name="Sign in").click()
        page.get_by_text("6 of 9 votes").wait_for()  # at once; statistics follow
        plot = page.get_by_role("img", name="Agreement", exact=True)
        plot.wait_for()
        page.wait_for_function("() => [...document.images].every((one) => one.complete && one.naturalWidth > 0)")
        faults += violations(page)
        for tab, button, member in (("Dashboard", "Download as files", "dashboard.json"), ("Export", "Download", "README.md")):
            page.get_by_role("tab", name=tab).click()
            with page.expect_download() as download:
                page.get_by_role("link", name=button, exact=True).and_(page.locator("[href^='/api/projects/']")).click()
            with zipfile.ZipFile(download.value.path()) as archive:
                assert any(name.endswith(f"/{member}") for name in archive.namelist())
        page.get_by_role("tab", name="Instructions and settings").click()
        page.get_by_role("button", name="New project").click()
        page.get_by_role("textbox", name="Name", exact=True).fill("fresh")
        page.get_by_role("radio", name="text").check()
        page.get_by_role("button", name="Make the project").click()
        page.get_by_role("tab", name="Data").click()
        page.wait_for_function("() => document.querySelector('[aria-label=Project]')?.value.startsWith('fresh')")
        page.locator("input[type=file][accept*='.zip']").set_input_files(str(data))
        page.locator(".file-preview .filename").wait_for()  # its name alone is there while it is on its way
        page.get_by_role("button", name="Add", exact=True).click()
        page.wait_for_function("() => [...document.querySelectorAll('textarea')].some((one) => one.value.startsWith('1 new'))")
        browser.close()
    assert not faults, faults
    store = Store.open(str(database))
    fresh = store.project_named("fresh")
    assert fresh is not None and fresh.kind == "text" and store.progress(fresh.id).items == 1
    store.close()
