"""The flow base: its quick attention is the stock one, and what is saved is a stock Stable Diffusion 3 without T5."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import pad

from mmalign.digits import Base, Pretraining, pretrained
from mmalign.digits_flow import NUM_ZEROS, FlowPretraining, flow_fingerprint, one_zero_for_all, pretrained_flow

SHORT = FlowPretraining(steps=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A digits base that was hardly trained."""
    return pretrained(Pretraining(vae_steps=2, unet_steps=2), seed=0, cache=tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def flow(base: Base) -> Base:
    return pretrained_flow(SHORT, base, seed=0, cache=base.folder.parent)


@pytest.fixture(scope="module")
def pipe(flow: Base) -> Any:
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline.from_pretrained(flow.folder, text_encoder_3=None, tokenizer_3=None)


def test_one_zero_token_that_counts_256_times_is_256_zero_tokens(pipe: Any) -> None:
    embeds, _, pooled, _ = pipe.encode_prompt(["a handwritten digit seven", ""], None, None, do_classifier_free_guidance=False)
    assert embeds[:, -NUM_ZEROS:].abs().max() == 0 and embeds[:, -NUM_ZEROS - 1].abs().max() > 0
    generator = torch.Generator().manual_seed(0)
    noisy, timestep = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([100.0, 900.0])
    given: dict[str, Any] = {"hidden_states": noisy, "timestep": timestep, "pooled_projections": pooled}
    with torch.no_grad():
        stock = pipe.transformer(**given, encoder_hidden_states=embeds).sample
        with one_zero_for_all(pipe.transformer):
            quick = pipe.transformer(**given, encoder_hidden_states=pad(embeds[:, :-NUM_ZEROS], (0, 0, 0, 1))).sample
        again = pipe.transformer(**given, encoder_hidden_states=embeds).sample
        short = pipe.transformer(**given, encoder_hidden_states=embeds[:, : -NUM_ZEROS + 1]).sample
    torch.testing.assert_close(quick, stock, rtol=1e-4, atol=1e-5)
    assert torch.equal(again, stock), "the stock attention is back"
    assert (short - stock).abs().max() > 1e-3, "how often the zeros count matters"


def test_the_flow_base_is_a_stock_pipeline_with_the_autoencoder_of_its_base(base: Base, flow: Base, pipe: Any) -> None:
    assert type(pipe).__name__ == "StableDiffusion3Pipeline" and pipe.text_encoder_3 is None
    weights = [load_file(one.folder / "vae" / "diffusion_pytorch_model.safetensors") for one in (base, flow)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    pipe.set_progress_bar_config(disable=True)
    [image] = pipe("a handwritten digit two", num_inference_steps=2, guidance_scale=1.0, height=32, width=32).images
    assert image.size == (32, 32)


def test_a_second_call_takes_the_kept_flow_base(base: Base, flow: Base) -> None:
    assert pretrained_flow(SHORT, base, seed=0, cache=base.folder.parent) == Base(folder=flow.folder, reused=True)


def test_the_fingerprint_tells_recipe_seed_and_base_apart(base: Base) -> None:
    other = Base(folder=Path("digits-of-another-seed"), reused=True)
    found = {flow_fingerprint(*given) for given in [(SHORT, base, 0), (SHORT, base, 1), (SHORT, other, 0)]}
    assert len(found | {flow_fingerprint(FlowPretraining(), base, 0)}) == 4
