"""Tiny random CLIPs and heads in the forms of the published checkpoints, one folder of each per test process."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

SIDE = 16  # pixels that the CLIPs take
DIM = 8
OPEN_CLIP_NAME = "mmalign-tiny"
OPEN_CLIP_MODEL = {
    "embed_dim": DIM,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
MEAN, STD = open_clip.constants.OPENAI_DATASET_MEAN, open_clip.constants.OPENAI_DATASET_STD
V2_KEYS = [f"layers.{place}.{part}" for place in (0, 2, 4, 6, 7) for part in ("weight", "bias")]  # of the published file
V2_WIDTHS = (DIM, 1024, 128, 64, 16, 1)


def new_folder():
    folder = Path(tempfile.mkdtemp(prefix="mmalign-tiny-clip-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def seeded(build, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


@functools.cache
def transformers_clip():
    """A `CLIPModel` with its processor, as save_pretrained writes them."""
    characters = [chr(code) for code in range(33, 127)]
    entries = [*characters, *(character + "</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={entry: index for index, entry in enumerate(entries)}, merges=[], model_max_length=77)
    start, end = len(entries) - 2, len(entries) - 1
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": len(entries), "bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    vision = {"image_size": SIDE, "patch_size": 8}
    config = CLIPConfig(text_config={**shape, **ids}, vision_config={**shape, **vision}, projection_dim=DIM)
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    folder = new_folder()
    seeded(lambda: CLIPModel(config).save_pretrained(folder))
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def open_clip_state(seed=0):
    return seeded(lambda: open_clip.CLIP(**OPEN_CLIP_MODEL), seed).state_dict()


def write_open_clip(folder, **preprocess):
    config = {"model_cfg": OPEN_CLIP_MODEL, "preprocess_cfg": {"mean": list(MEAN), "std": list(STD), **preprocess}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    state = {name: value.contiguous() for name, value in open_clip_state().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


@functools.cache
def open_clip_folder():
    """Weights and config as open_clip's `local-dir:` reads them."""
    return write_open_clip(new_folder())


@functools.cache
def hps_folder():
    """Both published files, as HPSv2's training wrote them: weights under `state_dict`, beside other things.

    open_clip then knows the model as OPEN_CLIP_NAME.
    """
    folder = new_folder()
    (folder / f"{OPEN_CLIP_NAME}.json").write_text(json.dumps(OPEN_CLIP_MODEL))
    open_clip.add_model_config(folder / f"{OPEN_CLIP_NAME}.json")
    for seed, file in enumerate(("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt"), 3):
        torch.save({"epoch": 1, "state_dict": open_clip_state(seed)}, folder / file)
    return folder


@functools.cache
def aesthetic_heads():
    """`v1.pth` and `v2.pth` with the keys of the published files, and weights that make ratings vary."""
    folder = new_folder()
    generator = torch.Generator().manual_seed(0)
    shapes = [shape for want, have in zip(V2_WIDTHS[1:], V2_WIDTHS[:-1], strict=True) for shape in ((want, have), (want,))]
    v2 = {key: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for key, shape in zip(V2_KEYS, shapes, strict=True)}
    torch.save(v2, folder / "v2.pth")
    torch.save({"weight": torch.randn(1, DIM, generator=generator), "bias": torch.tensor([5.0])}, folder / "v1.pth")
    return folder
