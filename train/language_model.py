"""Causal language models of Hugging Face's form from a local folder, with their tokenizer. No code in the folder is run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from labels.errors import UserError

_SHOWN = 4
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
    try:
        import transformers
        from transformers.utils import logging
    except ImportError:
        raise UserError("transformers is not installed", mend="pip install 'superclass-lean[evals]'") from None
    logging.set_verbosity_error()  # missing weights are told here, as an error
    logging.disable_progress_bar()
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        loading: dict[str, Any] = {**options, "weights_only": True, "output_loading_info": True, "dtype": dtype}
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, **loading)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # transformers raises what it likes; the folder is the user's
        raise UserError(
            f"{folder} cannot be loaded by transformers: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            allowed="a folder of a causal language model with its tokenizer, whole, without code of its own",
        ) from None
    model, info = loaded
    faults = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if faults:
        shown = ", ".join(faults[:_SHOWN])
        raise UserError(f"{folder}: {len(faults)} weights are missing or of another shape, the first: {shown}", mend="download it again")
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
