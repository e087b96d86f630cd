"""Parts of the tiny random pipelines that several families share."""

from typing import Any

# 3 x 32 x 32 pixels become 4 x 8 x 8 latents; a prompt is 16 tokens.
IMAGE_SIZE = 32
LATENT_SHAPE = (4, 8, 8)


def tiny_tokenizer() -> Any:
    """A CLIPTokenizer of 256 byte characters (alone and ending a word) and two specials: no merges, 16 tokens long."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    characters = sorted(ByteLevel.alphabet())
    entries = [*characters, *(character + "</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {entry: index for index, entry in enumerate(entries)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)


def tiny_t5_tokenizer(max_length: int = 512) -> Any:
    """A T5Tokenizer of the printable ASCII characters, alone: pad 0, end 1, unknown 2, a word's beginning 3."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0)]
    characters = [(chr(code), -3.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=[*special, *characters], extra_ids=0, model_max_length=max_length)


def tiny_t5(hidden_size: int, **changes: Any) -> Any:
    """A T5EncoderModel with 2 layers of the v1.1 kind (gated GELU) for `tiny_t5_tokenizer`."""
    from transformers import T5Config, T5EncoderModel

    shape = {"d_model": hidden_size, "d_kv": hidden_size // 2, "d_ff": 2 * hidden_size, "num_heads": 2, "num_layers": 2}
    kind = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "is_encoder_decoder": False, "use_cache": False}
    return T5EncoderModel(T5Config(vocab_size=98, **{**shape, **kind, **changes})).eval()


def tiny_qwen_tokenizer(chat_template: str | None = None) -> Any:
    """A Qwen2Tokenizer of 256 byte characters and the tokens that mark turns and images: no merges."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
    entries = [*sorted(ByteLevel.alphabet()), *marks, "<|image_pad|>", "<|video_pad|>"]
    vocab = {entry: index for index, entry in enumerate(entries)}
    special = [*marks, "<|image_pad|>", "<|video_pad|>"]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=special, model_max_length=4096)
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_text_config(hidden_size: int, **changes: Any) -> Any:
    """Of a CLIP text encoder with 2 layers for `tiny_tokenizer`."""
    from transformers import CLIPTextConfig

    ids = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    shape = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "projection_dim": hidden_size}
    depth = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 16}
    return CLIPTextConfig(vocab_size=514, **{**ids, **shape, **depth, **changes})


def tiny_vae(**changes: Any) -> Any:
    """An AutoencoderKL with factor 4: 3 x 32 x 32 pixels become 4 x 8 x 8 latents."""
    from diffusers import AutoencoderKL

    channels = (8, 8, 16)
    return AutoencoderKL(
        **{
            "block_out_channels": channels,
            "down_block_types": ("DownEncoderBlock2D",) * len(channels),
            "up_block_types": ("UpDecoderBlock2D",) * len(channels),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "latent_channels": LATENT_SHAPE[0],
            "sample_size": IMAGE_SIZE,
            "scaling_factor": 0.18215,
            **changes,
        }
    ).eval()
