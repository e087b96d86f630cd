"""Tokenizers made on the spot: byte-level BPE with real merges, with or without a token before every text; templates."""

from functools import cache
from typing import Any

MARKS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|turn|>", "<pad>")
CORPUS = (
    "the cat sat on the mat and the cat ran to the other cat",
    "name a colour blue is a colour and red is a colour too",
    "say hello in French or in German or in the tongue of cats",
    "two plus two is four and four plus four is eight",
)
CHATML = (
    "{% if tools %}<|im_start|>system\ntools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}<call>{{ call | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Llama 3's: the template writes the first token, and trims what is said.
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m['role'] }}\n\n{{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n\n{% endif %}"
)
# Like Gemma 2's: no system message, and turns by turns.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<|turn|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>model\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "gemma": GEMMA, "none": None}


@cache
def _trained() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=list(MARKS), show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer.to_str()


def tokenizer_of(template: str = "none", *, begins: bool = False, eos: str = "</s>", bos: str | None = "<s>") -> Any:
    """A fast tokenizer of about 400 tokens.

    Args:
        template: of TEMPLATES.
        begins: put `<s>` before every text.
        eos, bos: the marks that have these parts.
    """
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer.from_str(_trained())
    if begins:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", inner.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, pad_token="<pad>", bos_token=bos)
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer
