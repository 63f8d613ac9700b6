"""Weights from files: read without running code, loaded without a key left over, and told apart by a fingerprint."""

import hashlib
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import nn

from labels.errors import UserError
from train.parallel import laid_out_like

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_KEYS_SHOWN = 6
_DAMAGES = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError)


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of a torch file (`weights_only=True`: nothing is unpickled but tensors).

    A `state_dict` or `model` entry around the tensors is entered, prefixes of wrappers are removed, both by timm.

    Raises:
        UserError: the file is missing, damaged, of another kind, or holds other objects.
    """
    if file.suffix not in SUFFIXES or not file.is_file():
        raise UserError(f"no weight file at {file}", allowed=f"a file with an ending of {', '.join(SUFFIXES)}")
    try:
        tensors = load_state_dict(str(file), device="cpu", weights_only=True)
    except _DAMAGES as error:
        raise UserError(
            f"{file} cannot be read as weights: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            allowed="a whole .safetensors file, or a torch file that holds nothing but tensors",
            mend="fetch or write the file again",
        ) from None
    others = [key for key, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if others or not tensors:
        raise UserError(
            f"{file} holds " + (f"entries that are no tensors: {_shorten(others)}" if others else "no tensor"),
            allowed="a mapping of names to tensors, plain or below `state_dict` or `model`",
        )
    return tensors


def load_exactly(net: nn.Module, tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Load `tensors` into `net`: every key of the one must be in the other, with the same shape.

    Raises:
        UserError: naming the missing, unexpected and misshapen keys.
    """
    copy_exactly(net.state_dict(), tensors, file, type(net).__name__)


@torch.no_grad()
def copy_exactly(wanted: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], file: Path, what: str = "this run") -> None:
    """Copy `tensors` over `wanted`, in place: the same names and shapes in both; a split tensor takes its part.

    Raises:
        UserError: naming the missing, unexpected and misshapen keys; nothing is copied then.
    """
    missing, unexpected = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    misshapen = [
        f"{key} is {list(tensors[key].shape)}, wanted {list(wanted[key].shape)}"
        for key in sorted(wanted.keys() & tensors.keys())
        if tensors[key].shape != wanted[key].shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "other shape": misshapen}
    if any(faults.values()):
        told = "; ".join(f"{name} ({len(keys)}): {_shorten(keys)}" for name, keys in faults.items() if keys)
        raise UserError(
            f"{file} does not fit the architecture: {told}",
            allowed=f"the {len(wanted)} tensors of {what}, by their own names",
            mend="give the weights and the architecture (and image size) of the same model",
        )
    for key, tensor in wanted.items():
        tensor.copy_(laid_out_like(tensors[key], tensor))


def weights_fingerprint(net: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of all weights and buffers, 16 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _shorten(names: list[str]) -> str:
    rest = len(names) - _KEYS_SHOWN
    return ", ".join(names[:_KEYS_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
