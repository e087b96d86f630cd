"""The judging page in a real browser: what is shown, what is stored, and that none of it is lost, doubled or guessed."""

import contextlib
import io
import itertools
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
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
from mmalign.records import Comparison, Content, Media, Message

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="NO BROWSER: the judging page is NOT tested. Install chromium (Debian: apt-get install chromium).",
    ),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
QUICK: dict[str, Any] = {"min_dwell_ms": 0, "gold_share": 0, "repeat_share": 0, "order": "data", "overlap_share": 0}
MAKER = "sdxl-turbo-secret"
WAIT_MS = 15_000


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


def pixels(page: Any, selector: str) -> np.ndarray:
    """The pixels of the screen that an element takes; it must begin and end at whole ones."""
    box = page.locator(selector).evaluate("e => (({x, y, right, bottom}) => [x, y, right, bottom])(e.getBoundingClientRect())")
    ends = [edge * page.evaluate("devicePixelRatio") for edge in box]
    assert ends == pytest.approx([round(end) for end in ends], abs=1e-3), ends
    left, top, right, bottom = map(round, ends)
    return np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))[top:bottom, left:right]


# Judging


def test_every_choice_has_keys_and_is_stored_in_the_order_of_the_data(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(9))
    page = judge(project)
    for key in ("ArrowLeft", "1", "ArrowRight", "2", "t", "b", "s", "3"):
        press(page, key)
    found = site.votes(project, 8)
    assert [vote.shown.choice for vote in found] == ["left", "left", "right", "right", "tie", "both_bad", "skip", "tie"]
    for vote in found[:4]:
        place = ["left", "right"].index(vote.shown.choice)
        assert vote.choice == "ab"[vote.order[place]]
    assert all(vote.dwell_ms is not None and vote.dwell_ms >= 250 for vote in found)
    assert page.locator("#count").inner_text() == "8 of 9"


def test_buttons_judge_too_and_the_page_tells_when_nothing_is_left(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(1))
    page = judge(project)
    page.get_by_role("button", name="Both bad").click()
    page.get_by_role("heading", name="Nothing left to judge").wait_for()
    assert [vote.choice for vote in site.votes(project, 1)] == ["both_bad"]
    page.keyboard.press("u")
    ready(page)
    assert "Both bad" in page.locator("#banner").inner_text()


def test_a_double_press_in_one_tick_or_after_120_ms_is_one_vote(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(4))
    page = judge(project)
    before = ready(page)
    page.evaluate(
        "for (let n = 0; n < 2; n++) document.body.dispatchEvent("
        "new KeyboardEvent('keydown', {key: '1', code: 'Digit1', bubbles: true}))"
    )
    second = ready(page, before)
    page.keyboard.press("2")
    page.wait_for_timeout(120)
    page.keyboard.press("2")
    ready(page, second)
    found = site.votes(project, 2)
    assert [vote.assignment for vote in found] == [before, second]


def test_a_held_key_is_one_vote(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(3))
    page = judge(project)
    before = ready(page)
    for _ in range(40):
        page.keyboard.down("1")
        page.wait_for_timeout(20)
    page.keyboard.up("1")
    ready(page, before)
    site.votes(project, 1)


def test_key_combinations_and_unfinished_words_do_not_vote(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(2))
    page = judge(project)
    for combination in ("Control+1", "Alt+1", "Meta+1", "Shift+ArrowLeft", "Shift+ArrowRight"):
        page.keyboard.press(combination)
    page.evaluate(
        "document.body.dispatchEvent(new KeyboardEvent('keydown',{key: '1', code: 'Digit1', isComposing: true, bubbles: true}))"
    )
    page.wait_for_timeout(100)
    site.votes(project, 0)


def test_no_key_counts_before_both_pictures_were_decoded_and_seen_for_a_while(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(2))
    page = judge(project)
    held: list[Any] = []
    page.route("**/media/*", lambda route: held.append(route))
    page.reload(wait_until="domcontentloaded")
    page.wait_for_selector("#choices .choice")
    for _ in range(10):
        page.keyboard.press("1")
        page.wait_for_timeout(30)
    assert page.evaluate("document.body.dataset.shown") is None
    site.votes(project, 0)
    page.unroute("**/media/*")  # which lets those held go on
    ready(page)
    press(page, "1")
    site.votes(project, 1)


def test_a_picture_that_is_missing_cannot_be_judged_and_is_loaded_again(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(1))
    page = judge(project)
    page.route("**/media/*", lambda route: route.fulfill(status=500, body=""))
    page.reload()
    page.get_by_role("button", name="Load again").first.wait_for()
    page.keyboard.press("1")
    page.wait_for_timeout(100)
    site.votes(project, 0)
    page.unroute("**/media/*")
    page.get_by_role("button", name="Load again").first.click()
    ready(page)


def test_reload_and_back_keep_the_pair_and_its_sides(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(6), order="random")
    page = judge(project)
    press(page, "1")
    before = ready(page)
    sources = page.eval_on_selector_all("#stage img", "images => images.map(image => image.src)")
    page.reload()
    assert ready(page) == before
    page.goto(f"{site.url}/health")
    page.go_back()
    assert ready(page) == before
    assert page.eval_on_selector_all("#stage img", "images => images.map(image => image.src)") == sources
    site.votes(project, 1)


def test_two_tabs_show_one_pair_and_store_one_vote(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(4))
    first = judge(project)
    second = judge(project, context=first.context)
    before = ready(first)
    assert ready(second) == before
    press(first, "1")
    press(second, "2")
    second.get_by_text("judged already").first.wait_for()
    found = site.votes(project, 1)
    assert found[0].shown.choice == "left"
    assert ready(second) == ready(first)


def test_typing_a_reason_never_votes_and_outlives_a_reload(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(2), aspects=("fidelity",), flags=("unsafe",))
    page = judge(project)
    page.keyboard.press("r")
    page.keyboard.type("1 2 3 because t b s u")
    page.reload()
    ready(page)
    site.votes(project, 0)
    assert page.locator("#rationale").input_value() == "1 2 3 because t b s u"
    page.get_by_role("radio", name="Right").check(force=True)
    page.get_by_role("checkbox", name="Left: unsafe").check(force=True)
    page.keyboard.press("Escape")
    press(page, "2")
    [vote] = site.votes(project, 1)
    assert vote.shown.rationale == "1 2 3 because t b s u"
    assert dict(vote.shown.aspects) == {"fidelity": "right"}
    assert {name: tuple(places) for name, places in vote.shown.flags.items()} == {"unsafe": (0,)}
    assert vote.verdict.aspects["fidelity"] == "ab"[vote.order[1]]
    assert page.locator("#rationale").input_value() == ""


def test_a_reason_that_is_required_is_asked_for(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(2), rationale="required")
    page = judge(project)
    page.keyboard.press("1")
    page.get_by_text("Give a reason first").first.wait_for()
    page.keyboard.type("sharper")
    page.keyboard.press("Escape")
    press(page, "1")
    assert site.votes(project, 1)[0].shown.rationale == "sharper"


def test_undo_opens_the_judgement_again_and_a_new_one_replaces_it(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(3))
    page = judge(project)
    before = ready(page)
    following = press(page, "1")
    assert press(page, "u") == before
    assert page.locator("#choices [data-choice=left]").get_attribute("aria-pressed") == "true"
    assert press(page, "2") == following
    first, second = site.votes(project, 2)
    assert (first.revision, second.revision) == (1, 2)
    assert [vote.shown.choice for vote in site.store.votes(project)] == ["right"]
    assert press(page, "Control+z") == before
    assert press(page, "Escape") == following
    assert [vote.shown.choice for vote in site.store.votes(project)] == ["right"]


def test_strength_flips_with_the_sides(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(9), strength=True)
    page = judge(project)
    for key in ("1", "1", "1", "1", "6", "6", "4", "ArrowLeft"):
        press(page, key)
    found = site.votes(project, 8)
    assert [vote.shown.strength for vote in found] == [-3, -3, -3, -3, 2, 2, 0, None]
    for vote in found[:6]:
        assert vote.shown.strength is not None and vote.strength is not None
        assert vote.strength == vote.shown.strength * (1 if vote.order == (0, 1) else -1)
        assert vote.choice == ("b" if vote.strength > 0 else "a")


def test_four_are_ranked_by_keys_with_ties(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(2, k=4))
    page = judge(project)
    page.keyboard.press("Enter")
    page.wait_for_timeout(50)
    for key in ("3", "1", "=", "2", "Backspace", "4", "2"):
        page.keyboard.press(key)
    press(page, "Enter")
    [vote] = site.votes(project, 1)
    assert vote.shown.ranks == (1, 4, 1, 3)
    assert vote.ranks == tuple(vote.shown.ranks[vote.order.index(candidate)] for candidate in range(4))


def test_four_are_ranked_by_dragging(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(2, k=4))
    page = judge(project)

    def drag(candidate: int, x: float) -> None:
        row, chip = page.locator(".order").bounding_box(), page.locator(f".chip[data-candidate='{candidate}']").bounding_box()
        page.mouse.move(chip["x"] + chip["width"] / 2, chip["y"] + chip["height"] / 2)
        page.mouse.down()
        page.mouse.move(row["x"] + x, chip["y"] + 5, steps=4)
        page.mouse.up()

    for candidate in (0, 1, 2, 3):
        drag(candidate, 300)
    drag(3, 1)
    press(page, "Enter")
    assert site.votes(project, 1)[0].shown.ranks == (2, 3, 4, 1)


def test_practice_items_tell_the_expected_answer_before_going_on(site: Site, judge: Any) -> None:
    rows = image_pairs(3)
    project = site.project(rows[:1], calibration=1)
    known = [Comparison(id="c", prompt=Content(text="known"), candidates=rows[1].candidates, ranks=(1, 2))]
    site.store.add(project, known, role="calibration", explanations={"c": "The other one has <b>six</b> fingers."})
    page = judge(project)
    before = ready(page)
    page.keyboard.press("1")
    page.get_by_role("button", name="Go on").wait_for()
    told = page.locator("#banner").inner_text()
    [vote] = site.votes(project, 1)
    assert ("As expected" if vote.choice == "a" else "Expected: Right") in told
    assert "<b>six</b> fingers" in told
    assert ready_text(page) == "known"
    page.keyboard.press("Enter")
    ready(page, before)
    assert ready_text(page) == "prompt 0"


def ready_text(page: Any) -> str:
    return str(page.locator("#prompt").inner_text()).strip()


def test_instructions_come_before_the_first_pair_once_a_version(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(3), guideline="# Which is **better**?")
    page = judge(project, wait=False)
    page.get_by_role("heading", name="Which is better?").wait_for()
    page.keyboard.press("1")
    assert page.evaluate("document.body.dataset.shown") is None
    page.get_by_role("button", name="Start judging").click()
    ready(page)
    page.reload()
    ready(page)
    assert page.locator("dialog[open]").count() == 0
    site.store.set_guideline(project, "# Anew")
    page.reload()
    page.get_by_role("heading", name="Anew").wait_for()
    page.keyboard.press("Escape")
    ready(page)
    site.votes(project, 0)


# Blinding and injection


def test_no_maker_file_name_or_seed_reaches_the_browser(site: Site, judge: Any) -> None:
    folder = site.folder / MAKER
    folder.mkdir()
    rows = []
    for n in range(3):
        places = [folder / f"{MAKER}_seed_98765{n}{c}.png" for c in range(2)]
        for c, place in enumerate(places):
            place.write_bytes(png([7, n, c]))
        made = tuple({"model": MAKER, "seed": 987650 + c} for c in range(2))
        pair = tuple(Content(images=(Media(path=str(place)),)) for place in places)
        rows.append(Comparison(id=f"{MAKER}-{n}", prompt=Content(text="p"), candidates=pair, provenance=made))
    project = site.project(rows)
    page = judge(project, wait=False)
    seen: list[tuple[str, bytes, str]] = []

    def note(response: Any) -> None:
        seen.append((response.url, response.body() if response.status == 200 else b"", repr(response.headers)))

    page.on("requestfinished", lambda request: note(request.response()))
    page.reload()
    ready(page)
    press(page, "1")
    page.wait_for_timeout(100)
    assert sum("/media/" in url for url, _, _ in seen) >= 4
    for url, body, headers in seen:
        for secret in (MAKER, "98765", str(site.folder)):
            assert secret not in url and secret.encode() not in body and secret not in headers


def test_data_is_shown_as_text_and_never_run(site: Site, judge: Any) -> None:
    attacks = (
        "${globalThis.ran = 1}", "{{constructor.constructor('globalThis.ran = 1')()}}", "<img src=x onerror='ran = 1'>",
        "<script>ran = 1</script>", "[link](javascript:ran=1)", "<svg onload='ran = 1'>", "$\\text{<img src=x onerror=ran=1>}$",
    )  # fmt: skip
    rows = text_pairs(*((f"{attack} left", f"{attack} right") for attack in attacks[:2]), prompt=" ".join(attacks))
    whole = "\n\n".join(attacks)
    rows.append(Comparison(id="all", prompt=Content(text="p"), candidates=(Content(text=whole), Content(text=f"{whole} end"))))
    project = site.project(rows, kind="text", flags=("<b>unsafe</b>${ran=1}",), aspects=("<img src=x onerror='ran = 1'>",))
    page = judge(project)
    for attack in attacks:
        assert attack in ready_text(page) or attack.startswith("$\\text")
    for mode in ("p", "d"):
        page.keyboard.press(mode)
        assert attacks[0] in page.locator("#stage").inner_text()
    press(page, "1")
    press(page, "1")
    page.keyboard.press("p")
    assert whole in page.locator(".reading").first.inner_text()
    page.wait_for_timeout(50)
    assert page.evaluate("globalThis.ran") is None
    assert page.locator("#work img, #work script, #work svg").count() == 0
    assert not [a for a in page.eval_on_selector_all("#work a", "links => links.map(a => a.protocol)") if a == "javascript:"]
    assert "<b>unsafe</b>${ran=1}" in page.locator("#stage").inner_text()


# Views


def test_zoom_and_pan_move_both_pictures_together_by_keys_wheel_and_mouse(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(1, size=(900, 900)))
    page = judge(project, viewport={"width": 1200, "height": 800})

    def boxes() -> list[tuple[float, float, float]]:
        script = """panes => panes.map(pane => { const [f, i] = [pane, pane.firstChild].map(n => n.getBoundingClientRect());
            return [i.left - f.left, i.top - f.top, i.width]; })"""
        return [tuple(box) for box in page.eval_on_selector_all(".frame", script)]

    def moved(act: Callable[[], None]) -> tuple[float, float, float]:
        act()
        page.wait_for_timeout(40)
        left, right = boxes()
        assert left == pytest.approx(right, abs=1), "both lie on whole pixels of the screen"
        return left

    fit = moved(lambda: None)
    actual = moved(lambda: page.keyboard.press("z"))
    assert actual[2] == 900 > fit[2]
    panned = moved(lambda: page.keyboard.press("Shift+ArrowRight"))
    assert panned[0] < actual[0] - 50 and panned[1] == actual[1]
    assert moved(lambda: page.keyboard.press("Shift+ArrowDown"))[1] < panned[1]
    assert moved(lambda: page.keyboard.press("+"))[2] == 1800
    assert moved(lambda: page.keyboard.press("-"))[2] == 900
    page.mouse.move(300, 400)
    before = boxes()[0]
    dragged = moved(lambda: (page.mouse.down(), page.mouse.move(320, 415, steps=3), page.mouse.up()))
    assert (dragged[0] - before[0], dragged[1] - before[1]) == (20, 15)
    assert moved(lambda: page.mouse.wheel(0, -240))[2] > 900
    assert moved(lambda: page.keyboard.press("z")) == fit
    site.votes(project, 0)


def test_one_to_one_shows_every_pixel_as_it_is(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(1, size=(120, 80)))
    for ratio in (1, 2):
        page = judge(project, device_scale_factor=ratio)
        page.keyboard.press("z")
        page.wait_for_timeout(100)
        place = site.store.take(project, site.store.account("me").id).candidates  # type: ignore[union-attr]
        for side, content in zip(("first", "last"), place, strict=True):
            file = site.store.media(content.images[0].key)
            assert file is not None
            wanted = np.asarray(Image.open(io.BytesIO(file.data)).convert("RGB"))
            shot = pixels(page, f".pane:{side}-child .frame > img")
            assert shot.shape == wanted.shape and np.array_equal(shot, wanted), (ratio, side)


def test_difference_is_black_where_pictures_agree_and_blink_shows_one_after_the_other(site: Site, judge: Any) -> None:
    base = np.full((60, 60, 3), 90, np.uint8)
    other = base.copy()
    other[:30] += 20
    pair = []
    for value in (base, other):
        stream = io.BytesIO()
        Image.fromarray(value).save(stream, "PNG")
        pair.append(Content(images=(Media(data=stream.getvalue()),)))
    project = site.project([Comparison(id="d", prompt=Content(text="p"), candidates=tuple(pair))])
    page = judge(project, reduced_motion="reduce")
    page.keyboard.press("z")
    page.keyboard.press("d")
    page.wait_for_timeout(60)
    shot = pixels(page, ".pane:last-child .frame > img")
    assert (shot[2:28] == 20).all() and (shot[32:58] == 0).all()
    page.keyboard.press("d")
    page.wait_for_timeout(60)
    assert (pixels(page, ".pane:last-child .frame > img")[2:28] == 160).all()
    page.keyboard.press("d")
    page.keyboard.press("x")
    page.wait_for_timeout(700)
    front = page.locator(".frame.front").evaluate("frame => frame.parentElement.dataset.place")
    assert front == "0", "with reduced motion nothing blinks by itself"
    page.keyboard.press("Space")
    assert page.locator(".frame.front").evaluate("frame => frame.parentElement.dataset.place") == "1"
    hidden = ".frame:not(.front) > img"
    assert page.locator(hidden).evaluate("image => getComputedStyle(image).visibility") == "hidden"
    site.votes(project, 0)


def webm(shade: int) -> bytes:
    av = pytest.importorskip("av")
    stream = io.BytesIO()
    with av.open(stream, "w", format="webm") as file:
        track = file.add_stream("libvpx", rate=10)
        track.width, track.height, track.pix_fmt = 64, 48, "yuv420p"
        for n in range(5):
            frame = np.full((48, 64, 3), min(255, shade + 40 * n), np.uint8)
            file.mux(track.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(track.encode())
    return stream.getvalue()


def test_videos_play_side_by_side_and_frames_move_together(site: Site, judge: Any) -> None:
    videos = tuple(Content(images=(Media(data=webm(shade)),)) for shade in (0, 90))
    frames = tuple(Content(images=tuple(Media(data=png([side, n])) for n in range(3))) for side in (8, 9))
    rows = [
        Comparison(id=name, prompt=Content(text=name), candidates=pair)
        for name, pair in (("videos", videos), ("frames", frames))
    ]
    project = site.project(rows)
    page = judge(project)
    page.wait_for_function("() => [...document.querySelectorAll('video')].filter(v => v.currentTime > 0).length === 2")
    press(page, "1")
    before = page.eval_on_selector_all("#stage img", "images => images.map(image => image.src)")
    page.locator(".film").first.focus()
    page.keyboard.press("ArrowRight")
    after = page.eval_on_selector_all("#stage img", "images => images.map(image => image.src)")
    assert not set(before) & set(after)
    assert page.eval_on_selector_all(".film", "sliders => sliders.map(slider => slider.value)") == ["1", "1"]
    site.votes(project, 1)


def test_texts_are_rendered_plain_or_marked_where_they_differ(site: Site, judge: Any) -> None:
    prompt = Content(
        messages=(Message(role="system", text="Be brief."), Message(role="user", text="Look:", images=(Media(data=png(5)),)))
    )
    pair = (Content(text="The **quick** fox and $x^2$ 🦊 one"), Content(text="The **slow** fox and $x^2$ 🦊 two"))
    project = site.project([Comparison(id="t", prompt=prompt, candidates=pair)], kind="text")
    page = judge(project)
    assert [text.strip() for text in page.locator("#prompt .role").all_inner_texts()] == ["System", "User"]
    assert page.locator("#stage strong").count() == 2 and page.locator("#stage math").count() == 2
    page.keyboard.press("d")
    assert sorted(page.locator("#stage mark").all_inner_texts()) == ["one", "quick", "slow", "two"]
    page.keyboard.press("p")
    assert "**quick**" in page.locator("#stage").inner_text()
    page.locator("#prompt [data-enlarge]").click()
    assert page.locator("dialog[open] img").evaluate("image => image.naturalWidth") == 48
    page.keyboard.press("1")
    page.keyboard.press("Escape")
    site.votes(project, 0)


def test_on_a_phone_nothing_is_cut_off_and_both_sides_must_have_been_seen(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(2), aspects=("fidelity", "aesthetics"), flags=("unsafe",))
    page = judge(project, wait=False, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page.wait_for_selector("#choices .choice")
    page.wait_for_timeout(500)
    page.locator("#choices [data-choice=left]").tap(force=True)
    assert page.evaluate("document.body.dataset.shown") is None
    assert page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [390, 390]
    page.get_by_role("group", name="Show").get_by_role("button", name="Right").tap()
    before = ready(page)
    for choice in ("left", "right", "tie", "both_bad", "skip"):
        box = page.locator(f"#choices [data-choice={choice}]").bounding_box()
        assert box["y"] + box["height"] <= 844 and box["height"] >= 40
    page.locator("#choices [data-choice=right]").tap()
    page.wait_for_function("before => !document.querySelector('.tabs .unseen') === false", arg=before)
    assert [vote.shown.choice for vote in site.votes(project, 1)] == ["right"]


def test_dark_mode_follows_the_system_and_the_button(site: Site, judge: Any) -> None:
    page = judge(site.project(image_pairs(1)), color_scheme="dark")

    def brightness() -> int:
        found = re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))
        return sum(map(int, found[:3]))

    assert brightness() < 120
    page.locator("#theme").click()
    assert brightness() > 600
    page.reload()
    ready(page)
    assert brightness() > 600


def violations(page: Any, *, rules: Sequence[str] = ()) -> list[str]:
    """What axe finds on a page as it stands, by all rules of WCAG 2.2 A and AA and best practice, or by those named."""
    from axe_playwright_python.sync_playwright import Axe

    levels = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    only = {"type": "rule", "values": list(rules)} if rules else {"type": "tag", "values": levels}
    found = Axe().run(page, options={"runOnly": only, "resultTypes": ["violations"]}).response["violations"]
    return [f"{page.url}: {one['id']}: {one['nodes'][0]['html']}" for one in found]


MARKED = """# A\n\n`code` and $x^2$ [link](https://example.org)\n\n```python\ndef f(): return 'x' # note\n```\n
> quote\n\n| a |\n|---|\n| 1 |"""
ASKED: dict[str, Any] = {"aspects": ("fidelity",), "flags": ("unsafe",)}


def test_axe_finds_nothing_where_pictures_are_judged(site: Site, judge: Any) -> None:
    page = judge(site.project(image_pairs(1), **ASKED))
    found = violations(page)
    page.keyboard.press("?")
    found += violations(page)
    page.keyboard.press("Escape")
    page.keyboard.press("x")
    found += violations(page)
    page.keyboard.press("1")
    page.get_by_role("heading", name="Nothing left").wait_for()
    found += violations(page)
    page.keyboard.press("u")
    ready(page)
    found += violations(page)
    page = judge(site.project(image_pairs(1), strength=True), context=page.context)
    page.set_viewport_size({"width": 390, "height": 844})
    assert not found + violations(page)


def test_axe_finds_nothing_on_the_list_of_projects_and_where_people_sign_in(site: Site, browser: Any) -> None:
    site.project(image_pairs(1))
    page = browser.new_page()
    page.goto(site.url)
    page.get_by_role("link", name="Project").first.wait_for()
    found = violations(page)
    page.route("**/api/session", lambda route: route.fulfill(status=401, json={"detail": "sign in first"}))
    page.goto(f"{site.url}/login")
    page.get_by_label("Password").first.wait_for()
    found += violations(page)
    page.close()
    assert not found


def test_axe_finds_nothing_where_texts_and_lists_are_judged(site: Site, judge: Any) -> None:
    project = site.project(text_pairs((MARKED, f"{MARKED} more")), kind="text", guideline=MARKED, **ASKED)
    page = judge(project, wait=False)
    page.get_by_role("button", name="Start judging").wait_for()
    found = violations(page)
    page.keyboard.press("Escape")
    ready(page)
    found += violations(page)
    page = judge(site.project(image_pairs(1, k=4)), context=page.context)
    page.keyboard.press("2")
    page.keyboard.press("1")
    assert not found + violations(page)


def test_every_text_has_contrast_in_the_dark_too(site: Site, judge: Any) -> None:
    page = judge(site.project(text_pairs((MARKED, f"{MARKED} more")), kind="text", **ASKED), color_scheme="dark")
    found = violations(page, rules=["color-contrast"])
    page.keyboard.press("d")
    page.locator("[data-flag]").first.check(force=True)
    found += violations(page, rules=["color-contrast"])
    page = judge(site.project(image_pairs(1), strength=True), context=page.context)
    assert not found + violations(page, rules=["color-contrast"])


def test_focus_goes_from_top_to_bottom_and_acts_are_told_to_screen_readers(site: Site, judge: Any) -> None:
    page = judge(site.project(image_pairs(3), flags=("unsafe",)))
    order = []
    for _ in range(30):
        page.keyboard.press("Tab")
        order.append(page.evaluate("(({id, dataset}) => id || dataset.choice || dataset.flag)(document.activeElement)"))
    wanted = [
        "undo",
        "instructions",
        "keys",
        "theme",
        "prompt",
        "unsafe",
        "rationale",
        "left",
        "tie",
        "both_bad",
        "skip",
        "right",
    ]
    places = [order.index(name) for name in wanted]
    assert places == sorted(places)
    page.evaluate("document.activeElement.blur()")
    page.evaluate(
        "window.told = []; new MutationObserver(() => told.push(document.querySelector('#live').textContent))"
        ".observe(document.querySelector('#live'), {childList: true})"
    )
    press(page, "1")
    page.wait_for_timeout(60)
    told = page.evaluate("told.filter(Boolean)")
    assert "Item 2." in told


def test_single_keys_can_be_switched_off(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(2))
    page = judge(project, locale="en")
    page.keyboard.press("?")
    page.get_by_label("Single keys judge").uncheck()
    page.keyboard.press("Escape")
    page.keyboard.press("1")
    page.wait_for_timeout(100)
    site.votes(project, 0)


# Speed, lost networks, killed servers


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
