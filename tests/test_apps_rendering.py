"""Texts of models become HTML that shows them and runs nothing; items become JSON that names nobody."""

import json
import re
import time

import pytest

from mmalign.annotation.protocol import Protocol, Verdict
from mmalign.annotation.shown import Picture, Shown, ShownContent, ShownMessage
from mmalign.apps.markup import MAX_CHARACTERS, changes, html_of, mathml, text_of
from mmalign.apps.rendering import asked, guideline, shown, verdict

IN_TIME_S = 10  # of the processor; half a second on one that has nothing else to do, minutes without the limits
INJECTIONS = (
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "<svg onload=alert(1)>",
    "<math><mtext><style><img src=x onerror=alert(1)></style></mtext></math>",
    "[a](javascript:alert(1))",
    "[a](JaVaScRiPt:alert(1))",
    "[a](data:text/html,<script>alert(1)</script>)",
    "<a href='javascript:alert(1)'>a</a>",
    "<iframe src=//evil></iframe>",
    '![a](x" onerror="alert(1))',
    "```<img src=x onerror=alert(1)>\ncode\n```",
    '```python" onmouseover="alert(1)\ncode\n```',
    "$\\text{<img src=x onerror=alert(1)>}$",
    "$\\href{javascript:alert(1)}{x}$",
    "$$\\text{</math><script>alert(1)</script>}$$",
    "<form action=//evil><input name=q></form>",
    "<div style='position:fixed;inset:0'>over</div>",
    "<button popovertarget=p>x</button>",
)


def html(text: str) -> str:
    found = html_of(text)
    assert found is not None
    return found


def tags(text: str) -> list[str]:
    return re.findall(r"<[^>]*>", text)


@pytest.mark.parametrize("text", INJECTIONS)
def test_nothing_in_a_text_runs_loads_or_covers_the_page(text: str) -> None:
    for tag in tags(html(f"before {text} after\n\n{text}")):
        assert not re.search(r"\son\w+=|\sstyle=|javascript:|data:|\ssrc=|\sid=", tag, re.IGNORECASE), tag
        assert not re.match(r"</?(script|style|iframe|img|svg|form|input|button|object|embed|base|link|meta)\b", tag, re.I), tag


@pytest.mark.parametrize("text", ["<img src=x onerror=alert(1)>", "${alert(1)}", "{{7*7}}", "<b>bold</b>", "[a](javascript:x)"])
def test_what_looks_like_markup_is_shown_as_it_was_written(text: str) -> None:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert html(text) == f"<p>{escaped}</p>\n"


def test_markdown_becomes_headings_lists_tables_and_code_in_colours() -> None:
    found = html("# A\n\n- b\n\n| c |\n|---|\n| ~~d~~ |\n\n```python\nreturn 1\n```\n")
    for wanted in (
        "<h1>A</h1>",
        "<li>b</li>",
        "<th>c</th>",
        "<s>d</s>",
        '<span class="k">return</span>',
        '<span class="mi">1</span>',
    ):
        assert wanted in found


def test_code_of_an_unknown_language_stays_plain() -> None:
    assert '<code class="language-klingon">qapla &lt;b&gt;\n</code>' in html("```klingon\nqapla <b>\n```")


def test_links_open_elsewhere_and_tell_nothing() -> None:
    assert html("[a](https://example.org/?b=1&c=2)") == (
        '<p><a href="https://example.org/?b=1&amp;c=2" target="_blank" rel="noopener noreferrer nofollow">a</a></p>\n'
    )


def test_a_picture_that_a_text_names_is_a_link_and_is_not_loaded() -> None:
    assert "<img" not in html("![a cat](https://example.org/cat.png)")
    assert ">a cat</a>" in html("![a cat](https://example.org/cat.png)")


@pytest.mark.parametrize(
    ("text", "display"),
    [("$x^2$", "inline"), (r"\(x^2\)", "inline"), ("$$x^2$$", "block"), (r"\[x^2\]", "block"), ("$$\nx^2\n$$", "block")],
)
def test_formulas_become_mathml(text: str, display: str) -> None:
    found = html(f"Now {text} holds" if display == "inline" else f"Now\n\n{text}\n\nholds")
    assert f'<math display="{display}">' in found
    assert "<msup><mi>x</mi><mn>2</mn></msup>" in found
    assert "holds" in found


def test_a_formula_of_several_lines_is_no_list() -> None:
    found = html("$$\na\n- b\n= c\n$$")
    assert "<li>" not in found and "<h" not in found
    assert found.count("<math") == 1


@pytest.mark.parametrize("text", ["from $5 to $10", "$ 5 and 6 $", r"\$x\$", "`$x$`", "$", "$$", "a $x", "    $x$"])
def test_prices_code_and_lone_dollars_are_no_formulas(text: str) -> None:
    assert "<math" not in html(text)


def test_aligned_equations_keep_their_columns() -> None:
    assert html("$$\\begin{aligned} a &= b \\\\ c &= d \\end{aligned}$$").count("<mtd") == 4


@pytest.mark.parametrize("formula", [r"\frac{a}{", r"\left( x", "x" * 3000, "{" * 100 + "}" * 100])
def test_a_formula_that_cannot_be_read_stays_latex(formula: str) -> None:
    assert mathml(formula, block=False) == f'<code class="formula">{formula}</code>'


def test_words_in_a_formula_stay_words() -> None:
    assert "<mtext>a&lt;b&gt;c</mtext>" in html(r"$\text{a<b>c}$")


def test_a_text_beyond_the_limit_is_not_rendered() -> None:
    assert html_of("x" * (MAX_CHARACTERS + 1)) is None
    assert html_of("x" * MAX_CHARACTERS) is not None


def test_hostile_nesting_is_rendered_in_time() -> None:
    for text in (
        "> " * 5000,
        "[" * 20000,
        "*a " * 20000,
        "`" * 20000,
        "$" * 20001,
        "$x" * 20000,
        "$$\n" * 20000,
        r"\(" * 20000,
    ):
        start = time.process_time()
        html_of(text)
        assert time.process_time() - start < IN_TIME_S, text[:10]


def test_changed_words_are_marked_on_both_sides_and_spaces_do_not_count() -> None:
    left, right = "The quick brown fox jumps", "The  slow brown fox\njumps high"
    gone, come = changes(left, right)
    assert [left[a:b] for a, b in gone] == ["quick"]
    assert [right[a:b] for a, b in come] == ["slow", "high"]
    assert changes(left, left) == ((), ())


def test_long_texts_are_compared_by_lines_in_time() -> None:
    left = "\n".join(f"line {n} has some words of its own" for n in range(3000))
    start = time.process_time()
    gone, come = changes(left, left.replace("line 7 ", "LINE 7 "))
    assert time.process_time() - start < IN_TIME_S
    assert [left[a:b] for a, b in gone] == ["line 7 has some words of its own"]
    assert len(come) == 1


def test_texts_of_more_lines_than_are_compared_are_not_marked_and_cost_no_time() -> None:
    left, right = ("\n".join(f"{n % 200} {side}" for n in range(20_000)) for side in "xy")
    start = time.process_time()
    assert changes(left, right) == ((), ())
    assert time.process_time() - start < IN_TIME_S


@pytest.mark.parametrize("code", ["```perl\n" + "m{" * 40_000, "```java\n" + "a " * 40_000, "```make\n" + "(" * 40_000])
def test_code_whose_lexer_would_take_minutes_is_shown_without_colours(code: str) -> None:
    start = time.process_time()
    assert "<span" not in str(html_of(code))
    assert time.process_time() - start < IN_TIME_S


def test_the_text_of_rendered_markdown_is_what_a_reader_sees() -> None:
    assert text_of(str(html_of("a *b* `<c>` &amp; $x^2$\n\n```python\nx = 1\n```"))) == "a b <c> & x2\nx = 1\n\n"


def test_calls_and_tools_of_odd_shapes_are_shown_all_the_same() -> None:
    calls = ({"function": "f"}, {"function": {"name": None, "arguments": None}}, {"name": "g", "arguments": {"a": 1}})
    answer = ShownContent(messages=(ShownMessage(role="assistant", text="x", tool_calls=calls),))
    prompt = ShownContent(text="p", tools=({"function": "f"}, {"name": "g"}))
    found = shown(Shown(assignment="a", revision=1, project=1, prompt=prompt, candidates=(answer, answer)), kind="text")
    assert [call["name"] for call in found["candidates"][0]["turns"][0]["calls"]] == ["f", "None", "g"]
    assert [tool["name"] for tool in found["prompt"]["tools"]] == ["tool", "g"]


def picture(name: str, mime: str = "image/png") -> Picture:
    return Picture(key=f"key-{name}", mime=mime, width=64, height=48)


def of_texts(*texts: str, **more: object) -> Shown:
    candidates = tuple(ShownContent(text=text) for text in texts)
    return Shown(assignment="a1", revision=1, project=1, prompt=ShownContent(text="Say hi"), candidates=candidates, **more)  # type: ignore[arg-type]


def test_a_pair_of_texts_brings_words_html_and_changes() -> None:
    found = shown(of_texts("good day", "good **night**"), kind="text")
    assert found["assignment"] == "a1" and found["revision"] == 1
    assert found["prompt"]["turns"][0]["parts"] == [{"text": "Say hi", "html": "<p>Say hi</p>\n"}]
    assert found["candidates"][1]["turns"][0]["parts"][0]["html"] == "<p>good <strong>night</strong></p>\n"
    assert found["changes"]["plain"] == (((5, 8),), ((5, 14),))
    assert found["changes"]["rendered"] == (((5, 8),), ((5, 10),))
    json.dumps(found)


def test_three_texts_have_no_changes() -> None:
    assert shown(of_texts("a", "b", "c"), kind="text")["changes"] is None


def test_pictures_go_to_the_viewer_by_key_alone() -> None:
    pair = tuple(ShownContent(images=(picture(side),)) for side in ("l", "r"))
    found = shown(Shown(assignment="a", revision=2, project=1, prompt=ShownContent(text="p"), candidates=pair), kind="image")
    assert [one["media"] for one in found["candidates"]] == [
        [{"src": f"/media/key-{side}", "kind": "image", "width": 64, "height": 48}] for side in ("l", "r")
    ]
    assert all(one["turns"] == [] for one in found["candidates"])


def test_pictures_in_messages_go_to_the_viewer_too_and_words_below() -> None:
    spoken = ShownContent(messages=(ShownMessage(role="assistant", text="Here:", images=(picture("m", "video/mp4"),)),))
    value = Shown(assignment="a", revision=1, project=1, prompt=ShownContent(text="p"), candidates=(spoken, spoken))
    [first, _] = shown(value, kind="image")["candidates"]
    assert first["media"][0]["kind"] == "video"
    assert [part["text"] for part in first["turns"][0]["parts"]] == ["Here:"]


def test_pictures_of_a_conversation_stand_where_they_were_said() -> None:
    message = ShownMessage(role="user", text="Compare A with B.", images=(picture("1"), picture("2")), places=(8, 15))
    prompt = ShownContent(
        messages=(ShownMessage(role="system", text="Be brief."), message), tools=({"function": {"name": "look"}},)
    )
    found = shown(
        Shown(assignment="a", revision=1, project=1, prompt=prompt, candidates=of_texts("x", "y").candidates), kind="text"
    )
    system, user = found["prompt"]["turns"]
    assert (system["role"], user["role"]) == ("system", "user")
    assert [part.get("text") or part["media"]["src"] for part in user["parts"]] == [
        "Compare ", "/media/key-1", "A with ", "/media/key-2", "B.",
    ]  # fmt: skip
    assert found["prompt"]["tools"][0]["name"] == "look"


def test_calls_of_tools_and_thoughts_are_told() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    said = ShownContent(messages=(ShownMessage(role="assistant", text="", tool_calls=(call,), thoughts="hm"),))
    found = shown(
        Shown(assignment="a", revision=1, project=1, prompt=ShownContent(text="p"), candidates=(said, said)), kind="text"
    )
    [turn] = found["candidates"][0]["turns"]
    assert turn["calls"] == [{"name": "add", "arguments": '{"a": 1}'}]
    assert turn["thoughts"]["text"] == "hm"


def test_candidates_with_prompts_of_their_own_show_them() -> None:
    prompts = (ShownContent(text="one"), ShownContent(text="two"))
    found = shown(of_texts("x", "y", prompts=prompts, prefix="so far"), kind="text")
    assert [one["prompt"]["turns"][0]["parts"][0]["text"] for one in found["candidates"]] == ["one", "two"]
    assert found["prefix"]["text"] == "so far"


def test_the_verdict_that_stands_is_told_in_the_fields_of_a_vote() -> None:
    earlier = Verdict(choice="left", strength=-2, aspects={"clear": "tie"}, flags={"unsafe": (1,)}, rationale="r")
    assert shown(of_texts("x", "y", earlier=earlier), kind="text")["earlier"] == verdict(earlier)
    assert set(verdict(earlier)) == {"choice", "strength", "ranks", "aspects", "flags", "rationale"}


def test_the_page_is_told_what_is_asked_and_not_how_items_are_drawn() -> None:
    told = asked(Protocol(gold_share=0.1, guideline="g"))
    assert not {"gold_share", "repeat_share", "overlap_share", "random_share", "guideline"} & set(told)
    assert told["min_dwell_ms"] == 500


def test_instructions_are_rendered_as_texts_are() -> None:
    assert guideline("**a** <b>", 3) == {"version": 3, "text": "**a** <b>", "html": "<p><strong>a</strong> &lt;b&gt;</p>\n"}
