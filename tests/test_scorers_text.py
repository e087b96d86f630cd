"""Scorers of texts: reward models as stock transformers runs them, preference models, counts; and `mmalign score` with them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import comparison_of, encoded, write_rows

from mmalign.config import Choice
from mmalign.errors import UserError
from mmalign.language.reward import PreferenceNetwork, open_backbone, padding_token
from mmalign.language.tiny import tiny_tokenizer
from mmalign.likelihoods import padded_texts
from mmalign.records import Comparison, Content, Message, comparison, read
from mmalign.score import ScoreConfig, build_scorers, main
from mmalign.scorers import SCORERS, TextScorer, judged_kind
from mmalign.scorers.preference import EmbeddingHead, Shape

PROMPTS = ("Name a colour.", [{"role": "user", "content": "Say hello."}], "Go on:")
TEXTS = ("Blue.", "Hello, and a very good day to you.", "x")


@pytest.fixture
def reward(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny reward model of one label."""
    folder = tmp_path_factory.mktemp("reward")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    tokenizer = tiny_tokenizer()
    pad = padding_token(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    open_backbone("tiny", scalar=True, pad=pad, seed=0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def preference(reward: Path) -> Path:
    """A folder with a tiny general preference model."""
    from transformers import AutoTokenizer

    folder = reward / "gpm"
    tokenizer = AutoTokenizer.from_pretrained(reward / "model")
    model = open_backbone("tiny", scalar=False, pad=tokenizer.pad_token_id, seed=0)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    EmbeddingHead(Shape(width=32, dim=4, prompt_gate=True), seed=1).save(folder / "model")
    return folder


def text_row(number: int, *texts: str, **more: Any) -> Comparison:
    return Comparison(
        **{
            "id": f"row{number}",
            "prompt": Content(text=f"prompt {number}"),
            "candidates": tuple(Content(text=t) for t in texts),
        }
        | more
    )


def choice(name: str, **settings: Any) -> Choice:
    return Choice(name=name, target=SCORERS[name], settings=settings)


def test_scorers_of_texts_say_so_and_those_of_images_need_not(reward: Path) -> None:
    scorers = [SCORERS["text_length"](), SCORERS["short_words"](), SCORERS["text_reward"](model=str(reward), device="cpu")]
    assert all(isinstance(scorer, TextScorer) and judged_kind(scorer) == "texts" for scorer in scorers)
    assert judged_kind(SCORERS["brightness"]()) == "images"


def test_counts_are_of_words() -> None:
    assert SCORERS["text_length"]()(["", "", ""], ["one two, three!", "", "don't 42"]).tolist() == [3, 0, 2]
    assert SCORERS["short_words"]()(["", ""], ["ab abcd", "1 2"]).tolist() == [-3, -100]


def test_a_reward_model_scores_as_stock_transformers_does_one_text_at_a_time(reward: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    scorer = SCORERS["text_reward"](model=str(reward), batch_size=2, device="cpu")
    model = AutoModelForSequenceClassification.from_pretrained(reward / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(reward / "model")
    expected = []
    for prompt, text in zip(PROMPTS, TEXTS, strict=True):
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        said = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": text}], tokenize=False)
        expected.append(model(**tokenizer(said, return_tensors="pt", add_special_tokens=False)).logits[0, 0])
    scores = scorer(PROMPTS, TEXTS)
    assert len(set(scores.tolist())) == 3
    torch.testing.assert_close(scores, torch.stack(expected).detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(scores[[2, 0]], scorer([PROMPTS[2], PROMPTS[0]], [TEXTS[2], TEXTS[0]]), rtol=0, atol=1e-6)


def test_texts_without_a_template_end_with_the_end_of_text_and_long_ones_lose_their_beginning(reward: Path) -> None:
    reader = SCORERS["text_reward"](model=str(reward), template="never", max_length=6, device="cpu").reader
    ids, given = reader("ab", "cd")
    assert reader.tokenizer.decode(ids) == "abcd<|endoftext|>" and given == 2
    ids, given = reader("abcdefgh", "ij")
    assert reader.tokenizer.decode(ids) == "fghij<|endoftext|>" and given == 3


def test_a_preference_model_gives_the_mean_skew_score_over_the_opponents(preference: Path) -> None:
    opponents = ("Red.", "I do not know.")
    scorer = SCORERS["gpm_reward"](model=str(preference), opponents=opponents, batch_size=4, device="cpu")
    network = PreferenceNetwork(scorer.model, scorer.head)
    expected = []
    for prompt, text in zip(PROMPTS, TEXTS, strict=True):
        scores = []
        for opponent in opponents:
            (mine, length), (theirs, _) = scorer.reader(prompt, text), scorer.reader(prompt, opponent)
            texts = padded_texts([mine, theirs], [length, length], 2, pad=scorer.reader.tokenizer.pad_token_id)
            scores.append(network(texts)[0, 0])
        expected.append(sum(scores) / 2)
    scores = scorer(PROMPTS, TEXTS)
    assert scores.abs().min() > 1e-4
    torch.testing.assert_close(scores, torch.stack(expected).detach(), rtol=0, atol=1e-6)
    same = SCORERS["gpm_reward"](model=str(preference), opponents=("Blue.",), device="cpu")
    assert abs(float(same(PROMPTS[:1], TEXTS[:1])[0])) < 1e-6


def test_models_that_do_not_judge_texts_are_refused(reward: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scorer\.model: got"):
        SCORERS["text_reward"](model=str(tmp_path))
    with pytest.raises(UserError, match="got no preference head"):
        SCORERS["gpm_reward"](model=str(reward), opponents=("a",))
    with pytest.raises(UserError, match="opponents: got none"):
        SCORERS["gpm_reward"](model=str(reward), opponents=())


def test_score_judges_texts_conversations_and_goes_on_from_its_verdicts(tmp_path: Path, reward: Path) -> None:
    chat = Content(messages=(Message(role="user", text="Hello?"),))
    answer = Content(messages=(Message(role="assistant", text="Hello there, friend."),))
    rows = [
        text_row(0, "one", "one two"),
        text_row(1, "a b c", "", prompt=Content(text="empty")),
        text_row(2, "x", "y z", prompt=chat),
    ]
    rows.append(Comparison(id="chat", prompt=chat, candidates=(answer, Content(text="no"))))
    path = write_rows(rows[:1] + rows[2:], tmp_path / "texts.parquet")
    config = ScoreConfig(
        data=str(path), scorers=(choice("text_length"), choice("text_reward", model=str(reward), device="cpu"))
    )
    result = main(config)
    assert result.num_judged == 6 and result.means["text_length"] == pytest.approx(10 / 6)
    scored = [comparison(row) for row in read(result.output)]
    assert scored[0].scores["text_length"] == (1.0, 2.0) and scored[2].scores["text_length"] == (3.0, 1.0)
    asked = [{"role": "user", "content": "Hello?"}]
    alone = build_scorers(config.scorers)[1]([asked, asked], ["Hello there, friend.", "no"])
    assert scored[2].scores["text_reward"] == pytest.approx(alone.tolist(), abs=1e-6)
    again = main(config)
    assert again.num_judged == 0 and again.num_kept == 6


def test_score_refuses_the_wrong_kind_with_one_error(tmp_path: Path) -> None:
    texts = write_rows([text_row(n, "a", "b") for n in range(3)], tmp_path / "texts.parquet")
    images = write_rows(
        [comparison_of(n, [encoded(8, 8, n), encoded(8, 8, n + 9)]) for n in range(2)], tmp_path / "images.parquet"
    )
    with pytest.raises(UserError, match="got a text, and the scorers judge images"):
        main(ScoreConfig(data=str(texts), scorers=(choice("brightness"),)))
    with pytest.raises(UserError, match="got an image, and the scorers judge texts"):
        main(ScoreConfig(data=str(images), scorers=(choice("text_length"),)))
    with pytest.raises(UserError, match="got text_length, which judges texts, want judges of images"):
        main(ScoreConfig(data=str(texts), scorers=(choice("brightness"), choice("text_length"))))
