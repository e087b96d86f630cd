"""How likely a language model finds every response: the column that DavIR, density ratios, SPA and ideal ranking ask for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from mmalign.curation.edits import Edit, Relabelled
from mmalign.curation.memory import Memory, key_of
from mmalign.curation.reader import Reader
from mmalign.errors import UserError
from mmalign.language.chat import Encoded
from mmalign.records import Comparison, Dropped, Sample
from mmalign.records.table import in_batches


def likelihood(
    rows: Sequence[Comparison],
    journal: Path | None = None,
    *,
    model: str,
    label: str,
    weights: str | None = None,
    revision: str | None = None,
    mean: bool = False,
    system_prompt: str | None = None,
    max_length: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    batch_size: int = 4,
    device: str = "auto",
) -> Relabelled:
    """Scores of every response by a language model: log p(response | prompt), kept as a judge's; labels stay as they are.

    sum over the response's tokens of log p(token | all before it), the end of its turn included

    Args:
        journal: where scores are kept as they come, so that an interrupted run goes on. Not a setting.
        model: folder or hub id; conversations go through its chat template.
        label: name of the judge as whom the scores are kept: `base`, `tuned`, `reference` ...
        weights: output folder of a run that tuned the model; None: the model as it is.
        revision: of a hub id.
        mean: divide by the number of tokens.
        system_prompt: before conversations that have none, say the criterion and exemplars of a customised density ratio.
        max_length: rows with a longer prompt and response are left out, in tokens; None: what the model reads.
        dtype: of the weights.
        batch_size: rows at a time.
        device: auto, cpu, cuda ...

    Raises:
        UserError: no such model or weights, rows with images, a batch size below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size: got {batch_size}, want 1 or more.")
    settings: dict[str, Any] = {
        "model": model,
        "weights": weights,
        "revision": revision,
        "dtype": dtype,
        "system_prompt": system_prompt,
    }
    memory = Memory(journal=journal, judge=label, settings={"judge": "likelihood", **settings})
    known = memory.known()
    due = {key: row for row in rows if (key := key_of(row)) not in known}
    encoded: dict[str, Encoded] = {}
    if due:
        reader = Reader.open("likelihood", **settings, max_length=max_length, device=device)
        encoded = reader.encode({key: _samples(row) for key, row in due.items()})
        for keys in tqdm(list(in_batches(encoded, batch_size)), desc="likelihood", unit="batch", disable=None):
            told = [{"tokens": list(encoded[key].lengths)} for key in keys]
            known |= memory.add([due[key] for key in keys], reader.sums([encoded[key] for key in keys]), told)
    return Relabelled(
        outcomes=[_outcome(known.get(key_of(row)), label, mean) for row in rows],
        told=(f"{len(encoded)} rows read by {model}, {len(rows) - len(due)} known before",),
    )


def _samples(row: Comparison) -> list[Sample]:
    return [
        Sample(prompt=row.prompt_of(n), completion=one, prefix=row.prefix, ends_turn=row.prefix is None)
        for n, one in enumerate(row.candidates)
    ]


def _outcome(known: Mapping[str, Any] | None, label: str, mean: bool) -> tuple[Edit, ...] | Dropped:
    if known is None:
        return Dropped("longer than the model reads, or than max_length")
    sums, tokens = known["scores"], known["tokens"]
    scores = tuple(total / count for total, count in zip(sums, tokens, strict=True)) if mean else tuple(sums)
    return (Edit(scores={label: scores}, note={"label": label, "tokens": tokens}),)
