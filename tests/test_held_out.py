"""Held-out pairs: the implicit reward of a run's weights, LoRA or full, against its base."""

from dataclasses import replace
from pathlib import Path

import pytest

from mmalign.config import read_config
from mmalign.errors import UserError
from mmalign.experiment import Data, TrainConfig
from mmalign.held_out import pair_fit
from mmalign.records import comparison, write
from mmalign.report import PairFit
from mmalign.train import main

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(autouse=True)
def at_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache-home"))
    monkeypatch.chdir(CONFIGS.parent)


def trained(folder: Path, name: str, *changes: str) -> tuple[Path, Data]:
    config = read_config(TrainConfig, CONFIGS / f"{name}.yaml", [f"output={folder}", *changes])
    main(config)
    return folder, config.data


def measured(run: Path, data: Data) -> PairFit:
    return pair_fit(run, data, draws=4, batch_size=3, device="cpu")


@pytest.mark.parametrize("name", ["smoke_dpo_sd15", "smoke_dpo_sd2_full"])
def test_the_other_judgement_of_the_same_pairs_gives_the_mirrored_accuracy_and_drift(name: str, tmp_path: Path) -> None:
    run, data = trained(tmp_path / "run", name)
    rows = [comparison(row) for row in data.importer.build().dataset]
    rows = [row for row in rows if row.ranks is not None and row.ranks[0] != row.ranks[1]]
    for mirrored in (False, True):
        changed = [replace(row, candidates=row.candidates[:2], ranks=(2.0, 1.0) if mirrored else (1.0, 2.0)) for row in rows]
        write(changed, tmp_path / f"{mirrored}.parquet")
    importer = data.importer
    right, wrong = (
        measured(run, replace(data, importer=importer.with_settings(path=str(tmp_path / f"{mirrored}.parquet"))))
        for mirrored in (False, True)
    )
    assert right.accuracy.wins + right.accuracy.losses == len(rows)
    assert (right.accuracy.wins, right.accuracy.losses) == (wrong.accuracy.losses, wrong.accuracy.wins)
    assert right.chosen_drift != 0
    assert right.num_draws == 4


def test_a_run_that_learnt_nothing_ties_every_pair(tmp_path: Path) -> None:
    fit = measured(*trained(tmp_path / "run", "smoke_dpo_sd15", "training.optimiser.learning_rate=0.0"))
    assert (fit.accuracy.rate, fit.accuracy.wins, fit.accuracy.losses) == (0.5, 0, 0)
    assert fit.chosen_drift == fit.rejected_drift == 0


def test_a_folder_without_a_run_and_data_that_are_no_pairs_are_refused(tmp_path: Path) -> None:
    run, _ = trained(tmp_path / "run", "smoke_dpo_sd15", "training.steps=1")
    ranked = read_config(TrainConfig, CONFIGS / "smoke_rank_dpo_sd15.yaml").data
    with pytest.raises(UserError, match="want 2"):
        measured(run, ranked)
    with pytest.raises(UserError, match=r"config\.yaml"):
        measured(tmp_path, ranked)


def test_pairs_whose_label_is_a_tie_are_left_out_and_counted(tmp_path: Path) -> None:
    run, data = trained(tmp_path / "run", "smoke_dpo_sd15", "training.steps=2")
    table = data.importer.build().dataset
    rows = [comparison(table[index]) for index in range(3)]
    rows = [
        replace(row, candidates=row.candidates[:2], ranks=None, prob=prob)
        for row, prob in zip(rows, (1.0, 0.5, 0.7), strict=True)
    ]
    paths = {"all": rows, "decided": [rows[0], rows[2]], "ties": rows[1:2]}
    fits = {}
    for name, some in paths.items():
        write(some, tmp_path / f"{name}.parquet")
        importer = data.importer.with_settings(path=str(tmp_path / f"{name}.parquet"))
        changed = replace(data, importer=importer, view=data.view.with_settings(ties="soft"))
        if name == "ties":
            with pytest.raises(UserError, match="got 1 ties"):
                measured(run, changed)
        else:
            fits[name] = measured(run, changed)
    assert fits["all"].num_tied_labels == 1
    assert replace(fits["all"], num_tied_labels=0) == fits["decided"]


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    run, data = trained(tmp_path / "run", "smoke_dpo_sd15", "training.steps=1")
    with pytest.raises(UserError, match="device: got 'foo'"):
        pair_fit(run, data, device="foo")
