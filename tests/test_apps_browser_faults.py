"""The judging page in a real browser: slow and lost networks, killed servers, refusals."""

import contextlib
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from judging_pages import (
    BROWSER,
    Site,
    free_port,
    image_pairs,
    press,
    ready,
)

from mmalign.annotation.store import Store

pytest_plugins = ("judging_browser",)
pytestmark = BROWSER


def test_the_next_pair_is_there_within_150_ms_on_a_slow_link(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(8, size=(320, 256)))
    page = judge(project, locale="en")
    slow = {"offline": False, "latency": 100, "downloadThroughput": 20e6 / 8, "uploadThroughput": 20e6 / 8}
    link = page.context.new_cdp_session(page)
    link.send("Network.enable")
    link.send("Network.emulateNetworkConditions", slow)
    page.evaluate(
        """() => { window.waits = []; let pressed = 0;
            addEventListener('keydown', () => { pressed = performance.now(); }, true);
            new MutationObserver(() => waits.push(performance.now() - pressed))
                .observe(document.body, {attributes: true, attributeFilter: ['data-shown']}); }"""
    )
    for _ in range(6):
        press(page, "1")
        page.wait_for_timeout(500)
    waits = page.evaluate("waits")
    assert len(waits) == 6
    assert statistics.median(waits) < 150, waits
    site.votes(project, 6)


def test_a_reply_that_is_lost_is_asked_for_again_and_the_vote_counts_once(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(4))
    page = judge(project)
    before = ready(page)
    lost = []

    def lose(route: Any) -> None:
        if len(lost) < 2:
            lost.append(route.fetch().json()["status"])
            route.abort()
        else:
            route.continue_()

    page.route("**/vote", lose)
    press(page, "1")
    press(page, "2")
    found = site.votes(project, 2)
    assert found[0].assignment == before
    assert lost == ["stored", "duplicate"]
    page.wait_for_function("() => !document.querySelector('#saved').textContent")


SERVER = """
import sys
from mmalign.annotation.store import Store
from mmalign.apps.server import Settings, create_app, serve
settings = Settings(port=int(sys.argv[2]))
serve(create_app(Store.open(sys.argv[1]), settings), settings)
"""


def test_a_server_killed_between_storing_and_answering_costs_nothing(tmp_path: Path, judge: Any) -> None:
    place, port = f"sqlite:///{tmp_path / 'store.db'}", free_port()
    store = Store.open(place)
    site = Site(store, f"http://127.0.0.1:{port}", tmp_path)
    project = site.project(image_pairs(5))

    def started() -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", SERVER, place, str(port)], stderr=subprocess.PIPE)
        for _ in range(400):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.05):
                return process
            time.sleep(0.05)
        process.kill()
        raise AssertionError(process.communicate()[1].decode())

    process = started()
    try:
        page = judge(project, url=site.url)
        first, told = ready(page), list[str]()

        def die(route: Any) -> None:
            told.append(route.fetch().json()["status"])
            process.send_signal(signal.SIGKILL)
            process.wait()
            route.abort()

        page.route("**/vote", die, times=1)
        second = press(page, "1")
        page.get_by_text("1 judgement kept here").wait_for()
        page.keyboard.press("2")
        page.get_by_text("2 judgements kept here").wait_for()
        process = started()
        page.wait_for_function("() => !document.querySelector('#saved').textContent", timeout=15_000)
        ready(page, second)
        press(page, "t")
        found = site.votes(project, 3)
    finally:
        process.kill()
        process.communicate()
        store.close()
    assert told == ["stored"]
    assert [(vote.assignment, vote.shown.choice) for vote in found[:2]] == [(first, "left"), (second, "right")]


def test_votes_wait_in_the_tab_while_the_network_is_gone_even_through_a_reload(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(4), min_dwell_ms=400)
    page = judge(project)
    before = ready(page)
    page.route("**/api/**", lambda route: route.abort())
    press(page, "1")
    page.get_by_text("1 judgement kept here").wait_for()
    page.keyboard.press("2")
    page.get_by_text("2 judgements kept here").wait_for()
    page.keyboard.press("1")
    site.votes(project, 0)
    page.on("dialog", lambda dialog: dialog.accept())
    page.reload()
    page.wait_for_timeout(100)
    page.unroute("**/api/**")
    ready(page)
    first, second = site.votes(project, 2)
    assert first.assignment == before
    assert [first.shown.choice, second.shown.choice] == ["left", "right"]


def test_votes_of_a_tab_that_was_closed_without_network_are_sent_by_the_next_one(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(4))
    page = judge(project)
    page.route("**/api/**", lambda route: route.abort())
    press(page, "1")
    page.get_by_text("1 judgement kept here").wait_for()
    page.keyboard.press("2")
    page.get_by_text("2 judgements kept here").wait_for()
    context = page.context
    page.close()
    site.votes(project, 0)
    page = judge(project, context=context)
    assert [vote.shown.choice for vote in site.votes(project, 2)] == ["left", "right"]
    assert page.evaluate("Object.keys(localStorage).filter(name => name.includes('outbox'))") == []


def test_a_refused_vote_is_told_and_its_pair_comes_back(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(3), choices=("left", "right"))
    page = judge(project)
    before = ready(page)
    page.route("**/vote", lambda route: route.continue_(post_data=route.request.post_data.replace('"left"', '"tie"')), times=1)
    page.keyboard.press("1")
    page.get_by_text("Not counted").first.wait_for()
    page.wait_for_function("before => document.body.dataset.shown === before", arg=before)
    ready(page)
    site.votes(project, 0)
    press(page, "1")
    site.votes(project, 1)


def test_signing_out_elsewhere_asks_to_sign_in_and_keeps_what_was_judged(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(3))
    page = judge(project, locale="en")
    page.context.clear_cookies()
    page.keyboard.press("1")
    page.get_by_role("link", name="Sign in again").wait_for()
    page.on("dialog", lambda dialog: dialog.accept())
    page.goto(f"{site.url}/judge/{project}")
    ready(page)
    assert [vote.shown.choice for vote in site.votes(project, 1)] == ["left"]
