"""Layers whose output a network never uses are left out of training: what is trained gets a gradient, as DDP demands."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import every_family, inputs, num_frames, opened, stock_with_lora, tiny_models  # noqa: F401

from mmalign.adapters.diffusion import DiffusionAdapter
from mmalign.adapters.options import Lora
from mmalign.errors import UserError
from mmalign.families import FAMILIES
from mmalign.models.diffusion import add_lora, load_lora, lora_off, save_lora

QWEN = ("qwen_image", "qwen_image_edit", "qwen_image_edit_plus")
BOTH_STREAMS = ("to_out.0", "attn.to_add_out", "txt_mlp.net.2")


@pytest.mark.parametrize("kind", ["full", "lora"])
@every_family
def test_every_trained_parameter_gets_a_gradient(name: str, kind: str) -> None:
    settings: dict[str, Any] = {"model": "tiny", "resolution": 32, "frames": num_frames(FAMILIES[name])}
    adapter = DiffusionAdapter(family=name, lora=Lora(rank=2) if kind == "lora" else None, **settings)
    policy = adapter.open(needs_reference=False)
    policy.network(**inputs(policy.family, policy.pipe)).square().mean().backward()
    assert policy.parameters()
    assert [n for n, p in policy.network.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("name", QWEN)
def test_a_full_fine_tune_leaves_out_what_qwen_image_s_last_block_never_uses(name: str) -> None:
    policy = DiffusionAdapter(family=name, model="tiny", resolution=32, lora=None).open(needs_reference=False)
    frozen = {n.removeprefix("core.transformer_blocks.") for n, p in policy.network.named_parameters() if not p.requires_grad}
    layers = ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    assert frozen == {f"1.{layer}.{part}" for layer in layers for part in ("weight", "bias")}


def test_lora_targets_skip_them_and_the_file_loads_in_the_stock_pipeline_and_here(tmp_path: Path) -> None:
    family, pipe, denoiser = opened("qwen_image")
    add_lora(denoiser, rank=2, targets=BOTH_STREAMS)
    adapted = {n.split(".lora_A")[0] for n, _ in denoiser.core.named_parameters() if ".lora_A" in n}
    first = {f"transformer_blocks.0.{layer}" for layer in ("attn.to_out.0", "attn.to_add_out", "txt_mlp.net.2")}
    assert adapted == first | {"transformer_blocks.1.attn.to_out.0"}
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    save_lora(family, denoiser, tmp_path)
    with torch.no_grad():
        tuned = denoiser(**inputs(family, pipe))
        stock = family.forward(stock_with_lora(family, tmp_path, 1.0).transformer, **inputs(family, pipe))
        _, _, again = opened("qwen_image")
        load_lora(again, tmp_path)
        torch.testing.assert_close(stock, tuned, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again(**inputs(family, pipe)), tuned, rtol=1e-5, atol=1e-5)


def test_a_lora_of_others_that_bears_them_is_loaded_but_they_are_not_trained(tmp_path: Path) -> None:
    from peft import LoraConfig

    family, pipe, denoiser = opened("qwen_image")
    denoiser.core.add_adapter(LoraConfig(r=2, target_modules=list(BOTH_STREAMS)), adapter_name="default")
    denoiser.lora_layers = [denoiser.core]
    save_lora(family, denoiser, tmp_path)
    _, pipe, again = opened("qwen_image")
    load_lora(again, tmp_path)
    again(**inputs(family, pipe)).square().mean().backward()
    trained = {n: p for n, p in again.core.named_parameters() if p.requires_grad}
    assert len(again.lora_layers) == 6
    assert len(trained) == 2 * 4
    assert all(parameter.grad is not None for parameter in trained.values())


def test_targets_that_are_never_used_alone_are_refused() -> None:
    _, _, denoiser = opened("qwen_image")
    with pytest.raises(UserError, match=r"lora\.targets: got transformer_blocks\.1\.txt_mlp\.net\.2, .* never used"):
        add_lora(denoiser, rank=2, targets=("transformer_blocks.1.txt_mlp.net.2",))


def test_switching_the_lora_off_and_on_makes_no_weight_trainable_that_was_not() -> None:
    _, _, denoiser = opened("sd15")
    add_lora(denoiser, rank=2)
    some = next(parameter for name, parameter in denoiser.named_parameters() if ".lora_A" in name)
    some.requires_grad_(False)
    before = [parameter.requires_grad for parameter in denoiser.parameters()]
    with lora_off(denoiser):
        assert [parameter.requires_grad for parameter in denoiser.parameters()] == before
    assert [parameter.requires_grad for parameter in denoiser.parameters()] == before
    assert before.count(True) > 0
