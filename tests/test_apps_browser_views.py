"""The judging page in a real browser: every pixel and word is seen, on phones, in the dark, by screen readers."""

import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from judging_pages import BROWSER, WAIT_MS, Site, image_pairs, pixels, png, press, ready, settled, text_pairs, violations
from PIL import Image

from mmalign.apps.markup import html_of, text_of
from mmalign.records import Comparison, Content, Media, Message

pytest_plugins = ("judging_browser",)
pytestmark = BROWSER


def test_zoom_and_pan_move_both_pictures_together_by_keys_wheel_and_mouse(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(1, size=(900, 900)))
    page = judge(project, viewport={"width": 1200, "height": 800})

    def boxes() -> list[tuple[float, float, float]]:
        script = """panes => panes.map(pane => { const [f, i] = [pane, pane.firstChild].map(n => n.getBoundingClientRect());
            return [i.left - f.left, i.top - f.top, i.width]; })"""
        return [tuple(box) for box in page.eval_on_selector_all(".frame", script)]

    def moved(act: Callable[[], None]) -> tuple[float, float, float]:
        act()
        settled(page)
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
    page.mouse.wheel(0, -240)
    page.wait_for_function("() => document.querySelector('.frame > img').getBoundingClientRect().width > 900")
    assert moved(lambda: None)[2] > 900
    assert moved(lambda: page.keyboard.press("z")) == fit
    site.votes(project, 0)


def test_one_to_one_shows_every_pixel_as_it_is(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(1, size=(120, 80)))
    for ratio in (1, 2):
        page = judge(project, device_scale_factor=ratio)
        page.keyboard.press("z")
        settled(page)
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
    settled(page)
    shot = pixels(page, ".pane:last-child .frame > img")
    assert (shot[2:28] == 20).all() and (shot[32:58] == 0).all()
    page.keyboard.press("d")
    settled(page)
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
    assert sorted(page.locator("#stage strong mark, #stage p > mark").all_inner_texts()) == ["one", "quick", "slow", "two"]
    page.keyboard.press("p")
    assert "**quick**" in page.locator("#stage").inner_text()
    assert sorted(page.locator("#stage .written mark").all_inner_texts()) == ["one", "quick", "slow", "two"]
    page.keyboard.press("d")
    assert page.locator("#stage mark").count() == 0
    page.locator("#prompt [data-enlarge]").click()
    assert page.locator("dialog[open] img").evaluate("image => image.naturalWidth") == 48
    page.keyboard.press("1")
    page.keyboard.press("Escape")
    site.votes(project, 0)


RICH = """# Café 🦊\n\n1. one\n2. two `x < 1 && y`\n\n```python\n\ndef f(a):\n    return "<b>"  # note\n```\n\n$$\\frac{1}{2}$$
then $x^2$ \\& &lt;i&gt; &nbsp; <u>raw</u>\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n> quote
> more\n\n![pic](http://x/y.png) ~~gone~~ end"""


def test_differences_are_marked_in_rendered_texts_code_and_formulas(site: Site, judge: Any) -> None:
    other = RICH.replace("two", "three").replace("note", "remark").replace("frac{1}{2}", "frac{1}{3}").replace("end", "END 🦊")
    project = site.project(text_pairs((RICH, other)), kind="text")
    page = judge(project)
    shown = page.eval_on_selector_all("#stage .prose", "all => all.map(one => one.textContent)")
    assert sorted(shown) == sorted(text_of(str(html_of(text))) for text in (RICH, other))
    page.keyboard.press("d")
    assert sorted(page.locator("#stage mark").all_inner_texts()) == ["END 🦊", "end", "note", "remark", "three", "two"]
    assert page.locator("#stage pre mark").count() == 2 and page.locator("#stage math.changed").count() == 2
    assert page.eval_on_selector_all("#stage .prose", "all => all.map(one => one.textContent)") == shown


def test_axe_finds_nothing_where_tables_code_and_formulas_are_wider_than_the_page(site: Site, judge: Any) -> None:
    table, formula = f"| {' | '.join('abcdefghij' * 2)} |\n|{'---|' * 20}", " + ".join("abcdefghijklmnopq" * 4)
    wide = f"{table}\n\n```\n{'x' * 300}\n```\n\n$${formula}$$"
    page = judge(site.project(text_pairs((wide, f"{wide}\n\nmore")), kind="text", guideline=wide), wait=False)
    page.get_by_role("button", name="Start judging").wait_for()
    found = violations(page)
    page.keyboard.press("Escape")
    ready(page)
    assert page.locator("#stage .prose [tabindex='0']").count() == 6
    page.keyboard.press("d")
    assert not found + violations(page)


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
    page.set_default_timeout(WAIT_MS)
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
    page.wait_for_function("told.includes('Item 2.')")


def test_single_keys_can_be_switched_off(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(2))
    page = judge(project, locale="en")
    page.keyboard.press("?")
    page.get_by_label("Single keys judge").uncheck()
    page.keyboard.press("Escape")
    page.keyboard.press("1")
    page.wait_for_timeout(100)
    site.votes(project, 0)
