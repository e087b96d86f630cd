import functools
import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from mmalign.errors import UserError
from mmalign.records import (
    VIEWS,
    Comparison,
    Content,
    Dropped,
    Examples,
    Fault,
    Judgement,
    Media,
    append_judgements,
    best,
    comparison,
    outlines,
    pair,
    preference_scores,
    raise_faults,
    ranked,
    read,
    read_judgements,
    to_dataset,
    to_row,
    told_faults,
    unpaired,
    with_judgements,
    write,
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(red=0, size=(8, 6)):
    return encoded(Image.new("RGB", size, (red, 0, 0)))


def image(data):
    return Content(images=(Media(data=data),))


def row(k=2, **judged):
    candidates = tuple(image(png(i)) for i in range(k))
    return Comparison(id="r", prompt=Content(text="a cat"), candidates=candidates, **judged)


def order(example, of):
    return [of.candidates.index(sample.completion) for sample in example.samples]


# --- media ---------------------------------------------------------------------------------------------------------


def test_equal_content_has_an_equal_key_wherever_it_lies(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    assert Media(path=str(tmp_path / "a.png")).key() == Media(data=png()).key() != Media(data=png(1)).key()


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK"])
def test_a_white_image_of_any_mode_opens_as_white_rgb(mode):
    data = encoded(Image.new("RGB", (4, 3), "white").convert(mode), "TIFF")
    opened = Media(data=data).open()
    assert (opened.mode, opened.size) == ("RGB", (4, 3))
    assert np.asarray(opened).min() == 255


def test_cmyk_jpeg_keeps_its_colour():
    red = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    pixel = np.asarray(Media(data=red).open()).astype(int)[4, 4]
    assert pixel[0] > 230 and pixel[1] < 25 and pixel[2] < 25


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    grey = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    opened = Media(data=encoded(Image.fromarray(grey))).open()
    assert np.asarray(opened)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_sixteen_bit_colour_is_scaled_and_not_clipped():
    pixels = struct.pack(">3H", 65535, 32768, 0)
    chunk = lambda name, body: (  # noqa: E731
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    )
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + pixels))
    assert Media(data=data + chunk(b"IEND", b"")).open().getpixel((0, 0)) == (255, 128, 0)


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 255))
    opened = Media(data=encoded(clear)).open()
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (255, 0, 0)]


def test_a_transparent_palette_colour_is_laid_on_white():
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([255, 0, 0])
    assert Media(data=encoded(palette, transparency=0)).open().getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    media = Media(data=encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif))
    assert media.open().size == (4, 8)
    assert media.inspect() == ((4, 8), "RGB")


def test_floating_point_pixels_are_refused_because_they_have_no_white():
    data = encoded(Image.fromarray(np.ones((2, 2), dtype=np.float32)), "TIFF")
    with pytest.raises(UserError, match="mode F has no fixed range"):
        Media(data=data).open()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_image_is_an_error_that_names_file_and_row(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    media = Media(data=data[: len(data) // 2], path="media/a", where="pairs.jsonl:17: candidate 2")
    for look in (media.open, media.inspect):
        with pytest.raises(UserError, match=r"pairs.jsonl:17: candidate 2 \(media/a\): got a damaged image"):
            look()


def test_what_is_no_image_is_an_error():
    with pytest.raises(UserError, match=r"pairs\.jsonl:1.* damaged image"):
        Media(data=b"no image", where="pairs.jsonl:1").open()


def test_a_missing_image_is_an_error_that_names_file_and_row():
    with pytest.raises(UserError, match=r"pairs\.jsonl:3 \(gone\.png\): the image cannot be read"):
        Media(path="gone.png", where="pairs.jsonl:3").open()


# --- rows ----------------------------------------------------------------------------------------------------------


def test_a_comparison_survives_its_table():
    value = row(scores={"pickscore": (20.5, 21.0)}, ranks=(2.0, 1.0), prob=0.25, weight=0.5, margin=1.5,
                provenance=({"seed": 1}, {"seed": 2}))  # fmt: skip
    assert comparison(to_dataset([value])[0], "x:1") == value


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"prompt": Content(text="  ")}, "empty prompt"),
        ({"candidates": (Content(text="only one"),)}, "got 1 candidate, want at least 2"),
        ({"candidates": (Content(text="a"), Content())}, "candidate 2 has neither text nor image"),
        ({"ranks": (1.0,)}, "got 1 ranks for 2 candidates"),
        ({"scores": {"clip": (1.0, float("nan"))}}, "want finite numbers"),
        ({"prob": 1.5}, "got prob 1.5, want a probability from 0 to 1"),
        ({"prob": 0.2, "ranks": (1.0, 2.0)}, "disagree"),
        ({"prob": 0.2, "candidates": (Content(text="a"),) * 3}, "Give ranks instead"),
        ({"weight": -1.0}, "got weight -1.0"),
        ({"provenance": ({},)}, "got 1 provenance entries"),
    ],
)
def test_each_fault_of_a_row_is_told_with_its_place(changes, fault):
    entry = to_row(row()) | {k: v for k, v in to_row(Comparison(**{**vars(row()), **changes})).items() if k != "where"}
    with pytest.raises(UserError, match=f"^pairs.jsonl:17: .*{fault}"):
        comparison(entry, "pairs.jsonl:17")


def test_all_faults_of_a_row_are_told_at_once():
    entry = to_row(row(weight=-1.0, margin=-2.0))
    with pytest.raises(UserError, match=r"weight -1\.0.*margin -2\.0"):
        comparison(entry, "x:1")


# --- views ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [{"ranks": (1.0, 1.0)}, {"prob": 0.5}, {"scores": {"clip": (0.3, 0.3)}}])
@pytest.mark.parametrize("view", [pair, ranked, unpaired, best])
def test_a_tie_is_never_won_by_the_first_image(tie, view):
    assert view(row(**tie)) == Dropped("tie")


def test_a_soft_tie_has_probability_one_half_and_a_decided_row_one():
    tied, decided = row(ranks=(1.0, 1.0)), row(ranks=(2.0, 1.0))
    assert pair(tied, ties="soft")[0].side == {"prob": 0.5}
    assert pair(decided, ties="soft")[0].side == {"prob": 1.0}


def test_the_better_candidate_stands_first():
    value = row(ranks=(2.0, 1.0))
    (example,) = pair(value)
    assert (order(example, value), example.side) == ([1, 0], {})


@pytest.mark.parametrize(("prob", "first"), [(0.7, 0), (0.3, 1)])
def test_a_soft_label_is_turned_with_its_pair(prob, first):
    value = row(prob=prob)
    (example,) = pair(value)
    assert order(example, value)[0] == first
    assert example.side == {"prob": pytest.approx(0.7)}


def test_weight_and_margin_of_the_row_are_carried():
    (example,) = pair(row(ranks=(1.0, 2.0), weight=0.5, margin=1.5))
    assert example.side == {"weight": 0.5, "margin": 1.5}


def test_of_many_candidates_the_best_meets_the_worst():
    value = row(4, ranks=(2.0, 4.0, 1.0, 3.0))
    (example,) = pair(value)
    assert order(example, value) == [2, 1]


def test_all_pairs_leaves_out_the_tied_ones():
    value = row(3, ranks=(1.0, 2.0, 2.0))
    examples = pair(value, pairs="all")
    assert [order(e, value) for e in examples] == [[0, 1], [0, 2]]
    assert len({e.id for e in examples}) == 2
    assert [e.side["prob"] for e in pair(value, pairs="all", ties="soft")] == [1.0, 1.0, 0.5]


def test_a_score_gap_below_min_gap_is_a_tie():
    value = row(scores={"pickscore": (20.0, 20.4)})
    assert pair(value, min_gap=0.5) == Dropped("tie")
    assert order(pair(value, min_gap=0.4 - 1e-9)[0], value) == [1, 0]
    assert pair(value, min_gap=0.5, ties="soft")[0].side == {"prob": 0.5}


def test_by_chooses_the_judge():
    value = row(ranks=(1.0, 2.0), scores={"clip": (0.1, 0.2), "pickscore": (21.0, 20.0)})
    assert order(pair(value)[0], value) == [0, 1]
    assert order(pair(value, by="clip")[0], value) == [1, 0]
    assert order(pair(value, by="pickscore")[0], value) == [0, 1]
    assert pair(value, by="pickscor") == Dropped("not judged by pickscor. Did you mean pickscore?")


def test_several_judges_and_no_ranks_ask_which_one():
    with pytest.raises(UserError, match="Set the view's by to one of them"):
        pair(row(scores={"clip": (0.1, 0.2), "pickscore": (21.0, 20.0)}))


def test_min_gap_with_ranks_is_refused():
    with pytest.raises(UserError, match="ordered by ranks"):
        pair(row(ranks=(1.0, 2.0)), min_gap=0.1)


@pytest.mark.parametrize("view", sorted(VIEWS.keys() - {"prompts", "blind", "clips", "crossed", "retrieved"}))
def test_a_row_without_verdict_is_dropped_by_every_view_that_needs_one(view):
    assert VIEWS[view](row()) == Dropped("not judged")


def test_preference_scores_count_wins_over_judges_with_ties_half():
    # judge a: 0 beats 1 and 2, 1 beats 2; judge b: 1 beats 0 and 2, 0 ties 2. n (k - 1) = 4
    assert preference_scores([(3.0, 2.0, 1.0), (0.0, 1.0, 0.0)]) == (2.5 / 4, 3 / 4, 0.5 / 4)


def test_ranked_puts_the_highest_preference_score_first():
    value = row(3, scores={"a": (3.0, 2.0, 1.0), "b": (0.0, 1.0, 0.0)})
    (example,) = ranked(value)
    assert order(example, value) == [1, 0, 2]
    assert example.side == {"scores": (0.75, 0.625, 0.125)}


def test_ranked_falls_back_on_ranks_and_thins_to_a_stated_number():
    value = row(5, ranks=(5.0, 4.0, 3.0, 2.0, 1.0))
    assert ranked(value)[0].side == {"scores": (1.0, 0.75, 0.5, 0.25, 0.0)}
    (thinned,) = ranked(value, num_candidates=3)
    assert order(thinned, value) == [4, 2, 0] and thinned.side == {"scores": (1.0, 0.5, 0.0)}
    assert ranked(value, num_candidates=6) == Dropped("5 candidates, want 6")


def test_unpaired_labels_each_candidate():
    value = row(3, ranks=(2.0, 1.0, 3.0))
    assert [e.side["labels"] for e in unpaired(value)] == [0.0, 1.0, 0.0]
    assert [e.side["labels"] for e in unpaired(value, positive="ever")] == [1.0, 1.0, 0.0]
    assert [len(e.samples) for e in unpaired(value)] == [1, 1, 1]
    tied = row(ranks=(1.0, 1.0))
    assert [e.side["labels"] for e in unpaired(tied, ties="negative")] == [0.0, 0.0]
    assert [e.side["labels"] for e in unpaired(tied, ties="positive")] == [1.0, 1.0]


def test_best_keeps_the_best_alone():
    value = row(3, ranks=(2.0, 1.0, 3.0))
    (example,) = best(value)
    assert order(example, value) == [1]
    tied = row(3, ranks=(1.0, 1.0, 2.0))
    assert best(tied) == Dropped("tie")
    assert [order(e, tied) for e in best(tied, ties="all")] == [[0], [1]]


def test_examples_count_what_the_view_drops_and_read_media_late():
    rows = [row(ranks=(2.0, 1.0)), row(ranks=(1.0, 1.0)), row(), row(ranks=(1.0, 2.0))]
    examples = Examples(to_dataset(rows), pair)
    assert len(examples) == 2
    assert examples.dropped == {"tie": 1, "not judged": 1}
    assert examples.summary() == "4 rows: 2 examples; 2 rows dropped (tie: 1, not judged: 1)"
    assert [examples.row(i) for i in range(2)] == [0, 3]
    assert [e.samples[0].completion.images[0].read() for e in examples[:]] == [png(1), png(0)]


def test_examples_know_the_first_row_that_lacks_a_further_completion():
    given = [{"rationale"}, {"gold", "rationale"}, {"gold"}]
    rows = [
        row(where=f"row {n + 1}", ranks=(1.0, 2.0), extras=dict.fromkeys(names, Content(text="x")))
        for n, names in enumerate(given)
    ]
    examples = Examples(to_dataset(rows), pair)
    assert examples.extras == {"rationale": 2, "gold": 2}
    assert examples.first_lacking("rationale") == "row 3" and examples.first_lacking("gold") == "row 1"
    assert examples.first_lacking("exploration") == "row 1"


def test_examples_count_pairs_scored_against_their_order_and_keep_the_first_place_alone():
    given = [(2.0, 1.0), (1.0, 2.0), (0.0, 3.0)]
    rows = [row(where=f"row {n + 1}", ranks=(1.0, 2.0), scores={"s": scores}) for n, scores in enumerate(given)]
    examples = Examples(to_dataset(rows), functools.partial(pair, with_scores=True))
    assert (examples.against, examples.first_against) == (2, "row 2")


def test_examples_of_nothing_usable_say_why():
    with pytest.raises(UserError, match=r"no usable row.*tie: 1"):
        Examples(to_dataset([row(ranks=(1.0, 1.0))]), functools.partial(pair, ties="drop"))


def test_outlines_have_everything_but_the_media():
    value = row(3, ranks=(1.0, 2.0, 3.0), scores={"clip": (1.0, 2.0, 3.0)})
    table = to_dataset([value, row(), value])
    seen = list(outlines(table.select([2, 1])))
    assert [len(o.candidates) for o in seen] == [3, 2]
    assert (seen[0].ranks, seen[0].scores, seen[0].prompt) == (value.ranks, value.scores, value.prompt)
    assert all(m.data is None for o in seen for c in o.candidates for m in c.images)


# --- judgements ----------------------------------------------------------------------------------------------------


def test_judgements_are_appended_and_pooled(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    append_judgements(path, [Judgement(comparison="r", judge="ann", ranks=(1.0, 2.0))])
    append_judgements(path, [
        Judgement(comparison="r", judge="bob", ranks=(1.0, 1.0)),
        Judgement(comparison="r", judge="clip", scores=(0.1, 0.2)),
    ])  # fmt: skip
    pooled = with_judgements(row(), read_judgements(path)["r"])
    assert (pooled.prob, pooled.ranks, pooled.scores) == (0.75, (1.0, 2.0), {"clip": (0.1, 0.2)})


def test_a_judges_last_verdict_counts():
    first, last = (Judgement(comparison="r", judge="ann", ranks=r) for r in ((1.0, 2.0), (2.0, 1.0)))
    assert with_judgements(row(), [first, last]).ranks == (2.0, 1.0)


def test_a_judgement_of_another_comparison_is_refused():
    with pytest.raises(UserError, match="want one on r"):
        with_judgements(row(), [Judgement(comparison="other", judge="ann", ranks=(1.0, 2.0))])


# --- formats on disk -----------------------------------------------------------------------------------------------


def rows_to_write():
    judged = {"ranks": (2.0, 1.0), "scores": {"clip": (0.1, 0.2)}, "weight": 0.5, "provenance": ({"seed": 1}, {})}
    return [Comparison(**{**vars(row(**judged)), "id": f"row.{i}"}) for i in range(3)]


FORMATS = [("x.parquet", None), ("x.jsonl", None), ("x.tar", None), ("saved", None), ("shards", "webdataset"),
           ("folder", "imagefolder")]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), FORMATS)
def test_every_format_gives_back_what_was_written(tmp_path, name, kind):
    rows = rows_to_write()
    back = [comparison(r) for r in read(write(rows, tmp_path / name, format=kind))]
    for got, want in zip(back, rows, strict=True):
        assert [c.images[0].read() for c in got.candidates] == [c.images[0].read() for c in want.candidates]
        assert {**vars(got), "candidates": (), "where": ""} == {**vars(want), "candidates": ()}
        assert str(tmp_path) in got.where


@pytest.mark.parametrize(("name", "kind"), [f for f in FORMATS if f[1] != "imagefolder"])
def test_prompt_images_and_texts_survive_every_format_that_can_hold_them(tmp_path, name, kind):
    prompt = Content(text="make it red", images=(Media(data=png(9)), Media(data=png(7))))
    value = Comparison(id="e", prompt=prompt, candidates=(Content(text="no"), image(png(1))), prob=0.25)
    (got,) = (comparison(r) for r in read(write(to_dataset([value]), tmp_path / name, format=kind)))
    assert [m.read() for m in got.prompt.images] == [png(9), png(7)]
    assert (got.prompt.text, got.candidates[0], got.prob) == ("make it red", Content(text="no"), 0.25)


def test_imagefolder_refuses_what_it_cannot_hold_and_leaves_nothing_behind(tmp_path):
    value = Comparison(id="e", prompt=Content(text="p"), candidates=(Content(text="a"), Content(text="b")))
    with pytest.raises(UserError, match="one image a candidate"):
        write([value], tmp_path / "folder", format="imagefolder")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_write_leaves_the_old_file_whole(tmp_path):
    write(rows_to_write(), tmp_path / "x.parquet")
    before = (tmp_path / "x.parquet").read_bytes()
    broken = Comparison(**{**vars(row()), "candidates": (Content(images=(Media(path="gone.png"),)),) * 2})
    with pytest.raises(UserError, match=r"gone\.png"):
        write([*rows_to_write(), broken], tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.parquet"]


def test_images_that_lie_beside_a_jsonl_stay_where_they_are(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(2):
        (tmp_path / "images" / f"{i}.png").write_bytes(png(i))
    candidates = tuple(Content(images=(Media(path=str(tmp_path / "images" / f"{i}.png")),)) for i in range(2))
    write([Comparison(**{**vars(row()), "candidates": candidates})], tmp_path / "x.jsonl")
    line = json.loads((tmp_path / "x.jsonl").read_text())
    assert [c["image"] for c in line["candidates"]] == ["images/0.png", "images/1.png"]
    assert not (tmp_path / "x_media").exists()


def test_a_moved_folder_still_finds_its_images(tmp_path):
    write(rows_to_write(), tmp_path / "old" / "x.jsonl")
    (tmp_path / "old").rename(tmp_path / "new")
    assert comparison(read(tmp_path / "new")[0]).candidates[0].images[0].open().size == (8, 6)


def test_a_foreign_shard_has_its_images_in_the_order_of_their_names(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as tar:
        sample = {"__key__": "s1", "json": {"prompt": "a cat", "ranks": [2, 1]}, "0.png": png(1), "1.png": png(2)}
        tar.write(sample)
    (got,) = (comparison(r) for r in read(tmp_path / "x.tar"))
    assert [c.images[0].read() for c in got.candidates] == [png(1), png(2)]
    assert (got.ranks, got.prompt.text, got.id) == ((2.0, 1.0), "a cat", "s1")


def test_webdataset_reads_the_shards_we_write(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    write(rows_to_write(), tmp_path / "x.tar")
    with open(tmp_path / "x.tar", "rb") as file:
        samples = list(
            webdataset.tariterators.group_by_keys(webdataset.tariterators.tar_file_expander([{"url": "x.tar", "stream": file}]))
        )
    assert [json.loads(s["json"])["id"] for s in samples] == ["row.0", "row.1", "row.2"]
    assert samples[0]["1.0.png"] == png(1)


def test_imagefolder_metadata_reads_the_spellings_of_pairs_in_the_wild(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    lines = [{"image": "0.png", "lose_image": "1.png", "prompt": "p"},
             {"file_name": "1.png", "rejected_file_name": "0.png", "text": "q"}]  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, second = (comparison(r) for r in read(tmp_path))
    assert (first.ranks, first.prompt.text, first.candidates[0].images[0].read()) == ((1.0, 2.0), "p", png(0))
    assert (second.ranks, second.prompt.text, second.candidates[0].images[0].read()) == ((1.0, 2.0), "q", png(1))


PAIR = [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "no valid JSON"),
        ("[]", "got a JSON list"),
        ({"prompt": "p", "candidates": PAIR, "rank": [1, 2]}, "unknown key rank. Did you mean ranks?"),
        ({"prompt": "", "candidates": PAIR}, "empty prompt"),
        ({"candidates": PAIR}, "empty prompt"),
        ({"prompt": "p", "candidates": PAIR[:1]}, "got 1 candidate, want at least 2"),
        ({"prompt": "p", "candidates": PAIR, "prob": 2}, "want a probability"),
        ({"prompt": "p", "candidates": PAIR, "ranks": ["first", "second"]}, "wrong type"),
        ({"prompt": "p", "candidates": [{"image": "gone.png"}, {"text": "b"}]}, "gone.png is missing"),
        ({"prompt": "p", "candidates": [{"img": "a.png"}, {"text": "b"}]}, "want a text or an object"),
    ],
)
def test_each_fault_of_a_line_is_told_with_file_and_line(tmp_path, line, fault):
    good = json.dumps({"prompt": "p", "candidates": PAIR})
    bad = line if isinstance(line, str) else json.dumps(line)
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{good}\n\n{bad}\n")
    with pytest.raises(UserError) as told:
        read(path)
    assert str(told.value).startswith(f"{path}:3: ") and fault in str(told.value)
    faults: list[Fault] = []
    assert len(read(path, faults=faults)) == 1
    assert [f.where for f in faults] == [f"{path}:3"]


def test_only_the_closing_line_of_many_faults_is_told_with_the_place(tmp_path):
    faults = [Fault(f"and {letter}.jsonl:1", f"has no {letter}.") for letter in "abcdefg"]
    with pytest.raises(UserError) as told:
        raise_faults(faults, "folder")
    lines = [str(fault) for fault in faults[:5]]
    assert str(told.value).splitlines() == [*lines, "folder: and 2 rows more."]
    assert told_faults(faults) == [*lines, "and 2 rows more."]


def test_many_faulty_lines_are_told_at_once_and_counted(tmp_path):
    (tmp_path / "x.jsonl").write_text("".join(f'{{"key{letter}": 1}}\n' for letter in "abcdefghi"))
    with pytest.raises(UserError, match=r"x\.jsonl:1: (.|\n)*x\.jsonl:5: (.|\n)*and 4 rows more"):
        read(tmp_path / "x.jsonl")


def test_faults_of_one_kind_are_one_sentence_with_their_number_and_the_first_places(tmp_path):
    rows = [{"prompt": f"p{n}", "candidates": [{"text": "a"}], "ranks": [1]} for n in range(9)]
    rows += [{"prompt": "p", "candidates": PAIR, "scores": {"judge": [0.5 * n, float("nan")]}} for n in range(2)]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as told:
        read(path)
    first, second = str(told.value).splitlines()
    assert first == (
        f"{path}:1: got 1 candidate, want at least 2. Add the missing one or remove the row. "
        "Such faults: 9, the next at x.jsonl:2, x.jsonl:3, x.jsonl:4, x.jsonl:5 and 4 more."
    )
    assert second == (
        f"{path}:10: got scores of judge (0.0, nan), want finite numbers. Judge the row again or remove it. "
        "Such faults: 2, the next at x.jsonl:11."
    )


def test_a_missing_or_unknown_place_is_one_clear_error(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.txt").write_text("")
    for name, fault in (("gone", "no such file or folder"), ("empty", "without comparisons"), ("x.txt", "want .jsonl")):
        with pytest.raises(UserError, match=fault):
            read(tmp_path / name)


def test_a_parquet_table_of_something_else_is_refused(tmp_path):
    import pandas

    pandas.DataFrame({"caption": ["a"]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match="no id, prompt, candidates"):
        read(tmp_path / "x.parquet")


def test_a_damaged_parquet_file_and_a_compressed_shard_are_one_clear_error(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(UserError, match="damaged Parquet"):
        read(tmp_path / "x.parquet")
    with tarfile.open(tmp_path / "x.tar", "w:gz"):
        pass
    with pytest.raises(UserError, match="want an uncompressed one"):
        read(tmp_path / "x.tar")


GOOD = '{"prompt": "a cat", "candidates": ["a", "b"], "ranks": [1, 2]}'


def test_jsonl_that_is_not_utf8_is_a_fault_of_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + GOOD.replace("cat", "caf\xe9").encode("latin-1") + b"\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:2: got text that is not UTF-8"):
        read(path)
    faults = []
    assert len(read(path, faults=faults)) == 1
    assert [fault.where for fault in faults] == [f"{path}:2"]


def test_a_byte_order_mark_is_no_fault(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD, encoding="utf-8-sig")
    assert comparison(read(path)[0]).prompt.text == "a cat"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"candidates": [{"images": "0.png"}, "b"]}, "want a list"),
        ({"candidates": [{"image": 0}, "b"]}, "want paths"),
        ({"candidates": [{"text": 0}, "b"]}, "want a string"),
        ({"candidates": "ab"}, "want a list"),
        ({"ranks": "12"}, "want a list"),
        ({"scores": {"judge": "12"}}, "want a list"),
        ({"scores": [1, 2]}, "wrong type"),
        ({"provenance": [1, 2]}, "want an object a candidate"),
        ({"provenance": {"seed": 1}}, "want a list"),
    ],
)
def test_a_value_of_the_wrong_type_is_a_fault_of_its_line(tmp_path, change, named):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**json.loads(GOOD), **change}))
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: .*{named}"):
        read(path)


@pytest.mark.parametrize("entry", ["1", "no JSON"])
def test_provenance_of_a_table_that_is_no_object_is_a_fault(entry):
    with pytest.raises(UserError, match="want an object a candidate"):
        comparison({**to_row(row()), "provenance": [entry, "{}"]})


def test_a_parquet_file_is_read_under_its_own_name_whatever_signs_are_in_it(tmp_path):
    write([row(prob=0.25)], tmp_path / "d[1].parquet")
    write([row(prob=0.75)], tmp_path / "d1.parquet")
    assert comparison(read(tmp_path / "d[1].parquet")[0]).prob == 0.25


def test_a_path_from_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text(GOOD)
    assert len(read("~/rows.jsonl")) == 1


def test_ranked_wants_at_least_two_candidates():
    with pytest.raises(UserError, match="num_candidates 1, want 2"):
        ranked(row(3, ranks=(1.0, 2.0, 3.0)), num_candidates=1)


def test_rankings_of_different_length_are_refused():
    verdicts = [Judgement(comparison="r", judge=name, ranks=ranks) for name, ranks in (("a", (1, 2)), ("b", (1, 2, 3)))]
    with pytest.raises(UserError, match="want 2 ranks from each judge"):
        with_judgements(row(), verdicts)


@pytest.mark.parametrize("line", [b"[1]", b"3", b'"r"', b"\xe9", b"{}", b"no JSON"])
def test_a_line_that_is_no_judgement_is_named(tmp_path, line):
    (tmp_path / "verdicts.jsonl").write_bytes(b'{"comparison": "r", "judge": "a", "ranks": [1, 2]}\n' + line)
    with pytest.raises(UserError, match=r"verdicts\.jsonl:2: got"):
        read_judgements(tmp_path / "verdicts.jsonl")


def test_no_comparisons_make_an_empty_table():
    assert to_dataset([]).features == to_dataset([row()]).features
    assert len(to_dataset([])) == 0
