"""The language model that tells captions: a local folder's, or a small one whose tokens and weights are made here."""

from collections.abc import Sequence
from pathlib import Path

import torch

from labels.errors import UserError
from labels.settings import SmallDecoder
from train.language_model import LanguageModel, load_language_model

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
    try:
        from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer
        from transformers.utils import logging
    except ImportError:
        raise UserError("transformers is not installed", mend="pip install 'superclass-lean[evals]'") from None
    logging.set_verbosity_error()
    tokenizer = GPT2Tokenizer().train_new_from_iterator(captions, small.vocabulary, show_progress=False)
    heads = max(1, small.width // _HEAD_WIDTH)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=positions, n_embd=small.width, n_layer=small.layers, n_head=heads, bos_token_id=end,
        eos_token_id=end, pad_token_id=end, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LanguageModel(BUILT_IN, GPT2LMHeadModel(config).eval(), tokenizer)
