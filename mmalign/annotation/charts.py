"""Plots of the dashboard as SVG in words and numbers alone: points with intervals, bars. All names are escaped."""

from collections.abc import Sequence
from html import escape

WIDTH, LABELS, ROOM, ROW, TOP = 720, 220, 160, 26, 10
STYLE = (
    "<style>text{font:13px system-ui,sans-serif;fill:currentColor}.soft{opacity:.65}.axis{stroke:currentColor;opacity:.35}"
    ".at{stroke:currentColor;stroke-dasharray:3 3;opacity:.5}.whisker{stroke:#2563eb;stroke-width:2}.mark{fill:#2563eb}</style>"
)
LONGEST_LABEL = 28


def points(
    rows: Sequence[tuple[str, float, float | None, float | None]],
    *,
    title: str,
    low: float,
    high: float,
    reference: float | None = None,
    percent: bool = False,
) -> str:
    """A point with its interval for each row (label, value, low, high), as an SVG image.

    Args:
        rows: ends are None where there is no interval.
        title: of the image, for those who cannot see it too.
        low, high: ends of the axis; what lies beyond is drawn at the edge.
        reference: where a dashed line stands, such as 0.5 where no bias is.
        percent: write values as per cent.
    """
    marks = [] if reference is None else [_line(_x(reference, low, high), TOP, _x(reference, low, high), _bottom(rows), "at")]
    for number, (label, value, start, end) in enumerate(rows):
        y = TOP + ROW * number + ROW / 2
        told = _told(value, percent) + (
            "" if start is None or end is None else f" [{_told(start, percent)}, {_told(end, percent)}]"
        )
        if start is not None and end is not None:
            marks.append(_line(_x(start, low, high), y, _x(end, low, high), y, "whisker"))
        marks.append(f'<circle class="mark" cx="{_x(value, low, high):.1f}" cy="{y:.1f}" r="4.5"/>')
        marks.append(_row_texts(label, told, y))
    return _image(title, rows, [*marks, _axis(low, high, rows, percent)])


def bars(rows: Sequence[tuple[str, float]], *, title: str) -> str:
    """A bar for each row (label, count), as an SVG image."""
    most = max((value for _, value in rows), default=0) or 1
    marks = []
    for number, (label, value) in enumerate(rows):
        y = TOP + ROW * number + ROW / 2
        width = (WIDTH - LABELS - ROOM) * value / most
        marks.append(f'<rect class="mark" x="{LABELS}" y="{y - 8:.1f}" width="{width:.1f}" height="16" rx="2"/>')
        marks.append(_row_texts(label, f"{value:g}", y))
    return _image(title, rows, marks)


def _image(title: str, rows: Sequence[object], marks: Sequence[str]) -> str:
    height = TOP + ROW * len(rows) + 28
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{STYLE}{''.join(marks)}</svg>"
    )


def _row_texts(label: str, told: str, y: float) -> str:
    short = label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"
    return (
        f'<text x="{LABELS - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(short)}</text>'
        f'<text x="{WIDTH - ROOM + 8}" y="{y + 4:.1f}">{escape(told)}</text>'
    )


def _axis(low: float, high: float, rows: Sequence[object], percent: bool) -> str:
    y = _bottom(rows)
    ends = "".join(
        f'<text class="soft" x="{_x(value, low, high):.1f}" y="{y + 16}" text-anchor="middle">{_told(value, percent)}</text>'
        for value in (low, (low + high) / 2, high)
    )
    return _line(LABELS, y, WIDTH - ROOM, y, "axis") + ends


def _bottom(rows: Sequence[object]) -> float:
    return TOP + ROW * len(rows) + 2


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _x(value: float, low: float, high: float) -> float:
    share = (min(max(value, low), high) - low) / (high - low)
    return LABELS + share * (WIDTH - LABELS - ROOM)


def _told(value: float, percent: bool) -> str:
    return f"{value:.0%}" if percent else f"{round(value, 2) + 0.0:.2f}"  # + 0.0: no minus before a zero
