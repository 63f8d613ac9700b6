"""Conversations as LLaVA-1.5 writes them (its template `v1`): for training here and, saved with the tokenizer, for every evaluation.

T tokens of a conversation, the image's tokens among them.
"""

from typing import Any

from train.llava.data import IMAGE

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_TEXT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE + "\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
)
TEMPLATE = (
    SYSTEM
    + "{% for message in messages %}{% if message['role'] == 'user' %} USER: "
    + _TEXT
    + "{% else %} ASSISTANT: "
    + _TEXT
    + "{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
"""Jinja, as tokenizers of transformers keep it. Contents are text, or lists of parts as chat interfaces send them."""
IGNORED = -100
"""The label of a token that is not learnt, as transformers' losses have it."""


def written(turns: list[str], end: str) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as TEMPLATE writes it, and where in the text gpt's turns stand with their end tokens.

    Args:
        turns: human's and gpt's by turns, the image's mark in the first.
        end: the end token's text.
    """
    text, spans = SYSTEM, []
    for number in range(0, len(turns), 2):
        text += f" USER: {turns[number]} ASSISTANT:"
        begin = len(text)
        text += f" {turns[number + 1]}{end}"
        spans.append((begin, len(text)))
    return text, spans


def conversation_ids(turns: list[str], tokenizer: Any, image_token: int, image_tokens: int, most: int) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation; learnt are gpt's turns with their end tokens.

    Args:
        turns: human's and gpt's by turns, the image's mark in the first.
        tokenizer: one of the `tokenizers` library, which tells where tokens stand; its image mark is one token.
        image_token: the id that stands for a patch. image_tokens: how many the mark becomes.
        most: T at most; what is longer is cut at its end, but never within the image.

    Returns:
        ids, labels: both of length T, the labels not shifted.
    """
    text, spans = written(turns, tokenizer.eos_token)
    found = tokenizer(text, return_offsets_mapping=True)
    ids: list[int] = []
    labels: list[int] = []
    for token, (begin, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
        if token == image_token:
            ids += [image_token] * image_tokens
            labels += [IGNORED] * image_tokens
            continue
        ids.append(token)
        labels.append(token if any(first <= begin < end <= last for first, last in spans) else IGNORED)
    most = max(most, len(ids) - ids[::-1].index(image_token))
    return ids[:most], labels[:most]
