"""How benchmark rows are shown: a table that hides no loss, and a plot where matplotlib is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

MB = 2**20
HEADS = {
    "step": "one optimiser step of Diffusion-DPO",
    "store": "reading 16 latents by key",
    "loading": "reading a pair from JPEG",
}


def print_rows(
    rows: Sequence[Mapping[str, Any]],
    disclosed: Sequence[str],
    show: Callable[[str], None],
    heads: Mapping[str, str] = HEADS,
) -> None:
    """Every row, grouped, with its goal and whether it is met; then what has to be known to read them."""
    for suite, title in heads.items():
        for mode in dict.fromkeys(row.get("mode", "") for row in rows if row["suite"] == suite):
            here = [row for row in rows if row["suite"] == suite and row.get("mode", "") == mode]
            told = f"   (ratio: CPU time of the {here[0]['peer']} / of the row)" if "ratio" in here[0] else ""
            show(f"\n{title}{f', {mode}' if mode else ''}{told}")
            lines = [_head(here[0]), *(_line(row) for row in here)]
            width = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
            for line in lines:
                cells = [line[0].ljust(width[0]), *(cell.rjust(width[n]) for n, cell in enumerate(line[1:], 1))]
                show("  " + "  ".join(cells).rstrip())
            if "gate" in here[0]:
                worst = {name: max(row["gate"][name] for row in here) for name in ("loss_gap", "gradient_gap")}
                show(
                    f"  gate: losses within {worst['loss_gap']:.0e}, gradients within {worst['gradient_gap']:.0e} (relative L2)"
                )
    show("\nto be known:")
    for line in disclosed:
        show(f"  - {line}")


def _head(row: Mapping[str, Any]) -> list[str]:
    more = ["to joint"] if "ratio_to_joint" in row else []
    if "flop_limit" in row:
        more += ["FLOP limit", "of it"]
    if "memory_ratio" in row:
        more += ["memory", "at most", ""]
    if "held_bytes" in row:
        more += ["held MB"]
    if "step_peak_bytes" in row:
        more += ["step + MB"]
    if "host_syncs" in row:
        more += ["syncs", "collectives"]
    return ["", *(["ratio", "lowest to highest", "goal", ""] if "ratio" in row else []), *more]


def _line(row: Mapping[str, Any]) -> list[str]:
    line = [row["variant"]]
    if "ratio" in row:
        reliable, goal = row["reliable"], row["goal"]
        line += [f"{row['ratio']:.2f}" if reliable else "unreliable", f"{row['low']:.2f} to {row['high']:.2f}"]
        line += ["", ""] if goal is None else [f"{goal:.2f}", "met" if reliable and row["ratio"] >= goal else "missed"]
    if "ratio_to_joint" in row:
        line += [f"{row['ratio_to_joint']:.2f}"]
    if "flop_limit" in row:
        line += [f"{row['flop_limit']:.2f}", f"{100 * row['attained_of_limit']:.0f} %" if reliable else ""]
    if "memory_ratio" in row:
        memory, limit = row["memory_ratio"], row["memory_goal"]
        line += [f"{memory:.2f}", *(["", ""] if limit is None else [f"{limit:.2f}", "met" if memory <= limit else "missed"])]
    if "held_bytes" in row:
        line += [f"{row['held_bytes'] / MB:.1f}"]
    if "step_peak_bytes" in row:
        line += [f"{row['step_peak_bytes'] / MB:.1f}"]
    if "host_syncs" in row:
        line += [str(row["host_syncs"]), str(row["collectives"])]
    return line


def save_plot(rows: Sequence[Mapping[str, Any]], path: Path, *, label: str = "public script's time / time") -> bool:
    """Bars of the ratios with FLOP limit and goal drawn; False where matplotlib is not installed.

    Args:
        rows: with a FLOP limit.
        path: of the image.
        label: what the bars are.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in rows if "flop_limit" in row and row["reliable"]]
    figure = Figure(figsize=(9, 0.42 * len(shown) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, row in enumerate(reversed(shown)):
        ours = row["variant"].startswith("mmalign")
        error = [[row["ratio"] - row["low"]], [row["high"] - row["ratio"]]]
        axes.barh(place, row["ratio"], xerr=error, color="#3a6ea5" if ours else "#b8b8b8", height=0.62, ecolor="#555555")
        axes.plot([row["flop_limit"]] * 2, [place - 0.38, place + 0.38], color="black", linewidth=1.6)
        if row["goal"] is not None:
            axes.plot([row["goal"]] * 2, [place - 0.38, place + 0.38], color="#c0392b", linewidth=1.6, linestyle=":")
    axes.set_yticks(range(len(shown)), [f"{row['variant']} ({row['mode']})" for row in reversed(shown)])
    axes.axvline(1, color="#999999", linewidth=0.8)
    axes.set_xlabel(f"{label} (black: FLOP limit, red: goal)")
    figure.savefig(path, dpi=130)
    return True
