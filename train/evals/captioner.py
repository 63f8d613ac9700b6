"""Mapper and decoder as one module: the loss of captions, and captions by beam search.

features [B, W] -> mapper (ClipCap, arXiv 2111.09734; train.py of rmokady/CLIP_prefix_caption) -> a prefix [B, P, D] of
embeddings -> decoder, a causal language model: a folder in Hugging Face's format, whose code is never run, or a small
one whose tokens and weights are made at the start of training.

B batch, W feature width, P prefix, T tokens, D width of the embeddings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torch.nn import functional

from labels.manifest import PAD_ID
from labels.settings import Positive, Section, parse_count
from labels.storage import UserError, local_path
from train.encoders.libraries import check_whole, import_transformers, load_folder

_HEADS = 8
BUILT_IN = "built-in"
_HEAD_WIDTH = 64
_POSITION_KEYS = ("n_positions", "max_position_embeddings", "n_ctx", "max_seq_len")


class SmallDecoder(Section):
    layers: Positive = 4
    width: Positive = 256
    vocabulary: Annotated[int, BeforeValidator(parse_count), Field(ge=257)] = 8_000


@dataclass(frozen=True)
class LanguageModel:
    name: str  # for tables
    model: Any  # transformers' causal language model, in evaluation mode
    tokenizer: Any  # has an end token

    @property
    def width(self) -> int:
        """D of its embeddings."""
        return self.model.get_input_embeddings().weight.shape[1]

    def check_positions(self, tokens: int, needed_by: str) -> None:
        """Raise a UserError if `tokens` are more than the model can take; `needed_by` names the keys that need them."""
        limits = (getattr(self.model.config, key, None) for key in _POSITION_KEYS)
        limit = next((int(limit) for limit in limits if limit), None)
        if limit is not None and tokens > limit:
            problem = f"{needed_by} need {tokens} positions, the language model {self.name} has {limit}"
            raise UserError(problem, fix=f"lower {needed_by}")


class Captioner(nn.Module):
    """Features and token ids -> loss.

    Its children, and so its checkpoints, are what is trained: the mapper, and the decoder if `train_decoder`. A frozen
    decoder is not a child: the loop, the optimizer and checkpoints see the mapper alone.
    """

    def __init__(self, mapper: nn.Module, language: LanguageModel, *, train_decoder: bool) -> None:
        super().__init__()
        self.mapper, self._frozen = mapper, (language.model.requires_grad_(train_decoder),)
        if train_decoder:
            self.decoder = language.model

    def place(self, device: torch.device) -> None:
        """Move all of it, the decoder too."""
        self._frozen[0].to(device)
        self.to(device)

    def forward(self, features: Tensor, ids: Tensor) -> Tensor:
        """Mean cross-entropy over the tokens of `ids` int [B, T], the end token last, padded with PAD_ID."""
        (decoder,) = self._frozen
        words = decoder.get_input_embeddings()(ids.clamp(min=0))
        prefix = self.mapper(features).to(words.dtype)
        # Padding comes last, so causal attention never sees it.
        logits = decoder(inputs_embeds=torch.cat([prefix, words], dim=1), use_cache=False).logits
        predicted = logits[:, prefix.shape[1] - 1 : -1].flatten(0, 1).float()
        return functional.cross_entropy(predicted, ids.flatten().long(), ignore_index=PAD_ID)

    @torch.inference_mode()
    def generate(self, features: Tensor, language: LanguageModel, beams: int, max_tokens: int) -> Sequence[str]:
        """One caption for each row of features [B, W], by beam search."""
        from transformers import GenerationConfig

        (decoder,), end = self._frozen, language.tokenizer.eos_token_id
        tokens = {"eos_token_id": end, "pad_token_id": end, "max_new_tokens": max_tokens}
        config = GenerationConfig(num_beams=beams, do_sample=False, length_penalty=1.0, **tokens)
        prefix = self.mapper(features).to(decoder.get_input_embeddings().weight.dtype)
        mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
        ids = decoder.generate(inputs_embeds=prefix, attention_mask=mask, generation_config=config)
        return [" ".join(text.split()) for text in language.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def make_mapper(kind: str, width: int, prefix: int, out_width: int, layers: int) -> nn.Module:
    """A mapper [B, W] -> [B, P, D]: `mlp` or `transformer`."""
    if kind == "mlp":
        return MlpMapper(width, prefix, out_width)
    return TransformerMapper(width, prefix, out_width, layers)


class MlpMapper(nn.Sequential):
    """[B, W] -> [B, P, D]: one hidden layer of P D / 2 with tanh. ClipCap's choice for a trained decoder."""

    def __init__(self, width: int, prefix: int, out_width: int) -> None:
        hidden = max(prefix * out_width // 2, 1)
        out = nn.Linear(hidden, prefix * out_width)
        super().__init__(nn.Linear(width, hidden), nn.Tanh(), out, nn.Unflatten(1, (prefix, out_width)))


class TransformerMapper(nn.Module):
    """[B, W] -> [B, P, D]: P embeddings made of the features and P learnt ones go through `layers` blocks; the output
    is read at the learnt ones. ClipCap's choice for a frozen decoder.

    Blocks: pre-norm, 8 heads where they divide D, MLP of 2 D with ReLU, no dropout.
    """

    def __init__(self, width: int, prefix: int, out_width: int, layers: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, prefix * out_width)
        self.constant = nn.Parameter(torch.randn(prefix, out_width))
        options: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        sizes = out_width, _heads(out_width, _HEADS), 2 * out_width
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(*sizes, **options) for _ in range(layers)))

    def forward(self, features: Tensor) -> Tensor:
        mapped = self.linear(features).unflatten(1, self.constant.shape)
        learnt = self.constant.to(mapped.dtype).expand(len(features), -1, -1)
        return self.blocks(torch.cat([mapped, learnt], dim=1))[:, len(self.constant) :]


def _heads(width: int, most: int) -> int:
    """The largest number of heads, at most `most`, that divides `width`."""
    return next(heads for heads in range(max(1, min(most, width)), 0, -1) if width % heads == 0)


def make_decoder(name: str, captions: Sequence[str], small: SmallDecoder, positions: int, seed: int) -> LanguageModel:
    """The decoder `name`: a folder, or `built-in`.

    The built-in learns its tokens from the training part's `captions`; its weights, for `positions` tokens, are drawn
    from `seed`.
    """
    if name != BUILT_IN:
        return load_language_model(local_path(name))
    transformers = import_transformers()
    tokenizer = transformers.GPT2Tokenizer().train_new_from_iterator(captions, small.vocabulary, show_progress=False)
    end = tokenizer.eos_token_id
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=positions,
        n_embd=small.width,
        n_layer=small.layers,
        n_head=_heads(small.width, small.width // _HEAD_WIDTH),
        **{f"{kind}_token_id": end for kind in ("bos", "eos", "pad")},
        **{f"{kind}_pdrop": 0.0 for kind in ("resid", "embd", "attn")},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LanguageModel(BUILT_IN, transformers.GPT2LMHeadModel(config).eval(), tokenizer)


def load_language_model(folder: Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model and the tokenizer in `folder`, frozen, on the CPU; a UserError if it is not a whole causal model."""
    check_folder(folder)
    model, info = load_folder("AutoModelForCausalLM", folder, "a causal language model with its tokenizer", dtype=dtype)
    check_whole(folder, info)
    auto = import_transformers().AutoTokenizer
    try:
        tokenizer = auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises any kind
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the tokenizer in {folder} cannot be loaded by transformers: {reason}",
            allowed="tokenizer.json, or the files of a tokenizer that transformers knows",
            fix="download it again",
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no end token", fix="set eos_token in its tokenizer_config.json")
    return LanguageModel(str(folder), model.eval().requires_grad_(False), tokenizer)


def check_folder(folder: Path) -> None:
    """Raise a UserError if the folder, its configuration, weights or tokenizer are missing; nothing is read."""
    if not folder.is_dir():
        saved = "a folder that save_pretrained wrote, or that was downloaded whole"
        raise UserError(f"no language model at {folder}", allowed=saved, fix="fix the path")
    needed = (
        ("config.json", ("config.json",), "config.json", "download it whole"),
        (
            "weights",
            ("*.safetensors", "pytorch_model*.bin"),
            "model.safetensors (or its parts), or pytorch_model.bin",
            "download the weights too; after git clone: git lfs pull",
        ),
        (
            "tokenizer",
            ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json"),
            "tokenizer.json, tokenizer.model or vocab.json",
            "download it whole",
        ),
    )
    for what, patterns, allowed, fix in needed:
        if not any(file for pattern in patterns for file in folder.glob(pattern)):
            raise UserError(f"{folder} has no {what}", allowed=allowed, fix=fix)
