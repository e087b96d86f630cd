"""Summed log-probabilities from hidden states: equal to a log-softmax of all logits, which are never built."""

import copy
from typing import Any

import pytest
import torch
from tiny_causal import a_batch, gradients, naive_logps, relative_errors, tiny_causal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmalign.errors import UserError
from mmalign.language.head import Head, slot_sums, tile_rows
from mmalign.language.network import TokenNetwork

COUNTS = (5, 0, 11, 7)
SLOT = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS))
STAKES = torch.tensor([0.7, 2.0, -1.3, 0.4], dtype=torch.float64)
BOTH = frozenset({"agreement", "entropy"})


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).requires_grad_()


def some_head(**more: Any) -> tuple[Tensor, Head, Tensor]:
    """Hidden states (23, 8), a head with all that it may have, and targets."""
    head = Head(weight=numbers(57, 8, seed=1), bias=numbers(57, seed=2), **more)
    return numbers(23, 8, seed=0), head, torch.arange(23) * 2


def of_all_logits(hidden: Tensor, head: Head, target: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
    """The same from one matrix of logits."""
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    if head.inner is not None and head.outer is not None:
        logits = logits + head.inner @ head.outer.T
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logp = logits.log_softmax(1)
    chosen = logp.gather(1, target[:, None])[:, 0]
    by_token = {
        "logps": chosen if weight is None else chosen * weight,
        "agreement": chosen - logp.exp().square().sum(1).log(),
        "entropy": -(logp.exp() * logp).sum(1),
    }
    return {name: torch.stack([part.sum() for part in values.split(COUNTS)]) for name, values in by_token.items()}


def tensors_of(hidden: Tensor, head: Head) -> list[Tensor]:
    return [tensor for tensor in (hidden, head.weight, head.bias, head.inner, head.outer) if tensor is not None]


def grads(loss: Tensor, hidden: Tensor, head: Head, **more: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, tensors_of(hidden, head), **more))


def close(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-12, atol=1e-13) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("accumulators", [0, 4])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"scale": 0.3},
        {"softcap": 3.0},
        {"scale": 2.0, "softcap": 5.0},
        {"inner": numbers(23, 3, seed=3), "outer": numbers(57, 3, seed=4), "scale": 0.5, "softcap": 4.0},
    ],
    ids=["plain", "scaled", "capped", "scaled and capped", "low rank"],
)
def test_sums_and_gradients_are_those_of_all_logits(more: dict[str, Any], accumulators: int) -> None:
    hidden, head, target = some_head(**more)
    weight = torch.linspace(0.1, 2.0, 23, dtype=torch.float64)
    got = slot_sums(hidden, head, target, SLOT, COUNTS, weight=weight, wanted=BOTH, rows=7, accumulators=accumulators)
    want = of_all_logits(hidden, head, target, weight)
    assert {name: close([value], [want[name]]) for name, value in got.items()} == dict.fromkeys(want, True)
    assert float(got["logps"][1].detach()) == 0
    assert not got["agreement"].requires_grad and not got["entropy"].requires_grad
    own = grads((got["logps"] * STAKES).sum(), hidden, head)
    assert close(own, grads((want["logps"] * STAKES).sum(), hidden, head))


@pytest.mark.parametrize("rows", [1, 2, 5, 23, 64, None])
def test_tiles_of_any_size_and_one_or_two_passes_give_the_same(rows: int | None) -> None:
    hidden, head, target = some_head(softcap=4.0)
    want = of_all_logits(hidden, head, target)
    wanted = grads((want["logps"] * STAKES).sum(), hidden, head)
    for accumulators in (0, 2, 4):
        got = slot_sums(hidden, head, target, SLOT, COUNTS, rows=rows, accumulators=accumulators)["logps"]
        assert close([got], [want["logps"]])
        assert close(grads((got * STAKES).sum(), hidden, head), wanted)


@pytest.mark.parametrize("accumulators", [0, 4])
def test_a_second_backward_pass_gives_the_same_again(accumulators: int) -> None:
    hidden, head, target = some_head()
    got = slot_sums(hidden, head, target, SLOT, COUNTS, accumulators=accumulators)["logps"]
    loss = (got * STAKES).sum()
    first = grads(loss, hidden, head, retain_graph=True)
    kept = [tensor.clone() for tensor in first]
    assert close(grads(loss, hidden, head), kept) and close(first, kept)


OPPOSED = ((0, 2), (3, 1))
OPPOSITE = torch.tensor([0.7, -0.4, -0.7, 0.4], dtype=torch.float64)


@pytest.mark.parametrize("rows", [3, 7, 23])
@pytest.mark.parametrize("accumulators", [0, 2])
def test_one_total_serves_two_slots_whose_gradients_are_opposite(rows: int, accumulators: int) -> None:
    hidden, head, target = some_head(inner=numbers(23, 3, seed=3), outer=numbers(57, 3, seed=4), softcap=4.0)
    weight = torch.linspace(0.1, 2.0, 23, dtype=torch.float64)
    wanted = grads((of_all_logits(hidden, head, target, weight)["logps"] * OPPOSITE).sum(), hidden, head)
    how: dict[str, Any] = {"weight": weight, "rows": rows, "accumulators": accumulators, "opposed": OPPOSED}
    got = slot_sums(hidden, head, target, SLOT, COUNTS, **how)["logps"]
    assert close(grads((got * OPPOSITE).sum(), hidden, head), wanted)


def test_gradients_that_are_not_opposite_as_was_said_are_no_numbers() -> None:
    hidden, head, target = some_head()
    got = slot_sums(hidden, head, target, SLOT, COUNTS, opposed=OPPOSED)["logps"]
    of_hidden, *shared = grads((got * STAKES).sum(), hidden, head)
    assert bool(of_hidden.isfinite().all()) and all(bool(one.isnan().any()) for one in shared)


class Products(TorchDispatchMode):
    """Counts matrix products with the weights, and notes the size of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.largest = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        made = [tensor for tensor in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(tensor, Tensor)]
        views = function.is_view or function in {torch.ops.aten.detach.default, torch.ops.aten.t.default}
        self.largest = max([self.largest, *([] if views else [tensor.numel() for tensor in made])])
        if function in {torch.ops.aten.mm.default, torch.ops.aten.addmm_.default}:
            self.wide += 1
        return out


@pytest.mark.parametrize(
    ("frozen", "accumulators", "products"),
    [(True, 2, 2), (False, 2, 3 + 1), (False, 0, 4)],
    ids=["frozen: logits and hidden", "one pass: and weights of two slots", "two passes: logits twice"],
)
def test_logits_are_computed_once_where_that_is_possible(frozen: bool, accumulators: int, products: int) -> None:
    hidden, weight = numbers(12, 8, seed=0), numbers(57, 8, seed=1).detach().requires_grad_(not frozen)
    slot, counts = torch.repeat_interleave(torch.arange(2), 6), (6, 6)
    with Products() as counted:
        out = slot_sums(hidden, Head(weight=weight), torch.arange(12), slot, counts, rows=12, accumulators=accumulators)
        out["logps"].backward(torch.ones(2, dtype=torch.float64))
    assert counted.wide == products
    assert hidden.grad is not None and (weight.grad is None) == frozen


def test_four_slots_of_two_opposed_pairs_are_computed_in_one_pass() -> None:
    def products(opposed: tuple[tuple[int, int], ...] | None) -> int:
        hidden, weight = numbers(23, 8, seed=0), numbers(57, 8, seed=1)
        with Products() as counted:
            out = slot_sums(hidden, Head(weight=weight), torch.arange(23), SLOT, COUNTS, rows=23, opposed=opposed)
            out["logps"].backward(OPPOSITE)
        return counted.wide

    assert products(None) == 4  # logits twice, hidden states, weights
    assert products(OPPOSED) == 2 + 3  # logits, hidden states, and the weights of three slots that have tokens


def test_no_gradient_is_formed_without_a_graph() -> None:
    hidden, head, target = some_head()
    with torch.no_grad(), Products() as counted:
        out = slot_sums(hidden, head, target, SLOT, COUNTS, rows=23)
    assert counted.wide == 1 and not out["logps"].requires_grad


@pytest.mark.parametrize("accumulators", [0, 2])
def test_no_tensor_of_all_tokens_logits_is_made_or_saved(accumulators: int) -> None:
    tokens, vocab, rows = 300, 2000, 64
    hidden, weight = numbers(tokens, 8, seed=0, dtype=torch.float32), numbers(vocab, 8, seed=1, dtype=torch.float32)
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    slot, counts = torch.repeat_interleave(torch.arange(2), tokens // 2), (tokens // 2, tokens // 2)
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with Products() as counted, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = slot_sums(
            hidden, Head(weight=weight), torch.arange(tokens), slot, counts, wanted=BOTH, rows=rows, accumulators=accumulators
        )
        out["logps"].sum().backward()
    assert counted.largest == rows * vocab < tokens * vocab
    assert max(saved) == weight.numel()


def test_no_logits_of_all_tokens_are_made_by_a_network() -> None:
    tokens = a_batch()
    network = TokenNetwork(tiny_causal("llama", vocab_size=5000), rows=4)
    for layout in (tokens.packed(), tokens.padded()):
        with Products() as counted:
            network(layout)["logps"].sum().backward()
        assert counted.largest == 5000 * 16  # the weights of the output layer; 20 scored tokens have 100,000 logits


def test_tiles_hold_128_to_1024_tokens_of_64_mebibytes_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert [tile_rows(vocab, cpu) for vocab in (100, 32_000, 128_000, 1_000_000)] == [1024, 524, 131, 128]
    assert tile_rows(128_000, torch.device("cuda")) == 524


def test_autocast_runs_the_products_in_bfloat16_and_sums_in_float32() -> None:
    hidden, weight = numbers(23, 8, seed=0, dtype=torch.float32), numbers(57, 8, seed=1, dtype=torch.float32)
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    target = torch.arange(23)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = slot_sums(hidden, Head(weight=weight), target, SLOT, COUNTS, wanted=BOTH)
    rounded = Head(weight=weight.detach().bfloat16().float())
    logits = (hidden.detach().bfloat16() @ rounded.weight.bfloat16().T).float()
    want = logits.log_softmax(1).gather(1, target[:, None])[:, 0]
    want = torch.stack([part.sum() for part in want.split(COUNTS)])
    assert got["logps"].dtype == torch.float32 and torch.allclose(got["logps"], want, rtol=0, atol=1e-5)
    got["logps"].sum().backward()
    exact = of_all_logits(hidden.detach().double().requires_grad_(), Head(weight=weight.detach().double()), target)
    assert torch.allclose(got["logps"].double(), exact["logps"], rtol=0.02)
    assert weight.grad is not None and weight.grad.dtype == torch.float32 and bool(weight.grad.isfinite().all())


def test_half_precision_weights_get_gradients_near_the_exact_ones() -> None:
    hidden, head, target = some_head()
    half = Head(weight=head.weight.detach().bfloat16().requires_grad_(), bias=head.bias.detach().bfloat16().requires_grad_())  # type: ignore[union-attr]
    states = hidden.detach().bfloat16().requires_grad_()
    got = slot_sums(states, half, target, SLOT, COUNTS, accumulators=4)["logps"]
    assert got.dtype == torch.float32
    own = grads((got * STAKES).sum(), states, half)
    want = grads((of_all_logits(hidden, head, target)["logps"] * STAKES).sum(), hidden, head)
    for gradient, exact in zip(own, want, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert float((gradient.double() - exact).norm() / exact.norm()) < 0.03


def test_words_that_are_ruled_out_do_not_spoil_the_entropy() -> None:
    hidden, head, target = some_head()
    bias = torch.zeros(57, dtype=torch.float64)
    bias[50:] = -torch.inf
    out = slot_sums(hidden, Head(weight=head.weight, bias=bias), target, SLOT, COUNTS, wanted=BOTH)
    assert all(bool(value.isfinite().all()) for value in out.values())


def lora(model: Any, *, targets: list[str], **more: Any) -> Any:
    """The same with a LoRA whose B is not zero."""
    from peft import LoraConfig

    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False, **more))
    return model.double().eval()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_lora_on_the_output_layer_is_respected_and_trained(dropout: float) -> None:
    own = lora(tiny_causal("llama"), targets=["lm_head", "q_proj"], lora_dropout=dropout)
    base = [logps.sum().detach() for logps in naive_logps(tiny_causal("llama"), a_batch())]
    network = TokenNetwork(copy.deepcopy(own))
    for layout in (a_batch().padded(), a_batch().packed()):
        want = torch.stack([logps.sum() for logps in naive_logps(own, a_batch())])
        got = network(layout)["logps"]
        assert torch.allclose(got, want, rtol=0, atol=1e-10)
        found, wanted = gradients(network.model, got.square().sum()), gradients(own, want.square().sum())
        assert sorted(found) == sorted(wanted) and all("lora_" in name for name in found) and len(found) == 6
        assert max(relative_errors(found, wanted).values()) < 1e-6
        network.model.disable_adapters()
        assert torch.allclose(network(layout)["logps"], torch.stack(base), rtol=0, atol=1e-10)
        network.model.enable_adapters()
    network.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert torch.equal(network(layout)["logps"], network(layout)["logps"]) == (dropout == 0)


def test_an_output_layer_that_is_trained_beside_a_lora_is_respected() -> None:
    own = lora(tiny_causal("llama"), targets=["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        own.lm_head.modules_to_save["default"].weight += 0.1
    network = TokenNetwork(copy.deepcopy(own))
    want = torch.stack([logps.sum() for logps in naive_logps(own, a_batch())])
    got = network(a_batch().packed())["logps"]
    assert torch.allclose(got, want, rtol=0, atol=1e-10)
    found, wanted = gradients(network.model, got.sum()), gradients(own, want.sum())
    assert any("modules_to_save" in name for name in found)
    assert max(relative_errors(found, wanted).values()) < 1e-6
    network.model.disable_adapters()
    base = torch.stack([logps.sum() for logps in naive_logps(tiny_causal("llama"), a_batch())])
    assert torch.allclose(network(a_batch().packed())["logps"], base, rtol=0, atol=1e-10)


def test_variants_of_lora_on_the_output_layer_are_refused() -> None:
    with pytest.raises(UserError, match="variant of LoRA"):
        TokenNetwork(lora(tiny_causal("llama"), targets=["lm_head"], use_dora=True))


def test_per_token_log_probabilities_are_sums_of_slots_of_one_token() -> None:
    own = tiny_causal("gpt2")
    tokens = a_batch()
    want = torch.cat(naive_logps(own, tokens))
    network = TokenNetwork(own)
    layout = tokens.packed()
    states = network.hidden(layout).flatten(0, 1)[layout.at]
    slot = torch.arange(len(want))
    got = slot_sums(states, network.head(states), layout.target, slot, (1,) * len(want))["logps"]
    assert torch.allclose(got, want, rtol=0, atol=1e-10)
