"""The card of an exported data set: what is in it, what was left out and why, and how far the people agree."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mmalign.annotation.dashboard import Dashboard
from mmalign.annotation.protocol import Protocol

COLUMNS = {
    "id": "of the row in the judged data; `#` and a number where it became several rows",
    "prob": "share of the votes for the chosen one, a tie counting half: a soft label",
    "margin": "mean strength in favour of the chosen one, 0 to 3",
    "n_votes": "people whose verdict counts, skips left out",
    "agreement": "share of the most frequent verdict among them",
    "label": "whether the candidate is wanted",
    "ranks": "1 is best, equal is a tie",
}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the card tells beside the dashboard.

    Args:
        title: of the data set.
        kind: image or text.
        format, told: its name and what it is in one line.
        num_rows: of the data.
        dropped: items that are not in it, by reason.
        importer: what `mmalign train` reads it with; None: it is not for training.
        path: what the importer reads, for the command: from the folder of the card on.
        excluded: how many people's votes were left out on demand.
        guideline_version: the newest.
        columns: those that the rows have, with a value in one of them at least.
    """

    title: str
    kind: str
    format: str
    told: str
    num_rows: int
    dropped: Counter[str]
    importer: str | None
    path: str
    excluded: int
    guideline_version: int
    columns: frozenset[str] = frozenset()


def card(facts: Facts, whole: Dashboard, protocol: Protocol) -> str:
    """Return the README.md of an exported folder, with the head that the Hugging Face hub reads.

    Args:
        facts: of the export.
        whole: what is said about the votes.
        protocol: under which they were cast.
    """
    parts = [
        _head(facts),
        f"# {facts.title}\n",
        f"Preferences between {facts.kind}s that people gave in mmalign: {facts.told}.\n",
        _counts(facts, whole),
        _dropped(facts),
        _agreement(whole),
        _collected(facts, whole, protocol),
        _columns(facts),
        _use(facts),
    ]
    return "\n".join(part for part in parts if part)


def _head(facts: Facts) -> str:
    tags = ["mmalign", "preference", "human-feedback"]
    # No `configs`: with them `datasets` tells local folders apart by their last name alone and serves an older export's rows.
    return "\n".join(["---", f"pretty_name: {_quoted(facts.title)}", "tags:", *(f"- {tag}" for tag in tags), "---", ""])


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'


def _counts(facts: Facts, whole: Dashboard) -> str:
    choices = ", ".join(f"{name} {count}" for name, count in whole.counts.most_common())
    rows = {
        "rows": facts.num_rows,
        "items judged": f"{whole.num_judged}" + ("" if whole.num_items is None else f" of {whole.num_items}"),
        "items judged by two people or more": whole.num_overlapping,
        "votes": whole.num_votes - whole.num_checks,
        "votes by choice": choices or "none",
        "people": len(whole.raters),
    }
    if whole.num_checks:
        rows["further votes, on items of known answer and on items that came back"] = whole.num_checks
    if whole.blind is not None:
        rows["preferred after training, judged blind, by item"] = str(whole.blind)
    if facts.excluded:
        rows["people whose votes were left out on demand"] = facts.excluded
    return "## Counts\n\n" + _table(("", ""), [(name, str(value)) for name, value in rows.items()])


def _dropped(facts: Facts) -> str:
    if not facts.dropped:
        return "Every item of the project is in it.\n"
    return "## Left out\n\n" + _table(("reason", "items"), [(r, str(n)) for r, n in facts.dropped.most_common()])


def _agreement(whole: Dashboard) -> str:
    rows = [
        (
            row["measure"],
            f"{row['value']:.3f}",
            "" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}",
            str(row["items"]),
        )
        for row in whole.tables()["agreement"]
    ]
    rows += [
        (row["bias"] + " wins", f"{row['rate']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}", f"{row['total']} votes")
        for row in whole.tables()["bias"]
    ]
    if not rows:
        return "## Agreement\n\nNo item was judged by two people, so that nothing is known of agreement.\n"
    told = (
        "Intervals of agreement are bootstrapped over items, those of biases are Wilson's; 95 %. Preferences of people who are "
        "right three times of four agree in 63 % of cases: a low agreement is normal and no proof of bad work.\n"
    )
    chosen = (
        "\nItems were also chosen by their votes (active selection). Of the random slice alone:\n\n"
        + _table(("measure", "value"), [(r["measure"], f"{r['value']:.3f}") for r in whole.on_random.tables()["agreement"]])
        if whole.on_random is not None
        else ""
    )
    return "## Agreement\n\n" + _table(("measure", "value", "interval", "of"), rows) + "\n" + told + chosen


def _collected(facts: Facts, whole: Dashboard, protocol: Protocol) -> str:
    asked = [f"choices {', '.join(protocol.choices)}"]
    asked += ["strength from -3 to 3"] if protocol.strength else []
    asked += [f"aspects {', '.join(protocol.aspects)}"] if protocol.aspects else []
    asked += [f"flags {', '.join(protocol.flags)}"] if protocol.flags else []
    seconds = [rater.seconds for rater in whole.raters.values() if rater.seconds is not None]
    dwell = f" Median time on an item: {sorted(seconds)[len(seconds) // 2]:.1f} s." if seconds else ""
    many = f"{protocol.votes_per_item} people an item" if protocol.votes_per_item > 1 else "one person an item"
    if protocol.overlap_share:
        many += f", {protocol.overlap_votes} for a random {protocol.overlap_share:.0%} of them"
    checks = [f"{protocol.gold_share:.0%} items of known answer, where there are any"] if protocol.gold_share else []
    checks += [f"{protocol.repeat_share:.0%} items that come back with the sides swapped"] if protocol.repeat_share else []
    mixed = f" To be mixed in were {' and '.join(checks)}; votes on these do not count here." if checks else ""
    return (
        "## How it was collected\n\n"
        "Candidates were shown without the names of their makers, in an order drawn anew for every showing. Asked were: "
        f"{'; '.join(asked)}. Wanted were {many}.{mixed} "
        f"Guideline version {facts.guideline_version}.{dwell} People are numbered, not named.\n"
    )


def _columns(facts: Facts) -> str:
    used = [name for name in COLUMNS if name in facts.columns]
    if not used:
        return ""
    return "## Columns\n\n" + _table(("column", "what it is"), [(name, COLUMNS[name]) for name in used])


def _use(facts: Facts) -> str:
    if facts.importer is None:
        return ""
    view = {"unpaired": " data.view.name=unpaired", "ranked": " data.view.name=ranked"}.get(facts.format, "")
    place = facts.path.partition("/")[0]
    where = f"Where the folder `{place}` lies, the one of this file:\n\n"
    return f"## Use\n\n{where}    mmalign train ... data.importer.name={facts.importer} data.importer.path={facts.path}{view}\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(one) for one in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
