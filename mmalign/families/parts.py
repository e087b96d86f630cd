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
