"""The judging page in a real browser: what is shown is what is stored, and none of it is doubled or guessed."""

from typing import Any

from judging_pages import BROWSER, Site, image_pairs, png, press, ready, ready_text, text_pairs, toasted, until

from mmalign.records import Comparison, Content, Media

pytest_plugins = ("judging_browser",)
pytestmark = BROWSER
MAKER = "sdxl-turbo-secret"


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
    until(page, lambda: page.locator("#count").inner_text() == "8 of 9")


def test_buttons_judge_too_and_the_page_tells_when_nothing_is_left(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(1))
    page = judge(project)
    page.get_by_role("button", name="Both bad").click()
    page.get_by_role("heading", name="Nothing left to judge").wait_for()
    assert [vote.choice for vote in site.votes(project, 1)] == ["both_bad"]
    page.keyboard.press("u")
    ready(page)
    assert "Both bad" in page.locator("#banner").inner_text()


def test_a_project_that_is_closed_says_so_and_goes_on_when_it_is_opened(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(2))
    site.store.set_open(project, False)
    page = judge(project, wait=False)
    page.get_by_role("heading", name="This project is closed").wait_for()
    assert page.get_by_role("link", name="All projects").get_attribute("href") == "/"
    site.store.set_open(project, True)
    page.keyboard.press("Enter")
    ready(page)


def test_a_double_press_in_one_tick_or_after_120_ms_is_one_vote(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(4))
    page = judge(project)
    before = ready(page)
    page.evaluate(
        "for (let n = 0; n < 2; n++) document.body.dispatchEvent("
        "new KeyboardEvent('keydown', {key: '1', code: 'Digit1', bubbles: true}))"
    )
    second = ready(page, before)
    page.evaluate(  # by one clock with the page's own guard, however late all of it is
        "() => new Promise(done => { const press = () => ['keydown', 'keyup'].forEach(type => document.body.dispatchEvent("
        "new KeyboardEvent(type, {key: '2', code: 'Digit2', bubbles: true})));"
        "press(); setTimeout(() => { press(); done(); }, 120); })"
    )
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
    site.votes(project, 1)
    press(second, "2")
    toasted(second, "judged already")
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


def test_aspects_and_flags_are_given_by_keys_that_the_page_shows(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(3), aspects=("fidelity", "beauty", "safety"), flags=("unsafe", "watermark"))
    page = judge(project)
    legend = page.locator("#legend")
    assert all(word in legend.inner_text() for word in ("aspects", "flags", "reason"))
    page.keyboard.press("a")
    assert "fidelity:" in legend.inner_text() and page.locator("fieldset.marking kbd:visible").count() == 4
    for key in ("2", "t", "Backspace", "ArrowLeft", "3"):
        page.keyboard.press(key)
    assert "fidelity" not in legend.inner_text(), "it ends after the last aspect"
    page.keyboard.press("g")
    assert page.locator(".marking .pill.flag kbd:visible").all_inner_texts() == ["1", "2", "3", "4"]
    for key in ("2", "3", "4", "3", "5", "x", "Escape"):
        page.keyboard.press(key)
    site.votes(project, 0)
    press(page, "1")
    [vote] = site.votes(project, 1)
    assert dict(vote.shown.aspects) == {"fidelity": "right", "beauty": "left", "safety": "tie"}
    assert {name: tuple(places) for name, places in vote.shown.flags.items()} == {"watermark": (0, 1)}
    for keys, wanted in (("a 1 Escape a 1", {}), ("a 1", {"fidelity": "left"}), ("a a a 2", {"safety": "right"})):
        for key in keys.split():
            page.keyboard.press(key)
        page.keyboard.press("Tab")
        chosen = page.eval_on_selector_all("fieldset input:checked", "all => all.map(({name, value}) => [name, value])")
        names = ["fidelity", "beauty", "safety"]
        assert {names[int(name.rpartition("-")[2])]: value for name, value in chosen} == wanted
        page.eval_on_selector_all("fieldset input:checked", "all => all.forEach(one => { one.checked = false; })")
    site.votes(project, 1)


def test_keys_judge_at_once_after_an_aspect_or_a_flag_was_clicked(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(4), aspects=("fidelity",), flags=("unsafe",))
    page = judge(project)
    for count, (target, key, choice) in enumerate(
        ((".pill:not(.flag)", "ArrowRight", "right"), (".pill.flag", "1", "left")), 1
    ):
        page.locator(target).last.click()
        press(page, key)
        assert site.votes(project, count)[-1].shown.choice == choice
    page.locator("fieldset input").first.focus()  # as by Tab: arrows choose among the options then, digits judge
    page.keyboard.press("ArrowRight")
    assert page.locator("fieldset input:checked").get_attribute("value") == "tie"
    press(page, "2")
    assert dict(site.votes(project, 3)[-1].shown.aspects) == {"fidelity": "tie"}


def test_a_reason_that_is_required_is_asked_for(site: Site, judge: Any) -> None:
    project = site.project(image_pairs(2), rationale="required")
    page = judge(project)
    page.keyboard.press("1")
    toasted(page, "Give a reason first")
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
    page = judge(project)
    page.goto("about:blank")
    seen: list[tuple[str, bytes, str]] = []

    def note(response: Any) -> None:
        seen.append((response.url, response.body() if response.status == 200 else b"", repr(response.headers)))

    page.on("requestfinished", lambda request: note(request.response()))
    page.goto(f"{site.url}/judge/{project}")
    ready(page)
    press(page, "1")
    until(page, lambda: sum("/media/" in url for url, _, _ in seen) >= 4 and any(url.endswith("/vote") for url, _, _ in seen))
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
    page.keyboard.press("d")
    assert whole in page.locator(".reading").first.inner_text()
    for mode in ("d", "p"):
        page.keyboard.press(mode)
    assert page.locator(".reading mark").count() == 1, "rendered, with the word that differs"
    page.wait_for_timeout(50)
    assert page.evaluate("globalThis.ran") is None
    assert page.locator("#work img, #work script, #work svg").count() == 0
    assert not [a for a in page.eval_on_selector_all("#work a", "links => links.map(a => a.protocol)") if a == "javascript:"]
    assert "<b>unsafe</b>${ran=1}" in page.locator("#stage").inner_text()
