"""Packed rows give what padded rows give, and both what the model's own logits give, for the real model classes."""

import copy
import logging

import pytest
import torch
from tiny_causal import EXACT, MODELS, PACKING, a_batch, gradients, naive_logps, relative_errors, sequences, tiny_causal

from mmalign.errors import UserError
from mmalign.language import packed
from mmalign.language.network import TokenNetwork
from mmalign.likelihoods import Tokens

# What each architecture lacks for packing.
NOT_PACKING = {
    "falcon": "FalconForCausalLM has an attention of its own",
    "falcon_alibi": "its attention depends on places in the row (ALiBi)",
    "mamba": "MambaForCausalLM carries a recurrent state from token to token",
    "gpt_oss": "s_aux",
}
FLOAT32 = ("gemma2", "mamba")  # whose own attention or logits are float32
STAKES = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0], dtype=torch.float64)  # gradient of the loss by sequence


@pytest.mark.parametrize("name", MODELS)
def test_packed_and_padded_rows_give_what_the_models_own_logits_give(name: str) -> None:
    own = tiny_causal(name)
    network = TokenNetwork(copy.deepcopy(own))
    assert network.packs == (name in PACKING), network.why_not
    tokens = a_batch()
    want = torch.stack([logps.sum() for logps in naive_logps(own, tokens)])
    wanted = gradients(own, (want * STAKES).sum())
    assert float(want.detach().std()) > 0.1
    for layout in (tokens.padded(), tokens.padded(multiple=8, pad=1), tokens.packed())[: 3 if network.packs else 2]:
        got = network(layout)["logps"]
        assert torch.allclose(got, want.double(), rtol=0, atol=1e-5 if name in FLOAT32 else 1e-10)
        # transformers' RMSNorm and rotary tables compute in float32: packed rows round differently there.
        limit = 1e-9 if name in EXACT else 1e-5
        errors = relative_errors(gradients(network.model, (got * STAKES).sum()), wanted)
        assert max(errors.values()) < limit, max(errors.items(), key=lambda item: item[1])


@pytest.mark.parametrize("name", NOT_PACKING)
def test_an_architecture_that_cannot_pack_says_why_and_refuses_packed_layouts(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_causal(name)
    before = model.config._attn_implementation
    with caplog.at_level(logging.INFO, logger="mmalign.language.network"):
        network = TokenNetwork(model)
    assert not network.packs and NOT_PACKING[name] in network.why_not
    assert [record.getMessage() for record in caplog.records] == [f"rows are padded, not packed: {network.why_not}."]
    assert model.config._attn_implementation == before
    with pytest.raises(ValueError, match="want padded rows"):
        network(a_batch().packed())


def test_packing_can_be_switched_off() -> None:
    network = TokenNetwork(tiny_causal("llama"), pack=False)
    assert not network.packs and network.why_not == "pack is off"
    assert network.model.config._attn_implementation == "sdpa"


def test_the_probe_finds_layers_that_leak_from_one_segment_into_the_next() -> None:
    model = tiny_causal("llama")
    model.model.layers[0].register_forward_hook(lambda layer, inputs, states: states + states.roll(1, dims=1))
    network = TokenNetwork(model)
    assert not network.packs and "nats off" in network.why_not


def test_the_probe_finds_a_window_that_layers_keep_to_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mistral import modeling_mistral

    model = tiny_causal("mistral", layer_types=["sliding_attention", "sliding_attention"], sliding_window=64)
    assert TokenNetwork(copy.deepcopy(model)).packs
    for layer in model.model.layers:
        layer.self_attn.config = modeling_mistral.MistralConfig(**model.config.to_dict() | {"sliding_window": None})
        layer.self_attn.config._attn_implementation = packed.register()
    assert TokenNetwork(model).why_not == "its layers do not tell their sliding windows"


def test_logits_that_mmalign_does_not_get_as_the_model_does_are_refused() -> None:
    model = tiny_causal("llama")
    model.lm_head.register_forward_hook(lambda layer, inputs, logits: 2 * logits)
    with pytest.raises(UserError, match="LlamaForCausalLM, whose log-probabilities are"):
        TokenNetwork(model)


def test_an_encoder_decoder_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=53, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(UserError, match="want a causal language model"):
        TokenNetwork(model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    network = TokenNetwork(
        tiny_causal(name, **({"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if name == "gpt2" else {}))
    )
    network.train()
    layout = a_batch().packed()
    plain = gradients(network.model, (network(layout)["logps"] * STAKES).sum())
    network.checkpoint_gradients(True)
    calls = []
    counted = network.model.base_model.get_submodule("h.0" if name == "gpt2" else "layers.0")
    inner = next(module for module in counted.modules() if "Attention" in type(module).__name__)
    inner.register_forward_hook(lambda *_: calls.append(1))
    again = gradients(network.model, (network(layout)["logps"] * STAKES).sum())
    assert len(calls) == 2
    assert max(relative_errors(again, plain).values()) < 1e-12
    network.checkpoint_gradients(False)
    network(layout)
    assert len(calls) == 3


def test_a_copy_of_the_network_packs_too() -> None:
    network = TokenNetwork(tiny_causal("llama"))
    twin = copy.deepcopy(network)
    layout = a_batch().packed()
    assert torch.equal(twin(layout)["logps"], network(layout)["logps"])


def test_an_attention_that_was_changed_since_is_refused() -> None:
    network = TokenNetwork(tiny_causal("llama"))
    network.model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attention was changed"):
        network(a_batch().packed())


def test_a_context_does_not_see_what_follows_and_continuations_do_not_see_each_other() -> None:
    network = TokenNetwork(tiny_causal("llama"))
    tokens = a_batch()
    changed = Tokens(
        contexts=tokens.contexts,
        continuations=(sequences((5,), 9)[0], *tokens.continuations[1:]),
        context_of=tokens.context_of,
    )
    before, after = (network(which.packed())["logps"] for which in (tokens, changed))
    assert float((after[0] - before[0]).detach().abs()) > 0.1
    assert torch.allclose(after[1:], before[1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
@torch.no_grad()
def test_flex_attention_masks_as_the_calls_of_sdpa_do(name: str) -> None:
    import warnings

    model = tiny_causal(name, dtype=torch.float32)
    layout = a_batch().packed()
    want = TokenNetwork(model)(layout)["logps"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        got = TokenNetwork(model, kernel="flex")(layout)["logps"]
    assert torch.allclose(got, want, rtol=0, atol=1e-4)


def test_the_masks_of_a_row_by_hand() -> None:
    # A context of 3 tokens at places 0 to 2, continuations at 3 to 4 and at 5.
    layout = Tokens(contexts=sequences((3,)), continuations=sequences((3, 2), 1), context_of=(0, 0)).packed()
    row = packed.Row(segments=layout.segments)
    assert row.lengths == [3, 2, 1] and row.groups == [(None, [0]), (0, [1]), (0, [2])]
    cpu = torch.device("cpu")
    assert row.mask(2, 5, None, cpu).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert row.mask(2, 5, 2, cpu).int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    seen = packed._mask_function(layout.segments, 6, 3, cpu)
    place = torch.arange(6)
    whole = seen(torch.tensor(0), torch.tensor(0), place[:, None], place[None, :])
    assert whole.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 1, 1, 0, 0, 1],
    ]


def test_continuations_of_one_length_after_one_context_are_one_call() -> None:
    row = packed.Row(segments=a_batch().packed().segments)
    assert row.groups == [(None, [0]), (None, [1]), (0, [2, 3]), (1, [4]), (1, [5])]


def test_attention_dropout_reaches_packed_rows() -> None:
    network = TokenNetwork(tiny_causal("llama", attention_dropout=0.5))
    layout = a_batch().packed()
    still = network(layout)["logps"]
    network.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        once, twice = network(layout)["logps"], network(layout)["logps"]
    assert not torch.allclose(once, still) and not torch.allclose(once, twice)


def test_bfloat16_packs_and_stays_near_float64() -> None:
    layout = a_batch().packed()
    want = TokenNetwork(tiny_causal("llama"))(layout)["logps"]
    model = tiny_causal("llama", dtype=torch.bfloat16)
    network = TokenNetwork(model)
    assert network.packs
    got = network(layout)["logps"]
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), want, rtol=0.05, atol=1.0)
    got.sum().backward()
    assert all(
        p.grad is not None and bool(p.grad.isfinite().all()) and p.grad.dtype == torch.bfloat16 for p in model.parameters()
    )
