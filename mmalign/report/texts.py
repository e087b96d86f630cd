"""What an evaluation of texts found: same prompts and seeds before and after, as numbers, a table and one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch

from mmalign.report.findings import ScorerChange, percent
from mmalign.report.page import STYLE
from mmalign.statistics import bootstrap_interval, effect_size, win_rate

TEXTS = """
.texts { display: grid; gap: 1rem 2rem; grid-template-columns: 1fr 1fr; margin: 1rem 0 2rem; }
.texts pre { font: .875rem/1.5 ui-monospace, monospace; margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
"""


def scorer_change(name: str, before: Sequence[float], after: Sequence[float], *, held_out: bool) -> ScorerChange:
    """One judge's scores of the same prompts and seeds before and after; equal scores are ties.

    Args:
        name: of the judge.
        before, after: a score each prompt, in the judge's units.
        held_out: it took no part in making the preferences.
    """
    old, new = (torch.tensor(list(side), dtype=torch.float64).float() for side in (before, after))
    low, high = bootstrap_interval(new - old)
    return ScorerChange(
        name=name,
        held_out=held_out,
        win_rate=win_rate(old, new),
        eps=0.0,
        mean_before=float(old.mean()),
        mean_after=float(new.mean()),
        difference_low=low,
        difference_high=high,
        effect_size=effect_size(old, new),
    )


@dataclass(frozen=True, kw_only=True)
class TextEvaluation:
    """Two sets of texts on the same prompts and seeds, compared.

    Args:
        annotator: made the preferences.
        judge: took no part in them.
        distinct_before, distinct_after: distinct pairs of words over all texts, a share.
        perplexity_before, perplexity_after: of the models, on real text that neither was tuned on.
    """

    annotator: ScorerChange
    judge: ScorerChange
    distinct_before: float
    distinct_after: float
    perplexity_before: float
    perplexity_after: float

    @property
    def gain(self) -> float:
        """Of the held-out judge's mean, in its units."""
        return self.judge.mean_after - self.judge.mean_before

    @property
    def distinct_change(self) -> float:
        """Relative: -0.2 is a fall by a fifth."""
        return self.distinct_after / self.distinct_before - 1

    @property
    def perplexity_change(self) -> float:
        """Relative: 0.2 is a rise by a fifth."""
        return self.perplexity_after / self.perplexity_before - 1

    def results(self) -> dict[str, Any]:
        """Plain numbers for results.json."""
        rate = self.annotator.win_rate
        scorers = {}
        for scorer in (self.annotator, self.judge):
            plain = {name: value for name, value in vars(scorer).items() if name not in ("name", "win_rate", "tasks")}
            scorers[scorer.name] = {**plain, "win_rate": vars(scorer.win_rate)}
        return {
            "win_rate": rate.rate,
            "low": rate.low,
            "high": rate.high,
            "judge_before": self.judge.mean_before,
            "judge_after": self.judge.mean_after,
            "distinct_before": self.distinct_before,
            "distinct_after": self.distinct_after,
            "perplexity_before": self.perplexity_before,
            "perplexity_after": self.perplexity_after,
            "num_pairs": rate.num_pairs,
            "scorers": scorers,
        }

    def rows(self) -> list[tuple[str, ...]]:
        """The table, its heading first."""
        found: list[tuple[str, ...]] = [("", "before", "after", "win rate", "95 % interval", "effect", "won / tied / lost")]
        for scorer in (self.annotator, self.judge):
            rate = scorer.win_rate
            found.append(
                (
                    f"{scorer.name} (held out)" if scorer.held_out else scorer.name,
                    f"{scorer.mean_before:.3f}",
                    f"{scorer.mean_after:.3f}",
                    percent(rate.rate),
                    f"{100 * rate.low:.1f} to {percent(rate.high)}",
                    "undefined" if scorer.effect_size is None else f"{scorer.effect_size:+.2f}",
                    f"{rate.wins} / {rate.ties} / {rate.losses}",
                )
            )
        found.append(("distinct word pairs", f"{self.distinct_before:.3f}", f"{self.distinct_after:.3f}", *[""] * 4))
        found.append(("perplexity", f"{self.perplexity_before:.1f}", f"{self.perplexity_after:.1f}", *[""] * 4))
        return found

    def __str__(self) -> str:
        """The table for the terminal."""
        rows = self.rows()
        wide = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [f"{self.annotator.win_rate.num_pairs} prompts, the same seeds before and after", ""]
        for row in rows:
            cells = [row[0].ljust(wide[0]), *(cell.rjust(width) for cell, width in zip(row[1:], wide[1:], strict=True))]
            lines.append("   ".join(cells).rstrip())
        return "\n".join(lines)


def text_page(
    evaluation: TextEvaluation,
    prompts: Sequence[str],
    before: Sequence[str],
    after: Sequence[str],
    *,
    title: str,
    about: Sequence[str] = (),
    num_shown: int = 12,
) -> str:
    """The report as HTML text, self-contained.

    Args:
        evaluation: what was found.
        prompts, before, after: the texts; the first of them are shown, none is picked.
        title: heading of the page.
        about: paragraphs that say what was measured.
        num_shown: prompts in the page.
    """
    head, *rows = evaluation.rows()
    table = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"
    table += "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    shown = "".join(
        f"<p><b>{escape(prompt)}</b></p>\n<div class='texts'><pre>{escape(old)}</pre><pre>{escape(new)}</pre></div>\n"
        for prompt, old, new in list(zip(prompts, before, after, strict=True))[:num_shown]
    )
    parts = [
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{escape(one)}</p>" for one in about),
        f"<h2>Scores</h2>\n<div class='wide'><table>{table}</table></div>",
        f"<h2>The first {min(num_shown, len(prompts))} prompts: before on the left, after on the right</h2>\n{shown}",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{TEXTS}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )
