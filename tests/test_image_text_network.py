"""Networks that see give, packed or padded, what the models themselves give for each prompt and answer with its pixels."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from multimodal import VIDEO_FAMILIES, arguments, encoder, in_one_go, parts, picture, sample, sequence, token_logps
from tiny_causal import gradients, relative_errors
from torch import Tensor

from mmalign.adapters.text_tokens import tokens_of
from mmalign.errors import UserError
from mmalign.language.network import TokenNetwork
from mmalign.likelihoods import Tokens
from mmalign.multimodal import network as networks
from mmalign.multimodal.families import FAMILIES
from mmalign.multimodal.features import FeatureStore
from mmalign.multimodal.network import Sight
from mmalign.multimodal.opening import part_of
from mmalign.records import Content, Media, Message

FAMILY = pytest.mark.parametrize("family", FAMILIES)
PACKING = tuple(family for family in FAMILIES if family != "mllama")
WIDE, TALL = picture(0, 60, 40), picture(1, 40, 70)
ROWS: tuple[tuple[str, tuple[str, ...], tuple[Media, ...]], ...] = (
    ("what?", ("red", "a blue one", "no"), (WIDE,)),
    ("which of both?", ("one", "the other"), (TALL, WIDE)),
    ("name a colour", ("blue", "say it"), ()),
)
STAKES = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 0.7, -0.4], dtype=torch.float64)


def shown(family: str) -> Any:
    media = (picture(9, 32, 32),)
    chat = encoder(family).tokenizer.chat_template is not None
    content = Content(messages=(Message(role="user", text="a", images=media),)) if chat else Content(text="a", images=media)
    return encoder(family).shown(content)


def network_of(
    family: str, *, pack: bool = True, trained: str | tuple[str, ...] = (), store: FeatureStore | None = None
) -> TokenNetwork:
    """A network of a copy of the family's model, of which the parameters that begin so take a gradient."""
    model = copy.deepcopy(parts(family)[0])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(trained) and name.startswith(trained))
    return TokenNetwork(model, pack=pack, sight=Sight(model, FAMILIES[family], shown(family), store))


@functools.cache
def tokens(family: str, rows: Any = ROWS) -> Tokens:
    encoded = [encoder(family)([sample(question, answer, *images) for answer in answers]) for question, answers, images in rows]
    return tokens_of([one for one in encoded for one in _single(one)], 1, wanted=frozenset())


def _single(encoded: Any) -> list[Any]:
    """A row for every sample, so that rows may have different numbers of them."""
    from dataclasses import replace

    return [
        replace(
            encoded,
            contexts=(encoded.contexts[encoded.context_of[n]],),
            continuations=(encoded.continuations[n],),
            context_of=(0,),
            given=(encoded.given[n],),
            media=(encoded.media[encoded.context_of[n]],) if encoded.media else (),
        )
        for n in range(len(encoded.continuations))
    ]


def shared(family: str, rows: Any = ROWS) -> Tokens:
    """The same sequences, the answers of a row behind one context."""
    plain = tokens(family, rows)
    owners = [number for number, (_, answers, _) in enumerate(rows) for _ in answers]
    firsts = [owners.index(number) for number in range(len(rows))]
    assert all(torch.equal(plain.contexts[n], plain.contexts[firsts[owner]]) for n, owner in enumerate(owners))
    media = None if plain.media is None else tuple(plain.media[n] for n in firsts)
    contexts = tuple(plain.contexts[n] for n in firsts)
    return Tokens(
        contexts=contexts, continuations=plain.continuations, context_of=tuple(owners), weights=plain.weights, media=media
    )


def naive(model: Any, family: str) -> Tensor:
    """Sums of the model's own log-probabilities: each prompt and answer alone, with its pixels, from the processor."""
    found, number = [], 0
    for question, answers, images in ROWS:
        for answer in answers:
            ids = tokens(family).continuations[number]
            if family == "paligemma" and not images:  # whose processor refuses texts alone
                whole = arguments(family, *sequence(encoder(family)([sample(question, answer)]), 0))
            else:
                whole = in_one_go(family, question, answer, list(images))
            assert whole["input_ids"][0, -len(ids) :].tolist() == ids.tolist()
            found.append(token_logps(model(**whole).logits[0], whole["input_ids"][0], len(ids)).sum())
            number += 1
    return torch.stack(found)


@FAMILY
def test_packed_and_padded_rows_give_what_the_model_gives_for_each_answer_with_its_pixels(family: str) -> None:
    network = network_of(
        family, trained="model.language_model" if family not in ("idefics3", "smolvlm") else "model.text_model"
    )
    assert network.packs == (family in PACKING), network.why_not
    want = naive(network.model, family)
    wanted = gradients(network.model, (want * STAKES).sum())
    assert float(want.detach().std()) > 0.1
    sight: Any = network.sight
    for layout in (shared(family).padded(pad=1), *((shared(family).packed(),) if network.packs else ())):
        got = network(layout)["logps"]
        torch.testing.assert_close(got, want.double(), rtol=0, atol=1e-5 if family in ("gemma3", "paligemma") else 1e-9)
        errors = relative_errors(gradients(network.model, (got * STAKES).sum()), wanted)
        assert max(errors.values()) < 1e-5, max(errors.items(), key=lambda item: item[1])
    distinct = {image.key for seen in shared(family).media or () if seen is not None for image in seen.images}
    assert sight.frozen and sight.num_encoded == 1 + len(
        distinct
    )  # the probe's image, and each other once, whatever the passes
    assert len(distinct) == (3 if family == "llava_onevision" else 2)  # which cuts images of several into fewer patches


@FAMILY
def test_arms_with_images_of_their_own_are_scored_as_each_is_alone(family: str) -> None:
    arms = (("red", (WIDE,)), ("blue", (TALL,)), ("no", ()), ("a red one", (WIDE,)))
    encoded = encoder(family)([sample("what?", answer, *images) for answer, images in arms])
    assert len(encoded.contexts) == 3
    network = network_of(family)
    with torch.no_grad():
        want = []
        for number in range(len(arms)):
            ids, seen = sequence(encoded, number)
            logits = network.model(**arguments(family, ids, seen)).logits[0]
            want.append(token_logps(logits, torch.tensor(ids), len(encoded.continuations[number])).sum())
        found = tokens_of([encoded], len(arms), wanted=frozenset())
        for layout in (found.padded(pad=1, multiple=8), *((found.packed(),) if network.packs else ())):
            got = network(layout)["logps"]
            torch.testing.assert_close(got, torch.stack(want).double(), rtol=0, atol=1e-5)
    assert len({round(float(value), 4) for value in want}) == len(arms)


@FAMILY
def test_a_layout_that_shows_nothing_is_run_as_a_text(family: str) -> None:
    network = network_of(family)
    plain, mixed = shared(family, ROWS[2:]), shared(family)
    with torch.no_grad():
        want = network(mixed.padded())["logps"][5:]
        for layout in (plain.padded(), *((plain.packed(),) if network.packs else ())):
            torch.testing.assert_close(network(layout)["logps"], want, rtol=0, atol=1e-5)


@FAMILY
def test_towers_and_projectors_that_are_trained_get_the_gradient_of_the_naive_path(family: str) -> None:
    trained = {name for name, _ in parts(family)[0].named_parameters() if part_of(name, FAMILIES[family]) != "language"}
    network = network_of(family, trained=tuple(trained))
    sight: Any = network.sight
    wanted = gradients(network.model, (naive(network.model, family) * STAKES).sum())
    before = sight.num_encoded
    layout = shared(family).packed() if network.packs else shared(family).padded(pad=1)
    got = gradients(network.model, (network(layout)["logps"] * STAKES).sum())
    assert not sight.frozen and sight.num_encoded - before == (3 if family == "llava_onevision" else 2)
    assert {name for name, gradient in got.items() if gradient.any()} <= wanted.keys()
    known = {name: got[name] for name in wanted}
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    errors = {name: float((known[name] - gradient).abs().max()) / scale for name, gradient in wanted.items()}
    assert max(errors.values()) < 1e-6, max(errors.items(), key=lambda item: item[1])
    assert scale > 1e-2


def test_features_of_another_number_than_their_placeholders_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of("llava")
    sight: Any = network.sight
    monkeypatch.setattr(sight, "features", lambda model, images: [networks.Features(tokens=torch.zeros(15, 32))] * len(images))
    with pytest.raises(UserError, match=r"got 45 features of images for 48 tokens.*num_additional_image_tokens"):
        network(shared("llava").packed())


def test_an_architecture_that_cannot_be_packed_says_why() -> None:
    assert network_of("mllama").why_not == "its tokens attend to images across, not within the row"


@pytest.mark.parametrize("family", PACKING)
def test_a_prompts_image_moves_its_own_answers_alone(family: str) -> None:
    network = network_of(family)
    other = ((ROWS[0][0], ROWS[0][1], (picture(5, 60, 40),)), *ROWS[1:])
    with torch.no_grad():
        before, after = (network(shared(family, rows).packed())["logps"] for rows in (ROWS, other))
    assert float((after[:3] - before[:3]).abs().min()) > 1e-3
    torch.testing.assert_close(after[3:], before[3:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_a_plain_causal_mask_would_be_wrong(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of(family)
    layout = shared(family).packed()
    with torch.no_grad():
        right = network(layout)["logps"]
        inside = {0: ((0, 1),)} if family == "paligemma" else {}  # its layers want to be told that they are not causal
        monkeypatch.setattr(Sight, "blocks", lambda self, layout: inside)
        wrong = network(layout)["logps"]
    assert float((wrong - right)[:3].abs().max()) > 1e-2


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_places_in_the_sequence_instead_of_rotary_positions_would_be_wrong(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = network_of(family)
    layout = shared(family).packed()
    with torch.no_grad():
        right = network(layout)["logps"]
        monkeypatch.setattr(networks, "_rotary_positions", lambda layout: layout.positions.expand(3, -1, -1))
        wrong = network(layout)["logps"]
    assert float((wrong - right)[:5].abs().max()) > 1e-3
    torch.testing.assert_close(wrong[5:], right[5:])


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_videos_are_seen_as_the_model_sees_them(family: str) -> None:
    frames = [picture(n, 40, 40) for n in range(4)]
    encode = encoder(family, as_video=True)
    one = sample("what moves?", "a disc", *frames)
    encoded = encode([one, sample("what moves?", "nothing", *frames), sample("which?", "one", WIDE)])
    seen = encoded.media[0]
    assert seen is not None and seen.images[0].kind == ("image" if family == "internvl" else "video")
    found = tokens_of([encoded], 3, wanted=frozenset())
    model = parts(family)[0]
    with torch.no_grad():
        want = []
        for number in range(3):
            ids, shown_there = sequence(encoded, number)
            logits = model(**arguments(family, ids, shown_there)).logits[0]
            want.append(token_logps(logits, torch.tensor(ids), len(encoded.continuations[number])).sum())
        network = network_of(family)
        for layout in (found.packed(), found.padded()):
            torch.testing.assert_close(network(layout)["logps"], torch.stack(want).double(), rtol=0, atol=1e-8)


# --- what is remembered -------------------------------------------------------------------------------------------------


def test_the_projectors_gradient_is_that_of_the_naive_path_and_nothing_is_remembered() -> None:
    network = network_of("llava", trained="model.multi_modal_projector")
    sight: Any = network.sight
    assert not sight.frozen
    wanted = gradients(network.model, (naive(network.model, "llava") * STAKES).sum())
    before = sight.num_encoded
    got = gradients(network.model, (network(shared("llava").packed())["logps"] * STAKES).sum())
    assert sight.num_encoded == before + 2  # each distinct image once
    assert max(relative_errors(got, wanted).values()) < 1e-6 and len(wanted) == 4
    network(shared("llava").packed())
    assert sight.num_encoded == before + 4


@FAMILY
def test_a_layout_that_shows_nothing_reaches_every_weight_that_is_trained(family: str) -> None:
    network = network_of(family, trained="model.")
    layout = shared(family, ROWS[2:]).packed() if network.packs else shared(family, ROWS[2:]).padded()
    found = gradients(network.model, network(layout)["logps"].sum())
    assert found.keys() == {name for name, parameter in network.model.named_parameters() if parameter.requires_grad}
    elsewhere = [gradient for name, gradient in found.items() if part_of(name, FAMILIES[family]) != "language"]
    assert elsewhere and not any(gradient.any() for gradient in elsewhere)
    frozen: Any = network_of(family).sight
    assert frozen.touched(network.model, layout) is None


def test_little_is_remembered_beside_the_images_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "MOST_BYTES", 0)
    network = network_of("llava")
    sight: Any = network.sight
    first, second = (shared("llava", ROWS[n : n + 1]).packed() for n in (0, 1))
    before = sight.num_encoded
    with torch.no_grad():
        network(first), network(first)
        assert sight.num_encoded == before + 1
        network(second)  # the same image and another
        assert sight.num_encoded == before + 2 and len(sight._memo) == 2
        network(first)
        assert sight.num_encoded == before + 2 and len(sight._memo) == 1


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "mllama"])
def test_features_on_disk_are_those_of_the_tower(family: str, tmp_path: Path) -> None:
    layout = shared(family).padded()
    with torch.no_grad():
        want = network_of(family)(layout)["logps"]
        first = network_of(family, store=FeatureStore(tmp_path, "a" * 64))
        torch.testing.assert_close(first(layout)["logps"], want, rtol=0, atol=0)
        again = network_of(family, store=FeatureStore(tmp_path, "a" * 64))
        sight: Any = again.sight
        torch.testing.assert_close(again(layout)["logps"], want, rtol=0, atol=0)
    assert sight.num_encoded == 0
    assert len(list(tmp_path.glob("*/*/*.safetensors"))) == 3
    other: Any = network_of(family, store=FeatureStore(tmp_path, "b" * 64)).sight
    assert other.num_encoded == 1


def test_features_of_another_precision_are_not_taken_for_these() -> None:
    network = network_of("llava").float()
    network.model.float()
    sight: Any = network.sight
    sight.forget()
    layout = shared("llava").packed()
    with torch.no_grad():
        plain = network(layout)["logps"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = network(layout)["logps"]
        torch.testing.assert_close(network(layout)["logps"], plain, rtol=0, atol=0)
    assert not torch.equal(rough, plain) and len({how for _, how in sight._memo}) == 2
