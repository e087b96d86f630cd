"""Distillation from a teacher: equal to sums over whole logits, which are never built; and runs that learn from one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import merged, metrics_of
from test_language_head import COUNTS, SLOT, STAKES, close, grads, numbers
from text_runs import PAIRS, model_folder, text_weights, train_text
from tiny_causal import a_batch, gradients, relative_errors, tiny_causal
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmalign.adapters.options import Lora
from mmalign.adapters.text import TextAdapter
from mmalign.adapters.text_teacher import TeacherModel
from mmalign.errors import UserError
from mmalign.language.distillation import Lesson, distilled_sums
from mmalign.language.head import Head
from mmalign.language.network import TokenNetwork
from mmalign.language.teacher import Teacher, frozen_network
from mmalign.likelihoods import TokenInputs, Tokens

BOTH = frozenset({"teacher_divergence", "advantage"})
TARGET = torch.zeros(23, dtype=torch.long)


def a_lesson(dtype: torch.dtype = torch.float64, **more: Any) -> Lesson:
    """A teacher of width 6 whose logits are capped, and its reference of width 5."""
    return Lesson(
        states=numbers(23, 6, seed=11, dtype=dtype).detach(),
        head=Head(weight=numbers(57, 6, seed=12, dtype=dtype).detach(), softcap=2.0),
        reference_states=numbers(23, 5, seed=13, dtype=dtype).detach(),
        reference_head=Head(
            weight=numbers(57, 5, seed=14, dtype=dtype).detach(), bias=numbers(57, seed=15, dtype=dtype).detach()
        ),
        **more,
    )


def a_head(full: bool) -> Head:
    if not full:
        return Head(weight=numbers(57, 8, seed=1))
    inner, outer = numbers(23, 2, seed=3), numbers(57, 2, seed=4)
    return Head(weight=numbers(57, 8, seed=1), bias=numbers(57, seed=2), inner=inner, outer=outer, scale=0.7, softcap=1.5)


def log_probabilities(states: Tensor, head: Head) -> Tensor:
    logits = states @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    if head.inner is not None and head.outer is not None:
        logits = logits + head.inner @ head.outer.T
    logits = logits * head.scale
    return (logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)).log_softmax(1)


def of_all_logits(logp: Tensor, logq: Tensor, logr: Tensor | None, top_k: int | None) -> dict[str, Tensor]:
    """KL and advantage of each token from whole matrices."""
    kept = torch.ones_like(logq, dtype=torch.bool)
    if top_k is not None:
        kept = logq >= logq.sort(1, descending=True).values[:, top_k - 1 : top_k]
    q = torch.where(kept, logq.exp(), 0.0)
    q = q / q.sum(1, keepdim=True)
    found = {"teacher_divergence": (q * (q.clamp_min(1e-300).log() - logp)).sum(1)}
    if logr is not None:
        found["advantage"] = (logp.exp() * torch.where(kept, logq - logr, 0.0)).sum(1)
    return found


def wanted_sums(hidden: Tensor, head: Head, lesson: Lesson) -> dict[str, Tensor]:
    assert lesson.reference_states is not None and lesson.reference_head is not None
    logp, logq = log_probabilities(hidden, head), log_probabilities(lesson.states, lesson.head)
    found = of_all_logits(logp, logq, log_probabilities(lesson.reference_states, lesson.reference_head), lesson.top_k)
    return {name: torch.stack([part.sum() for part in values.split(COUNTS)]) for name, values in found.items()}


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("wanted", "accumulators"), [({"advantage"}, 4), ({"teacher_divergence"}, 4), (BOTH, 0), (BOTH, 4)])
def test_sums_and_gradients_are_those_of_whole_matrices(
    top_k: int | None, full: bool, wanted: set[str], accumulators: int
) -> None:
    hidden, head, lesson = numbers(23, 8, seed=0), a_head(full), a_lesson(top_k=top_k)
    want = wanted_sums(hidden, head, lesson)
    got = distilled_sums(
        hidden, head, lesson, TARGET, SLOT, COUNTS, wanted=frozenset(wanted), rows=4, accumulators=accumulators
    )
    assert got.keys() == wanted
    for name in wanted:
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12)
    loss, wants = (sum((n + 1) * (one[name] * STAKES).sum() for n, name in enumerate(sorted(wanted))) for one in (got, want))
    assert isinstance(loss, Tensor) and isinstance(wants, Tensor)
    expected = grads(wants, hidden, head, retain_graph=True)
    assert close(grads(loss, hidden, head, retain_graph=True), expected)
    assert close(grads(loss, hidden, head), expected)  # a second time, from what was kept or computed again


def test_a_frozen_output_layer_still_leads_to_the_hidden_states() -> None:
    hidden, lesson = numbers(23, 8, seed=0), a_lesson()
    head = Head(weight=numbers(57, 8, seed=1).detach())
    got = distilled_sums(hidden, head, lesson, TARGET, SLOT, COUNTS, wanted=BOTH, rows=4)
    want = wanted_sums(hidden, head, lesson)
    pairs = zip(*(torch.autograd.grad(sum((one[n] * STAKES).sum() for n in BOTH), hidden) for one in (got, want)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_a_teacher_that_is_the_policy_diverges_by_nothing() -> None:
    hidden, head = numbers(23, 8, seed=0), a_head(full=True)
    lesson = Lesson(states=hidden.detach(), head=head)
    got = distilled_sums(hidden, head, lesson, TARGET, SLOT, COUNTS, wanted=frozenset({"teacher_divergence"}))
    assert float(got["teacher_divergence"].detach().abs().max()) < 1e-12
    assert all(float(one.abs().max()) < 1e-12 for one in grads(got["teacher_divergence"].sum(), hidden, head))


def test_one_word_of_which_the_teacher_is_sure_makes_imitation() -> None:
    hidden, head, lesson = numbers(23, 8, seed=0), a_head(full=False), a_lesson(top_k=1)
    got = distilled_sums(hidden, head, lesson, TARGET, SLOT, COUNTS, wanted=frozenset({"teacher_divergence"}))
    likeliest = log_probabilities(lesson.states, lesson.head).argmax(1)
    nll = -log_probabilities(hidden, head).gather(1, likeliest[:, None])[:, 0]
    torch.testing.assert_close(got["teacher_divergence"], torch.stack([part.sum() for part in nll.split(COUNTS)]))


def test_half_precision_is_finite_and_near() -> None:
    half = torch.bfloat16
    hidden, head = numbers(23, 8, seed=0, dtype=half), Head(weight=numbers(57, 8, seed=1, dtype=half))
    got = distilled_sums(hidden, head, a_lesson(half), TARGET, SLOT, COUNTS, wanted=BOTH)
    exact = distilled_sums(
        hidden.detach().double(), Head(weight=head.weight.detach().double()), a_lesson(), TARGET, SLOT, COUNTS, wanted=BOTH
    )
    for name in BOTH:
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name].double(), exact[name], rtol=0.05, atol=0.5)
    assert all(bool(one.isfinite().all()) and one.dtype == half for one in grads(got["advantage"].sum(), hidden, head))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor made inside the block."""

    size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.size = max(self.size, out.numel())
        return out


def test_no_matrix_of_tokens_by_words_is_made() -> None:
    hidden, head = numbers(23, 8, seed=0), a_head(full=False)
    with Largest() as largest:
        sums = distilled_sums(hidden, head, a_lesson(), TARGET, SLOT, COUNTS, wanted=BOTH, rows=4)
        (sums["advantage"].sum() + sums["teacher_divergence"].sum()).backward()
    assert largest.size == 57 * 8  # the output layer's gradient; a tile has 4 x 57


def test_vocabularies_of_two_sizes_and_an_absent_reference_are_refused() -> None:
    hidden = numbers(23, 8, seed=0)
    with pytest.raises(ValueError, match="57, 58"):
        distilled_sums(hidden, Head(weight=numbers(58, 8, seed=1)), a_lesson(), TARGET, SLOT, COUNTS, wanted=BOTH)
    alone = Lesson(states=numbers(23, 6, seed=1), head=Head(weight=numbers(57, 6, seed=2)))
    with pytest.raises(ValueError, match="no reference"):
        distilled_sums(hidden, a_head(full=False), alone, TARGET, SLOT, COUNTS, wanted=BOTH)


# --- measures of inputs -----------------------------------------------------------------------------------------------


def other(name: str, **changes: object) -> nn.Module:
    """A model with other weights."""
    model = tiny_causal(name, **changes)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def naive(model: nn.Module, tokens: Tokens) -> list[Tensor]:
    """Log-probabilities of all words for each continuation, from the model's own logits."""
    found = []
    for owner, continuation in zip(tokens.context_of, tokens.continuations, strict=True):
        ids = torch.cat([tokens.contexts[owner], continuation])[None]
        found.append(model(ids, use_cache=False).logits[0].log_softmax(-1)[-len(continuation) - 1 : -1])
    return found


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("heads", [False, True])
def test_measures_of_a_model_are_means_over_each_candidates_tokens(pack: bool, heads: bool) -> None:
    tokens = a_batch(heads=(3, 2, 1, 3, 3) if heads else None)
    tokens = tokens.select([0, 1, 3, 4])
    model, teacher, reference = tiny_causal("gpt2"), other("phi"), other("gpt2")
    want = {"teacher_divergence": [], "advantage": []}
    for rows in zip(*(naive(one, tokens) for one in (model, teacher, reference)), strict=True):
        for name, values in of_all_logits(*rows, None).items():
            want[name].append(values.mean())
    whole = {name: torch.stack(values).view(2, 2) for name, values in want.items()}
    stakes = torch.tensor([[1.0, -0.5], [0.3, 2.0]], dtype=torch.float64)
    expected = gradients(model, sum((values * stakes).sum() for values in whole.values()))

    taught = Teacher(
        network=frozen_network(teacher, pack=pack)[0],
        reference=frozen_network(reference, pack=pack)[0],
        with_reference=True,
    )
    inputs = TokenInputs(tokens=tokens, num_candidates=2, batch=2, wanted=BOTH, pack=pack, teacher=taught)
    network = TokenNetwork(model, pack=pack)
    got = inputs.measures(network)
    for name in BOTH:
        torch.testing.assert_close(got[name], whole[name], rtol=1e-10, atol=1e-10)
    loss = sum((got[name] * stakes).sum() for name in BOTH)
    assert max(relative_errors(gradients(model, loss), expected).values()) < 1e-9
    second = inputs.candidates(slice(1, 2)).measures(network)
    torch.testing.assert_close(second["advantage"], whole["advantage"][:, 1:], rtol=1e-10, atol=1e-10)
    assert set(inputs.refer(network)[0]) == {"policy"}


def test_wanting_a_teachers_measures_without_one_is_refused() -> None:
    with pytest.raises(ValueError, match="teacher"):
        TokenInputs(tokens=a_batch(), num_candidates=1, batch=5, wanted=BOTH)


# --- runs -------------------------------------------------------------------------------------------------------------


def learning(**changes: Any) -> dict[str, Any]:
    """All pairs in every step, so that steps can be compared."""
    return {"training": {"steps": 4, "batch_size": len(PAIRS), "log_every": 1}, **changes}


def test_dckd_brings_a_policy_nearer_to_a_teacher_of_another_architecture(tmp_path: Path) -> None:
    teacher = {"model": str(model_folder("gpt2")), "top_k": 20}
    output = train_text(tmp_path / "run", **learning(loss={"name": "dckd"}, adapter={"teacher": teacher}))
    metrics = metrics_of(output)
    for side in ("chosen", "rejected"):
        values = [step[f"teacher_divergence/{side}"] for step in metrics]
        assert values == sorted(values, reverse=True) and values[-1] < 0.97 * values[0]
    assert {path.name for path in output.glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert all("lora_" in name for name in text_weights(output))  # nothing of the teacher is saved


def test_adpa_gains_where_a_tuned_teacher_gained_over_its_base_and_dckd_beside_it_brings_it_nearer(tmp_path: Path) -> None:
    tuned = train_text(tmp_path / "teacher", **learning())
    teacher = {"model": str(model_folder()), "lora": str(tuned)}
    losses = [{"name": "adpa"}, {"name": "dckd", "weight": 0.5}]
    output = train_text(tmp_path / "run", **learning(loss=losses, adapter={"teacher": teacher}))
    metrics = metrics_of(output)
    assert metrics[0]["teacher_divergence/rejected"] > 0
    assert metrics[-1]["advantage/rejected"] > metrics[0]["advantage/rejected"]
    assert metrics[-1]["teacher_divergence/chosen"] < metrics[0]["teacher_divergence/chosen"]


def opened(asked: set[str], **teacher: Any) -> Any:
    adapter = TextAdapter(model=str(model_folder()), lora=Lora(rank=2), teacher=TeacherModel(**teacher))
    return adapter.open(asked=frozenset(asked))


def test_candidates_one_at_a_time_and_full_tuning_learn_from_a_teacher_with_its_reference(tmp_path: Path) -> None:
    teacher = {"model": str(model_folder("gpt2")), "reference": {"model": str(model_folder("phi"))}}
    changes: dict[str, Any] = {"loss": {"name": "adpa"}, "adapter": {"teacher": teacher, "lora": None}}
    whole = train_text(tmp_path / "whole", **learning(**changes))
    rows = merged(learning(**changes), {"training": {"candidate_microbatch": 1}})
    parts = train_text(tmp_path / "parts", **rows)
    first, second = (metrics_of(output) for output in (whole, parts))
    assert first[-1]["advantage/rejected"] > first[0]["advantage/rejected"]
    for one, other in zip(first, second, strict=True):
        assert other["advantage/rejected"] == pytest.approx(one["advantage/rejected"], rel=1e-3)


def test_a_teacher_is_opened_where_a_loss_asks_for_it_and_told_in_the_plan() -> None:
    policy = opened({"policy", "teacher_divergence"}, model=str(model_folder("gpt2")))
    taught = policy.teacher.num_parameters
    assert policy.num_encoder_parameters == taught > 0 and f"taught by {taught:,}" in policy.plan()
    assert not any(parameter.requires_grad for network in policy.teacher.networks for parameter in network.parameters())
    assert not policy.teacher.network.training
    assert opened({"policy"}, model=str(model_folder("gpt2"))).teacher is None


def test_rows_are_padded_where_the_teachers_must_be() -> None:
    mamba = opened({"teacher_divergence"}, model=str(model_folder("mamba")))
    assert not mamba.network.packs
    adapter = TextAdapter(
        model=str(model_folder()), lora=Lora(rank=2), pack=True, teacher=TeacherModel(model=str(model_folder("mamba")))
    )
    with pytest.raises(UserError, match=r"adapter\.pack: got true, and the teacher's rows"):
        adapter.open(asked=frozenset({"teacher_divergence"}))


@pytest.mark.parametrize("loss", ["dckd", "adpa"])
def test_a_loss_that_asks_for_a_teacher_names_the_setting(tmp_path: Path, loss: str) -> None:
    with pytest.raises(UserError, match=r"Set adapter\.teacher to"):
        train_text(tmp_path / "run", loss={"name": loss})
    assert not (tmp_path / "run").exists()


def test_adpa_wants_to_know_what_its_teacher_was_tuned_from(tmp_path: Path) -> None:
    teacher = {"model": str(model_folder("gpt2"))}
    with pytest.raises(UserError, match="the reference it was tuned from"):
        train_text(tmp_path / "run", loss={"name": "adpa"}, adapter={"teacher": teacher})


def test_a_teacher_of_another_vocabulary_or_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter\.teacher: got a teacher with \d+ words"):
        opened({"teacher_divergence"}, model="tiny")
    folder = tmp_path / "renamed"
    shutil.copytree(model_folder("gpt2"), folder)
    text = (folder / "tokenizer.json").read_text()
    tokenizer = json.loads(text)
    vocab = tokenizer["model"]["vocab"]
    first, second = sorted(vocab)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=f"first in '{first}'"):
        opened({"teacher_divergence"}, model=str(folder))
    with pytest.raises(UserError, match=r"adapter\.teacher: cannot open .*nowhere"):
        opened({"teacher_divergence"}, model=str(tmp_path / "nowhere"))
