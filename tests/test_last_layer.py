"""The last layer runs no further than its keys and values for tokens whose states nobody asks for, and changes nothing."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from tiny_causal import PACKING, a_batch, gradients, relative_errors, tiny_causal
from torch import Tensor, nn

from mmalign.language.last_layer import LastLayer
from mmalign.language.network import TokenNetwork
from mmalign.likelihoods import Tokens

SPARED = {"mlp", "self_attn.q_proj", "self_attn.o_proj"}  # of Llama's layers
STAKES = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0], dtype=torch.float64)


def tokens_seen(network: TokenNetwork, layout: Any) -> dict[str, Counter[int]]:
    """Of each part of each layer, how many tokens its own computation saw."""
    seen: dict[str, Counter[int]] = {}
    handles = []
    for number, layer in enumerate(network.model.model.layers):
        for name in (*SPARED, "self_attn.k_proj", "self_attn.v_proj"):
            part = layer.get_submodule(name)
            inner = part.gate_proj if name == "mlp" else part

            def see(_: nn.Module, args: tuple[Tensor, ...], key: str = f"{number}.{name}") -> None:
                seen.setdefault(key, Counter())[args[0].shape[-2]] += 1

            handles.append(inner.register_forward_pre_hook(see))  # after the network's own hooks
    network(layout)
    for handle in handles:
        handle.remove()
    return seen


def test_only_asked_for_tokens_go_through_the_last_layer() -> None:
    network = TokenNetwork(tiny_causal("llama"))
    layout = a_batch().packed()
    total = layout.ids.numel()
    assert layout.needed is not None and 0 < len(layout.needed) < 0.9 * total
    seen = tokens_seen(network, layout)
    last = len(network.model.model.layers) - 1
    for key, counts in seen.items():
        number, name = key.split(".", 1)
        few = int(number) == last and name in SPARED
        assert counts == {len(layout.needed) if few else total: 1}, key


def test_padded_rows_and_rows_of_which_nearly_all_is_asked_for_are_run_as_ever() -> None:
    network = TokenNetwork(tiny_causal("llama"))
    padded = a_batch().padded()
    assert padded.needed is None
    assert {length for counts in tokens_seen(network, padded).values() for length in counts} == {padded.ids.shape[1]}
    joint = Tokens(
        contexts=(torch.arange(9),), continuations=(torch.arange(5),), context_of=(0,), context_weights=(torch.ones(8),)
    )
    assert joint.packed().needed is None  # the prompt is scored too


def test_needed_are_the_places_asked_for_each_once() -> None:
    layout = a_batch().packed()
    assert layout.needed is not None
    assert sorted(set(layout.at.tolist())) == layout.needed.tolist()
    assert len(layout.at) > len(layout.needed)  # continuations of one context share its last token


def test_hidden_states_of_all_tokens_are_there_when_they_are_asked_for() -> None:
    network = TokenNetwork(tiny_causal("llama"))
    layout = a_batch().packed()
    assert layout.needed is not None
    with torch.no_grad():
        whole, at = network.hidden(layout)[0], network.states(layout)
    assert torch.allclose(whole[layout.at], at, rtol=0, atol=1e-12)
    spared = network._hidden(layout)[0]
    others = torch.ones(len(whole), dtype=torch.bool).index_fill(0, layout.needed, False)
    assert (spared[others] - whole[others]).abs().max() > 1e-3  # or nothing was spared


@pytest.mark.parametrize("name", PACKING)
def test_what_is_spared_changes_no_sum_and_no_gradient(name: str) -> None:
    own = tiny_causal(name)
    spared, whole = (TokenNetwork(copy.deepcopy(own)) for _ in range(2))
    layout = a_batch().packed()
    got = spared(layout)["logps"]
    states = whole.hidden(layout).flatten(0, 1).index_select(0, layout.at)
    want = whole._sums(layout, states, whole.head(states), frozenset(), None)["logps"]
    exact = got.dtype == torch.float64
    assert torch.allclose(got, want, rtol=0, atol=1e-10 if exact else 1e-5)
    errors = relative_errors(*(gradients(n.model, (sums * STAKES).sum()) for n, sums in ((spared, got), (whole, want))))
    assert all(torch.tensor(list(errors.values())).isfinite())
    assert max(errors.values()) < 1e-5, max(errors.items(), key=lambda item: item[1])


def test_a_copy_is_not_hooked_twice_and_follows_its_own_rows() -> None:
    network = TokenNetwork(tiny_causal("llama"))
    again = TokenNetwork(copy.deepcopy(network.model))
    layout = a_batch().packed()
    assert tokens_seen(again, layout) == tokens_seen(network, layout)
    assert len(again.model.model.layers[-1].mlp._forward_hooks) == len(network.model.model.layers[-1].mlp._forward_hooks) == 1
    with torch.no_grad():
        assert torch.equal(again(layout)["logps"], network(layout)["logps"])


def test_a_layer_that_would_go_wrong_is_left_alone() -> None:
    class Counting(nn.Module):
        """What it makes of a token depends on how many there are."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, states: Tensor) -> Tensor:
            out: Tensor = self.inner(states)
            return out * (1 + 0.5 * (states.shape[-2] == needed))

    model = tiny_causal("llama")
    probed = TokenNetwork(copy.deepcopy(model))._probe().packed().needed
    assert probed is not None
    needed = len(probed)
    last = model.model.layers[-1]
    last.mlp = Counting(last.mlp)
    network = TokenNetwork(model)
    assert network.packs
    assert not last.mlp._forward_hooks and not last.self_attn._forward_pre_hooks


def test_no_row_is_kept_when_checkpointing_computed_the_layer_again() -> None:
    network = TokenNetwork(tiny_causal("llama")).train()
    network.checkpoint_gradients(True)
    network(a_batch().packed())["logps"].sum().backward()
    hooks = network.model.model.layers[-1].self_attn._forward_pre_hooks.values()
    (own,) = [hook.__self__ for hook in hooks if isinstance(getattr(hook, "__self__", None), LastLayer)]
    assert own.row is None
