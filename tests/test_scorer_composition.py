import itertools
import json
import string

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.config import read_config
from mmalign.errors import UserError
from mmalign.evaluate import EvaluateConfig, evaluate_pairs, main
from mmalign.records import Comparison, Content, Media, write
from mmalign.report import task_changes
from mmalign.scorers import SCORERS, TaskScorer
from mmalign.scorers.composition import ZeroShotColour, composition
from mmalign.scorers.composition_prompts import COLOURS, TASKS, parse_composition
from mmalign.scorers.composition_rules import Detection


def noise(height, width, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (max(2, height // 4), max(2, width // 4), 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


PROMPTS = [
    "a photo of a dog",
    "a photo of a dog and a traffic light",
    "a photo of two dogs",
    "a photo of a red dog",
    "a photo of a dog left of a cat",
    "a photo of a red apple and a green cup",
]
IMAGES = [noise(40, 40, 1), noise(40, 56, 2), noise(40, 40, 3), noise(64, 48, 4), noise(40, 40, 5), noise(56, 40, 6)]


@pytest.fixture(scope="module")
def clip_tokenizer():
    from transformers import CLIPTokenizer

    characters = [chr(code) for code in range(33, 127)]
    words = [*characters, *(character + "</w>" for character in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77)


def save(network, processor, folder):
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def owl(clip_tokenizer, tmp_path_factory):
    from transformers import Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**shape, "vocab_size": len(clip_tokenizer), "max_position_embeddings": 77, "initializer_factor": 8.0}
    ids = {"bos_token_id": len(clip_tokenizer) - 2, "eos_token_id": len(clip_tokenizer) - 1}
    vision = {**shape, "image_size": 32, "patch_size": 8, "initializer_factor": 8.0}
    config = Owlv2Config(text_config={**text, **ids, "pad_token_id": 0}, vision_config=vision, projection_dim=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Owlv2ForObjectDetection(config)
        for head in (network.class_head, network.box_head):
            for value in head.parameters():
                torch.nn.init.normal_(value, std=0.6)
    processor = Owlv2Processor(Owlv2ImageProcessor(size={"height": 32, "width": 32}), clip_tokenizer)
    return save(network, processor, tmp_path_factory.mktemp("owl"))


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    from transformers import (
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *string.ascii_lowercase]
    words += [f"##{letter}" for letter in string.ascii_lowercase]
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    swin = {"model_type": "swin", "embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 1, 2], "window_size": 2}
    config = GroundingDinoConfig(
        backbone_config={**swin, "image_size": 32, "patch_size": 4, "out_indices": [2, 3]},
        text_config={"model_type": "bert", **shape, "vocab_size": len(words)},
        **{"d_model": 32, "num_queries": 12, "num_feature_levels": 2, "max_text_len": 40, "disable_custom_kernels": True},
        **{f"{side}_{part}": n for side in ("encoder", "decoder") for part, n in (("layers", 2), ("ffn_dim", 32))},
        **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = GroundingDinoForObjectDetection(config)
        for name, value in network.named_parameters():
            if "class_embed" not in name and "bbox_embed" in name:
                torch.nn.init.normal_(value, std=0.5)
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)}, do_lower_case=True)
    images = GroundingDinoImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    return save(network, GroundingDinoProcessor(images, tokenizer), tmp_path_factory.mktemp("dino"))


@pytest.fixture(params=["owl", "dino"])
def build(request):
    """Builds the scorer on one of the two tiny random detectors, at a threshold that a part of their boxes pass."""
    folder = request.getfixturevalue(request.param)
    return lambda **settings: composition(model=folder, device="cpu", **{"threshold": 0.5, **settings})


def test_the_check_runs_from_prompts_and_images_to_ones_and_zeros(build):
    scorer = build()
    verdicts = scorer.verdicts(PROMPTS, IMAGES)
    assert [each.task for each in verdicts] == list(TASKS)
    assert any(each.found for each in verdicts) and not all(each.passed for each in verdicts)
    scores = scorer(PROMPTS, IMAGES)
    assert scores.tolist() == [float(each.passed) for each in verdicts]
    assert [scorer.task(prompt) for prompt in PROMPTS] == [each.task for each in verdicts]
    assert scorer([], []).shape == (0,)


def test_every_image_passes_or_fails_by_what_the_detector_finds(build):
    prompts = ["a photo of a dog"] * len(IMAGES)
    assert build(threshold=0.0)(prompts, IMAGES).tolist() == [1.0] * len(IMAGES)
    assert build(threshold=1.0)(prompts, IMAGES).tolist() == [0.0] * len(IMAGES)


def test_what_is_found_is_the_same_in_any_batch_and_order(build):
    together = build(batch_size=6).verdicts(PROMPTS * 2, IMAGES + IMAGES[::-1])
    single = build(batch_size=1).verdicts(PROMPTS * 2, IMAGES + IMAGES[::-1])
    turned = build(batch_size=3).verdicts(PROMPTS[::-1] * 2, IMAGES + IMAGES[::-1])[::-1]
    assert sum(len(each.found) for each in together) > 10
    for other in (single, turned):
        for ours, theirs in zip(together, other, strict=True):
            assert [each.name for each in ours.found] == [each.name for each in theirs.found]
            for a, b in zip(ours.found, theirs.found, strict=True):
                assert a.score == pytest.approx(b.score, abs=1e-5) and a.box == pytest.approx(b.box, abs=1e-3)


def test_owl_boxes_are_those_of_transformers_own_postprocessing(owl):
    from transformers import Owlv2ForObjectDetection, Owlv2Processor

    network, processor = Owlv2ForObjectDetection.from_pretrained(owl).eval(), Owlv2Processor.from_pretrained(owl)
    image = IMAGES[1]
    inputs = processor(text=[["a photo of a dog", "a photo of an apple"]], images=image, return_tensors="pt")
    with torch.no_grad():
        outputs = network(**inputs)
    [stock] = processor.post_process_grounded_object_detection(
        outputs, threshold=0.5, target_sizes=[(image.height, image.width)]
    )
    [ours] = composition(model=owl, device="cpu").detector([image], [("dog", "apple")], threshold=0.5)
    assert {each.name for each in ours} == {"dog", "apple"}
    boxes = stock["boxes"].clamp(min=0).minimum(torch.tensor([56.0, 40.0, 56.0, 40.0]))
    inside = (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])
    torch.testing.assert_close(torch.tensor([each.box for each in ours]), boxes[inside])
    torch.testing.assert_close(torch.tensor([each.score for each in ours]), stock["scores"][inside])
    assert [("dog", "apple").index(each.name) for each in ours] == stock["labels"][inside].tolist()


def test_dino_boxes_and_scores_are_those_of_the_tokens_of_a_name(dino):
    from transformers import GroundingDinoForObjectDetection, GroundingDinoProcessor

    network = GroundingDinoForObjectDetection.from_pretrained(dino).eval()
    processor = GroundingDinoProcessor.from_pretrained(dino)
    image = IMAGES[1]
    inputs = processor(text="dog. hot dog.", images=image, return_tensors="pt")
    with torch.no_grad():
        outputs = network(**inputs)
    [stock] = processor.post_process_grounded_object_detection(
        outputs, threshold=0.0, text_threshold=0.0, target_sizes=[(image.height, image.width)]
    )
    probabilities = outputs.logits[0].sigmoid()
    dog, hot_dog = probabilities[:, 1:4].amax(dim=-1), probabilities[:, 5:11].amax(dim=-1)  # d o g . h o t d o g .
    [ours] = composition(model=dino, device="cpu").detector([image], [("dog", "hot dog")], threshold=0.0)
    boxes = stock["boxes"].clamp(min=0).minimum(torch.tensor([56.0, 40.0, 56.0, 40.0]))
    inside = (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])
    assert len(ours) == inside.sum() > 3
    torch.testing.assert_close(torch.tensor([each.box for each in ours]), boxes[inside])
    torch.testing.assert_close(torch.tensor([each.score for each in ours]), torch.maximum(dog, hot_dog)[inside])
    assert [each.name == "dog" for each in ours] == (dog >= hot_dog)[inside].tolist()


def test_colour_by_clip_is_its_zero_shot_choice(owl, clip_tokenizer, tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    end = len(clip_tokenizer) - 1
    text = {**shape, "vocab_size": end + 1, "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    config = CLIPConfig(text_config=text, vision_config={**shape, "image_size": 16, "patch_size": 8}, projection_dim=8)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        folder = save(CLIPModel(config), CLIPProcessor(images, clip_tokenizer), tmp_path / "clip")
    scorer = composition(model=owl, colour_model=folder, device="cpu", threshold=0.0)
    assert isinstance(scorer.colour_of, ZeroShotColour)

    network, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    chosen, first = [], []
    for image, name in itertools.product(IMAGES, ("dog", "apple", "traffic light")):
        texts = [
            text
            for colour in COLOURS
            for text in (
                f"a photo of a {colour} {name}",
                f"a photo of a {colour}-colored {name}",
                f"a photo of a {colour} object",
            )
        ]
        inputs = processor(text=texts, images=image.crop((8, 4, 40, 36)), return_tensors="pt", padding=True)
        with torch.no_grad():
            outputs = network(**inputs)
        means = torch.stack([features.mean(dim=0) for features in outputs.text_embeds.split(3)])  # of normalised features
        fits = means @ outputs.image_embeds[0] / means.norm(dim=-1)
        chosen.append(COLOURS[int(fits.argmax())])
        first.append(COLOURS[int((outputs.text_embeds[::3] @ outputs.image_embeds[0]).argmax())])
        assert scorer.colour_of(image, Detection(name=name, score=0.9, box=(8.0, 4.0, 40.0, 36.0))) == chosen[-1]
    assert len(set(chosen)) > 1 and chosen != first  # the image and all three texts have their say
    assert set(scorer(["a photo of a red dog"] * 2, IMAGES[:2]).tolist()) <= {0.0, 1.0}


def test_objects_of_ones_own_may_be_named(owl):
    with pytest.raises(UserError, match="want a known object instead of 'unicorn'"):
        composition(model=owl, device="cpu")(["a photo of a unicorn"], IMAGES[:1])
    scorer = composition(model=owl, device="cpu", more_objects=("Unicorn",))
    assert [scorer.task(prompt) for prompt in ("a photo of a unicorn", "a photo of two unicorns")] == [TASKS[0], TASKS[2]]


@pytest.mark.parametrize("setting", ["threshold", "max_overlap", "margin"])
def test_settings_beyond_zero_and_one_are_refused(setting):
    with pytest.raises(UserError, match=rf"composition\.{setting}: got 1\.5, want 0 to 1"):
        composition(model="anything", **{setting: 1.5})


def test_what_is_no_detector_is_a_user_fault(clip_tokenizer, tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel

    save(CLIPTextModel(CLIPTextConfig(vocab_size=200, hidden_size=8, num_attention_heads=1)), clip_tokenizer, tmp_path / "text")
    for name, got in (("text", r"a model of type clip_text_model"), ("nowhere", "nowhere")):
        with pytest.raises(UserError, match=rf"composition\.model: got .*want a folder or hub id with a detector.*{got}"):
            composition(model=str(tmp_path / name))


def test_what_is_no_clip_is_a_user_fault_of_its_own_setting(owl, tmp_path):
    with pytest.raises(UserError, match=r"composition\.colour_model: got .*nowhere"):
        composition(model=owl, colour_model=str(tmp_path / "nowhere"), device="cpu")


def test_results_by_task_are_worked_by_hand():
    before, after = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    two, one = task_changes(["b", "b", "b", "a"], before, after)
    assert (two.name, two.num_pairs, one.name, one.num_pairs) == ("b", 3, "a", 1)
    assert (two.mean_before, two.mean_after) == pytest.approx((1 / 3, 2 / 3))
    assert (one.mean_before, one.mean_after) == (1.0, 0.0)
    assert two.difference_low == 0.0 and two.difference_high == 1.0
    assert (one.difference_low, one.difference_high) == (-1.0, -1.0)


def sided(folder, name, images):
    """Comparisons with two images a prompt, as `mmalign generate` writes them."""
    rows = []
    for number, prompt in enumerate(PROMPTS):
        contents = []
        for seed in (0, 1):
            path = folder / f"{name}_{number}_{seed}.png"
            images[2 * number + seed].save(path)
            contents.append(Content(images=(Media(path=str(path)),)))
        origins = ({"seed": 0}, {"seed": 1})
        rows.append(Comparison(id=f"{number}", prompt=Content(text=prompt), candidates=tuple(contents), provenance=origins))
    return write(rows, folder / f"{name}.jsonl")


@pytest.mark.parametrize("label", [None, "checked"])
def test_evaluate_gives_the_results_of_each_task(owl, tmp_path, label):
    square = [image.resize((40, 40)) for image in IMAGES]
    sides = [[image for image in square for _ in (0, 1)], square[::-1] * 2]
    before, after = (sided(tmp_path, name, images) for name, images in zip(("before", "after"), sides, strict=True))
    judge = f"{{name: composition, model: {owl}, threshold: 0.5, device: cpu" + (f", label: {label}}}" if label else "}")
    words = [f"before={before}", f"after={after}", f"output={tmp_path / 'report'}", "held_out=brightness"]
    result = main(read_config(EvaluateConfig, None, [*words, f"scorers=[{judge}]"]))
    name = label or "composition"
    found = json.loads((tmp_path / "report/results.json").read_text())["scorers"]
    assert "tasks" not in found["brightness"]
    scorer = composition(model=owl, threshold=0.5, device="cpu")
    assert isinstance(scorer, TaskScorer) and not isinstance(SCORERS["brightness"](), TaskScorer)
    shares = [scorer([p for p in PROMPTS for _ in (0, 1)], images).reshape(-1, 2).mean(dim=1) for images in sides]
    assert list(found[name]["tasks"]) == [parse_composition(prompt).task for prompt in PROMPTS] == list(TASKS)
    for place, task in enumerate(found[name]["tasks"].values()):
        assert (task["mean_before"], task["mean_after"]) == (shares[0][place], shares[1][place])
        assert task["num_pairs"] == 2
    assert found[name]["mean_over_tasks_before"] == pytest.approx(float(shares[0].mean()))
    assert found[name]["mean_over_tasks_after"] == pytest.approx(float(shares[1].mean()))
    assert f"{name} by task, before and after" in str(result) and "colour_attribution" in str(result)
    page = (tmp_path / "report/report.html").read_text()
    assert f"<h2>{name} by task</h2>" in page and "<td>colour attribution</td>" in page


def test_each_task_counts_alike_in_the_mean_over_tasks(owl):
    scorer = composition(model=owl, threshold=0.0, device="cpu")
    never = composition(model=owl, threshold=1.0, device="cpu")
    prompts, images = ["a photo of a dog"] * 3 + ["a photo of ten dogs"], IMAGES[:1] * 4
    assert scorer(prompts, images)[:3].tolist() == [1.0] * 3 and never(prompts, images).sum() == 0
    evaluation = evaluate_pairs(prompts, images, images, scorers=[scorer])
    passed = float(scorer(prompts[3:], images[3:]))
    assert evaluation.results()["scorers"]["composition"]["mean_over_tasks_after"] == pytest.approx((1 + passed) / 2)
