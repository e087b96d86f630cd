"""Step scorers: what each of them looks at, the same number in any batch, prompts encoded once, and a judge that stays put."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from runs import config_of, tree
from safetensors.torch import load_file, save_file
from test_step_aware import disturbed
from test_step_reward import LATENT, LOSS, STEP_AWARE, adapter_of
from torch import Tensor

from mmalign.config import Choice, Table, read_config
from mmalign.errors import UserError
from mmalign.models.latent_reward import save_latent_reward
from mmalign.models.lora import add_lora
from mmalign.models.step_aware import open_step_aware, save_step_aware
from mmalign.models.step_scorers import STEP_SCORERS, Kept, StepModel, StepScorer
from mmalign.scorers import SCORERS

PROMPTS = ["a red disc", "a blue disc", "a red disc", "a red disc", "rain"]


def policy_of(tmp_path: Path, reward: dict[str, Any], family: str = "sd15") -> Any:
    config = config_of(tree(tmp_path / "out", family, adapter=adapter_of(reward, family), **LOSS))
    return config.adapter.build().open(seed=0)


def states(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    noisy, clean = (torch.randn(5, 4, 8, 8, generator=generator) for _ in range(2))
    return {"noisy": noisy, "clean": clean, "timestep": torch.tensor([951, 951, 951, 401, 0])}


def step_aware_folder(tmp_path: Path) -> Path:
    network, reads = open_step_aware("tiny")
    return save_step_aware(disturbed(network), reads, tmp_path / "step_aware")


def latent_folder(tmp_path: Path, policy: Any) -> Path:
    return save_latent_reward(policy.network, tmp_path / "latent")


def small_decoder_folder(folder: Path, **changes: Any) -> Path:
    """A random `AutoencoderTiny` with the sides of the tiny VAE."""
    from diffusers import AutoencoderTiny

    wide = {name: (8, 8, 8) for name in ("encoder_block_out_channels", "decoder_block_out_channels")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = AutoencoderTiny(**wide, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1), **changes)
    small.save_pretrained(folder)
    return folder


@pytest.fixture
def built(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[StepModel, StepScorer, Any]:
    """The model that is sampled, a scorer of it, and a function that builds it with other settings."""
    policy = policy_of(tmp_path, LATENT)
    settings: dict[str, Any] = {
        "step_aware": {"path": str(step_aware_folder(tmp_path))},
        "latent": {"path": str(latent_folder(tmp_path, policy))},
        "image": {"scorer": choice_of("colourfulness")},
    }[request.param]

    def build(**more: Any) -> StepScorer:
        return STEP_SCORERS[request.param](policy.images, **settings, **more)

    return policy.images, build(), build


def choice_of(name: str, **settings: Any) -> Any:
    """As a config reads it."""
    return Choice(name=name, target=SCORERS[name], settings=settings)


ALL = pytest.mark.parametrize("built", sorted(STEP_SCORERS), indirect=True)


@ALL
def test_scores_are_one_a_state_in_any_batch_and_without_a_graph(built: Any) -> None:
    model, scorer, build = built
    assert isinstance(model, StepModel) and isinstance(scorer, StepScorer)
    scores = scorer(prompts=PROMPTS, **states())
    assert scores.shape == (5,) and scores.isfinite().all() and not scores.requires_grad
    assert len({round(float(score), 5) for score in scores}) == 5
    torch.testing.assert_close(build(batch_size=2)(prompts=PROMPTS, **states()), scores, rtol=0, atol=1e-5)
    turned = {name: value.flip(0) for name, value in states().items()}
    torch.testing.assert_close(scorer(prompts=PROMPTS[::-1], **turned).flip(0), scores, rtol=0, atol=1e-5)


LOOKS_AT = {"step_aware": {"clean", "timestep", "prompts"}, "image": {"clean"}, "latent": {"noisy", "timestep", "prompts"}}


@ALL
def test_each_scorer_looks_at_its_part_of_the_state(built: Any, request: pytest.FixtureRequest) -> None:
    _, scorer, _ = built
    base = {"prompts": PROMPTS, **states()}
    scores = scorer(**base)
    others = {
        "noisy": states(1)["noisy"],
        "clean": states(1)["clean"],
        "timestep": torch.tensor([1, 1, 1, 1, 900]),
        "prompts": ["snow"] * 5,
    }
    changed = {name for name, other in others.items() if not torch.allclose(scorer(**{**base, name: other}), scores, atol=1e-6)}
    assert changed == LOOKS_AT[request.node.callspec.params["built"]]
    assert scorer.needs_guess == ("clean" in changed)


def test_the_step_aware_scorer_is_the_model_on_the_decoded_guess(tmp_path: Path) -> None:
    images = policy_of(tmp_path, STEP_AWARE).images
    folder = step_aware_folder(tmp_path)
    scorer = STEP_SCORERS["step_aware"](images, path=str(folder))
    network, reads = open_step_aware(str(folder))
    state = states()
    latents = state["clean"] / images.pipe.vae.config.scaling_factor
    with torch.no_grad():
        decoded = (images.pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        pixels = reads.pixels(decoded, resize="shortest")
        expected = network(pixels[:, None], state["timestep"][:, None], reads.tokens(PROMPTS))[:, 0]
    torch.testing.assert_close(scorer(prompts=PROMPTS, **state), expected, rtol=0, atol=1e-4)


def test_a_distinct_prompt_is_encoded_once_and_kept(tmp_path: Path) -> None:
    images = policy_of(tmp_path, STEP_AWARE).images
    scorer: Any = STEP_SCORERS["step_aware"](images, path=str(step_aware_folder(tmp_path)))
    encoded: list[int] = []
    scorer.network.clip.text_projection.register_forward_hook(lambda module, given, output: encoded.append(len(output)))
    first = scorer(prompts=PROMPTS, **states())
    again = scorer(prompts=PROMPTS, **states())
    assert encoded == [3] and torch.equal(first, again)
    scorer(prompts=[*PROMPTS[:4], "snow"], **states())
    assert encoded == [3, 1]


def test_the_prompts_asked_for_last_are_kept() -> None:
    asked: list[list[str]] = []

    def compute(prompts: list[str]) -> dict[str, Tensor]:
        asked.append(prompts)
        return {"length": torch.tensor([len(prompt) for prompt in prompts])}

    kept = Kept(compute=compute, capacity=2)
    assert kept(["aaa", "b", "cc", "b"])["length"].tolist() == [3, 1, 2, 1]
    assert kept(["cc", "b"])["length"].tolist() == [2, 1]
    assert kept(["aaa"])["length"].tolist() == [3]
    assert kept(["b"])["length"].tolist() == [1]
    assert asked == [["aaa", "b", "cc"], ["aaa"]]


class CountedPixels:
    """A scorer of pixels; `from_images` tells whether it was given images."""

    name = "mean"
    from_images = False

    def __call__(self, prompts: Any, images: Any) -> Tensor:
        self.from_images = True
        return torch.zeros(len(images))

    def score_pixels(self, prompts: Any, pixels: Tensor) -> Tensor:
        return pixels.mean((1, 2, 3))


def test_an_image_scorer_is_given_pixels_where_it_takes_them_and_8_bit_images_else(tmp_path: Path) -> None:
    images = policy_of(tmp_path, STEP_AWARE).images
    state = states()
    counted = CountedPixels()
    scorer = STEP_SCORERS["image"](images, scorer=Choice(name="mean", target=lambda: counted))
    torch.testing.assert_close(scorer(prompts=PROMPTS, **state), images.decode(state["clean"]).mean((1, 2, 3)))
    assert not counted.from_images
    plain = STEP_SCORERS["image"](images, scorer=choice_of("brightness"))(prompts=PROMPTS, **state)
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    torch.testing.assert_close(plain, (images.decode(state["clean"]) * luma).sum(1).mean((1, 2)), rtol=0, atol=4e-3)


def test_a_small_decoder_stands_for_the_vae_in_what_is_scored(tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    images, state = policy_of(tmp_path, STEP_AWARE).images, states()
    folder = small_decoder_folder(tmp_path / "small")
    calls: list[int] = []
    images.pipe.vae.decoder.register_forward_hook(lambda module, given, output: calls.append(len(output)))
    with torch.no_grad():
        pixels = (AutoencoderTiny.from_pretrained(folder).eval().decode(state["clean"]).sample / 2 + 0.5).clamp(0, 1)
    counted = Choice(name="mean", target=CountedPixels)
    found = STEP_SCORERS["image"](images, scorer=counted, decoder=str(folder))(prompts=PROMPTS, **state)
    torch.testing.assert_close(found, pixels.mean((1, 2, 3)))
    model = step_aware_folder(tmp_path)
    found = STEP_SCORERS["step_aware"](images, path=str(model), decoder=str(folder))(prompts=PROMPTS, **state)
    network, reads = open_step_aware(str(model))
    with torch.no_grad():
        seen = network.image_features(reads.pixels(pixels, resize="shortest"), state["timestep"])
        expected = network.score(seen, network.text_features(reads.tokens(PROMPTS)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert not calls, "the model's own VAE decodes nothing"


def test_a_small_decoder_that_is_none_is_refused(tmp_path: Path) -> None:
    policy = policy_of(tmp_path, STEP_AWARE)
    (tmp_path / "empty").mkdir()
    policy.images.pipe.vae.save_pretrained(tmp_path / "vae")
    for folder, told in (("vae", r"which is a AutoencoderKL, want an AutoencoderTiny"), ("empty", "diffusers cannot load")):
        with pytest.raises(UserError, match=rf"source\.scorer\.decoder: got .*{folder}.*{told}"):
            STEP_SCORERS["image"](policy.images, scorer=choice_of("brightness"), decoder=str(tmp_path / folder))


def move(denoiser: Any) -> None:
    """Train the network a little, as far as its weights go."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (one for one in denoiser.parameters() if one.requires_grad):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("kind", ["lora", "full", "tuned"])
def test_a_latent_judge_stays_put_while_the_network_that_it_reads_is_trained(tmp_path: Path, kind: str) -> None:
    policy = policy_of(tmp_path, {**LATENT, "tune": "network"} if kind == "tuned" else LATENT)
    folder = latent_folder(tmp_path, policy)
    expected = STEP_SCORERS["latent"](policy.images, path=str(folder))(prompts=PROMPTS, **states())
    images = policy_of(tmp_path, STEP_AWARE).images
    if kind == "full":
        images.denoiser.requires_grad_(True)
    else:
        add_lora(images.denoiser, rank=2)
    scorer = STEP_SCORERS["latent"](images, path=str(folder))
    before = images.denoiser(states()["noisy"], states()["timestep"], **images.conditions(PROMPTS))
    move(images.denoiser)
    torch.testing.assert_close(scorer(prompts=PROMPTS, **states()), expected, rtol=0, atol=1e-5)
    after = images.denoiser(states()["noisy"], states()["timestep"], **images.conditions(PROMPTS))
    assert not torch.allclose(after, before, atol=1e-3)  # and it did train, its LoRA on again


@pytest.mark.parametrize("name", sorted(STEP_SCORERS))
def test_a_policy_in_training_is_a_model_to_score_steps_of(tmp_path: Path, name: str) -> None:
    reward = policy_of(tmp_path, LATENT)
    settings: dict[str, Any] = {
        "step_aware": {"path": str(step_aware_folder(tmp_path))},
        "latent": {"path": str(latent_folder(tmp_path, reward))},
        "image": {"scorer": choice_of("sharpness")},
    }[name]
    policy = config_of(tree(tmp_path / "out")).adapter.build().open(seed=0)
    assert isinstance(policy, StepModel) and policy.denoiser.lora_layers
    scores, expected = (STEP_SCORERS[name](model, **settings)(prompts=PROMPTS, **states()) for model in (policy, reward.images))
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


def test_a_latent_reward_of_sdxl_scores_with_the_size_that_is_sampled(tmp_path: Path) -> None:
    policy = policy_of(tmp_path, LATENT, "sdxl")
    scorer: Any = STEP_SCORERS["latent"](policy.images, path=str(latent_folder(tmp_path, policy)))
    assert scorer(prompts=PROMPTS, **states()).isfinite().all()
    assert scorer.condition(["rain"])["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A config with a step scorer."""

    scorer: Annotated[Choice, Table(STEP_SCORERS)]


def test_a_config_names_a_step_scorer_with_its_settings(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("scorer: {name: image, batch_size: 2, scorer: {name: brightness}}")
    images = policy_of(tmp_path, STEP_AWARE).images
    built = read_config(Judged, config).scorer.build(images)
    assert (built.scorer.name, built.batch_size) == ("brightness", 2)
    assert built(prompts=PROMPTS, **states()).shape == (5,)
    config.write_text("scorer: {name: latent}")
    with pytest.raises(UserError, match=r"scorer\.path"):
        read_config(Judged, config)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    policy = policy_of(tmp_path, LATENT)
    other = policy_of(tmp_path, LATENT, "sd2")
    source = r"^source\.scorer\.path: got "
    with pytest.raises(
        UserError, match=source + r".*, which is mmalign latent reward of family sd2, want a latent reward of sd15"
    ):
        STEP_SCORERS["latent"](policy.images, path=str(latent_folder(tmp_path, other)))
    with pytest.raises(UserError, match=source + r".*, which is mmalign step-aware CLIP, want a latent reward of sd15"):
        STEP_SCORERS["latent"](policy.images, path=str(step_aware_folder(tmp_path)))
    with pytest.raises(
        UserError, match=source + r".*nothing, which is no latent reward model .*want a folder that training saved"
    ):
        STEP_SCORERS["latent"](policy.images, path=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=source + r"'.*nothing', want a folder or hub id with a CLIP model"):
        STEP_SCORERS["step_aware"](policy.images, path=str(tmp_path / "nothing"))


@pytest.mark.parametrize("kind", ["step_aware", "latent"])
def test_keys_that_a_step_scorers_weights_lack_are_listed_with_the_setting_and_the_folder(tmp_path: Path, kind: str) -> None:
    policy = policy_of(tmp_path, LATENT)
    folder = step_aware_folder(tmp_path) if kind == "step_aware" else latent_folder(tmp_path, policy)
    weights = load_file(folder / "model.safetensors")
    lost = sorted(weights)[:2]
    save_file({key: value for key, value in weights.items() if key not in lost}, folder / "model.safetensors")
    with pytest.raises(UserError) as told:
        STEP_SCORERS[kind](policy.images, path=str(folder))
    assert str(told.value).startswith(f"source.scorer.path ({folder}): got a checkpoint with keys 2 missing: {', '.join(lost)}")
