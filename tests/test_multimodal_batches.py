"""Several prompts that show something in one call of `generate`: each is answered as it is alone, in every family."""

import pytest
import torch
from multimodal import encoder, parts, picture

from mmalign.blind_model import asked, spoken
from mmalign.multimodal.batches import alike, stacked
from mmalign.multimodal.families import FAMILIES
from mmalign.records import Content, Message
from mmalign.records.media import Media


def prompt(question: str, *images: Media) -> Content:
    return Content(messages=(Message("user", question, images=images),))


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_of_a_batch_are_those_of_each_prompt_alone(family: str) -> None:
    model, processor = parts(family)
    prompts = [
        asked(encoder(family), content)
        for content in (
            prompt("what is it?", picture(1)),
            prompt("and now, in more words than before?", picture(2)),
            prompt("no image"),
            prompt("wide", picture(3, 70, 30)),
        )
    ]
    assert any(len(group) > 1 for group in alike([one.shown for one in prompts]))
    how = {"max_new_tokens": 10, "temperature": 0.7}
    alone = [spoken(model, processor.tokenizer, [one], [n], **how)[0] for n, one in enumerate(prompts)]
    together = spoken(model, processor.tokenizer, prompts, range(4), **how)
    assert together == alone
    assert len({token for one in together for token in one.ids}) > 5


def test_tensors_of_tokens_are_padded_on_the_left_and_others_put_behind_each_other() -> None:
    one = {"pixel_values": torch.zeros(1, 3, 2, 2), "token_type_ids": torch.tensor([[0, 1]])}
    two = {"pixel_values": torch.ones(2, 3, 2, 2), "token_type_ids": torch.tensor([[1, 1, 0]])}
    wide = {"pixel_values": torch.ones(1, 3, 2, 4), "token_type_ids": torch.tensor([[1]])}
    crossed = {"cross_attention_mask": torch.ones(1, 1, 1, 2)}
    assert alike([one, None, wide, two, None, crossed]) == [[0, 3], [1, 4], [2], [5]]
    found = stacked([one, two], [2, 3])
    assert found["pixel_values"].shape == (3, 3, 2, 2) and found["pixel_values"][:, 0, 0, 0].tolist() == [0.0, 1.0, 1.0]
    assert found["token_type_ids"].tolist() == [[0, 0, 1], [1, 1, 0]]
    longer = stacked([crossed, {"cross_attention_mask": torch.ones(1, 3, 1, 2)}], [1, 3])
    assert longer["cross_attention_mask"][0].sum(dim=(1, 2)).tolist() == [0.0, 0.0, 2.0]
