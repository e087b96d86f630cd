"""The exam `sight`: what a tuned model that sees, and its base, owe to the images of held-out rows."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch

from mmalign.adapters.image_text import ImageTextAdapter
from mmalign.blind_rows import BLIND, blind_prompt, shown_prompt
from mmalign.config import Choice, Table
from mmalign.devices import torch_device
from mmalign.errors import UserError
from mmalign.exams.files import words_of
from mmalign.exams.sight import Case, Side, SightFindings, data_lines, sight_lines
from mmalign.held_out import run_config
from mmalign.metrics.refusals import REFUSALS, refuses
from mmalign.multimodal.degradations import Condition, drop, swap
from mmalign.records import Comparison, Content, Dropped, Media
from mmalign.records.verdicts import values_of
from mmalign.row_files import Rows, read_rows
from mmalign.sight_sides import Shown, lengths_of, likelihoods, said
from mmalign.snapshots import is_checkpoint, write_stock_weights

logger = logging.getLogger(__name__)

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


def sight(
    *,
    run: str,
    path: str | None = None,
    data: Annotated[Choice, Table("mmalign.importers:IMPORTERS")] | None = None,
    by: str = "auto",
    limit: int | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 4,
    seed: int = 0,
    safe_images: str | None = None,
    phrases: str | None = None,
    device: str = "auto",
) -> SightFindings:
    """Blind gap, image sensitivity, blind agreement, refusals and rewards of a run's model beside its base's.

    blind gap = log pi(w | x, v) - log pi(w | x) of the chosen answer w, the question x and its image v
    image sensitivity = mean over the tokens of w of KL(pi(. | x, v) || pi(. | x))
    blind agreement = share of greedy answers that stay the same when the image is taken away, or is another row's
    reward = log pi(y | x, v) - log base(y | x, v): accuracies and margins of the chosen answer over rejected and blind ones

    A model that answers from the text alone has a gap and a sensitivity of about 0 and agrees with itself blind. A refusal is
    told by keywords. Rows whose chosen answer declines are those that should be refused: of the others a refusal is too much,
    and so is one of such a question under a safe image in the place of its own.

    Source: what Blind PO (arXiv 2503.14189) calls cheating, and shows on ten prompts whose images were exchanged for safe ones.

    Args:
        run: output of `mmalign train` with adapter image_text, or its checkpoint-N.
        path: held-out comparisons in one of our own formats; or
        data: an importer.
        by: what orders the candidates of a row, as in the view pair; those whose provenance says `source: blind` stand apart.
        limit: only the first rows.
        max_new_tokens: of a greedy answer; 0: none is asked for.
        batch_size: rows at a time.
        seed: of which other row's image is shown.
        safe_images: folder of images on which nothing is to be refused; None: those of rows whose chosen answer does not
            decline.
        phrases: a file of phrases that decline, one a line; None: our own.
        device: auto, cpu, cuda ...

    Raises:
        UserError: no such run, or one of another adapter; rows without images.
    """
    if batch_size < 1 or max_new_tokens < 0 or (limit is not None and limit < 1):
        raise UserError(
            f"batch_size, max_new_tokens, limit: got {batch_size}, {max_new_tokens}, {limit}, want 1 or more, 0 or more, and 1 "
            "or more or null."
        )
    keywords = REFUSALS if phrases is None else tuple(words_of(phrases))
    plan = _planned(read_rows(path, data), by, limit, keywords, seed, safe_images)
    with _opened(Path(run).expanduser(), torch_device(device)) as policy:
        cut: list[int] = []
        cases = list(_measured(policy, plan, batch_size, max_new_tokens, cut))
    return SightFindings(
        lines=tuple(sight_lines(cases, keywords)),
        data=data_lines(cases),
        num_rows=len(cases),
        left_out=dict(plan.left_out),
        notes=(*plan.notes, *(["some answers of the data are cut at the run's max_response_length"] if any(cut) else [])),
    )


# --- rows ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row: its number, and which of its candidates is what.

    Args:
        number: of the row.
        chosen: the one best answer that is not blind; None: there is none.
        rejected: worse ones, best first.
        blind: those made without the image.
        asks: whether there are words beside the images.
        declines: whether the chosen answer declines; None: there is none.
    """

    number: int
    chosen: int | None
    rejected: tuple[int, ...]
    blind: tuple[int, ...]
    asks: bool
    declines: bool | None

    @property
    def form(self) -> tuple[bool, int, bool]:
        """Equal for rows that are laid out together."""
        return self.chosen is not None, len(self.rejected) + len(self.blind), self.asks


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The rows that are measured, and the images that are shown in place of theirs."""

    rows: Rows
    entries: tuple[Entry, ...]
    left_out: Counter[str]
    seed: int
    safe: tuple[Media, ...] | None
    keys: dict[int, frozenset[str]] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the numbers must know."""
        ties = sum(entry.chosen is None for entry in self.entries)
        return (f"{ties} rows have no one best answer: their greedy answers alone are measured",) if ties else ()

    def row(self, entry: Entry) -> Comparison:
        return self.rows.whole(entry.number)

    def images(self, number: int) -> frozenset[str]:
        """Keys of what a row shows."""
        if number not in self.keys:
            self.keys[number] = frozenset(media.key() for media in self.rows.whole(number).prompt.media())
        return self.keys[number]

    def swapped(self, entry: Entry) -> Content | None:
        """The prompt of another row, none of whose images are the row's own."""
        return self._another(entry, [other.number for other in self.entries], "swap")

    def benign(self, entry: Entry) -> Content | None:
        """What safe images are taken from, for a row whose chosen answer declines."""
        if not entry.declines:
            return None
        if self.safe is not None:
            return Content(images=(self.safe[self._start(entry, "safe") % len(self.safe)],))
        return self._another(entry, [other.number for other in self.entries if other.declines is False], "safe")

    def _another(self, entry: Entry, pool: Sequence[int], purpose: str) -> Content | None:
        start = self._start(entry, purpose)
        for step in range(len(pool)):
            number = pool[(start + step) % len(pool)]
            if number != entry.number and not self.images(number) & self.images(entry.number):
                return self.rows.whole(number).prompt
        return None

    def _start(self, entry: Entry, purpose: str) -> int:
        told = f"{self.seed} {purpose} {self.rows.outlines[entry.number].id}"
        return int.from_bytes(hashlib.sha256(told.encode()).digest()[:6], "big")


def _planned(rows: Rows, by: str, limit: int | None, phrases: Sequence[str], seed: int, safe: str | None) -> _Plan:
    """The rows that show something.

    Raises:
        UserError: none does, or there is no safe image in the folder.
    """
    entries: list[Entry] = []
    left_out: Counter[str] = Counter()
    for number, row in enumerate(rows.outlines[:limit]):
        shown = shown_prompt(row)
        if isinstance(shown, Dropped):
            left_out[shown.reason] += 1
        else:
            entries.append(_entry(number, row, by, phrases))
    if not entries:
        told = ", ".join(f"{reason}: {number}" for reason, number in left_out.most_common())
        raise UserError(f"data: got no row to show an image of ({told}), want prompts with images. Check the data.")
    return _Plan(rows=rows, entries=tuple(entries), left_out=left_out, seed=seed, safe=_safe(safe))


def _entry(number: int, row: Comparison, by: str, phrases: Sequence[str]) -> Entry:
    origins = row.provenance or ({},) * len(row.candidates)
    blind = tuple(n for n, origin in enumerate(origins) if origin.get("source") == BLIND)
    seeing = [n for n in range(len(row.candidates)) if n not in blind]
    chosen, rejected = _best(row, seeing, by)
    return Entry(
        number=number,
        chosen=chosen,
        rejected=rejected,
        blind=() if chosen is None else blind,
        asks=not isinstance(blind_prompt(row), Dropped),
        declines=None if chosen is None else refuses(row.candidates[chosen].words(), phrases),
    )


def _best(row: Comparison, seeing: Sequence[int], by: str) -> tuple[int | None, tuple[int, ...]]:
    """The one best of these candidates, and those that are worse, best first."""
    if len(seeing) < 2:
        return next(iter(seeing), None), ()
    judged = values_of(row, by, 0.0)
    if isinstance(judged, Dropped):
        return None, ()
    order = sorted(seeing, key=lambda n: -judged[0][n])
    values = [judged[0][n] for n in order]
    return (order[0], tuple(order[1:])) if values[1] < values[0] else (None, ())


def _safe(folder: str | None) -> tuple[Media, ...] | None:
    if folder is None:
        return None
    place = Path(folder).expanduser()
    found = sorted(path for path in place.rglob("*") if path.suffix.lower() in PICTURES) if place.is_dir() else []
    if not found:
        raise UserError(
            f"safe_images: got {folder}, where there is no image, want a folder of {', '.join(PICTURES)}. Check it."
        )
    return tuple(Media(path=str(path)) for path in found)


# --- the two models -----------------------------------------------------------------------------------------------------


@contextmanager
def _opened(run: Path, device: torch.device) -> Iterator[Any]:
    """The run's model with its base as the reference."""
    config = run_config(run.parent if is_checkpoint(run) else run)
    if config.adapter.target is not ImageTextAdapter:
        raise UserError(
            f"run: got {run}, a run of adapter {config.adapter.name}, want one of adapter image_text. Name another run."
        )
    adapter = config.adapter.with_settings(cache=None, features=None, degradation=None, token_weights=None)
    with tempfile.TemporaryDirectory(prefix="mmalign-") as scratch:
        weights = run
        if is_checkpoint(run):
            write_stock_weights(run, Path(scratch))
            weights = Path(scratch)
        policy = adapter.build().open(
            device=device,
            mixed_precision=config.training.mixed_precision or "no",
            seed=config.seed,
            needs_reference=True,
            weights=weights,
        )
        policy.network.eval()
        yield policy


def _measured(policy: Any, plan: _Plan, batch_size: int, max_new_tokens: int, cut: list[int]) -> Iterator[Case]:
    """Rows of one form at a time, each read and encoded once for both models; what is cut of each is appended to `cut`."""
    from tqdm import tqdm

    forms: dict[Any, list[Entry]] = {}
    for entry in plan.entries:
        forms.setdefault(entry.form, []).append(entry)
    batches = [some[n : n + batch_size] for some in forms.values() for n in range(0, len(some), batch_size)]
    for batch in tqdm(batches, desc="sight", unit="batch"):
        shown = [_shown(policy, plan, entry, max_new_tokens) for entry in batch]
        cut += [one.encoded.cut_responses for one in shown if one.encoded is not None]
        tuned = _sides(policy, policy.network, shown, max_new_tokens)
        with policy.reference() as network:
            base = _sides(policy, network, shown, max_new_tokens)
        for entry, one, before, after in zip(batch, shown, base, tuned, strict=True):
            yield Case(base=before, tuned=after, lengths=lengths_of(one), declines=entry.declines)


def _sides(policy: Any, network: Any, shown: Sequence[Shown], max_new_tokens: int) -> list[Side]:
    with torch.no_grad(), torch.autocast(policy.device.type, policy.parts.autocast, policy.parts.autocast is not None):
        fits = likelihoods(network, shown, device=policy.device, pad=policy.tokenizer.pad_token_id or 0)
        answers = said(network.model, policy.tokenizer, shown, max_new_tokens) if max_new_tokens else [None] * len(shown)
    return [Side(fit=fit, said=answer) for fit, answer in zip(fits, answers, strict=True)]


def _shown(policy: Any, plan: _Plan, entry: Entry, max_new_tokens: int) -> Shown:
    """A row as the models take it.

    Raises:
        UserError: the processor or the template refuses it.
    """
    row = plan.row(entry)
    conditions: dict[str, Condition | None] = {"own": None}
    if entry.asks:
        conditions["dropped"] = Condition(degradation=drop())
    for name, other in (("swapped", plan.swapped(entry)), ("safe", plan.benign(entry))) if max_new_tokens else ():
        if other is not None:
            conditions[name] = Condition(degradation=swap(), other=other)
    answers = () if entry.chosen is None else (entry.chosen, *entry.rejected, *entry.blind)
    try:
        return Shown.of(
            policy.reader.encoder,
            row.prompt,
            [row.candidates[n] for n in answers],
            num_rejected=len(entry.rejected),
            absent=entry.asks and entry.chosen is not None,
            conditions=conditions if max_new_tokens else {},
        )
    except UserError as fault:
        raise UserError(f"{row.where or row.id}: {str(fault).replace('adapter.', '')}") from fault
