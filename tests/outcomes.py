"""What outcome tests do with a finished quickstart: change its labels, train again from its base, judge."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from mmalign import evaluate, generate, train
from mmalign.config import read_config
from mmalign.digits import Base
from mmalign.quickstart import QuickstartConfig, comparison_config, evaluation_config
from mmalign.records import Comparison, comparison, read, write
from mmalign.report import Evaluation
from mmalign.train import TrainConfig

SEED = 0


@contextmanager
def one_process_at_a_time(folder: Path) -> Iterator[None]:
    """Workers of pytest-xdist wait for the one that makes what all use."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        yield


def tuned(run: Path, base: Base, folder: Path, *overrides: str) -> Evaluation:
    """Another training from the base of a quickstart, by its config with overrides, judged on the same images of the base.

    The quickstart's cache holds the best and worst candidates; a view that takes others needs `adapter.cache=null`.
    """
    config = read_config(TrainConfig, run / "config.yaml", [f"output={folder / 'lora'}", *overrides])
    lora = train.main(config).output
    after = generate.main(evaluation_config(QuickstartConfig(seed=SEED), base, folder / "after", lora))
    return evaluate.main(comparison_config(run / "before" / generate.ROWS_FILE, after.file, lora, folder)).evaluation


def changed_rows(run: Path, file: Path, change: Callable[[Comparison], Comparison]) -> Path:
    """The quickstart's scored comparisons, each changed, in another file."""
    return write((change(comparison(row)) for row in read(str(run / "scored.parquet"))), file)
