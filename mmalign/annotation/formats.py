"""Formats of an export: what one judged item becomes in each, and why it does not."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mmalign.annotation.ballots import Ballot
from mmalign.annotation.pooling import NO_VOTES, Pooled, with_verdict
from mmalign.annotation.tables import Encoded, Rows
from mmalign.importers.trl_format import laid_out
from mmalign.records import Comparison, Content, Dropped, Example, Media, Sample, pair
from mmalign.records.verdicts import Pairs

OWN_PROMPTS = "a prompt of its own for each candidate, which the format comparisons can hold"
SEVERAL_IMAGES = "several images a candidate, which the format comparisons can hold"
WORDS_AND_IMAGES = "words and images in one candidate, which the format comparisons can hold"
CONVERSATION = "a conversation before its images, which the format comparisons can hold"
PROMPT_IMAGES = "images in the prompt, which the formats trl, ranked and comparisons can hold"
NOT_TWO = "{} candidates, want 2"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One item with what was said of it.

    Args:
        row: as it was added.
        verdict: of all votes.
        ballots: one a vote.
        prob: whether rows carry the share of the votes as a soft label.
        pairs: which pairs a list of candidates becomes.
    """

    row: Comparison
    verdict: Pooled
    ballots: Sequence[Ballot]
    prob: bool = True
    pairs: Pairs = "best_worst"

    @property
    def facts(self) -> dict[str, Any]:
        """How many people said it, and what share of them the most frequent verdict has."""
        return {"n_votes": self.verdict.num_votes, "agreement": self.verdict.agreement}

    @property
    def pictured(self) -> bool:
        """Whether candidates are images alone."""
        return all(c.images and c.text is None and not c.messages for c in self.row.candidates)


Outcome = list[dict[str, Any]] | str


def trl(judged: Judged) -> Outcome:
    """Preference pairs as TRL has them: prompt, chosen, rejected, and prob, margin, n_votes, agreement beside them."""
    if problem := judged.verdict.dropped or _misfit(judged):
        return problem
    examples = pair(with_verdict(judged.row, judged.verdict), by="ranks", pairs=judged.pairs)
    if isinstance(examples, Dropped):
        return examples.reason
    return [_pair_row(judged, example) for example in examples]


def _pair_row(judged: Judged, example: Example) -> dict[str, Any]:
    chosen, rejected = example.samples
    row = _said(judged, chosen, {"chosen": chosen.completion, "rejected": rejected.completion})
    prob, margin = judged.verdict.prob, judged.verdict.margin
    if prob is not None and judged.prob:
        row["prob"] = max(prob, 1 - prob)
    if margin is not None:
        row["margin"] = margin
    return {"id": example.id, **row, **judged.facts}


def unpaired(judged: Judged) -> Outcome:
    """Each candidate alone with its label, as TRL has them for KTO: the best ones are wanted, and none where all are bad."""
    verdict = judged.verdict
    if not verdict.num_votes or (verdict.dropped and not verdict.all_bad):
        return verdict.dropped or NO_VOTES
    if problem := _misfit(judged):
        return problem
    rows = []
    for place, candidate in enumerate(judged.row.candidates):
        sample = Sample(prompt=judged.row.prompt, completion=candidate, prefix=judged.row.prefix)
        label = verdict.ranks is not None and verdict.ranks[place] == min(verdict.ranks)
        said = _said(judged, sample, {"completion": candidate})
        rows.append({"id": f"{judged.row.id}#{place}", **said, "label": label, **judged.facts})
    return rows


def ranked(judged: Judged) -> Outcome:
    """All candidates with their ranks (1 is best, equal is a tie): prompt, completions, ranks."""
    if problem := judged.verdict.dropped or _misfit(judged):
        return problem
    row = judged.row
    sample = Sample(prompt=row.prompt, completion=row.candidates[0], prefix=row.prefix)
    names = [str(place) for place in range(len(row.candidates))]
    said = _said(judged, sample, dict(zip(names, row.candidates, strict=True)))
    completions = [said.pop(name) for name in names]
    return [{"id": row.id, **said, "completions": completions, "ranks": list(judged.verdict.ranks or ()), **judged.facts}]


def pick_a_pic(judged: Judged) -> Outcome:
    """Pairs of images with the columns of Pick-a-Pic; label_0 and label_1 are 0.5 for a tie."""
    verdict, row = judged.verdict, judged.row
    if len(row.candidates) != 2:
        return NOT_TWO.format(len(row.candidates))
    if problem := (None if verdict.ranks is not None else verdict.dropped) or no_images_alone(judged):
        return problem
    first, second = verdict.ranks or (0.0, 0.0)
    label = 0.5 if first == second else float(first < second)
    best = "tie" if first == second else f"{row.id}#{int(second < first)}"
    entry: dict[str, Any] = {"ranking_id": row.id, "caption": row.prompt.text, "best_image_uid": best, "are_different": True}
    for place, content in enumerate(row.candidates):
        entry |= {f"image_{place}_uid": f"{row.id}#{place}", f"jpg_{place}": Encoded(content.images[0])}
        entry[f"model_{place}"] = judged.ballots[0].sources[place] if judged.ballots[0].sources else None
    return [{**entry, "label_0": label, "label_1": 1 - label, "has_label": True, **judged.facts}]


def with_examples_per_prompt(rows: Rows) -> Rows:
    """Tell beside each row of Pick-a-Pic how many rows have its caption, by which an importer can weigh them."""
    counts = Counter(row["caption"] for row in rows(False))

    def counted(media: bool) -> Iterator[dict[str, Any]]:
        for row in rows(media):
            yield {**row, "num_example_per_prompt": counts[row["caption"]]}

    return counted


def csv_row(judged: Judged) -> Outcome:
    """One line an item: the votes by choice, the pooled verdict, the sources; ties and bad ones too."""
    row, verdict = judged.row, judged.verdict
    counts = {f"votes {name}": verdict.counts[name] for name in ("a", "b", "ranks", "tie", "both_bad", "skip")}
    sources = judged.ballots[0].sources
    ranks = verdict.ranks or (None,) * len(row.candidates)
    entry: dict[str, Any] = {"id": row.id, "prompt": row.prompt.words(), **counts, "outcome": verdict.dropped or "ordered"}
    entry |= {"prob": verdict.prob, "margin": verdict.margin, **judged.facts}
    for place, candidate in enumerate(row.candidates):
        letter = "abcdef"[place]
        entry |= {f"rank {letter}": ranks[place], f"source {letter}": sources[place] if sources else None}
        entry[f"text {letter}"] = candidate.words() or None
    return [entry]


def _said(judged: Judged, sample: Sample, answers: dict[str, Content]) -> dict[str, Any]:
    """The prompt and answers to it: texts and conversations as TRL has them, or images."""
    if not judged.pictured:
        return laid_out(sample, answers)
    row: dict[str, Any] = {"prompt": sample.prompt.text}
    if sample.prompt.images:
        row["images"] = list(sample.prompt.images)
    pictures: dict[str, Media] = {name: content.images[0] for name, content in answers.items()}
    return {**row, **pictures}


def _misfit(judged: Judged) -> str | None:
    """Why these formats cannot hold the item, if so."""
    row = judged.row
    if row.prompts is not None:
        return OWN_PROMPTS
    if judged.pictured and row.prompt.messages:
        return CONVERSATION
    if judged.pictured and any(len(content.images) > 1 for content in row.candidates):
        return SEVERAL_IMAGES
    return WORDS_AND_IMAGES if not judged.pictured and any(candidate.media() for candidate in row.candidates) else None


def no_images_alone(judged: Judged) -> str | None:
    """Why formats of one text and images that answer it cannot hold the item, if so."""
    if problem := _misfit(judged):
        return problem
    return WORDS_AND_IMAGES if not judged.pictured else PROMPT_IMAGES if judged.row.prompt.images else None


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format of an export.

    Args:
        rows: what an item becomes; None: the export writes it as a whole.
        kinds: of projects that have it.
        containers: it can lie in, the first by default.
        importer: what `mmalign train` reads it with; None: it is not for training.
        told: in one line what it is, for the card.
        counted: adds to rows what only all of them together tell.
    """

    rows: Callable[[Judged], Outcome] | None
    kinds: tuple[str, ...] = ("image", "text")
    containers: tuple[str, ...] = ("parquet", "jsonl", "datasets")
    importer: str | None = "trl"
    told: str
    counted: Callable[[Rows], Rows] | None = None


FORMATS: dict[str, Format] = {
    "comparisons": Format(rows=None, importer="comparisons", told="all candidates of each prompt with pooled ranks and prob"),
    "trl": Format(rows=trl, told="preference pairs as TRL has them: prompt, chosen, rejected"),
    "unpaired": Format(rows=unpaired, told="single candidates as TRL has them for KTO: prompt, completion, label"),
    "ranked": Format(rows=ranked, told="ranked lists: prompt, completions, ranks (1 is best, equal is a tie)"),
    "pick_a_pic": Format(
        rows=pick_a_pic,
        kinds=("image",),
        containers=("parquet", "datasets"),
        importer="pick_a_pic",
        told="pairs of images with the columns of Pick-a-Pic; label_0 and label_1 are 0.5 for a tie",
        counted=with_examples_per_prompt,
    ),
    "hpdv2": Format(
        rows=None,
        kinds=("image",),
        containers=("json",),
        importer="hpdv2",
        told="images with the fields of HPDv2: human_preference of pairs, rank of lists, raw_annotations of each person",
    ),
    "csv": Format(
        rows=csv_row, containers=("csv",), importer=None, told="one line an item: votes by choice and the pooled verdict"
    ),
    "judgements": Format(
        rows=None,
        containers=("parquet", "jsonl"),
        importer=None,
        told="every vote as it was cast, with every revision, and every item as it was added",
    ),
}
