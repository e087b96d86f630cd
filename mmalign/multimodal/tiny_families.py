"""Tiny configs, processors and tokenizers of every family that sees, made of nothing that is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
Made = tuple[Any, Any]  # config and processor


def template(image: str, video: str = "", *, begin: str = "") -> str:
    """ChatML with parts: what stands for an image or a video is written where it stands in a message."""
    return (
        begin + "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{image}{{% elif part['type'] == 'video' %}}{video}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def byte_tokenizer(named: Mapping[str, str], others: tuple[str, ...] = (), *, begins: bool = False) -> Any:
    """A tokenizer of 256 byte characters and special tokens, without merges.

    Args:
        named: special tokens that a processor asks for by name (`image_token`).
        others: further special tokens.
        begins: whether a text begins with a token, `<|endoftext|>`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = [*MARKS, *dict.fromkeys([*named.values(), *others])]
    entries = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special]
    backend = Tokenizer(models.BPE(vocab={entry: index for index, entry in enumerate(entries)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    if begins:
        first = entries.index(MARKS[0])
        backend.post_processor = processors.TemplateProcessing(single=f"{MARKS[0]} $A", special_tokens=[(MARKS[0], first)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=MARKS[0],
        eos_token=MARKS[2],
        pad_token=MARKS[0],
        extra_special_tokens=dict(named),
        model_max_length=4096,
    )


def _ids(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _square(vision: Mapping[str, Any]) -> dict[str, int]:
    return {"height": vision["image_size"], "width": vision["image_size"]}


def _llava(text: dict[str, Any], vision: dict[str, Any]) -> Made:
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaProcessor

    tokenizer = byte_tokenizer({"image_token": "<image>"}, begins=True)
    side = vision["image_size"]
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=tokenizer,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\n"),
    )
    config = LlavaConfig(
        text_config={"model_type": "llama", **_ids(tokenizer), **text},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **vision},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return config, processor


def _llava_next(text: dict[str, Any], vision: dict[str, Any]) -> Made:
    from transformers import LlavaNextConfig, LlavaNextImageProcessor, LlavaNextProcessor

    tokenizer = byte_tokenizer({"image_token": "<image>"}, begins=True)
    side = vision["image_size"]
    grids = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": side}, crop_size=_square(vision), image_grid_pinpoints=grids
        ),
        tokenizer=tokenizer,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>\n"),
    )
    config = LlavaNextConfig(
        text_config={"model_type": "llama", **_ids(tokenizer), **text},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **vision},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grids,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return config, processor


def _onevision(text: dict[str, Any], vision: dict[str, Any]) -> Made:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    tokenizer = byte_tokenizer({"image_token": "<image>", "video_token": "<video>"})
    side = vision["image_size"]
    grids = [[side, side], [side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=_square(vision), image_grid_pinpoints=grids),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=_square(vision)),
        num_image_tokens=(side // vision["patch_size"]) ** 2,
        vision_feature_select_strategy="full",
        chat_template=template("<image>\n", "<video>\n"),
    )
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **_ids(tokenizer), **text},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **vision},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grids,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return config, processor


def _qwen_parts(text: dict[str, Any], patch: int) -> tuple[Any, Any, dict[str, Any]]:
    """Tokenizer, what makes the processor, and settings of the config that all of Qwen's have."""
    from transformers import Qwen2VLImageProcessor

    names = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }
    tokenizer = byte_tokenizer(names)
    unit = (2 * patch) ** 2
    pixels = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
    images = Qwen2VLImageProcessor(size={"shortest_edge": unit, "longest_edge": 8 * unit}, **pixels)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    settings = {
        "text_config": {**_ids(tokenizer), "rope_parameters": rope, **text},
        **{f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()},
    }
    around = names["vision_start_token"] + "{}" + names["vision_end_token"]
    words = template(around.format(names["image_token"]), around.format(names["video_token"]))
    made = {"image_processor": images, "tokenizer": tokenizer, "chat_template": words}
    return tokenizer, (made, pixels, {"shortest_edge": unit, "longest_edge": 32 * unit}), settings


def _qwen2(text: dict[str, Any], vision: dict[str, Any]) -> Made:
    from transformers import Qwen2VLConfig, Qwen2VLProcessor, Qwen2VLVideoProcessor

    patch = 14
    _, (made, pixels, size), settings = _qwen_parts(text, patch)
    seen = {
        "depth": vision["num_hidden_layers"],
        "embed_dim": vision["hidden_size"],
        "hidden_size": text["hidden_size"],
        "num_heads": vision["num_attention_heads"],
        "mlp_ratio": 2,
        "patch_size": patch,
    }
    processor = Qwen2VLProcessor(video_processor=Qwen2VLVideoProcessor(size=size, **pixels), **made)
    return Qwen2VLConfig(vision_config=seen, **settings), processor


def _qwen2_5(text: dict[str, Any], vision: dict[str, Any]) -> Made:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

    patch = 14
    _, (made, pixels, size), settings = _qwen_parts(text, patch)
    seen = {
        "depth": vision["num_hidden_layers"],
        "hidden_size": vision["hidden_size"],
        "intermediate_size": vision["intermediate_size"],
        "out_hidden_size": text["hidden_size"],
        "num_heads": vision["num_attention_heads"],
        "patch_size": patch,
        "window_size": 2 * 2 * patch,
        "fullatt_block_indexes": [vision["num_hidden_layers"] - 1],
        "tokens_per_second": 2,
    }
    processor = Qwen2_5_VLProcessor(video_processor=Qwen2VLVideoProcessor(size=size, **pixels), **made)
    return Qwen2_5_VLConfig(vision_config=seen, **settings), processor


def _qwen3(text: dict[str, Any], vision: dict[str, Any]) -> Made:
    from transformers import Qwen3VLConfig, Qwen3VLProcessor, Qwen3VLVideoProcessor

    patch = 16
    _, (made, pixels, size), settings = _qwen_parts(text, patch)
    settings["text_config"]["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    seen = {
        "depth": vision["num_hidden_layers"],
        "hidden_size": vision["hidden_size"],
        "intermediate_size": vision["intermediate_size"],
        "out_hidden_size": text["hidden_size"],
        "num_heads": vision["num_attention_heads"],
        "patch_size": patch,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    processor = Qwen3VLProcessor(video_processor=Qwen3VLVideoProcessor(size=size, **pixels), **made)
    return Qwen3VLConfig(vision_config=seen, **settings), processor


def _idefics(text: dict[str, Any], vision: dict[str, Any], *, smol: bool = False) -> Made:
    from transformers import Idefics3Config, Idefics3ImageProcessor, Idefics3Processor, SmolVLMConfig

    rows = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
    others = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *rows)
    tokenizer = byte_tokenizer({"image_token": "<image>"}, others)
    side, scale = vision["image_size"], 2
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessor(size={"longest_edge": 2 * side}, max_image_size={"longest_edge": side}),
        tokenizer=tokenizer,
        image_seq_len=(side // vision["patch_size"] // scale) ** 2,
        chat_template=template("<image>"),
    )
    config = (SmolVLMConfig if smol else Idefics3Config)(
        text_config={"model_type": "llama", **_ids(tokenizer), **text},
        vision_config=vision,
        scale_factor=scale,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    return config, processor


def _smolvlm(text: dict[str, Any], vision: dict[str, Any]) -> Made:
    """With Idefics3's processor, which writes images alike: SmolVLM's own wants a package that spells numbers of frames."""
    return _idefics(text, vision, smol=True)


def _internvl(text: dict[str, Any], vision: dict[str, Any]) -> Made:
    from transformers import GotOcr2ImageProcessor, InternVLConfig, InternVLProcessor, InternVLVideoProcessor

    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = byte_tokenizer(names)
    side, patch = vision["image_size"], vision["patch_size"]
    length = (side // patch // 2) ** 2
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=_square(vision), crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=_square(vision)),
        image_seq_length=length,
        chat_template=template("<IMG_CONTEXT>\n", "<video>\n"),
    )
    seen = {**vision, "image_size": [side, side], "patch_size": [patch, patch]}
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **_ids(tokenizer), **text},
        vision_config=seen,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=length,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    return config, processor


def _gemma3(text: dict[str, Any], vision: dict[str, Any]) -> Made:
    from transformers import Gemma3Config, Gemma3ImageProcessor, Gemma3Processor

    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = byte_tokenizer(names, begins=True)
    length = (vision["image_size"] // vision["patch_size"] // 2) ** 2
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size=_square(vision)),
        tokenizer=tokenizer,
        image_seq_length=length,
        chat_template=template("<start_of_image>", begin="{{ bos_token }}"),
    )
    width = text["hidden_size"] // text["num_attention_heads"]
    more = {"head_dim": width, "query_pre_attn_scalar": width, "sliding_window": 16}
    config = Gemma3Config(
        text_config={**_ids(tokenizer), **more, "layer_types": _kinds(text), **text},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **vision},
        mm_tokens_per_image=length,
        **{f"{n.removesuffix('_token')}_token_index": tokenizer.convert_tokens_to_ids(token) for n, token in names.items()},
    )
    return config, processor


def _kinds(text: Mapping[str, Any]) -> list[str]:
    """Layers with a window and without, in turn."""
    return [("sliding_attention", "full_attention")[n % 2] for n in range(text["num_hidden_layers"])]


def _paligemma(text: dict[str, Any], vision: dict[str, Any]) -> Made:
    from transformers import PaliGemmaConfig, PaliGemmaProcessor, SiglipImageProcessor

    tokenizer = byte_tokenizer({"image_token": "<image>"})
    images = SiglipImageProcessor(size=_square(vision))
    images.image_seq_length = (vision["image_size"] // vision["patch_size"]) ** 2
    processor = PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer)
    ids = _ids(tokenizer)
    config = PaliGemmaConfig(
        text_config={"model_type": "gemma", **ids, "head_dim": text["hidden_size"] // text["num_attention_heads"], **text},
        vision_config={
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
            "projection_dim": text["hidden_size"],
            **vision,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=text["hidden_size"],
        hidden_size=text["hidden_size"],
    )
    return config, processor


def _mllama(text: dict[str, Any], vision: dict[str, Any]) -> Made:
    from transformers import MllamaConfig, MllamaImageProcessor, MllamaProcessor

    tokenizer = byte_tokenizer({"image_token": "<|image|>"}, ("<|python_tag|>",), begins=True)
    processor = MllamaProcessor(
        image_processor=MllamaImageProcessor(size=_square(vision), max_image_tiles=2),
        tokenizer=tokenizer,
        chat_template=template("<|image|>", begin="{{ bos_token }}"),
    )
    rope = {"rope_type": "default", "rope_theta": 1e4}
    config = MllamaConfig(
        text_config={**_ids(tokenizer), "cross_attention_layers": [1], "rope_parameters": rope, **text},
        vision_config={
            "hidden_size": vision["hidden_size"],
            "intermediate_size": vision["intermediate_size"],
            "num_hidden_layers": vision["num_hidden_layers"],
            "num_global_layers": 1,
            "attention_heads": vision["num_attention_heads"],
            "vision_output_dim": 2 * vision["hidden_size"],
            "intermediate_layers_indices": [0],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )
    return config, processor


BUILDERS: dict[str, Callable[[dict[str, Any], dict[str, Any]], Made]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _onevision,
    "qwen2_vl": _qwen2,
    "qwen2_5_vl": _qwen2_5,
    "qwen3_vl": _qwen3,
    "idefics3": _idefics,
    "smolvlm": _smolvlm,
    "internvl": _internvl,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "mllama": _mllama,
}
