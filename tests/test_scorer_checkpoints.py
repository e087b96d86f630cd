"""Checkpoint files of scorers: every published form is read, no code in them is run, and keys that do not fit are listed."""

import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import (
    DIM,
    OPEN_CLIP_NAME,
    V2_KEYS,
    aesthetic_heads,
    hps_folder,
    new_folder,
    open_clip_folder,
    open_clip_state,
    transformers_clip,
)
from torch import nn

from mmalign.errors import UserError
from mmalign.scorers import SCORERS
from mmalign.scorers.checkpoints import SHOWN_KEYS, check_keys, load_checked, read_checkpoint

STATE = {"0.weight": torch.arange(6.0).reshape(3, 2), "0.bias": torch.tensor([1.0, 2.0, 3.0])}


def same(state, expected=STATE):
    return state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_are_read_in_the_new_and_the_old_format(suffix, zipped, tmp_path):
    torch.save(STATE, tmp_path / f"a.{suffix}", _use_new_zipfile_serialization=zipped)
    assert same(read_checkpoint(tmp_path / f"a.{suffix}"))
    assert same(read_checkpoint(str(tmp_path), file=f"a.{suffix}"))


def test_safetensors_are_read_from_a_file_and_a_folder(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors")
    assert same(read_checkpoint(str(tmp_path / "a.safetensors")))
    assert same(read_checkpoint(tmp_path, file="a.safetensors"))


@pytest.mark.parametrize(
    "wrapped",
    [
        {"state_dict": STATE, "epoch": 3},
        {"model": STATE},
        {f"module.{key}": value for key, value in STATE.items()},
        {"state_dict": {f"module.{key}": value for key, value in STATE.items()}, "name": "run"},
    ],
)
def test_what_training_scripts_wrap_around_weights_is_taken_off(wrapped, tmp_path):
    torch.save(wrapped, tmp_path / "a.pt")
    assert same(read_checkpoint(tmp_path / "a.pt"))


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


def test_code_in_a_pickle_is_refused_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(1), "more": Bomb()}, "a.pt")
    with pytest.raises(UserError, match=r"hps_v2\.checkpoint: got 'a\.pt', which is damaged or holds more than tensors"):
        read_checkpoint("a.pt", place="hps_v2.checkpoint")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut off", bytes(range(256)) * 4])
def test_a_damaged_file_is_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="which is damaged or holds more than tensors"):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("value", [[torch.zeros(1)], {}, {"weight": 3.0}, {"state_dict": {"weight": "text"}}])
def test_a_file_without_named_tensors_is_refused(value, tmp_path):
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"want a file of named tensors, a state dict"):
        read_checkpoint(tmp_path / "a.pt")


def test_a_place_that_holds_nothing_says_what_is_wanted(tmp_path):
    for source, file, wants in (
        (tmp_path, None, "want the name of a file in it as well"),
        (tmp_path, "a.pt", r"want a\.pt in it"),
        (tmp_path / "gone.pt", None, "want a file, a folder or a hub id. Nothing lies there"),
        ("gone/a.pt", "b.pt", "want a file, a folder or a hub id. Nothing lies there"),
        ("owner/name", None, "want the name of a file in it as well"),
        ("owner/name", "a.pt", r"no local path, want a hub id that holds a\.pt .*download the file and name its path"),
        ("own er/name", "a.pt", r"no local path, want a hub id that holds a\.pt .*alphanumeric"),
    ):
        with pytest.raises(UserError, match=wants):
            read_checkpoint(source, file=file, place="hps_v2.checkpoint")
    (tmp_path / "notes.txt").write_text("weights")
    with pytest.raises(UserError, match=r"want a file that ends in \.pt, "):
        read_checkpoint(tmp_path / "notes.txt")


def test_all_faults_of_keys_come_in_one_message_and_nothing_is_loaded():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    state = {
        **STATE,
        "0.bias": torch.zeros(4),
        "1.weight": torch.zeros(1, 3),
        "more": torch.zeros(1),
        "again": torch.zeros(1, 3),
    }
    with pytest.raises(UserError) as told:
        load_checked(module, state, place="here", rename=lambda key: "1.weight" if key == "again" else key)
    message = str(told.value)
    assert message.startswith("here: got a checkpoint with keys 1 missing: 1.bias; 1 unexpected: more; ")
    assert "1 of another shape: 0.bias [4] (want [3]); 1 twice: 1.weight, want exactly the model's." in message
    assert same(module.state_dict(), before)


def test_keys_are_renamed_or_left_out_and_the_rest_is_loaded():
    module = nn.Linear(2, 3)
    rename = {"0.weight": "weight", "0.bias": "bias"}.get
    load_checked(module, {**STATE, "position_ids": torch.arange(5)}, place="here", rename=rename)
    assert torch.equal(module.weight, STATE["0.weight"]) and torch.equal(module.bias, STATE["0.bias"])


def test_long_lists_of_keys_are_counted_and_cut():
    keys = [f"k{number:03}" for number in range(SHOWN_KEYS + 5)]
    with pytest.raises(UserError, match=rf"{len(keys)} missing: k000, .*k{SHOWN_KEYS - 1:03} and 5 more, want"):
        check_keys("here", missing=keys, unexpected=[], misshapen={})


def spoilt(state, missing, misshapen):
    """Without one key, with another of a wrong shape, and with one too many."""
    state = {key: value for key, value in state.items() if key != missing}
    return {**state, misshapen: torch.zeros(2, 2), "one_too_many": torch.zeros(1)}


def assert_listed(build, place, missing, misshapen, shape):
    with pytest.raises(UserError) as told:
        build()
    message = str(told.value)
    assert message.startswith(f"{place}: got a checkpoint with keys 1 missing: {missing}; 1 unexpected: one_too_many; ")
    assert f"1 of another shape: {misshapen} [2, 2] (want {shape})" in message


@pytest.mark.parametrize("name", ["pick_score", "clip_score", "aesthetic"])
def test_a_clip_folder_with_keys_that_do_not_fit_is_refused_with_their_list(name, tmp_path):
    folder = shutil.copytree(transformers_clip(), tmp_path / "clip")
    missing, misshapen = "visual_projection.weight", "text_model.embeddings.position_embedding.weight"
    save_file(
        spoilt(load_file(folder / "model.safetensors"), missing, misshapen), folder / "model.safetensors", {"format": "pt"}
    )
    more = {"pick_score": {"processor": str(folder)}, "aesthetic": {"head": str(aesthetic_heads() / "v2.pth")}}.get(name, {})
    assert_listed(lambda: SCORERS[name](model=str(folder), **more), f"{name}.model", missing, misshapen, [77, 16])


def test_positions_that_published_clips_were_saved_with_are_no_fault(tmp_path):
    folder = shutil.copytree(transformers_clip(), tmp_path / "clip")
    state = load_file(folder / "model.safetensors")
    counted = {f"{tower}_model.embeddings.position_ids": torch.arange(n)[None] for tower, n in (("text", 77), ("vision", 5))}
    save_file({**state, **counted}, folder / "model.safetensors", {"format": "pt"})
    images = [Image.new("RGB", (24, 20), "red")]
    scores = [SCORERS["clip_score"](model=str(one), scale="cosine")(["a cat"], images) for one in (folder, transformers_clip())]
    assert torch.equal(*scores)


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_hps_weights_that_do_not_fit_are_refused_with_the_list_of_keys(form, tmp_path):
    hps_folder()  # open_clip learns the model's name
    missing, misshapen = "visual.proj", "text_projection"
    state = spoilt({key: value.contiguous() for key, value in open_clip_state().items()}, missing, misshapen)
    path = tmp_path / f"hps.{form}"
    if form == "pt":
        torch.save({"state_dict": state}, path)
    else:
        save_file(state, path)
    build = lambda: SCORERS["hps_v2"](checkpoint=str(path), model=OPEN_CLIP_NAME)  # noqa: E731
    assert_listed(build, "hps_v2.checkpoint", missing, misshapen, [16, DIM])


def test_hps_weights_as_safetensors_score_as_the_published_form(tmp_path):
    from PIL import Image

    state = torch.load(hps_folder() / "HPS_v2.1_compressed.pt")["state_dict"]
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "hps.safetensors")
    one, other = (
        SCORERS["hps_v2"](checkpoint=str(path), model=OPEN_CLIP_NAME, device="cpu")(["a"], [Image.new("RGB", (9, 5), "red")])
        for path in (hps_folder(), tmp_path / "hps.safetensors")
    )
    assert torch.equal(one, other)


def test_aesthetic_heads_of_the_other_version_or_of_a_wider_clip_are_refused_with_their_keys():
    settings = {"model": str(transformers_clip()), "device": "cpu"}
    heads = aesthetic_heads()
    with pytest.raises(UserError, match=r"^aesthetic\.head: got .*10 missing: layers\.0\.bias, .*2 unexpected: bias, weight"):
        SCORERS["aesthetic"](head=str(heads / "v1.pth"), **settings)
    with pytest.raises(UserError, match=r"^aesthetic\.head: got .*2 missing: bias, weight; 10 unexpected: layers\.0\.bias"):
        SCORERS["aesthetic"](head=str(heads / "v2.pth"), version="v1", **settings)
    published = new_folder() / "sac+logos+ava1-l14-linearMSE.pth"
    widths = (768, 1024, 128, 64, 16, 1)
    shapes = [shape for want, have in zip(widths[1:], widths[:-1], strict=True) for shape in ((want, have), (want,))]
    torch.save({key: torch.zeros(shape) for key, shape in zip(V2_KEYS, shapes, strict=True)}, published)
    with pytest.raises(UserError, match=rf"1 of another shape: layers\.0\.weight \[1024, 768\] \(want \[1024, {DIM}\]\), want"):
        SCORERS["aesthetic"](head=str(published), **settings)


def test_the_published_ids_are_asked_for_and_without_a_connection_the_message_says_what_to_do(tmp_path):
    hps_folder()
    head = str(aesthetic_heads() / "v2.pth")
    for name, settings, message in (
        (
            "hps_v2",
            {"model": OPEN_CLIP_NAME},
            r"checkpoint: got 'xswu/HPSv2', .*that holds HPS_v2\.1_compressed\.pt .*connection",
        ),
        ("hps_v2", {"model": OPEN_CLIP_NAME, "version": "v2"}, r"checkpoint: .*that holds HPS_v2_compressed\.pt"),
        ("pick_score", {}, r"processor: got 'laion/CLIP-ViT-H-14-laion2B-s32B-b79K', .*check the name and the connection"),
        ("pick_score", {"processor": str(transformers_clip())}, r"model: got 'yuvalkirstain/PickScore_v1', .*connection"),
        ("aesthetic", {"head": head}, r"model: got 'openai/clip-vit-large-patch14', .*connection"),
        ("aesthetic", {"head": "owner/name"}, r"head: got 'owner/name', want the name of a file in it as well"),
        ("clip_score", {"model": str(tmp_path / "nowhere")}, r"model: got .*nowhere.*want a folder"),
    ):
        with pytest.raises(UserError, match=rf"^{name}\.{message}"):
            SCORERS[name](**settings)


@pytest.mark.parametrize("model", ["ViT-H-15", "coca_ViT-B-32", "xlm-roberta-base-ViT-B-32"])
def test_hps_over_anything_but_a_plain_clip_is_refused(model):
    with pytest.raises(UserError, match=rf"hps_v2\.model: got '{model}', want open_clip's name of a plain CLIP"):
        SCORERS["hps_v2"](checkpoint=str(hps_folder()), model=model)


@pytest.mark.parametrize("settings", [{"model": "ViT-B-32"}, {"model": "local-dir:x", "pretrained": "openai"}])
def test_open_clip_never_scores_with_unused_weights_or_none_named(settings):
    with pytest.raises(UserError, match=r"clip_score_open_clip\.pretrained"):
        SCORERS["clip_score_open_clip"](**settings)


def test_open_clip_never_scores_with_random_weights_or_weights_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match="open_clip can load"):
        SCORERS["clip_score_open_clip"](model=f"local-dir:{tmp_path / 'nowhere'}")
    shutil.copy(open_clip_folder() / "open_clip_config.json", tmp_path)
    with pytest.raises(UserError, match=r"open_clip can load .*pretrained weights .* could not be loaded"):
        SCORERS["clip_score_open_clip"](model=f"local-dir:{tmp_path}", device="cpu")
    state = {key: value.contiguous() for key, value in open_clip_state().items()}
    save_file(spoilt(state, "visual.proj", "text_projection"), tmp_path / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=r"open_clip can load .*visual\.proj.*one_too_many.*text_projection"):
        SCORERS["clip_score_open_clip"](model=f"local-dir:{tmp_path}", device="cpu")


def test_an_unknown_device_is_a_user_fault():
    with pytest.raises(UserError, match="device: got 'gpu0', want auto"):
        SCORERS["clip_score"](model=str(transformers_clip()), device="gpu0")
