"""Fixtures of the judging page: a served site, a browser, and pages of it."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from judging_pages import CHROMIUM, WAIT_MS, Site, free_port, ready

from mmalign.annotation.store import Store
from mmalign.apps.server import Settings, create_app


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    import uvicorn

    folder, port = tmp_path_factory.mktemp("judging"), free_port()
    store = Store.open(f"sqlite:///{folder / 'store.db'}")
    server = uvicorn.Server(uvicorn.Config(create_app(store, Settings(port=port)), port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Site(store, f"http://127.0.0.1:{port}", folder)
    server.should_exit = True
    thread.join(10)
    store.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
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

    def opened(project: int, *, context: Any = None, wait: bool = True, url: str = site.url, **options: Any) -> Any:
        if options:
            contexts.append(context := browser.new_context(**options))
        page = (context or shared).new_page()
        pages.append(page)
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda fault: faults.append(str(fault)))
        page.on("console", lambda said: faults.append(said.text) if "Content Security Policy" in said.text else None)
        page.goto(f"{url}/judge/{project}")
        if wait:
            ready(page)
        return page

    yield opened
    for one in (*pages, *contexts):
        one.close()
    assert not faults, faults
