"""Token sequences as layouts, and the measures that losses ask of them: by hand, against TRL's numbers, and part by part."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_causal import gradients, relative_errors, sequences, tiny_causal
from torch import Tensor
from torch.nn.functional import logsigmoid

from mmalign.language.head import Head, slot_sums
from mmalign.language.network import TokenNetwork
from mmalign.likelihoods import Layout, Segment, TokenInputs, Tokens
from mmalign.likelihoods.tokens import first_difference, shared_heads
from mmalign.losses import LOSSES

GOLDEN = Path(__file__).parent / "golden" / "text"
NOTHING: frozenset[str] = frozenset()


def ids(*values: int) -> Tensor:
    return torch.tensor(values)


def from_logits(logits: Tensor) -> object:
    """A network whose logits of a padded layout are these."""

    def network(layout: Layout, wanted: frozenset[str]) -> Mapping[str, Tensor]:
        states = logits[:, : layout.ids.shape[1]].flatten(0, 1)[layout.at]
        weight = torch.eye(logits.shape[-1], dtype=logits.dtype)
        return slot_sums(
            states, Head(weight=weight), layout.target, layout.slot, layout.counts, weight=layout.weight, wanted=wanted
        )

    return network


def two_contexts(**more: object) -> Tokens:
    return Tokens(
        contexts=(ids(1, 2, 3), ids(4, 5)),
        continuations=(ids(6, 7), ids(8), ids(9, 10, 11)),
        context_of=(0, 0, 1),
        **more,
    )


def test_a_packed_row_holds_every_context_once_and_no_last_token() -> None:
    layout = two_contexts().packed()
    assert layout.ids.tolist() == [[1, 2, 3, 4, 5, 6, 9, 10]]
    assert layout.positions.tolist() == [[0, 1, 2, 0, 1, 3, 2, 3]]
    assert layout.segments == (
        Segment(start=0, stop=3),
        Segment(start=3, stop=5),
        Segment(start=5, stop=6, after=0),
        Segment(start=6, stop=8, after=1),
    )
    assert layout.at.tolist() == [2, 5, 2, 4, 6, 7]
    assert layout.target.tolist() == [6, 7, 8, 9, 10, 11]
    assert layout.slot.tolist() == [0, 0, 1, 2, 2, 2] and layout.counts == (2, 1, 3)
    assert layout.weight is None and layout.mask is None and layout.num_slots == 3


def test_padded_rows_hold_context_and_continuation_and_end_in_padding() -> None:
    layout = two_contexts().padded(multiple=4, pad=99)
    assert layout.ids.tolist() == [
        [1, 2, 3, 6, 7, 99, 99, 99],
        [1, 2, 3, 8, 99, 99, 99, 99],
        [4, 5, 9, 10, 11, 99, 99, 99],
    ]
    assert layout.mask is not None and layout.mask.sum(1).tolist() == [5, 4, 5]
    assert layout.positions.tolist() == [list(range(8))] * 3
    assert layout.at.tolist() == [2, 3, 8 + 2, 16 + 1, 16 + 2, 16 + 3]
    assert layout.target.tolist() == [6, 7, 8, 9, 10, 11]
    assert layout.segments == () and layout.counts == (2, 1, 3)


def test_heads_contexts_and_weights_have_slots_of_their_own_and_weight_zero_is_not_scored() -> None:
    tokens = two_contexts(
        heads=(1, 1, 2),
        weights=(torch.tensor([1.0, 0.5]), torch.ones(1), torch.tensor([0.0, 2.0, 1.0])),
        context_weights=(torch.tensor([1.0, 0.0]), torch.ones(1)),
    )
    assert tokens.num_slots == 8 and tokens.scored().tolist() == [2, 1, 2]
    for layout in (tokens.packed(), tokens.padded()):
        assert layout.target.tolist() == [6, 7, 8, 10, 11, 2, 5]
        assert layout.slot.tolist() == [0, 1, 2, 4, 5, 6, 7]
        assert layout.counts == (1, 1, 1, 0, 1, 1, 1, 1)
        assert layout.weight is not None and layout.weight.tolist() == [1.0, 0.5, 1.0, 2.0, 1.0, 1.0, 1.0]
        assert layout.ids.flatten()[layout.at].tolist() == [3, 6, 3, 9, 10, 1, 4]


def test_empty_sequences_and_missing_contexts_are_refused() -> None:
    with pytest.raises(ValueError, match="empty context or continuation"):
        Tokens(contexts=(ids(1),), continuations=(ids(1)[:0],), context_of=(0,))
    with pytest.raises(ValueError, match="got 1 context indices for 2 continuations"):
        Tokens(contexts=(ids(1),), continuations=(ids(2), ids(3)), context_of=(0,))


def test_the_shared_head_is_as_long_as_the_rows_shortest_candidate() -> None:
    assert shared_heads([[3, 2], [1, 2]]) == (2, 2, 1, 1)


def test_candidates_differ_first_where_one_of_them_does() -> None:
    assert first_difference([ids(1, 2, 3), ids(1, 2, 4)]) == 2
    assert first_difference([ids(1, 2), ids(1, 2, 4), ids(5, 2)]) == 0
    assert first_difference([ids(1, 2), ids(1, 2, 4)]) == 2


class Golden:
    """The eight sequences that TRL was given, as four rows of (chosen, rejected), and its numbers."""

    def __init__(self) -> None:
        with np.load(GOLDEN / "inputs_tok.npz") as arrays:
            given = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        with np.load(GOLDEN / "trl116_dpo_tok.npz") as arrays:
            self.numbers = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        self.order = [0, 4, 1, 5, 2, 6, 3, 7]
        self.logits, self.reference = given["logits"][self.order], given["ref_logits"][self.order]
        rows = [given["input_ids"][row][given["attention_mask"][row].bool()] for row in self.order]
        prompts = [int(length) for length in given["prompt_len"]]
        continuations = tuple(row[prompts[number // 2] :] for number, row in enumerate(rows))
        self.tokens = Tokens(
            contexts=tuple(rows[2 * number][:length] for number, length in enumerate(prompts)),
            continuations=continuations,
            context_of=(0, 0, 1, 1, 2, 2, 3, 3),
            heads=tuple(min(len(continuations[n - n % 2]), len(continuations[n - n % 2 + 1])) for n in range(8)),
        )
        self.inputs = TokenInputs(
            tokens=self.tokens, num_candidates=2, batch=4, wanted=frozenset({"shared", "agreement", "entropy"})
        )

    def __getitem__(self, name: str) -> Tensor:
        """An array of TRL's whose first axis is the sequences, as (4, 2, ...)."""
        return self.numbers[name][self.order].unflatten(0, (4, 2))

    def measures(self, logits: Tensor) -> dict[str, Tensor]:
        return self.inputs.measures(from_logits(logits))


def test_sums_of_log_probabilities_and_their_agreement_are_trls() -> None:
    golden = Golden()
    policy, reference = golden.measures(golden.logits), golden.measures(golden.reference)
    by_token, squares = golden["sigmoid/per_token_logps"], golden["sigmoid/log_sum_sq_probs"]
    there = by_token != 0
    assert torch.allclose(policy["policy"], by_token.sum(-1), rtol=0, atol=1e-12)
    assert torch.allclose(reference["policy"], golden["sigmoid/ref_per_token_logps"].sum(-1), rtol=0, atol=1e-12)
    mean = ((by_token - squares) * there).sum(-1) / there.sum(-1)
    assert torch.allclose(policy["agreement"], mean, rtol=0, atol=1e-12)
    assert there.sum(-1).flatten().tolist() == golden.tokens.scored().tolist()


@pytest.mark.parametrize(
    ("case", "alpha"), [("sigmoid", 1.0), ("ld_alpha0.0", 0.0), ("ld_alpha0.5", 0.5), ("ld_alpha1.0", 1.0)]
)
def test_heads_and_tails_give_ld_dpos_loss_and_gradient(case: str, alpha: float) -> None:
    golden = Golden()
    golden.logits.requires_grad_()
    policy, reference = golden.measures(golden.logits), golden.measures(golden.reference)
    ratios = [m["shared"] + alpha * (m["policy"] - m["shared"]) for m in (policy, reference)]
    delta = ratios[0] - ratios[1]
    loss = -logsigmoid(0.1 * (delta[:, 0] - delta[:, 1])).mean()
    loss.backward()
    assert torch.allclose(loss.detach(), golden.numbers[f"{case}/loss"], rtol=0, atol=1e-12)
    assert golden.logits.grad is not None
    assert torch.allclose(golden.logits.grad.unflatten(0, (4, 2)), golden[f"{case}/grad_logits"], rtol=0, atol=1e-13)


def test_agreement_gives_wpos_loss_and_gradient() -> None:
    golden = Golden()
    golden.logits.requires_grad_()
    policy, reference = golden.measures(golden.logits), golden.measures(golden.reference)
    delta = policy["policy"] - reference["policy"]
    loss = (-logsigmoid(0.1 * (delta[:, 0] - delta[:, 1])) * policy["agreement"].sum(1).exp()).mean()
    loss.backward()
    assert torch.allclose(loss.detach(), golden.numbers["wpo/loss"], rtol=0, atol=1e-12)
    assert golden.logits.grad is not None
    assert torch.allclose(golden.logits.grad.unflatten(0, (4, 2)), golden["wpo/grad_logits"], rtol=0, atol=1e-13)


def rows(**more: object) -> TokenInputs:
    """Two rows of two candidates, a rationale and a gold answer each, of different lengths; with all measures."""
    lengths = (4, 2, 3, 5)
    continuations = sequences((*lengths, 3, 1, 2, 6), 1)
    tokens = Tokens(
        contexts=sequences((6, 4)),
        continuations=continuations,
        context_of=(0, 0, 1, 1, 0, 1, 0, 1),
        weights=tuple(torch.linspace(0.5, 1.5, len(c)) if n % 2 else torch.ones(len(c)) for n, c in enumerate(continuations)),
        context_weights=tuple(torch.ones(length - 1) for length in (6, 4)),
        heads=(2, 2, 3, 3, 3, 1, 2, 6),
    )
    wanted = frozenset({"shared", "joint", "agreement", "entropy"})
    return TokenInputs(tokens=tokens, num_candidates=2, batch=2, extras=("rationale", "gold"), wanted=wanted, **more)


def same(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> bool:
    return got.keys() == want.keys() and all(torch.allclose(got[n], want[n], rtol=0, atol=1e-10) for n in want)


def test_all_measures_of_packed_rows_are_those_of_padded_rows_and_of_each_sequence_alone() -> None:
    model = tiny_causal("llama")
    network = TokenNetwork(model)
    inputs = rows()
    padded = inputs.measures(network)
    assert {name: tuple(value.shape) for name, value in padded.items()} == {
        "policy": (2, 2),
        "rationale": (2, 1),
        "gold": (2, 1),
        "shared": (2, 2),
        "joint": (2, 2),
        "agreement": (2, 2),
        "entropy": (2, 2),
    }
    assert same(replace(inputs, pack=True).measures(network), padded)
    assert same(replace(inputs, multiple=16, pad=7).measures(network), padded)
    names = {0: ("policy", 0, 0), 3: ("policy", 1, 1), 4: ("rationale", 0, 0), 7: ("gold", 1, 0)}
    for number, (name, row, column) in names.items():
        context = inputs.tokens.contexts[inputs.tokens.context_of[number]]
        continuation = inputs.tokens.continuations[number]
        whole = torch.cat([context, continuation])
        logp = model(whole[None], use_cache=False).logits[0].log_softmax(-1)[:-1]
        chosen = logp.gather(1, whole[1:, None])[:, 0]
        scored = chosen[len(context) - 1 :]
        assert inputs.tokens.weights is not None and inputs.tokens.heads is not None
        weighted = scored * inputs.tokens.weights[number]
        assert torch.allclose(padded[name][row, column], weighted.sum(), rtol=0, atol=1e-10)
        if name == "policy":
            head = weighted[: inputs.tokens.heads[number]].sum()
            assert torch.allclose(padded["shared"][row, column], head, rtol=0, atol=1e-10)
            joint = weighted.sum() + chosen[: len(context) - 1].sum()
            assert torch.allclose(padded["joint"][row, column], joint, rtol=0, atol=1e-10)
            p = logp[len(context) - 1 :].exp()
            assert torch.allclose(padded["agreement"][row, column], (scored - p.square().sum(1).log()).mean(), atol=1e-10)
            assert torch.allclose(padded["entropy"][row, column], torch.special.entr(p).sum(1).mean(), atol=1e-10)


@pytest.mark.parametrize("pack", [False, True])
def test_candidates_one_at_a_time_give_the_same_measures(pack: bool) -> None:
    network = TokenNetwork(tiny_causal("llama"))
    inputs = rows(pack=pack)
    whole = inputs.measures(network)
    first, second = (inputs.candidates(slice(i, i + 1)).measures(network) for i in range(2))
    assert second.keys() == whole.keys() - {"rationale", "gold"}
    assert same({name: first[name] for name in ("rationale", "gold")}, {name: whole[name] for name in ("rationale", "gold")})
    assert same({name: torch.cat([first[name], second[name]], 1) for name in second}, {name: whole[name] for name in second})
    none = inputs.candidates(slice(0, 0)).measures(network)
    assert none["policy"].shape == (2, 0)
    assert same({"gold": none["gold"]}, {"gold": whole["gold"]})


def test_the_reference_gives_its_measures_without_a_graph_and_without_what_only_the_policy_is_asked() -> None:
    network = TokenNetwork(tiny_causal("llama"))
    inputs = rows(pack=True)
    measures, again = inputs.refer(network)
    assert again is inputs and not any(value.requires_grad for value in measures.values())
    own = inputs.measures(network)
    assert own["policy"].requires_grad and measures.keys() == own.keys() - {"agreement", "entropy"}
    assert same(measures, {name: own[name] for name in measures})
    settled, _ = inputs.settle(network)
    assert same(settled, own) and not settled["policy"].requires_grad
    assert torch.equal(inputs.logps(network), own["policy"])
    with pytest.raises(ValueError, match="drift"):
        inputs.refer(network, drift=True)


def test_answers_of_others_are_measured_without_a_graph() -> None:
    network = TokenNetwork(tiny_causal("llama"))
    other = Tokens(contexts=sequences((6, 4)), continuations=sequences((3, 3), 5), context_of=(0, 1))
    for pack in (False, True):
        measures = rows(pack=pack, mismatched=other).measures(network)
        want = network(other.padded())["logps"]
        assert torch.allclose(measures["mismatched"], want[:, None], rtol=0, atol=1e-10)
        assert not measures["mismatched"].requires_grad


def test_gradients_of_packed_rows_are_those_of_padded_rows() -> None:
    model = tiny_causal("gpt2")
    network = TokenNetwork(model)
    found = []
    for pack in (False, True):
        measures = rows(pack=pack).measures(network)
        loss = sum(
            ((measures[name] / 100).sin() * (n + 1)).sum() for n, name in enumerate(("policy", "shared", "joint", "gold"))
        )
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    total = torch.stack([gradient.norm() for gradient in found[0]]).norm()
    assert float(total) > 0.1
    for padded, packed in zip(*found, strict=True):
        assert float((packed - padded).norm()) < 1e-10 * float(total)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("pack", [True, False])
def test_one_accumulator_for_both_answers_of_a_pair_gives_the_gradient_of_one_for_each(pack: bool, heads: bool) -> None:
    network = TokenNetwork(tiny_causal("llama"), accumulators=8)
    answers = sequences((3, 5, 4, 1), seed=2)
    lengths = ((3, 5), (4, 1))
    tokens = Tokens(
        contexts=sequences((5, 3)),
        continuations=answers,
        context_of=(0, 0, 1, 1),
        heads=shared_heads(lengths) if heads else None,
    )
    wanted = frozenset({"shared"}) if heads else frozenset()
    found = []
    for opposed in (True, False):
        inputs = TokenInputs(tokens=tokens, num_candidates=2, batch=2, wanted=wanted, pack=pack, opposed=opposed)
        measured = inputs.measures(network)
        zeros = torch.zeros(2, 2, dtype=torch.float64)
        named = {"shared": measured["shared"], "reference_shared": zeros} if heads else {}
        loss = LOSSES["ld_dpo" if heads else "dpo"](measured["policy"], zeros, **named).losses.mean()
        found.append(gradients(network.model, loss))
    assert max(relative_errors(*found).values()) < 1e-12
    assert float(found[0]["lm_head.weight"].abs().max()) > 0


def test_only_both_candidates_without_further_completions_are_opposed() -> None:
    tokens = Tokens(contexts=sequences((5,)), continuations=sequences((3, 5, 4), seed=2), context_of=(0, 0, 0))
    two = TokenInputs(tokens=tokens.select([0, 1]), num_candidates=2, batch=1, opposed=True)
    assert two._opposed() == ((0, 1),)
    assert two.candidates(slice(0, 1))._opposed() is None
    assert TokenInputs(tokens=tokens, num_candidates=3, batch=1, opposed=True)._opposed() is None
    assert TokenInputs(tokens=tokens, num_candidates=2, batch=1, extras=("gold",), opposed=True)._opposed() is None
    scored = replace(two.tokens, context_weights=(torch.ones(4),))
    assert replace(two, tokens=scored)._opposed() is None
