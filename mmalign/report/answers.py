"""The HTML report of texts: the same numbers as of images, and answers side by side."""

from collections.abc import Callable, Sequence
from html import escape

from PIL.Image import Image

from mmalign.report.findings import Evaluation, percent
from mmalign.report.grid import chosen_places, thumbnail
from mmalign.report.page import img, mean_charts, page_around

MOST_CHARACTERS = 4000  # of a text in the page
SIDE = 160  # pixels of an image of a prompt

STYLE = """
.answers { table-layout: fixed; }
.answers td, .answers th { text-align: left; vertical-align: top; white-space: normal; }
.answers td { overflow-wrap: anywhere; white-space: pre-wrap; padding: .6rem .75rem; }
.answers td.prompt { color: var(--soft); font-size: .9375rem; padding-left: 0; }
"""


def answers_page(
    evaluation: Evaluation,
    prompts: Sequence[str],
    columns: Sequence[tuple[str, Sequence[str]]],
    *,
    title: str,
    num_shown: int = 24,
    keys: Sequence[str] = (),
    pictures: Callable[[int], Sequence[Image]] = lambda place: (),
) -> str:
    """The report as HTML text. Every text is escaped: an answer may hold HTML.

    Args:
        evaluation: what was found; its `texts` are there.
        prompts: as text, one a pair.
        columns: (heading, answers) of the model before, at each checkpoint and after.
        title: heading of the page.
        num_shown: pairs in the page; which: `chosen_places`.
        keys: what tells prompts apart that say the same of other images; none: their words do.
        pictures: place of a pair -> images of its prompt.
    """
    charts = mean_charts(evaluation)
    shown = [
        f'<h2>Checkpoints</h2>\n<div class="charts">{charts}</div>' if charts else "",
        _lengths(evaluation),
        _side_by_side(prompts, columns, chosen_places(keys or prompts, num_shown), pictures),
    ]
    return page_around(evaluation, shown, title=title, style=STYLE)


def _lengths(evaluation: Evaluation) -> str:
    if evaluation.texts is None:
        return ""
    cells = "".join(f"<tr><td>{name}</td><td>{old}</td><td>{new}</td></tr>" for name, old, new in evaluation.texts.rows())
    biases = "".join(
        f"<p>{escape(one.name)}: the change of score correlates {one.correlation:+.2f} with the change of length; at equal "
        f"length the win rate is {percent(one.equal_length.rate)} ({100 * one.equal_length.low:.1f} to "
        f"{percent(one.equal_length.high)}).</p>"
        for one in evaluation.texts.biases
    )
    return (
        '<h2>Length and variety</h2>\n<div class="wide"><table><thead><tr><th></th><th>before</th><th>after</th></tr></thead>'
        f"<tbody>{cells}</tbody></table></div>{biases}"
    )


def _side_by_side(
    prompts: Sequence[str],
    columns: Sequence[tuple[str, Sequence[str]]],
    places: Sequence[int],
    pictures: Callable[[int], Sequence[Image]],
) -> str:
    headings = "".join(f"<th>{escape(heading)}</th>" for heading, _ in columns)
    rows = "".join(
        f'<tr><td class="prompt">{_pictured(pictures(place))}{_shown(prompts[place])}</td>'
        + "".join(f"<td>{_shown(texts[place])}</td>" for _, texts in columns)
        + "</tr>"
        for place in places
    )
    return (
        '<h2>Answers</h2>\n<p class="soft">Shown are the first seeds of every prompt, not chosen by any score.</p>\n'
        f'<div class="wide"><table class="answers"><thead><tr><th>prompt</th>{headings}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _pictured(images: Sequence[Image]) -> str:
    return "".join(img(thumbnail(image, SIDE), "shown with the prompt") for image in images)


def _shown(text: str) -> str:
    cut = text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} ..."
    return escape(cut)
