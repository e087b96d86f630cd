"""The judging page in a real browser: slow and lost networks, killed servers, refusals."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from annotation_stores import opened
from judging_pages import BROWSER, Site, image_pairs, press, ready, toasted, until
from judging_processes import PATIENCE_S, free_port

pytest_plugins = ("judging_browser",)
pytestmark = BROWSER


LOADED = """count => performance.getEntriesByType('resource').filter(
    one => one.name.includes('/media/') && one.responseEnd).length === count"""


def hold(page: Any) -> list[Any]:
    """Let no request of the page reach the server; those that wait."""
    held: list[Any] = []
    page.route("**/*", lambda route: held.append(route))
    return held


def test_the_next_pair_is_shown_while_the_server_answers_nothing(site: Site, judge: Any) -> None:
    """The press costs no way over the network, however slow that is; what it takes beyond is timed in benchmarks/."""
    project = site.project(image_pairs(8, size=(320, 256)))
    page = judge(project, locale="en")
    for count in range(1, 7):
        page.wait_for_function(LOADED, arg=2 * (count + 1))
        held = hold(page)
        press(page, "1")
        until(page, lambda held=held: any(route.request.url.endswith("/vote") for route in held))
        assert page.evaluate("[...document.querySelectorAll('#stage img')].map(one => one.naturalWidth)") == [320, 320]
        site.votes(project, count - 1)
        page.unroute("**/*")  # which lets those held go on
        site.votes(project, count)


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
from annotation_stores import opened
from mmalign.apps.server import Settings, create_app, serve
settings = Settings(port=int(sys.argv[2]))
serve(create_app(opened(sys.argv[1]), settings), settings)
"""


def test_a_server_killed_between_storing_and_answering_costs_nothing(tmp_path: Path, judge: Any) -> None:
    place, port = f"sqlite:///{tmp_path / 'store.db'}", free_port()
    store = opened(place)
    site = Site(store, f"http://127.0.0.1:{port}", tmp_path)
    project = site.project(image_pairs(5))

    def started() -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", SERVER, place, str(port)]
        process, end = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment), time.monotonic() + PATIENCE_S
        while process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return process
            time.sleep(0.05)
        process.kill()
        raise AssertionError(process.communicate()[1].decode())

    process = started()
    try:
        page = judge(project, url=site.url)
        first, asked, told = ready(page), list[Any](), list[str]()

        def die(route: Any) -> None:
            asked.append(route)
            if len(asked) == 1:
                told.append(route.fetch().json()["status"])
                process.send_signal(signal.SIGKILL)
                process.wait()
            route.abort()

        page.route("**/vote", die)
        second = press(page, "1")
        page.get_by_text("1 judgement kept here").wait_for()
        page.keyboard.press("2")
        page.get_by_text("2 judgements kept here").wait_for()
        process = started()
        page.unroute("**/vote")
        page.wait_for_function("() => !document.querySelector('#saved').textContent")
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
    page.wait_for_function(  # those of other projects are other tests'
        "project => !Object.keys(localStorage).some(name => name.includes(`outbox:${project}:`))", arg=project
    )


# A vote for the left becomes a tie, and the first `lost` questions for what is next find no server. Done where the page asks:
# what the browser's interception does to a request that is under way when it begins is not the page's.
ALTERED = """lost => {
    const ask = window.fetch;
    window.asked = [];
    window.fetch = (url, options) => {
        asked.push(url);
        if (url.endsWith("/next") && lost-- > 0) return Promise.reject(new TypeError("lost"));
        const body = url.endsWith("/vote") ? options.body.replace('"left"', '"tie"') : options?.body;
        return ask(url, {...options, body});
    };
    window.unaltered = () => { window.fetch = ask; };
}"""


def test_a_refused_vote_is_told_and_its_pair_comes_back(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(3), choices=("left", "right"))
    page = judge(project)
    before = ready(page)
    page.evaluate(ALTERED, 0)
    page.keyboard.press("1")
    toasted(page, "Not counted")
    page.wait_for_function("before => document.body.dataset.shown === before", arg=before)
    assert ready(page) == before
    assert page.locator("#toast").inner_text().startswith("Not counted")
    site.votes(project, 0)
    page.evaluate("unaltered()")
    press(page, "1")
    site.votes(project, 1)


def test_a_refusal_is_still_told_after_the_connection_was_lost_and_found(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(3), choices=("left", "right"))
    page = judge(project)
    before = ready(page)
    page.evaluate(ALTERED, 2)
    page.keyboard.press("1")
    toasted(page, "No connection")
    page.wait_for_function("before => document.body.dataset.shown === before", arg=before)
    assert ready(page) == before
    assert [url.rsplit("/", 1)[1] for url in page.evaluate("asked") if url.endswith("/next")] == ["next"] * 3
    assert page.locator("#toast").inner_text().startswith("Not counted")


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
