"""Examples: a table seen through a view, as a sequence whose media are read when an item is."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, overload

from mmalign.errors import UserError
from mmalign.records.rows import Comparison, Dropped, Example, Message
from mmalign.records.table import comparison, outlines
from mmalign.records.views import SIDE_DEFAULTS

if TYPE_CHECKING:
    import datasets


class Examples(Sequence[Example]):
    """The examples of a table under a view, in the table's order; what the view dropped is counted by reason.

    Building it reads no media. Item i reads the one row it comes from. `kinds` tells (number of samples, numbers of images in a
    sample) of the examples there are, each with its first row, `sources` the numbers of images in a prompt; `labels` are those
    of all examples where the view gives side data of that name; `against` counts the examples whose best candidate is scored
    below the worst, and `first_against` is the row of the first; `extras` counts the examples that have a further completion of
    that name; `side` has the side data that need not be there of any example that has them; `widest` is the most candidates of
    a row that made an example; `undecided` counts the rows of more than two candidates of which fewer examples are decided than
    there are candidates beside the best; `fingerprint` is a hash of all that was read.

    Args:
        dataset: a table of our schema.
        view: a function of VIEWS with its settings bound, `functools.partial(pair, ties="soft")`.

    Raises:
        UserError: a row is faulty, or the view uses no row at all.
    """

    def __init__(self, dataset: "datasets.Dataset", view: Callable[[Comparison], tuple[Example, ...] | Dropped]) -> None:
        """See the class."""
        self.dataset = dataset
        self.view = view
        self.dropped: Counter[str] = Counter()
        self.kinds: dict[tuple[int, tuple[int, ...]], str] = {}
        self.sources: dict[int, str] = {}
        self.labels = array("d")
        self.against = 0
        self.first_against = ""
        self.extras: Counter[str] = Counter()
        self.side: dict[str, Any] = {}
        self.widest = 0
        self.undecided = 0
        self._places: list[tuple[int, int]] = []
        self._lacking: dict[str, str] = {}
        digest = hashlib.sha256()
        for index, row in enumerate(outlines(dataset)):
            outcome = view(row)
            digest.update(repr((row.id, row.prompt.text, len(row.candidates), row.ranks, row.prob, row.scores)).encode())
            if row.prompt.images:
                digest.update(repr(len(row.prompt.images)).encode())
            digest.update(_said(row))
            if isinstance(outcome, Dropped):
                self.dropped[outcome.reason] += 1
            else:
                where = row.where or f"row {index + 1}"
                self.sources.setdefault(len(row.prompt.images), where)
                self._places += [(index, n) for n in range(len(outcome))]
                self.widest = max(self.widest, k := len(row.candidates))
                self.undecided += k > 2 and sum(example.side.get("prob") != 0.5 for example in outcome) < k - 1
                for example in outcome:
                    self._note(example, where)
        self.fingerprint = digest.hexdigest()
        if not self._places:
            remedy = (
                "Check the view's settings." if len(dataset) else "The data are empty: check their path, or what made them."
            )
            raise UserError(f"data: got no usable row, want at least one: {self.summary()}. {remedy}")

    def _note(self, example: Example, where: str) -> None:
        """Count what the checks of a run ask of an example, and keep the row that stands first for it."""
        if example.extras or self.extras:
            for name in self.extras.keys() - example.extras.keys():
                self._lacking.setdefault(name, where)
            for name in example.extras.keys() - self.extras.keys():
                if self.kinds:
                    self._lacking[name] = self._first()
            self.extras.update(example.extras.keys())
        self.side |= {name: value for name, value in example.side.items() if name in SIDE_DEFAULTS}
        scores = example.side.get("scores")
        if isinstance(scores, tuple) and "margin" not in example.side and scores[0] < scores[-1]:
            self.against += 1
            self.first_against = self.first_against or where
        label = example.side.get("labels")
        if isinstance(label, float):
            self.labels.append(label)
        images = tuple(sorted({len(sample.completion.media()) for sample in example.samples}))
        self.kinds.setdefault((len(example.samples), images), where)

    def _first(self) -> str:
        return next(iter(self.kinds.values()))

    def first_lacking(self, name: str) -> str:
        """Return the row of the first example without a further completion of that name; of all, where no example has one."""
        return self._lacking[name] if name in self.extras else self._first()

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Read one example, or a slice of them, from the table."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row, n = self._places[index]
        outcome = self.view(comparison(self.dataset[row], least=0))
        assert not isinstance(outcome, Dropped)  # views do not look into media, so the outline had the same outcome
        return outcome[n]

    def row(self, index: int) -> int:
        """Return which row of the table example `index` comes from."""
        return self._places[index][0]

    def summary(self) -> str:
        """Say in one line how many rows became how many examples, and why the others did not."""
        text = f"{len(self.dataset)} rows: {len(self)} examples"
        if self.dropped:
            reasons = ", ".join(f"{reason}: {number}" for reason, number in self.dropped.most_common())
            text += f"; {self.dropped.total()} rows dropped ({reasons})"
        return text


def _said(row: Comparison) -> bytes:
    """Return the words that the fingerprint needs beyond the prompt's text; nothing for images alone."""
    contents = [(n, c) for n, c in enumerate(row.contents()) if c.messages or c.tools or (n and c.text is not None)]
    said: list[object] = [(n, c.text, c.tools, [_message(m) for m in c.messages]) for n, c in contents]
    said += [(n, c.template_kwargs) for n, c in contents if c.template_kwargs]
    further = [row.prefix, *row.extras] if row.prefix is not None or row.extras else []
    return repr((said, further)).encode() if said or further else b""


def _message(message: Message) -> tuple[object, ...]:
    return message.role, message.text, message.name, message.tool_calls, message.places, message.extra, len(message.images)
