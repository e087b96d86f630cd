"""What is particular to SD3 / SD3.5 and FLUX.1; what they share with every family is in tests/test_families.py."""

import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from runs import config_of, final_weights, forget_accelerate, metrics_of, train, tree, write_config
from test_families import PROMPTS, SIZE, condition_of, retraced, sampled
from tiny import tiny_pipeline

from mmalign import cli, prepare
from mmalign.errors import UserError
from mmalign.experiment import read_examples
from mmalign.families import FAMILIES
from mmalign.families.flux import _pack, _positions, _unpack
from mmalign.models.diffusion import Denoiser, encode_prompt, open_pipeline, schedule_of
from mmalign.models.sampling import set_scheduler


def schnell(folder: Path) -> Any:
    """A pipeline of the kind of FLUX.1 schnell: not told its guidance, no shift."""
    changes = {"transformer": {"guidance_embeds": False}, "scheduler": {"use_dynamic_shifting": False, "shift": 1.0}}
    return open_pipeline("flux", tiny_pipeline("flux", folder, **changes))


def timesteps(pipe: Any, steps: int, **options: Any) -> torch.Tensor:
    """The noise levels of the stock sampler, by way of its own call."""
    pipe(PROMPTS[0], height=SIZE[0], width=SIZE[1], num_inference_steps=steps, output_type="latent", **options)
    return pipe.scheduler.sigmas[:-1]


def test_flux_tokens_are_squares_of_latents_row_by_row_with_channels_first() -> None:
    latents = torch.arange(2 * 3 * 4 * 6).float().reshape(2, 3, 4, 6)
    tokens = _pack(latents)
    assert tokens.shape == (2, 6, 12)
    assert torch.equal(tokens[0, 1], latents[0, :, 0:2, 2:4].flatten()), "the second token is to the right of the first"
    assert torch.equal(tokens[1, 3], latents[1, :, 2:4, 0:2].flatten()), "the fourth begins the second row"
    assert torch.equal(_unpack(tokens, latents), latents)
    assert _positions(latents).tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]


def test_flux_is_told_one_guidance_for_policy_and_reference_and_sampling_tells_another(tmp_path: Path) -> None:
    family = FAMILIES["flux"]
    pipe = open_pipeline("flux", tiny_pipeline("flux", tmp_path))
    told: list[list[float]] = []
    times = pipe.transformer.time_text_embed.time_proj
    times.register_forward_pre_hook(lambda _, given: told.append(given[0].tolist()))
    condition = condition_of(family, pipe, PROMPTS)
    noisy, timestep = torch.randn(2, 4, 8, 16), torch.tensor([900.0, 500.0])
    denoiser = Denoiser("flux", pipe.transformer)
    with torch.no_grad():
        plain = denoiser(noisy, timestep, **condition)
        guided = Denoiser(family.with_guidance(3.5), pipe.transformer)(noisy, timestep, **condition)
    assert told[1] == [1000.0, 1000.0] and told[3] == [3500.0, 3500.0]
    assert told[0] == pytest.approx([900.0, 500.0])
    assert (plain - guided).abs().max() > 1e-4
    told.clear()
    sampled(family, pipe, scale=3.5)
    assert told[1] == [3500.0, 3500.0]
    with pytest.raises(ValueError, match="sd3 is told no guidance"):
        FAMILIES["sd3"].with_guidance(3.5)


def test_flux_schnell_has_no_guidance_and_retraces_the_stock_pipeline(tmp_path: Path) -> None:
    family, pipe = FAMILIES["flux"], schnell(tmp_path)
    stock = sampled(family, pipe, steps=4)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    with torch.no_grad():
        ours = retraced(family, pipe, scheduler, PROMPTS, 1.0, None)
    torch.testing.assert_close(ours, stock, atol=2e-4, rtol=0)
    assert schedule_of(pipe, SIZE).sigma[499].item() == pytest.approx(0.5)


def test_flux_trains_on_the_noise_levels_that_it_samples_this_size_with(tmp_path: Path) -> None:
    pipe = open_pipeline("flux", tiny_pipeline("flux", tmp_path))
    sigmas = timesteps(pipe, 4)
    schedule = schedule_of(pipe, SIZE)
    torch.testing.assert_close(sigmas, schedule.sigma[[999, 749, 499, 249]])
    tokens = (SIZE[0] // 8) * (SIZE[1] // 8)  # of the tiny VAE with factor 4, packed 2 x 2
    shift = math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))
    assert schedule.sigma[499].item() == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5))
    torch.testing.assert_close(schedule.network_timesteps, 1000 * schedule.sigma)


def test_sd3_trains_on_the_schedule_that_is_shifted_by_3(tmp_path: Path) -> None:
    pipe = open_pipeline("sd3", tiny_pipeline("sd3", tmp_path))
    schedule = schedule_of(pipe, SIZE)
    assert schedule.prediction == "flow"
    assert schedule.sigma[[249, 499, 999]].tolist() == pytest.approx([0.5, 0.75, 1.0])  # 3 s / (1 + 2 s)
    torch.testing.assert_close(schedule.sigma.flip(0), type(pipe.scheduler).from_config(pipe.scheduler.config).sigmas)


def without_t5(folder: Path) -> Path:
    """An SD3 folder as it is published for little memory: model_index.json names no third encoder."""
    pipe = open_pipeline("sd3", tiny_pipeline("sd3", folder / "whole"))
    type(pipe)(**{**pipe.components, "text_encoder_3": None, "tokenizer_3": None}).save_pretrained(folder / "small")
    return folder / "small"


def test_sd3_without_t5_has_zeros_in_its_place_and_trains_caches_and_saves_a_folder_without_it(tmp_path: Path) -> None:
    folder = without_t5(tmp_path)
    pipe = open_pipeline("sd3", folder)
    assert pipe.text_encoder_3 is None
    embeds = encode_prompt("sd3", pipe, PROMPTS)["encoder_hidden_states"]
    whole = encode_prompt("sd3", open_pipeline("sd3", tmp_path / "whole"), PROMPTS)["encoder_hidden_states"]
    assert embeds.shape == whole.shape == (2, 16 + 256, 48)
    assert torch.equal(embeds[:, :16], whole[:, :16])
    assert not embeds[:, 16:].any() and whole[:, 16:].any()
    adapter = {"model": str(folder), "cache": str(tmp_path / "cache")}
    prepare.main(config_of(tree(tmp_path / "out", family="sd3", adapter=adapter)))
    output = train(tmp_path / "out", family="sd3", adapter=adapter)
    assert metrics_of(output)[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert max(float(value.abs().max()) for key, value in final_weights(output).items() if "lora_B" in key) > 1e-4
    forget_accelerate()
    full = train(tmp_path / "full", family="sd3", adapter={"model": str(folder), "lora": None})
    for run in (output, full):
        names: dict[str, Any] = {"diffusers": diffusers}
        exec((run / "README.md").read_text().split("```python\nimport diffusers\n")[1].split("```")[0], names)
        assert names["pipe"].text_encoder_3 is None and names["pipe"].tokenizer_3 is None


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_sampler_of_epsilon_is_refused_for_rectified_flow(name: str, tmp_path: Path) -> None:
    pipe = open_pipeline(name, tiny_pipeline(name, tmp_path))
    with pytest.raises(UserError, match=r"got 'DDIMScheduler', which this .* Known: FlowMatchEuler"):
        set_scheduler(pipe, "DDIMScheduler")


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_an_error_that_rectified_flow_does_not_know_is_refused_before_a_file_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = {"weights": {"name": "error_of", "prediction": "v_prediction"}}
    config = write_config(tmp_path / "config.yaml", tree(tmp_path / "out", family=name, adapter=adapter))
    assert cli.main(["train", str(config)]) == 2
    told = capsys.readouterr().err
    assert "adapter.weights: got prediction v_prediction for a model of rectified flow" in told and "Traceback" not in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "tokens"), [("sd3", 16 + 256), ("flux", 512)])
def test_a_prompt_longer_than_the_encoder_takes_is_cut_as_the_stock_pipeline_cuts_it(
    name: str, tokens: int, tmp_path: Path
) -> None:
    pipe = open_pipeline(name, tiny_pipeline(name, tmp_path))
    embeds = encode_prompt(name, pipe, ["a red cube " * 80, "a red cube " * 90, "a red cube"])["encoder_hidden_states"]
    assert embeds.shape[:2] == (3, tokens)
    assert torch.equal(embeds[0, :-1], embeds[1, :-1])
    assert not torch.equal(embeds[0], embeds[2])


def test_the_told_guidance_is_a_setting_that_reference_logps_in_the_cache_remember(tmp_path: Path) -> None:
    told: list[set[float]] = []
    adapter = {"guidance_embedding": 3.5, "draws": 1, "cache": str(tmp_path / "cache")}
    prepare.main(config_of(tree(tmp_path / "out", family="flux", adapter=adapter)))
    policy = config_of(tree(tmp_path / "out", family="flux", adapter=adapter)).adapter.build().open()
    embedding = policy.pipe.transformer.time_text_embed.time_proj
    embedding.register_forward_pre_hook(lambda _, given: told.append(set(given[0].tolist())))
    examples, _ = read_examples(config_of(tree(tmp_path / "out", family="flux", adapter=adapter)).data)
    inputs = policy.prepare(policy.collate([policy.item(examples[0], 0)])).inputs
    with torch.no_grad(), policy.reference() as reference:
        inputs.logps(reference)
        inputs.logps(policy.network)
    assert told[1::2] == [{3500.0}, {3500.0}]
    with pytest.raises(UserError, match="guidance_embedding"):
        train(tmp_path / "other", family="flux", adapter={**adapter, "guidance_embedding": 1.0})
    with pytest.raises(UserError, match=r"guidance_embedding: got -3\.0, want 0 or more"):
        config_of(tree(tmp_path / "out", family="flux", adapter={"guidance_embedding": -3.0}))
    with pytest.raises(UserError, match=r"guidance_embedding: got 3\.5, but sd3 is told no guidance"):
        config_of(tree(tmp_path / "out", family="sd3", adapter={"guidance_embedding": 3.5}))


def test_t5_keeps_in_float32_what_overflows_in_float16_also_after_validation_images(tmp_path: Path) -> None:
    validation = {"prompts": ["a red 1"], "steps": 1, "guidance_scale": 1.0}
    config = config_of(tree(tmp_path / "out", family="sd3", adapter={"lora": None, "validation": validation}))
    policy = config.adapter.build().open(mixed_precision="fp16")
    expected = {"SelfAttention.q.weight": torch.float16, "DenseReluDense.wo.weight": torch.float32}
    before = {name: value.clone() for name, value in policy.pipe.text_encoder_3.state_dict().items()}
    for moment in ("opened", "validated"):
        after = policy.pipe.text_encoder_3.state_dict()
        for end, dtype in expected.items():
            assert {value.dtype for name, value in after.items() if name.endswith(end)} == {dtype}, moment
        assert all(torch.equal(before[name], value) for name, value in after.items()), moment
        policy.validate(tmp_path / "images")
    assert (tmp_path / "images" / "000.png").is_file()
