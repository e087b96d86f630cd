"""What one pass of a language model measures beside the logps, against the model's own logits."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_causal import gradients, relative_errors, sequences, tiny_causal
from torch import Tensor

from mmalign.language.network import TokenNetwork
from mmalign.likelihoods import TokenInputs, Tokens

LENGTHS = (4, 3, 5, 2)  # of the candidates of two rows of two


def a_batch(*, degraded: bool = False, columns: bool = False) -> Tokens:
    """Two prompts with two answers each; then each answer after another prompt, or two further answers of each row."""
    contexts = sequences((5, 3))
    own = sequences(LENGTHS, 1)
    owners = [0, 0, 1, 1]
    if degraded:
        contexts = (*contexts, *sequences((4, 6), 2))
        own, owners = (*own, own[0], own[2], own[1], own[3]), [*owners, 2, 3, 2, 3]
    if columns:
        own, owners = (*own, *sequences((2, 3, 4, 1), 3)), [*owners, 0, 1, 0, 1]
    return Tokens(contexts=contexts, continuations=own, context_of=tuple(owners))


def logits_of(model: torch.nn.Module, tokens: Tokens, number: int) -> Tensor:
    """Logits that predict the tokens of a continuation."""
    context, ids = tokens.contexts[tokens.context_of[number]], tokens.continuations[number]
    return model(input_ids=torch.cat([context, ids])[None], use_cache=False).logits[0, len(context) - 1 : -1]


def target_of(model: torch.nn.Module, tokens: Tokens, number: int, name: str) -> Tensor:
    logits, ids = logits_of(model, tokens, number), tokens.continuations[number][:, None]
    values = logits.log_softmax(1) if name == "logps" else logits
    return values.gather(1, ids)[:, 0]


def parts_of(inputs: TokenInputs, network: TokenNetwork, stakes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the stakes, one candidate at a time, as the loop takes them."""
    total = []
    for i in range(inputs.num_candidates):
        part = slice(i, i + 1)
        measured = inputs.candidates(part).measures(network)
        told = [(measured[name], g) for name, g in stakes.items() if name in measured]
        total.append(sum((values * (g if values.shape == g.shape else g[:, part])).sum() for values, g in told))
    return gradients(network.model, sum(total))


@pytest.mark.parametrize("pack", [True, False])
def test_a_name_that_stands_twice_has_two_columns(pack: bool) -> None:
    model = tiny_causal("llama")
    tokens = a_batch(columns=True)
    inputs = TokenInputs(tokens=tokens, num_candidates=2, batch=2, extras=("crossed", "crossed"), pack=pack)
    network = TokenNetwork(copy.deepcopy(model))
    out = inputs.measures(network)
    want = torch.stack([target_of(model, tokens, n, "logps").sum() for n in range(8)])
    torch.testing.assert_close(out["policy"], want[:4].view(2, 2))
    torch.testing.assert_close(out["crossed"], want[4:].view(2, 2).T)
    stakes = {"policy": torch.tensor([[1.0, 2.0], [-1.0, 0.5]]), "crossed": torch.tensor([[0.3, -2.0], [1.0, 1.5]])}
    whole = gradients(network.model, sum((out[name] * g).sum() for name, g in stakes.items()))
    assert max(relative_errors(parts_of(inputs, network, stakes), whole).values()) < 1e-5


@pytest.mark.parametrize("pack", [True, False])
def test_other_targets_are_scored_after_the_tokens_of_a_continuation(pack: bool) -> None:
    model = tiny_causal("llama")
    tokens = a_batch()
    others = tuple((ids + 7) % 50 for ids in tokens.continuations)
    inputs = TokenInputs(tokens=replace(tokens, targets=others), num_candidates=2, batch=2, pack=pack)
    got = inputs.measures(TokenNetwork(copy.deepcopy(model)))["policy"].flatten()
    want = [logits_of(model, tokens, n).log_softmax(1).gather(1, others[n][:, None]).sum() for n in range(4)]
    torch.testing.assert_close(got, torch.stack(want))


@pytest.mark.parametrize("pack", [True, False])
def test_the_likeliest_tokens_are_those_of_the_largest_logits(pack: bool) -> None:
    model = tiny_causal("llama")
    tokens = a_batch()
    layout = tokens.packed() if pack else tokens.padded()
    found = TokenNetwork(copy.deepcopy(model), rows=3).likeliest(layout)
    want = torch.cat([logits_of(model, tokens, n).argmax(1) for n in range(4)])
    assert found.tolist() == want.tolist()


def rival_of(model: torch.nn.Module, tokens: Tokens, number: int) -> Tensor:
    """Log-probs of the first of the two likeliest tokens that is not the continuation's, place by place."""
    logits, ids = logits_of(model, tokens, number), tokens.continuations[number]
    first, second = logits.topk(2, dim=1).indices.unbind(1)
    return logits.log_softmax(1).gather(1, torch.where(first == ids, second, first)[:, None])[:, 0]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pack", [True, False])
def test_rivals_are_the_likeliest_other_tokens_in_the_places_of_an_answers_own(pack: bool, weighted: bool) -> None:
    model = tiny_causal("llama")
    tokens = a_batch()
    best = [logits_of(model, tokens, n).argmax(1) for n in range(4)]  # so that some of its tokens are the likeliest
    own = [torch.where(torch.arange(len(ids)) % 2 == 0, top, ids) for ids, top in zip(tokens.continuations, best, strict=True)]
    tokens = replace(tokens, continuations=(*own, own[0], own[2]), context_of=(0, 0, 1, 1, 1, 0))
    if weighted:
        tokens = replace(tokens, weights=tuple(torch.arange(len(ids)).float() + 0.5 for ids in tokens.continuations))
    wanted = frozenset({"rival", "degraded_rival"})
    inputs = TokenInputs(tokens=tokens, num_candidates=2, batch=2, extras=("degraded",), wanted=wanted, pack=pack)
    network = TokenNetwork(copy.deepcopy(model), rows=3)
    out = inputs.measures(network)
    factors = tokens.weights or tuple(torch.ones(len(ids)) for ids in tokens.continuations)
    want = torch.stack([(factors[n] * rival_of(model, tokens, n)).sum() for n in range(6)])
    torch.testing.assert_close(out["rival"], want[:4].view(2, 2))
    torch.testing.assert_close(out["degraded_rival"], want[4:, None])
    stakes = {"policy": torch.tensor([[1.0, 0.2], [-1.0, 0.5]]), "rival": torch.tensor([[0.3, -2.0], [1.0, 1.5]])}
    stakes["degraded_rival"] = torch.tensor([[2.0], [-0.7]])
    whole = gradients(network.model, sum((out[name] * g).sum() for name, g in stakes.items()))
    logps = torch.stack([(factors[n] * target_of(model, tokens, n, "logps")).sum() for n in range(4)]).view(2, 2)
    theirs = (logps * stakes["policy"]).sum() + (want[:4].view(2, 2) * stakes["rival"]).sum()
    theirs = theirs + (want[4:, None] * stakes["degraded_rival"]).sum()
    assert max(relative_errors(whole, gradients(model, theirs)).values()) < 1e-5
    assert max(relative_errors(parts_of(inputs, network, stakes), whole).values()) < 1e-5


@pytest.mark.parametrize("pack", [True, False])
def test_single_tokens_are_measured_without_weights_and_padded_with_zeros(pack: bool) -> None:
    model = tiny_causal("llama")
    tokens = replace(a_batch(degraded=True), weights=tuple(torch.full((n,), 0.5) for n in (*LENGTHS, 4, 5, 3, 2)))
    wanted, extras = frozenset({"tokens", "each_degraded_tokens"}), ("each_degraded", "each_degraded")
    inputs = TokenInputs(tokens=tokens, num_candidates=2, batch=2, extras=extras, wanted=wanted, pack=pack)
    network = TokenNetwork(copy.deepcopy(model))
    out = inputs.measures(network)
    want = torch.zeros(8, 5, dtype=torch.float64)
    for n in range(8):
        own = target_of(model, tokens, n, "logps")
        want[n, : len(own)] = own
    torch.testing.assert_close(out["tokens"], want[:4].view(2, 2, 5))
    torch.testing.assert_close(out["each_degraded_tokens"], want[4:].view(2, 2, 5).transpose(0, 1))
    torch.testing.assert_close(out["policy"], 0.5 * want[:4].sum(1).view(2, 2))
    torch.testing.assert_close(inputs.refer(network)[0]["tokens"], out["tokens"].detach())
    stakes = {
        name: torch.randn(value.shape, generator=torch.Generator().manual_seed(n))
        for n, (name, value) in enumerate(out.items())
    }
    whole = gradients(network.model, sum((out[name] * g).sum() for name, g in stakes.items()))
    assert max(relative_errors(parts_of(inputs, network, stakes), whole).values()) < 1e-5
    with pytest.raises(ValueError, match="want tokens alone"):
        replace(inputs, wanted=wanted | {"entropy"})


@pytest.mark.parametrize("pack", [True, False])
def test_divergence_is_the_summed_kl_of_the_reference_from_the_policy(pack: bool) -> None:
    model, reference = tiny_causal("llama"), tiny_causal("llama")
    for parameter in reference.parameters():
        parameter.data *= 0.7
    tokens = a_batch()
    asked = frozenset({"divergence"})
    inputs = TokenInputs(tokens=tokens, num_candidates=2, batch=2, wanted=asked, pack=pack)
    network = TokenNetwork(copy.deepcopy(model))
    with pytest.raises(ValueError, match="Call refer first"):
        inputs.measures(network)
    known, inputs = inputs.refer(TokenNetwork(copy.deepcopy(reference)))
    out = inputs.measures(network)
    p, q = ([logits_of(one, tokens, n).log_softmax(1) for n in range(4)] for one in (model, reference))
    want = torch.stack([(b.exp() * (b - a)).sum() for a, b in zip(p, q, strict=True)])
    torch.testing.assert_close(out["divergence"].flatten(), want)
    assert float(want.detach().min()) > 0.01
    torch.testing.assert_close(known["policy"].flatten()[0], target_of(reference, tokens, 0, "logps").sum())
    assert "divergence" not in known
    stakes = {"divergence": torch.tensor([[1.0, -0.5], [2.0, 0.3]])}
    whole = gradients(network.model, (out["divergence"] * stakes["divergence"]).sum())
    theirs = gradients(model, (want.view(2, 2) * stakes["divergence"]).sum())
    assert max(relative_errors(whole, theirs).values()) < 1e-5
    assert max(relative_errors(parts_of(inputs, network, stakes), whole).values()) < 1e-5


@pytest.mark.parametrize("pack", [True, False])
def test_anchored_scores_weigh_tokens_by_what_the_image_does_to_their_logits(pack: bool) -> None:
    model = tiny_causal("llama")
    tokens = a_batch(degraded=True)
    extras = ("each_degraded", "each_degraded")
    inputs = TokenInputs(tokens=tokens, num_candidates=2, batch=2, extras=extras, wanted=frozenset({"anchored"}), pack=pack)
    network = TokenNetwork(copy.deepcopy(model))
    out = inputs.measures(network)
    degraded = (4, 6, 5, 7)  # by candidate: columns follow each other, row by row
    want = []
    for n, other in enumerate(degraded):
        d = target_of(model, tokens, n, "logits") - target_of(model, tokens, other, "logits")
        share = 1 / (1 + torch.exp(-d))
        weight = share + 0.5 if n % 2 == 0 else 1.5 - share
        want.append((target_of(model, tokens, n, "logps") + weight.log()).sum())
    torch.testing.assert_close(out["anchored"].flatten(), torch.stack(want))
    stakes = {"anchored": torch.tensor([[1.0, -0.5], [2.0, 0.3]]), "policy": torch.ones(2, 2)}
    whole = gradients(network.model, sum((out[name] * g).sum() for name, g in stakes.items()))
    assert max(relative_errors(parts_of(inputs, network, stakes), whole).values()) < 1e-5


def test_anchored_scores_want_every_answer_under_the_degraded_image() -> None:
    with pytest.raises(ValueError, match="without the further completions each_degraded"):
        TokenInputs(tokens=a_batch(), num_candidates=2, batch=2, wanted=frozenset({"anchored"}))
