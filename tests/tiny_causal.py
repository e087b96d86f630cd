"""Tiny random causal language models of the real classes, in float64, with weights large enough to tell right from wrong."""

import copy

import torch
from torch import Tensor, nn

from mmalign.likelihoods import Tokens

VOCAB = 53
PLAIN = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = PLAIN | {"num_key_value_heads": 2}
SHORT = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2}
MIXED = ["sliding_attention", "full_attention"]
# name -> class, config class, settings
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "llama_tied": ("LlamaForCausalLM", "LlamaConfig", GROUPED | {"tie_word_embeddings": True}),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        GROUPED | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 6}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        GROUPED
        | {"head_dim": 4, "sliding_window": 4, "query_pre_attn_scalar": 4, "attn_logit_softcapping": 0.5}
        | {"final_logit_softcapping": 0.7},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        GROUPED | {"head_dim": 4, "sliding_window": 4, "final_logit_softcapping": 0.7, "layer_types": MIXED},
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED | {"sliding_window": 3}),
    "phi": ("PhiForCausalLM", "PhiConfig", GROUPED),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", PLAIN),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", GROUPED),
    "granite": ("GraniteForCausalLM", "GraniteConfig", GROUPED | {"logits_scaling": 3.0}),
    "cohere": ("CohereForCausalLM", "CohereConfig", GROUPED | {"logit_scale": 0.3}),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", GROUPED),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        SHORT | {"num_attention_heads": 4, "ffn_dim": 24, "max_position_embeddings": 64, "word_embed_proj_dim": 16},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", GROUPED | {"num_local_experts": 4}),
    "falcon": ("FalconForCausalLM", "FalconConfig", SHORT | {"num_attention_heads": 4, "alibi": False}),
    "falcon_alibi": ("FalconForCausalLM", "FalconConfig", SHORT | {"num_attention_heads": 4, "alibi": True}),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    ),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", GROUPED | {"num_local_experts": 4, "head_dim": 4, "rope_scaling": None}),
}
PACKING = tuple(list(MODELS)[: list(MODELS).index("falcon")])
# Those without a norm or state in float32 agree with themselves to the last digits of float64.
EXACT = ("phi", "gpt2", "gpt_neox", "opt")


def tiny_causal(name: str, *, dtype: torch.dtype = torch.float64, **changes: object) -> nn.Module:
    """The model of that name in MODELS, with some settings changed."""
    import transformers

    model_class, config_class, settings = MODELS[name]
    config = getattr(transformers, config_class)(**copy.deepcopy(settings) | changes)
    config._experts_implementation = "eager"  # the other one has no float64
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(config)
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def sequences(lengths: tuple[int, ...], seed: int = 0) -> tuple[Tensor, ...]:
    """Random token ids."""
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(VOCAB, (length,), generator=draw) for length in lengths)


def a_batch(**more: object) -> Tokens:
    """Two rows: three candidates, two of one length and one of a single token, and two; longer than any window above."""
    return Tokens(contexts=sequences((7, 4)), continuations=sequences((5, 5, 1, 6, 3), 1), context_of=(0, 0, 0, 1, 1), **more)


def naive_logps(model: nn.Module, tokens: Tokens) -> list[Tensor]:
    """Log-probabilities of each continuation's tokens, one sequence after the other, from the model's own logits."""
    found = []
    for owner, continuation in zip(tokens.context_of, tokens.continuations, strict=True):
        ids = torch.cat([tokens.contexts[owner], continuation])[None]
        logp = model(ids, use_cache=False).logits[0].log_softmax(-1)
        found.append(logp[-len(continuation) - 1 : -1].gather(1, continuation[:, None])[:, 0])
    return found


def relative_errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """||got - want|| / ||want|| by name; of what is nothing beside the largest (the bias of keys), as part of that."""
    assert got.keys() == want.keys()
    floor = 1e-4 * max(gradient.norm() for gradient in want.values())
    return {name: float((got[name] - want[name]).norm() / want[name].norm().clamp_min(floor)) for name in want}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of a loss, by the name of the parameter."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}
