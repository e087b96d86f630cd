"""Every loss that is made for texts, from rows of text to a gradient and metrics, on a tiny language model."""

from typing import Any

import pytest
import torch
from loss_inputs import OF_TEXTS

from mmalign.adapters.options import Lora
from mmalign.adapters.text import TextAdapter
from mmalign.losses import LOSSES
from mmalign.metrics import averages, preference_metrics, table
from mmalign.objective import Objective, Term
from mmalign.records import Content, Example, Sample

ANSWERS = [" red", " blue and green", " a chair by the window", " no idea"]
SIDE: dict[str, Any] = {"labels": 1.0, "scores": (1.0, 0.6, 0.1), "margin": 0.5}
WANTS = {"odpo": {"margin"}, "rpo": {"margin"}}  # which have a default, and need one of two
LISTS = {"plackett_luce", "lipo", "exo_listwise", "gpo", "info_nca", "nca"}


def sample(prompt: str, completion: str) -> Sample:
    return Sample(prompt=Content(text=prompt), completion=Content(text=completion))


def examples(k: int, names: set[str]) -> list[Example]:
    side = {name: value[:k] if isinstance(value := SIDE[name], tuple) else value for name in names}
    out = []
    for n, prompt in enumerate(("Name a colour:", "What is on the table?", "Say yes:")):
        answers = [sample(prompt, ANSWERS[(n + i) % 4]) for i in range(4)]
        extras = dict.fromkeys(("gold", "rationale", "exploration"), answers[3])
        labels = {"labels": float(n != 1)} if "labels" in side else {}
        out.append(Example(id=str(n), samples=tuple(answers[:k]), side={**side, **labels}, extras=extras))
    return out


@pytest.mark.parametrize("name", OF_TEXTS)
def test_a_loss_leads_from_texts_to_a_gradient_and_metrics(name: str) -> None:
    objective = Objective([Term(name=name, loss=LOSSES[name], settings={})])
    term = objective.terms[0]
    k = term.num_candidates or (3 if name in LISTS else 2)
    needed = {one for one in SIDE if term.data.get(one)} | WANTS.get(name, set())
    rows = examples(k, needed)
    lengths = {"lengths": (1.0,) * k, "gold_lengths": (1.0,), "mean_length": 1.0, "draw": 0.5}
    objective.check({**lengths, **rows[0].side}, k)
    objective.try_out({**lengths, **rows[0].side}, k)

    policy = TextAdapter(model="tiny", lora=Lora(rank=2)).open(
        asked=objective.asked, num_candidates=k, needs_reference=objective.needs_reference
    )
    policy.survey(rows)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():  # away from the reference
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    prepared = policy.prepare(policy.collate([policy.item(row, 0) for row in rows]))
    reference, inputs = None, prepared.inputs
    if objective.needs_reference:
        with policy.reference() as network:
            reference, inputs = inputs.refer(network)
    measured = inputs.measures(policy.network)
    result = objective(measured, reference, prepared.side)
    result.losses.mean().backward()
    assert result.losses.shape == (3,) and result.losses.isfinite().all()
    assert any(bool((parameter.grad != 0).any()) for parameter in policy.parameters())
    assert all(bool(parameter.grad.isfinite().all()) for parameter in policy.parameters())

    readings = {"logps": measured["policy"].detach()}
    if reference is not None:
        readings["logps/ref"] = reference["policy"]
    known = {one: prepared.side.get(one) for one in ("labels", "scores", "lengths")}
    sums = preference_metrics(result.losses, result.rewards, readings, **known, beta=objective.beta())
    told = averages(sums, table(sums).tolist())
    assert told["loss"] == pytest.approx(float(result.losses.detach().mean()), rel=1e-5)
    assert told["lengths/chosen"] > 0 and ("logps/ratio_chosen" in told) == objective.needs_reference
