"""Causal language models of Hugging Face's form from a local folder, with their tokenizer. No code in the folder is run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from labels.errors import UserError
from train.pretrained import check_whole, import_transformers, load_folder

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
        return next((int(getattr(self.model.config, name)) for name in _LIMITS if getattr(self.model.config, name, None)), None)

    def check_room(self, tokens: int, told: str) -> None:
        """Raises:
        UserError: `tokens` positions are more than it has; `told` names the keys that ask for them.
        """
        if self.positions is not None and tokens > self.positions:
            raise UserError(f"{told} need {tokens} positions, the language model {self.name} has {self.positions}", mend=f"lower {told}")


def load_language_model(folder: Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model and the tokenizer in `folder`, frozen, on the CPU.

    Raises:
        UserError: the folder is missing, lacks configuration, weights or tokenizer, or does not hold a whole causal language model.
    """
    check_folder(folder)
    model, info = load_folder("AutoModelForCausalLM", folder, "a causal language model with its tokenizer", dtype=dtype)
    check_whole(folder, info)
    try:
        tokenizer = import_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises what it likes; the folder is the user's
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the tokenizer in {folder} cannot be loaded by transformers: {reason}",
            allowed="tokenizer.json, or the files of a tokenizer that transformers knows",
            mend="download it again",
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no end token", mend="set eos_token in its tokenizer_config.json")
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
            mend="mend the path",
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json", allowed="a folder of a causal language model, whole", mend="download it whole")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise UserError(
            f"{folder} has no weights",
            allowed="model.safetensors (or its parts), or pytorch_model.bin",
            mend="download the weights too; after git clone: git lfs pull",
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")):
        raise UserError(f"{folder} has no tokenizer", allowed="tokenizer.json, tokenizer.model or vocab.json", mend="download it whole")
