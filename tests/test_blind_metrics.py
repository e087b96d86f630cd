"""What a run of Blind PO reports: accuracies of (chosen, rejected) and of (chosen, blind), each by its name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from image_text_runs import data_of, train_seen
from runs import metrics_of
from torch import Tensor

from mmalign.losses import blind_bpo
from mmalign.metrics import Sums, averages, preference_metrics, table

GOLDEN = Path(__file__).parent / "golden" / "mllm" / "bpo_blind.npz"
BLIND = torch.ones(2)


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def values(sums: Sums) -> dict[str, float]:
    return averages(sums, table(sums).tolist())


def test_accuracies_of_both_pairs_are_those_of_the_authors_code() -> None:
    with np.load(GOLDEN) as stored:
        policy, reference = (
            torch.from_numpy(
                np.stack([stored[f"{of}_{name}_token_logps"].sum(1) for name in ("chosen", "rejected", "blind")], 1)
            )
            for of in ("policy", "ref")
        )
        wanted = {name: float(stored[f"accuracy_chosen_vs_{name}"]) for name in ("rejected", "blind")}
    result = blind_bpo(policy, reference)
    got = values(preference_metrics(result.losses, result.rewards, {}, blind=torch.ones(len(policy))))
    assert (got["rewards/accuracies"], got["rewards/accuracies_blind"]) == (wanted["rejected"], wanted["blind"])
    rewards = 0.1 * (policy - reference)
    assert got["rewards/margins"] == pytest.approx(float((rewards[:, 0] - rewards[:, 1]).mean()))
    assert got["rewards/margins_blind"] == pytest.approx(float((rewards[:, 0] - rewards[:, 2]).mean()))
    assert got["rewards/rejected"] == pytest.approx(float(rewards[:, 1].mean()))
    assert got["rewards/blind"] == pytest.approx(float(rewards[:, 2].mean()))


def test_the_blind_one_is_no_rejected_one_in_any_metric_and_rejected_ones_are_not_ordered() -> None:
    rewards = torch.tensor([[1.0, 2.0, 0.0, 9.0], [3.0, 0.0, 1.0, 3.0]])
    logps, reference, lengths = rewards - 50, torch.full((2, 4), -50.0), torch.tensor([[5.0, 6.0, 7.0, 90.0]] * 2)
    readings = {"logps": logps, "logps/ref": reference, "degraded": logps[:, :1] - 1}
    got = values(preference_metrics(torch.zeros(2), rewards, readings, lengths=lengths, blind=BLIND, beta=1.0))
    assert got["rewards/accuracies"] == 3 / 4 == got["ranking/accuracy"], "of the four pairs with the chosen one"
    assert got["rewards/accuracies_blind"] == 1 / 4, "one is wrong, one a tie"
    assert got["rewards/margins"] == 1.5 and got["rewards/margins_blind"] == -4.0
    assert (got["rewards/rejected"], got["rewards/blind"]) == (0.5, 6.0)
    assert (got["lengths/rejected"], got["lengths/blind"], got["lengths/difference"]) == (7.0, 90.0, -2.0)
    assert (got["logps/blind"], got["logps/ref_blind"], got["logps/ratio_blind"]) == (-44.0, -50.0, 6.0)
    assert got["degraded/chosen"] == -49.0 and "degraded/blind" not in got


def test_without_a_blind_one_nothing_is_told_of_it() -> None:
    def names(rewards: Tensor, **known: Tensor) -> set[str]:
        return set(preference_metrics(torch.zeros(2), rewards, {}, **known))

    assert not any("blind" in name for name in names(torch.zeros(2, 3)))
    assert names(torch.zeros(2, 2), blind=BLIND) == names(torch.zeros(2, 2))


def test_a_run_logs_both_accuracies(tmp_path: Path) -> None:
    for row in metrics_of(train_seen(tmp_path, loss={"name": "blind_bpo"}, data=data_of("blind", "blind"))):
        told = {name: row[f"rewards/{name}"] for name in ("accuracies", "accuracies_blind", "chosen", "rejected", "blind")}
        assert all(0 <= told[name] <= 1 for name in ("accuracies", "accuracies_blind"))
        assert row["rewards/margins_blind"] == pytest.approx(told["chosen"] - told["blind"], abs=1e-9)
        assert row["rewards/margins"] == pytest.approx(told["chosen"] - told["rejected"], abs=1e-9)
