"""Fixtures of the judging page: a served site, a browser, and pages of it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from annotation_stores import opened
from judging_pages import WAIT_MS, Site, launched, ready, served

NOTE_TOASTS = """addEventListener("DOMContentLoaded", () => {
    window.toasts = [];
    const place = document.querySelector("#toast");
    const note = () => place.textContent && toasts.push(place.textContent);
    if (place) new MutationObserver(note).observe(place, {childList: true});
})"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("judging")
    store = opened(f"sqlite:///{folder / 'store.db'}")
    with served(store) as url:
        yield Site(store, url, folder)
    store.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = launched(playwright)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shared(browser: Any) -> Iterator[Any]:
    context = browser.new_context()
    yield context
    context.close()


@pytest.fixture
def judge(site: Site, browser: Any, shared: Any) -> Iterator[Callable[..., Any]]:
    """Open the judging page of a project, ready for a verdict; with options in a browser of its own; faulty scripts fail."""
    contexts, pages, faults = [], [], list[str]()

    def shown(project: int, *, context: Any = None, wait: bool = True, url: str = site.url, **options: Any) -> Any:
        if options:
            contexts.append(context := browser.new_context(**options))
        page = (context or shared).new_page()
        pages.append(page)
        page.set_default_timeout(WAIT_MS)
        page.add_init_script(NOTE_TOASTS)
        page.on("pageerror", lambda fault: faults.append(str(fault)))
        page.on("console", lambda said: faults.append(said.text) if "Content Security Policy" in said.text else None)
        page.goto(f"{url}/judge/{project}")
        if wait:
            ready(page)
        return page

    yield shown
    for one in (*pages, *contexts):
        one.close()
    assert not faults, faults
