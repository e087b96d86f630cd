"""VQAScore: the probability with which a visual question answering model says that the image shows the prompt."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor

from mmalign.devices import torch_device
from mmalign.errors import UserError
from mmalign.scorers.checkpoints import check_keys, first_line
from mmalign.scorers.clip import check_lengths

BLIP_VQA = "BlipForQuestionAnswering"


@dataclass(frozen=True, kw_only=True)
class VQAScore:
    """A frozen question answering model as a scorer (see `vqa_score`)."""

    name: str = "vqa_score"
    template: str
    batch_size: int
    answer_logps: Callable[[list[str], list[Image]], Float[Tensor, " n"]]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], images: Sequence[Image]) -> Float[Tensor, " n"]:
        """Score i is of image i under prompt i, in [0, 1]. On the CPU, float32."""
        check_lengths(self.name, prompts, len(images))
        scores = [torch.zeros(0)]
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            questions = [self.template.replace("{prompt}", prompt) for prompt in prompts[part]]
            logps = self.answer_logps(questions, [image.convert("RGB") for image in images[part]])
            scores.append(logps.float().exp().cpu())
        return torch.cat(scores)


def vqa_score(
    *,
    model: str,
    revision: str | None = None,
    template: str = 'Does this figure show "{prompt}"? Please answer yes or no.',
    answer: str = "Yes",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    batch_size: int = 8,
    device: str = "auto",
) -> VQAScore:
    """VQAScore: how surely the model answers the question about the prompt with "Yes".

    P(answer | image, question) = prod_i P(token i of the answer | image, question, tokens before it),  in [0, 1]

    Source: Lin et al. (2024), Evaluating Text-to-Visual Generation with Image-to-Text Generation (arXiv 2404.01291),
    equation 1, with this template and answer. The published CLIP-FlanT5 code takes the mean over the answer's tokens and the
    end token before exp; the published code for chat models, and this one, do not count an end token. The probability is
    over the whole vocabulary, not over yes and no. Scores of different models, templates or answers do not compare.

    Three kinds of model, told apart by its config:

    - `BlipForQuestionAnswering`: the question is read by the text encoder, the answer by the decoder from its start token.
      transformers' decoder does not mask the question's padding; it is given each question without.
    - any `AutoModelForImageTextToText` with a chat template (Qwen2-VL, LLaVA ...): one user turn of image and question. The
      answer stands exactly where the template would put the assistant's turn, so that a space before it is the template's.
      Batches are padded on the right: no token sees padding, and a score is the same in any batch to rounding.
    - an `AutoModelForImageTextToText` over an encoder and a decoder (InstructBLIP or BLIP-2 with Flan-T5, as in the paper):
      the template alone is the encoder's text, the answer is read from the decoder's start token.

    Images: RGB, then the checkpoint's own processor, through which no gradient reaches the pixels. Prompts are not cut but by
    BLIP's text encoder (512 tokens).

    Args:
        model: folder or hub id, e.g. `Salesforce/blip-vqa-base`, `Qwen/Qwen2-VL-7B-Instruct`.
        revision: hub branch, tag or commit.
        template: the question; `{prompt}` stands for the prompt.
        answer: whose probability is the score; "No" with a template that asks the opposite, for instance.
        dtype: of the weights. Batches agree to rounding of this type.
        batch_size: images per forward.
        device: `auto` is the GPU if there is one.

    Raises:
        UserError: no such model, one of none of these kinds, weights missing, a template without `{prompt}`, a prompt with one
            of the model's control tokens.
    """
    if "{prompt}" not in template or not answer.strip():
        raise UserError(
            f"vqa_score.template, vqa_score.answer: got {template!r} and {answer!r}, want a question with {{prompt}} in it and "
            "an answer. Leave both out for the published ones."
        )
    network, processor = _open(model, revision, getattr(torch, dtype))
    network = network.to(torch_device(device)).eval().requires_grad_(False)
    build = _blip_logps if type(network).__name__ == BLIP_VQA else _seq2seq_logps if _has_decoder(network) else _chat_logps
    return VQAScore(template=template, batch_size=batch_size, answer_logps=build(network, processor, answer))


def _open(model: str, revision: str | None, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BlipForQuestionAnswering, ProcessorMixin

    try:
        config: Any = AutoConfig.from_pretrained(model, revision=revision)
        kind: Any = BlipForQuestionAnswering if BLIP_VQA in (config.architectures or ()) else AutoModelForImageTextToText
        network, loaded = kind.from_pretrained(model, revision=revision, dtype=dtype, output_loading_info=True)
        processor: Any = AutoProcessor.from_pretrained(model, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"vqa_score.model: got {model!r}, want a folder or hub id with a {BLIP_VQA}, or an image-text-to-text model, and "
            f"its processor ({first_line(error)}). Save both with save_pretrained, or check the name and the connection."
        ) from error
    check_keys("vqa_score.model", missing=loaded["missing_keys"], unexpected=(), misshapen={})
    chats = isinstance(processor, ProcessorMixin) and processor.chat_template is not None
    if kind is not BlipForQuestionAnswering and not chats and not _has_decoder(network):
        raise UserError(
            f"vqa_score.model: got {model!r}, a {type(network).__name__} with a {type(processor).__name__}, want a {BLIP_VQA}, "
            "or a model with an encoder and a decoder, or one whose processor has a chat template. Choose one that answers."
        )
    return network, processor


def _blip_logps(network: Any, processor: Any, answer: str) -> Callable[[list[str], list[Image]], Float[Tensor, " n"]]:
    tokens: list[int] = processor.tokenizer(answer, add_special_tokens=False).input_ids
    decoder_input = torch.tensor([[network.decoder_start_token_id, *tokens[:-1]]], device=network.device)
    targets = torch.tensor([tokens], device=network.device)
    max_tokens = network.config.text_config.max_position_embeddings

    def answer_logps(questions: list[str], images: list[Image]) -> Float[Tensor, " n"]:
        inputs = processor(
            images=images, text=questions, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
        ).to(network.device, network.dtype)
        image = network.vision_model(inputs.pixel_values).last_hidden_state
        question = network.text_encoder(
            inputs.input_ids, attention_mask=inputs.attention_mask, encoder_hidden_states=image
        ).last_hidden_state
        lengths = inputs.attention_mask.sum(dim=1)
        logps = torch.zeros(len(questions), device=network.device)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().squeeze(1)
            start = decoder_input.expand(len(rows), -1)
            logits = network.text_decoder(start, encoder_hidden_states=question[rows, :length]).logits
            logps[rows] = _sequence_logps(logits, targets.expand(len(rows), -1))
        return logps

    return answer_logps


def _has_decoder(network: Any) -> bool:
    return bool(network.config.get_text_config(decoder=True).is_encoder_decoder)


def _seq2seq_logps(network: Any, processor: Any, answer: str) -> Callable[[list[str], list[Image]], Float[Tensor, " n"]]:
    tokens: list[int] = processor.tokenizer(answer, add_special_tokens=False).input_ids
    targets = torch.tensor([tokens], device=network.device)
    text_config = network.config.get_text_config(decoder=True)
    starts = (network.generation_config.decoder_start_token_id, getattr(text_config, "decoder_start_token_id", None))
    start = next((token for token in starts if token is not None), text_config.pad_token_id)  # T5 starts with its padding
    decoder_input = torch.tensor([[start, *tokens[:-1]]], device=network.device)

    def answer_logps(questions: list[str], images: list[Image]) -> Float[Tensor, " n"]:
        _refuse_control_tokens(processor.tokenizer, questions)
        inputs = processor(images=images, text=questions, padding=True, return_tensors="pt").to(network.device, network.dtype)
        logits = network(**inputs, decoder_input_ids=decoder_input.expand(len(questions), -1)).logits
        return _sequence_logps(logits, targets.expand(len(questions), -1))

    return answer_logps


def _chat_logps(network: Any, processor: Any, answer: str) -> Callable[[list[str], list[Image]], Float[Tensor, " n"]]:
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "right"  # causal attention then never meets padding
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    ending = _answer_in_place(processor, answer)
    tokens = _answer_tokens(tokenizer, _chat(processor, "a"), ending)
    few_logits = "logits_to_keep" in inspect.signature(network.forward).parameters

    def answer_logps(questions: list[str], images: list[Image]) -> Float[Tensor, " n"]:
        _refuse_control_tokens(tokenizer, questions)
        texts = [_chat(processor, question) + ending for question in questions]
        inputs = processor(
            images=[[image] for image in images],
            text=texts,
            padding=True,
            add_special_tokens=not _has_start(tokenizer, texts[0]),
            return_tensors="pt",
        ).to(network.device, network.dtype)
        lengths = inputs.attention_mask.sum(dim=1)
        places = lengths[:, None] + torch.arange(-len(tokens), 0, device=network.device)
        targets = inputs.input_ids.gather(1, places)
        if (targets != torch.tensor(tokens, device=network.device)).any():
            raise UserError(
                f"vqa_score.answer: got {answer!r}, which the model's tokens do not part from what stands before it, want an "
                "answer that begins a token of its own. Write it without a leading space or punctuation."
            )
        kept, where = torch.unique(places - 1, return_inverse=True)
        more = {"logits_to_keep": kept} if few_logits else {}
        logits = network(**inputs, **more, use_cache=False).logits
        rows = torch.arange(len(questions), device=network.device)[:, None]
        return _sequence_logps(logits[rows, where if few_logits else places - 1], targets)

    return answer_logps


def _sequence_logps(logits: Float[Tensor, "n seq vocab"], targets: Int[Tensor, "n seq"]) -> Float[Tensor, " n"]:
    logps = logits.float().log_softmax(dim=-1)
    return logps.gather(-1, targets[..., None]).squeeze(-1).sum(dim=-1)


def _turn(role: str, *content: dict[str, str]) -> dict[str, Any]:
    return {"role": role, "content": list(content)}


def _chat(processor: Any, question: str) -> str:
    """The text up to where the assistant begins."""
    user = _turn("user", {"type": "image"}, {"type": "text", "text": question})
    text: str = processor.apply_chat_template([user], add_generation_prompt=True)
    return text


def _answer_in_place(processor: Any, answer: str) -> str:
    """What follows that text until the end of the answer: the answer, after the white space that the template sets."""
    user = _turn("user", {"type": "image"}, {"type": "text", "text": "a"})
    whole = processor.apply_chat_template([user, _turn("assistant", {"type": "text", "text": answer})])
    begun = _chat(processor, "a")
    rest = whole.removeprefix(begun)
    if rest == whole or answer not in rest:
        raise UserError(
            f"vqa_score.model: got a chat template whose assistant's turn, {whole[-60:]!r}, does not go on from "
            f"{begun[-60:]!r}, want one that answers at once. Choose a model that does not think before it answers."
        )
    return str(rest[: rest.index(answer) + len(answer)])


def _answer_tokens(tokenizer: Any, begun: str, ending: str) -> list[int]:
    before: list[int] = tokenizer(begun, add_special_tokens=False).input_ids
    whole: list[int] = tokenizer(begun + ending, add_special_tokens=False).input_ids
    same = next((place for place, pair in enumerate(zip(before, whole, strict=False)) if pair[0] != pair[1]), len(before))
    return whole[same:]


def _has_start(tokenizer: Any, text: str) -> bool:
    return tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)


def _refuse_control_tokens(tokenizer: Any, questions: Sequence[str]) -> None:
    for question in questions:
        found = [token for token in tokenizer.all_special_tokens if token in question]
        if found:
            raise UserError(
                f"vqa_score: got the control token {found[0]!r} in {question!r}, want plain text. Take it out of the prompt."
            )
