"""Tests run offline, on one thread, with every shape and type annotation of mmalign checked at run time."""

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    GRADIO_ANALYTICS_ENABLED="False",
    WANDB_MODE="offline",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", ""),
)

import jaxtyping
import torch

# Before the first import of mmalign. The tower: an int may stand for a float, as for every type checker.
jaxtyping.install_import_hook("mmalign", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
torch.set_num_threads(1)
