"""The language model that tells captions: a local folder's, or a small one whose tokens and weights are made here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BeforeValidator, Field

from labels.settings import Positive, Section, parse_count
from train.language_model import LanguageModel, load_language_model
from train.pretrained import import_transformers


class SmallDecoder(Section):
    layers: Positive = 4
    width: Positive = 256
    vocabulary: Annotated[int, BeforeValidator(parse_count), Field(ge=257)] = 8_000


BUILT_IN = "built-in"
_HEAD_WIDTH = 64


def make_decoder(name: str, captions: Sequence[str], small: SmallDecoder, positions: int, seed: int) -> LanguageModel:
    """The decoder `name`: `built-in`, or a folder.

    Args:
        captions: the training part's, which the built-in's tokens are learnt from.
        small: the built-in's size. positions: how many tokens it has to take.
        seed: its weights are drawn from.

    Raises:
        UserError: see load_language_model.
    """
    if name != BUILT_IN:
        return load_language_model(Path(name))
    transformers = import_transformers()
    tokenizer = transformers.GPT2Tokenizer().train_new_from_iterator(captions, small.vocabulary, show_progress=False)
    heads = max(1, small.width // _HEAD_WIDTH)
    end = tokenizer.eos_token_id
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=positions, n_embd=small.width, n_layer=small.layers, n_head=heads, bos_token_id=end,
        eos_token_id=end, pad_token_id=end, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LanguageModel(BUILT_IN, transformers.GPT2LMHeadModel(config).eval(), tokenizer)
