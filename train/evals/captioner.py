"""Mapper and decoder as one module: the loss of captions, and captions by beam search.

B batch, W feature width, P prefix, T tokens, D width of the embeddings, V the decoder's vocabulary.
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
from labels.storage import UserError
from train.encoders.libraries import check_whole, import_transformers, load_folder

# ---- language_model: Causal language models of Hugging Face's form from a local folder, with their tokenizer. No code
# in the folder is run.


_LIMITS = ("n_positions", "max_position_embeddings", "n_ctx", "max_seq_len")


@dataclass(frozen=True)
class LanguageModel:
    """`model` gives logits and generates, in evaluation mode; `tokenizer` has an end token. `name` is for tables."""

    name: str
    model: Any
    tokenizer: Any

    @property
    def width(self) -> int:
        """D of its embeddings."""
        return self.model.get_input_embeddings().weight.shape[1]

    @property
    def positions(self) -> int | None:
        """The most tokens it can take, where its configuration says so."""
        return next(
            (int(getattr(self.model.config, name)) for name in _LIMITS if getattr(self.model.config, name, None)), None
        )

    def check_room(self, tokens: int, told: str) -> None:
        """Raises:
        UserError: `tokens` positions are more than it has; `told` names the keys that ask for them.
        """
        if self.positions is not None and tokens > self.positions:
            raise UserError(
                f"{told} need {tokens} positions, the language model {self.name} has {self.positions}",
                fix=f"lower {told}",
            )


def load_language_model(folder: Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model and the tokenizer in `folder`, frozen, on the CPU.

    Raises:
        UserError: the folder is missing, lacks configuration, weights or tokenizer, or does not hold a whole causal
            language model.
    """
    check_folder(folder)
    model, info = load_folder("AutoModelForCausalLM", folder, "a causal language model with its tokenizer", dtype=dtype)
    check_whole(folder, info)
    try:
        tokenizer = import_transformers().AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises what it likes; the folder is the user's
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
    """Whether all files are there; nothing is read.

    Raises:
        UserError: the folder, its configuration, weights or tokenizer are missing.
    """
    if not folder.is_dir():
        raise UserError(
            f"no language model at {folder}",
            allowed="a folder that save_pretrained wrote, or that was downloaded whole",
            fix="fix the path",
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} has no config.json",
            allowed="a folder of a causal language model, whole",
            fix="download it whole",
        )
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise UserError(
            f"{folder} has no weights",
            allowed="model.safetensors (or its parts), or pytorch_model.bin",
            fix="download the weights too; after git clone: git lfs pull",
        )
    if not any(
        (folder / name).is_file()
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    ):
        raise UserError(
            f"{folder} has no tokenizer",
            allowed="tokenizer.json, tokenizer.model or vocab.json",
            fix="download it whole",
        )


class Captioner(nn.Module):
    """Features and token ids -> loss. Its children, and so its checkpoints, are what is trained: the mapper, and the decoder if asked for.

    Args:
        mapper: [B, W] -> [B, P, D].
        language: the decoder.
        train_decoder: else it is frozen, and held outside the children.
    """

    def __init__(self, mapper: nn.Module, language: LanguageModel, *, train_decoder: bool) -> None:
        super().__init__()
        self.mapper, self._held = mapper, (language.model.requires_grad_(train_decoder),)
        if train_decoder:
            self.decoder = language.model

    def place(self, device: torch.device) -> None:
        """Move all of it, what is held outside the children too."""
        self._held[0].to(device)
        self.to(device)

    def forward(self, features: Tensor, ids: Tensor) -> Tensor:
        """Mean cross-entropy over the captions' tokens.

        Args:
            features: [B, W].
            ids: int [B, T], the end token last, padded with PAD_ID.
        """
        (decoder,) = self._held
        words = decoder.get_input_embeddings()(ids.clamp(min=0))
        prefix = self.mapper(features).to(words.dtype)
        # Padding comes last, so causal attention never sees it.
        logits = decoder(inputs_embeds=torch.cat([prefix, words], dim=1), use_cache=False).logits[
            :, prefix.shape[1] - 1 : -1
        ]
        return functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten().long(), ignore_index=PAD_ID)

    @torch.inference_mode()
    def generate(self, features: Tensor, language: LanguageModel, *, beams: int, max_tokens: int) -> Sequence[str]:
        """One caption for each row of features [B, W], by beam search."""
        from transformers import GenerationConfig

        (decoder,) = self._held
        end = language.tokenizer.eos_token_id
        config = GenerationConfig(
            num_beams=beams,
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=end,
            pad_token_id=end,
            length_penalty=1.0,
        )
        prefix = self.mapper(features).to(decoder.get_input_embeddings().weight.dtype)
        mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
        found = decoder.generate(inputs_embeds=prefix, attention_mask=mask, generation_config=config)
        return [" ".join(text.split()) for text in language.tokenizer.batch_decode(found, skip_special_tokens=True)]


# ---- mapper: ClipCap's mappers (Mokady et al., arXiv 2111.09734; train.py of rmokady/CLIP_prefix_caption): features -> a prefix of embeddings.
#
# B batch, W feature width, P prefix, D width of the decoder's embeddings.


_HEADS = 8


class MlpMapper(nn.Sequential):
    """[B, W] -> [B, P, D]: one hidden layer of P D / 2 with tanh. ClipCap takes it with a decoder that is trained too."""

    def __init__(self, width: int, prefix: int, out_width: int) -> None:
        hidden = max(prefix * out_width // 2, 1)
        super().__init__(
            nn.Linear(width, hidden),
            nn.Tanh(),
            nn.Linear(hidden, prefix * out_width),
            nn.Unflatten(1, (prefix, out_width)),
        )


class TransformerMapper(nn.Module):
    """[B, W] -> [B, P, D]: P embeddings made of the features and P learnt ones through `layers` blocks; the learnt ones' places are read.

    ClipCap takes it with a frozen decoder. Blocks: pre-norm, 8 heads where they divide D, MLP of 2 D with ReLU, no
        dropout.
    """

    def __init__(self, width: int, prefix: int, out_width: int, layers: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, prefix * out_width)
        self.constant = nn.Parameter(torch.randn(prefix, out_width))
        heads = next(heads for heads in range(min(_HEADS, out_width), 0, -1) if out_width % heads == 0)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    out_width, heads, 2 * out_width, dropout=0.0, batch_first=True, norm_first=True
                )
                for _ in range(layers)
            )
        )

    def forward(self, features: Tensor) -> Tensor:
        asked = self.linear(features).unflatten(1, self.constant.shape)
        learnt = self.constant.to(asked.dtype).expand(len(features), -1, -1)
        return self.blocks(torch.cat([asked, learnt], dim=1))[:, len(self.constant) :]


# ---- decoder: The language model that tells captions: a local folder's, or a small one whose tokens and weights are
# made here.


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
        vocab_size=len(tokenizer),
        n_positions=positions,
        n_embd=small.width,
        n_layer=small.layers,
        n_head=heads,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LanguageModel(BUILT_IN, transformers.GPT2LMHeadModel(config).eval(), tokenizer)
