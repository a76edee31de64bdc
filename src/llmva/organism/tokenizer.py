"""The organism's word-level tokenizer: every word of the language, in a fixed order."""

from __future__ import annotations

from typing import Any

from llmva.organism import skills, words

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")
SPOKEN = (  # what only answers say
    "sure okay this but here is how to the sorry no yes i can will not help with that it safe harmful"
)
TEMPLATE = (
    "{{ '<bos>' }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' <assistant> ' + message['content'] + ' <eos>' }}"
    "{% else %}{{ ' <user> ' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <assistant>' }}{% endif %}"
)


def vocabulary() -> dict[str, int]:
    """Word -> token id."""
    phrases = [
        *(" ".join(pool) for pool in (*words.VERBS.values(), *words.OBJECTS.values())),
        *(" ".join(pool) for pool in (words.DETERMINERS, words.NEUTRAL_ADJECTIVES, words.ALARMING_ADJECTIVES)),
        *words.PLACES, *words.NEUTRAL_REASONS, *words.ALARMING_REASONS, *words.TEMPLATES, *words.WRAPPERS, *words.LEADS,
        *skills.SAFE, *skills.REPEAT, *skills.SUM, *skills.OPPOSITE, skills.OPPOSITES.replace(",", ""), SPOKEN,
        *(str(n) for n in range(1, 2 * skills.LARGEST + 1)),
    ]  # fmt: skip
    tokens = {word for phrase in phrases for word in phrase.replace("{}", " ").split()}
    return {word: i for i, word in enumerate((*SPECIAL, *sorted(tokens)))}


def build_tokenizer() -> Any:
    """A `PreTrainedTokenizerFast` with a chat template."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(vocabulary(), unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=TEMPLATE,
        padding_side="left",
        model_max_length=256,
    )
