"""QLoRA as far as it can be told without a GPU: what is asked of transformers and peft, and what is refused."""

import inspect
from pathlib import Path

import pytest
import torch
from peft import prepare_model_for_kbit_training
from text_runs import model_folder, train_text
from transformers.utils.quantization_config import QuantizationMethod

from mmalign.adapters.options import Lora
from mmalign.adapters.text import TextAdapter
from mmalign.errors import UserError
from mmalign.language.opening import quantization_config

NEEDS_A_GPU = r"adapter\.quantization: got 4bit, which needs a GPU and the package bitsandbytes\. Install it, or set"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_bits_are_qloras_and_compute_in_the_precision_of_the_run(dtype: torch.dtype) -> None:
    config = quantization_config("4bit", dtype)
    assert config.quant_method == QuantizationMethod.BITS_AND_BYTES and config.load_in_4bit and not config.load_in_8bit
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
    assert config.bnb_4bit_compute_dtype == dtype


def test_eight_bits_are_those_of_int8() -> None:
    config = quantization_config("8bit", torch.bfloat16)
    assert config.load_in_8bit and not config.load_in_4bit


def test_peft_prepares_a_packed_model_without_checkpointing_its_activations() -> None:
    assert "use_gradient_checkpointing" in inspect.signature(prepare_model_for_kbit_training).parameters


@pytest.mark.skipif(torch.cuda.is_available(), reason="would be opened")
def test_packed_weights_are_refused_without_a_gpu_before_the_run_writes_anything(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=NEEDS_A_GPU):
        TextAdapter(model=str(model_folder()), lora=Lora(rank=2), quantization="4bit").open()
    with pytest.raises(UserError, match=NEEDS_A_GPU):
        train_text(tmp_path / "run", adapter={"quantization": "4bit"})
    assert not (tmp_path / "run").exists()
