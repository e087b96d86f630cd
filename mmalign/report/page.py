"""The HTML report: one self-contained file, images inside, light and dark, readable without any script."""

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL.Image import Image

from mmalign.report.alarm import RULE
from mmalign.report.findings import Curve, Evaluation, PairFit, ScorerChange, TrainingDrift, percent
from mmalign.report.grid import chosen_places, short_captions, thumbnail
from mmalign.report.lengths import LENGTH_RULE
from mmalign.report.tasks import task_table

THUMBNAIL = 256  # pixels of the longer side of an image in the page, at most

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --soft: #656d76; --rule: #dfe3e8; --mark: #0b63c5;
  --other: #b4540a; --note: #fff8e6; --note-rule: #d9a300; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e4e7eb; --soft: #98a1ab; --rule: #2d333b;
  --mark: #6cb0ff; --other: #f0a35e; --note: #262112; --note-rule: #b98c1a; } }
body { background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", "DejaVu Sans", sans-serif; margin: 0 auto; max-width: 60rem; padding: 3.5rem 1.75rem 4rem; }
h1 { font-size: 1.75rem; font-weight: 600; letter-spacing: -.01em; line-height: 1.25; margin: 0; }
h2 { font-size: 1.1rem; font-weight: 600; margin: 3.25rem 0 .9rem; }
p { margin: .5rem 0; max-width: 44rem; }
.soft, figcaption, th, dt { color: var(--soft); }
dl { display: flex; flex-wrap: wrap; gap: 1.5rem 3.5rem; margin: 2.25rem 0 0; }
dt { font-size: .875rem; }
dd { margin: 0; }
dd b { display: block; font-size: 1.9rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
dd span { color: var(--soft); font-size: .875rem; }
.note { background: var(--note); border-left: 3px solid var(--note-rule); padding: .65rem 1rem; margin: .75rem 0; }
.notes { margin-top: 2.25rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th { font-size: .875rem; font-weight: 400; text-align: right; }
td { text-align: right; }
th, td { border-bottom: 1px solid var(--rule); padding: .5rem .5rem; white-space: nowrap; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
td small { color: var(--soft); font-size: .8125rem; }
th.axis { text-align: center; }
svg { display: block; margin-left: auto; }
.forest { height: 2.1rem; width: 15rem; }
.pairs { display: grid; gap: 1.4rem 1.75rem; margin-top: 1.25rem;
  grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); }
figure { margin: 0; }
.pair { display: grid; gap: 4px; grid-template-columns: 1fr 1fr; }
.pair img { display: block; height: auto; width: 100%; }
.crisp img { image-rendering: pixelated; }
figcaption { font-size: .875rem; line-height: 1.4; margin-top: .4rem; overflow-wrap: anywhere; }
.charts { display: grid; gap: 2rem 3rem; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); }
.charts svg { height: auto; width: 100%; }
svg text { fill: var(--soft); font-size: 12px; }
.how p { font-size: .9375rem; }
.alarm { border-left-color: #c62828; font-weight: 600; }
.states { display: grid; gap: 4px; grid-auto-columns: minmax(5rem, 11rem); grid-auto-flow: column; margin-bottom: .3rem; }
.states img { display: block; height: auto; width: 100%; }
"""


def report_page(
    evaluation: Evaluation,
    prompts: Sequence[str],
    before: Sequence[Image],
    after: Sequence[Image],
    *,
    title: str = "Before and after training",
    num_shown: int = 24,
    columns: Sequence[tuple[str, Sequence[Image]]] = (),
    num_rows: int = 6,
) -> str:
    """The report as HTML text.

    Args:
        evaluation: what was found.
        prompts, before, after: the pairs; which are shown: `chosen_places`.
        title: heading of the page.
        num_shown: pairs of images in the page.
        columns: (heading, images) of the model before, at each checkpoint and after; empty without checkpoints.
        num_rows: prompts and seeds shown at every checkpoint.
    """
    shown = [_checkpoints(evaluation, prompts, columns, num_rows), _examples(prompts, before, after, num_shown)]
    return page_around(evaluation, shown, title=title)


def page_around(evaluation: Evaluation, shown: Sequence[str], *, title: str, style: str = "") -> str:
    """The report as HTML text around what is shown of the candidates.

    Args:
        evaluation: what was found.
        shown: HTML.
        title: heading of the page.
        style: further CSS.
    """
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{evaluation.num_pairs} pairs from {evaluation.num_prompts} prompts, '
        "the same prompts and seeds before and after.</p>",
        _headline(evaluation),
        _notes(evaluation),
        _table(evaluation),
        task_table({scorer.name: scorer.tasks for scorer in evaluation.scorers}),
        *shown,
        _training(evaluation.training),
        _pairs(evaluation.pairs),
        _how_to_read(evaluation),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def _headline(evaluation: Evaluation) -> str:
    scorer, judge = evaluation.headline, evaluation.held_out
    rate = scorer.win_rate
    interval = f"{100 * rate.low:.1f} to {percent(rate.high)}"
    items = [("Win rate", percent(rate.rate), f"{interval}, by {escape(scorer.name)}")]
    if judge is not None:
        change = f"{_number(judge.mean_before)} → {_number(judge.mean_after)}"
        items.append(("Held-out judge", change, f"mean of {escape(judge.name)}"))
    if evaluation.diversity_before is not None and evaluation.diversity_after is not None:
        change = f"{evaluation.diversity_before:.3f} → {evaluation.diversity_after:.3f}"
        relative = evaluation.diversity_change
        items.append(("Diversity", change, "within a prompt" if relative is None else f"{_signed(100 * relative, 0)} %"))
    cells = "".join(f"<div><dt>{name}</dt><dd><b>{value}</b><span>{about}</span></dd></div>" for name, value, about in items)
    return f"<dl>{cells}</dl>"


def _notes(evaluation: Evaluation) -> str:
    alarm = evaluation.over_optimisation
    loud = str(alarm) if alarm is not None and alarm.found else None
    notes = "".join(
        f'<p class="note{" alarm" if warning == loud else ""}">{escape(warning)}</p>' for warning in evaluation.warnings()
    )
    return f'<div class="notes">{notes}</div>' if notes else ""


def _table(evaluation: Evaluation) -> str:
    last = evaluation.scorers[-1]
    rows = "".join(_table_row(scorer, with_axis=scorer is last) for scorer in evaluation.scorers)
    return (
        '<h2>Scores</h2>\n<div class="wide"><table><thead><tr><th></th><th>before</th><th>after</th><th>difference</th>'
        "<th>effect</th><th>won / tied / lost</th><th>win rate</th>"
        '<th class="axis">95 % interval</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _table_row(scorer: ScorerChange, *, with_axis: bool) -> str:
    rate = scorer.win_rate
    name = escape(scorer.name) + ("<br><small>held out</small>" if scorer.held_out else "")
    difference = _signed(scorer.mean_after - scorer.mean_before, 3)
    ends = f"{_signed(scorer.difference_low, 3)} to {_signed(scorer.difference_high, 3)}"
    effect = "none" if scorer.effect_size is None else _signed(scorer.effect_size, 2)
    return (
        f"<tr><td>{name}</td><td>{_number(scorer.mean_before)}</td><td>{_number(scorer.mean_after)}</td>"
        f"<td>{difference}<br><small>{ends}</small></td><td>{effect}</td>"
        f"<td>{rate.wins} / {rate.ties} / {rate.losses}</td><td>{percent(rate.rate)}</td>"
        f"<td>{_forest(scorer, with_axis=with_axis)}</td></tr>"
    )


def _forest(scorer: ScorerChange, *, with_axis: bool) -> str:
    """A win rate as a dot on its interval, on an axis from 0 to 100 % with a line at one half."""
    rate = scorer.win_rate
    low, middle, high = (8 + 224 * share for share in (rate.low, rate.rate, rate.high))
    label = f"{100 * rate.low:.1f} to {percent(rate.high)}"
    axis = (
        '<text x="8" y="33" text-anchor="start">0</text><text x="120" y="33" text-anchor="middle">50 %</text>'
        '<text x="232" y="33" text-anchor="end">100</text>'
    )
    return (
        f'<svg class="forest" viewBox="0 0 240 34" role="img" aria-label="{label}"><title>{label}</title>'
        '<line x1="8" x2="232" y1="14" y2="14" stroke="var(--rule)"/>'
        '<line x1="120" x2="120" y1="4" y2="24" stroke="var(--soft)" stroke-dasharray="2 2"/>'
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="14" y2="14" stroke="var(--mark)" stroke-width="3" stroke-linecap="round"/>'
        f'<circle cx="{middle:.1f}" cy="14" r="4.5" fill="var(--mark)"/>' + (axis if with_axis else "") + "</svg>"
    )


def mean_charts(evaluation: Evaluation) -> str:
    """Each judge's mean over the steps, as HTML; empty without checkpoints."""
    return "".join(
        _chart(f"Mean of {escape(name)}", [("", curve)], line_at=curve.values[0], ends="First to last")
        for name, curve in evaluation.mean_curves().items()
    )


def _checkpoints(
    evaluation: Evaluation, prompts: Sequence[str], columns: Sequence[tuple[str, Sequence[Image]]], num_rows: int
) -> str:
    """Each judge's mean over the steps, and the same seeds at every checkpoint."""
    charts = mean_charts(evaluation)
    if not charts:
        return ""
    headings = " · ".join(escape(heading) for heading, _ in columns)
    rows, largest = [], 0
    for place in chosen_places(prompts, num_rows):
        shown = [images[place] for _, images in columns]
        largest = max(largest, *(side for image in shown for side in image.size))
        states = "".join(img(image, f"{heading}: {prompts[place]}") for image, (heading, _) in zip(shown, columns, strict=True))
        rows.append(f'<figure><div class="states">{states}</div><figcaption>{escape(prompts[place])}</figcaption></figure>')
    crisp = " crisp" if largest <= 128 else ""
    return (
        f'<h2>Checkpoints</h2>\n<div class="charts">{charts}</div>\n<p class="soft">The same prompts and seeds, from left to '
        f'right: {headings}.</p>\n<div class="wide{crisp}">{"".join(rows)}</div>'
    )


def _examples(prompts: Sequence[str], before: Sequence[Image], after: Sequence[Image], num_shown: int) -> str:
    places = chosen_places(prompts, num_shown)
    shared, captions = short_captions([prompts[place] for place in places])
    figures, largest = [], 0
    for place, caption in zip(places, captions, strict=True):
        old, new = before[place], after[place]
        largest = max(largest, *old.size, *new.size)
        figures.append(
            f'<figure><div class="pair">{img(old, f"before: {prompts[place]}")}{img(new, f"after: {prompts[place]}")}</div>'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    crisp = " crisp" if largest <= 128 else ""
    begins = f" All prompts begin with “{escape(shared)}”." if shared else ""
    return (
        '<h2>Images</h2>\n<p class="soft">Before on the left, after on the right. '
        f"Shown are the first seeds of every prompt, not chosen by any score.{begins}</p>\n"
        f'<div class="pairs{crisp}">{"".join(figures)}</div>'
    )


def img(image: Image, alt: str) -> str:
    """An image of a page, with its pixels in it."""
    small = thumbnail(image, THUMBNAIL) if max(image.size) > THUMBNAIL else image.convert("RGB")
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    size = f'width="{small.width}" height="{small.height}"'
    return f'<img src="data:image/png;base64,{data}" {size} alt="{escape(alt, quote=True)}">'


def _training(training: TrainingDrift | None) -> str:
    if training is None or not training.named():
        return ""
    charts = []
    if training.accuracy is not None:
        charts.append(_chart("Implicit-reward accuracy", [("", training.accuracy)], line_at=0.5))
    errors = [("chosen", training.chosen_error), ("rejected", training.rejected_error)]
    drawn = [(name, curve) for name, curve in errors if curve is not None]
    if drawn:
        charts.append(_chart("Denoising error above the reference", drawn, line_at=0.0))
    return f'<h2>Training</h2>\n<div class="charts">{"".join(charts)}</div>'


def _pairs(fit: PairFit | None) -> str:
    if fit is None:
        return ""
    accuracy = fit.accuracy
    of_images = fit.error == "denoising error"
    drifts = [(1e3 if of_images else 1) * drift for drift in (fit.chosen_drift, fit.rejected_drift)]
    drift = f"{_signed(drifts[0], 3)} chosen, {_signed(drifts[1], 3)} rejected"
    draws, unit = (f"; {fit.num_draws} noise draws a pair", ", in thousandths") if of_images else ("", "")
    left_out = f" {fit.left_out()}." if fit.left_out() else ""
    return (
        "<h2>Held-out pairs</h2>\n"
        f"<p>The tuned model's implicit reward orders {percent(accuracy.rate)} of "
        f"{accuracy.wins + accuracy.ties + accuracy.losses} preference pairs that it was not trained on "
        f"({100 * accuracy.low:.1f} to {percent(accuracy.high)}{draws}). "
        f"{fit.error.capitalize()} above the base model's{unit}: {drift}.{left_out}</p>"
    )


def _chart(title: str, curves: Sequence[tuple[str, Curve]], *, line_at: float, ends: str = "First to last tenth") -> str:
    """Curves over steps in thin lines; the end of each bears its name; a dashed line at `line_at`."""
    values = [value for _, curve in curves for value in curve.values] + [line_at]
    steps = [step for _, curve in curves for step in curve.steps]
    bottom, top, first, last = min(values), max(values), min(steps), max(steps)

    def x(step: float) -> float:
        return 70 + 276 * (step - first) / ((last - first) or 1)

    def y(value: float) -> float:
        return 12 + 120 * (top - value) / ((top - bottom) or 1)

    body = f'<line x1="70" x2="346" y1="{y(line_at):.1f}" y2="{y(line_at):.1f}" stroke="var(--soft)" stroke-dasharray="2 3"/>'
    for value in (top, line_at, bottom):
        if value == line_at or abs(y(value) - y(line_at)) > 16:
            body += f'<text x="62" y="{y(value) + 4:.1f}" text-anchor="end">{_number(value, 2)}</text>'
    for colour, (name, curve) in zip(("var(--mark)", "var(--other)"), curves, strict=False):
        points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(curve.steps, curve.values, strict=True))
        body += f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.75" stroke-linejoin="round"/>'
        body += f'<text x="352" y="{y(curve.values[-1]) + 4:.1f}" style="fill:{colour}">{name}</text>'
    body += f'<text x="70" y="156">step {first:g}</text><text x="346" y="156" text-anchor="end">{last:g}</text>'
    means = "; ".join(f"{name} {_number(curve.ends[0], 2)} → {_number(curve.ends[1], 2)}".strip() for name, curve in curves)
    return (
        f'<figure><svg viewBox="0 0 420 164" role="img" aria-label="{title}">{body}</svg>'
        f"<figcaption>{title}. {ends}: {means}.</figcaption></figure>"
    )


def _how_to_read(evaluation: Evaluation) -> str:
    interval = {
        "wilson": "Wilson's interval, which stays honest near 0 and 100 %",
        "bootstrap": "a percentile bootstrap over the pairs",
    }[evaluation.interval]
    eps = ", ".join(f"{escape(scorer.name)} {scorer.eps:.3g}" for scorer in evaluation.scorers)
    one = "image" if evaluation.texts is None else "answer"
    variety = "diversity is the mean distance between images of one prompt (0 means that they are all alike)."
    if evaluation.texts is not None:
        variety = (
            "distinct-2 is the share of distinct pairs of words, each two answers cut to the length of the shorter one. The "
            "win rate at equal length takes off what a straight line through the changes of score and length says of length; "
            f"length is warned of when {LENGTH_RULE}."
        )
    return (
        '<h2>How to read this</h2>\n<div class="how">'
        f"<p>The win rate is the share of pairs that score higher after training; a tie counts half. Tied are pairs that "
        f"differ by no more than: {eps}. The interval covers the truth in 95 % of repetitions; it is {interval}, "
        "and takes the pairs as independent.</p>"
        f"<p>A win rate near 100 % says that nearly every {one} moved in the judged direction, not how far. The effect is the "
        "mean difference in units of its own spread (0.2 small, 0.8 large); the held-out judge took no part in making the "
        f"preferences; {variety}</p>"
        f"<p>The over-optimisation alarm is raised when {RULE}.</p></div>"
    )


def _number(value: float, digits: int = 3) -> str:
    """Three decimals, or `digits` significant ones below 0.01, with a true minus."""
    text = f"{value:.3f}" if abs(value) >= 0.01 or value == 0 or digits == 3 else f"{value:.{digits}g}"
    return text.replace("-", "−")  # noqa: RUF001


def _signed(value: float, digits: int) -> str:
    """A number with its sign, a true minus, and no minus before a rounded zero."""
    text = f"{value:+.{digits}f}"
    return "0" if float(text) == 0 else text.replace("-", "−")  # noqa: RUF001
