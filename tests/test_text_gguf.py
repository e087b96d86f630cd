"""Models whose weights are a GGUF file: unpacked, tuned by LoRA or in full, and saved as stock transformers reads them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from text_runs import model_folder, train_text
from text_tokenizers import tokenizer_of

from mmalign.adapters.text import TextAdapter

gguf = pytest.importorskip("gguf")
WIDTH, HIDDEN, LAYERS, HEADS = 32, 64, 2, 4


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small Llama as llama.cpp has it, half of its weights in blocks of 8 bits, and the adapter's settings for it."""
    folder = tmp_path_factory.mktemp("gguf")
    words = len(tokenizer_of("none"))
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(words)
    draw = torch.Generator().manual_seed(0)

    def add(name: str, *shape: int, packed: bool = False) -> None:
        values = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=draw) / 6
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(
            name,
            *((gguf.quantize(values.numpy(), kind),) if packed else (values.numpy(),)),
            **({"raw_dtype": kind} if packed else {}),
        )

    add("token_embd.weight", words, WIDTH)
    add("output.weight", words, WIDTH)
    add("output_norm.weight", WIDTH)
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}.weight", WIDTH)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", WIDTH, WIDTH, packed=True)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{layer}.{name}.weight", HIDDEN, WIDTH)
        add(f"blk.{layer}.ffn_down.weight", WIDTH, HIDDEN, packed=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"model": str(folder), "gguf_file": "tiny.gguf", "tokenizer": str(model_folder())}


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_what_is_tuned_loads_as_the_run_says(lora: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    run = train_text(tmp_path / "run", adapter={**settings, "lora": lora}, training={"steps": 1})
    policy = TextAdapter(**settings).open()
    before = policy.model.state_dict()
    names: dict[str, Any] = {"transformers": transformers}
    code = (run / "README.md").read_text().split("import transformers\n")[1].split("```")[0]
    exec(code, names)
    ids = torch.tensor([[1, 2, 3]])
    assert getattr(names["model"].config, "quantization_config", None) is None or lora is not None
    with torch.no_grad():
        tuned, base = names["model"].eval()(ids).logits, policy.model(ids).logits
    assert tuned.isfinite().all() and not torch.allclose(tuned, base, atol=1e-4)
    if lora is None:
        again = names["model"].state_dict()
        assert again.keys() == before.keys() and all(value.dtype == torch.float32 for value in again.values())


def test_the_weights_are_those_of_the_file(settings: dict[str, Any]) -> None:
    policy = TextAdapter(**settings).open()
    reader = gguf.GGUFReader(Path(settings["model"]) / "tiny.gguf")
    stored = {one.name: torch.tensor(gguf.dequantize(one.data, one.tensor_type)) for one in reader.tensors}
    weights = policy.model.state_dict()
    assert torch.equal(weights["lm_head.weight"], stored["output.weight"])
    assert torch.equal(weights["model.layers.1.mlp.down_proj.weight"], stored["blk.1.ffn_down.weight"])
