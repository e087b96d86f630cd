"""The objective: a weighted sum of losses, what it demands of the data, and the automatic beta."""

import math

import pytest
import torch
from torch import Tensor

from mmalign.errors import UserError
from mmalign.losses import LOSSES
from mmalign.objective import AutoBeta, Objective, Term


def term(name: str, weight: float = 1.0, **settings: float | str) -> Term:
    return Term(name=name, loss=LOSSES[name], settings=settings, weight=weight)


def logps(seed: int, *shape: int) -> Tensor:
    return -torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_sum_weighs_its_terms_and_takes_the_rewards_of_the_first() -> None:
    policy, reference = logps(0, 3, 2), logps(1, 3, 2)
    both = Objective([term("dpo", 0.8, beta=2.0), term("sft", 0.25)])({"policy": policy}, {"policy": reference}, {})
    dpo, sft = LOSSES["dpo"](policy, reference, beta=2.0), LOSSES["sft"](policy)
    assert torch.allclose(both.losses, 0.8 * dpo.losses + 0.25 * sft.losses, rtol=1e-6)
    assert torch.equal(both.rewards, dpo.rewards)


def test_a_reference_is_asked_for_only_if_a_term_names_it() -> None:
    assert not Objective([term("mapo"), term("sft")]).needs_reference
    assert Objective([term("mapo"), term("dpo")]).needs_reference


def test_side_data_reaches_only_the_terms_that_name_it() -> None:
    policy, reference = logps(0, 2, 2), logps(1, 2, 2)
    side = {"prob": torch.tensor([0.5, 1.0]), "weight": torch.tensor([2.0, 1.0]), "margin": torch.tensor([0.0, 0.1])}
    result = Objective([term("dpo", beta=3.0), term("sft")])({"policy": policy}, {"policy": reference}, side)
    dpo = LOSSES["dpo"](policy, reference, side["prob"], side["weight"], side["margin"], beta=3.0)
    assert torch.allclose(result.losses, dpo.losses + LOSSES["sft"](policy, side["weight"]).losses)


def test_the_anchor_is_averaged_by_the_function_that_knows_all_processes() -> None:
    policy, reference = logps(0, 4, 1), logps(1, 4, 1)
    side = {"labels": torch.tensor([1.0, 0.0, 1.0, 0.0])}
    seen: list[Tensor] = []

    def over_all(values: Tensor) -> Tensor:
        seen.append(values)
        return torch.tensor([0.5, 0.0])

    result = Objective([term("kto", beta=2.0)])({"policy": policy}, {"policy": reference}, side, over_all)
    assert torch.equal(result.losses, LOSSES["kto"](policy, reference, side["labels"], torch.tensor(0.25), beta=2.0).losses)
    assert len(seen) == 1 and torch.equal(seen[0], (policy - reference).flatten())


@pytest.mark.parametrize(
    ("name", "side", "k", "message"),
    [
        ("rank_dpo", (), 2, r"loss\.rank_dpo: needs the data scores, the view gives none\. .*ranked gives scores"),
        ("kto", ("weight",), 1, r"loss\.kto: needs the data labels, the view gives weight\. .*unpaired gives labels"),
        ("dpo", (), 4, r"loss\.dpo: got 4 candidates a prompt, want 2\. .*data\.view"),
        ("mapo", (), 1, r"loss\.mapo: got 1 candidates a prompt, want 2"),
        ("kto", ("labels",), 2, r"loss\.kto: got 2 candidates a prompt, want 1"),
    ],
)
def test_data_that_a_loss_cannot_be_computed_on_is_refused(name: str, side: tuple[str, ...], k: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Objective([term("sft"), term(name)]).check(side, k)


@pytest.mark.parametrize(("name", "side", "k"), [("rank_dpo", ("scores",), 5), ("sft", (), 1), ("kto", ("labels",), 1)])
def test_data_that_suits_a_loss_passes(name: str, side: tuple[str, ...], k: int) -> None:
    Objective([term(name)]).check(side, k)


@pytest.mark.parametrize(("name", "k", "side"), [("mapo", 2, ()), ("kto", 1, ("labels",))])
def test_an_automatic_beta_is_refused_where_there_is_no_pair_or_no_reference_to_follow(
    name: str, k: int, side: tuple[str, ...]
) -> None:
    with pytest.raises(UserError, match=rf"loss\.{name}\.beta: got auto, want a number"):
        Objective([term(name, beta="auto")]).check(side, k)


@pytest.mark.parametrize("target", [0.2, 0.35])
def test_under_an_automatic_beta_the_typical_pair_has_the_target_gradient_factor(target: float) -> None:
    objective = Objective([term("dpo", beta="auto")], AutoBeta(target=target, minimum=1e-3, maximum=1e6))
    generator = torch.Generator().manual_seed(0)
    typical = 3e-4
    for _ in range(200):
        reference = -torch.rand(64, 2, generator=generator)
        delta = typical * math.sqrt(math.pi / 2) * torch.randn(64, generator=generator)  # mean |delta| = typical
        policy = reference + torch.stack([delta, torch.zeros(64)], dim=1)
        objective({"policy": policy.double()}, {"policy": reference.double()}, {})
    beta = objective.beta()
    assert beta is not None
    assert 1 / (1 + math.exp(beta * typical)) == pytest.approx(target, abs=0.02)


def test_an_automatic_beta_stays_within_its_bounds() -> None:
    objective = Objective([term("dpo", beta="auto")], AutoBeta(minimum=10.0, maximum=500.0))
    same = logps(0, 2, 2)
    assert objective.beta() == 500.0
    objective({"policy": same}, {"policy": same}, {})
    assert objective.beta() == 500.0  # policy and reference do not differ yet
    objective({"policy": same + torch.tensor([10.0, 0.0])}, {"policy": same}, {})
    assert objective.beta() == 10.0


def test_an_automatic_beta_goes_on_from_its_state_and_passes_over_nan() -> None:
    first = Objective([term("dpo", beta="auto")])
    first({"policy": logps(0, 4, 2)}, {"policy": logps(1, 4, 2)}, {})
    again = Objective([term("dpo", beta="auto")])
    again.load_state_dict(first.state_dict())
    assert again.beta() == first.beta()
    again({"policy": torch.full((1, 2), torch.nan)}, {"policy": torch.zeros(1, 2)}, {})
    assert again.beta() == first.beta()


UNSTEADY = [{"maximum": math.inf}, {"decay": 1.0}, {"decay": -0.5}]


@pytest.mark.parametrize(
    "settings", [{"target": 0.5}, {"target": 0.0}, {"minimum": 0.0}, {"minimum": 5.0, "maximum": 1.0}, *UNSTEADY]
)
def test_an_automatic_beta_without_meaning_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"got .*, want"):
        AutoBeta(**settings)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_defaults_of_every_loss_are_accepted_before_there_are_data(name: str) -> None:
    Objective([term(name)]).try_settings()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("robust", {"label_smoothing": 0.5}, r"loss\.robust\.label_smoothing: got 0\.5"),
        ("dpo", {"beta": -1.0}, r"loss\.dpo\.beta: got -1\.0"),
        ("spo", {"clip": 2.0}, r"loss\.spo\.clip: got 2\.0"),
        ("length_dpo", {"alpha": -0.01}, r"loss\.length_dpo\.alpha: got -0\.01, want zero or more\."),
    ],
)
def test_settings_that_no_data_go_with_are_refused_before_there_are_data(
    name: str, settings: dict[str, float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Objective([term(name, **settings)]).try_settings()
