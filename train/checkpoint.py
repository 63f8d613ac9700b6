"""Checkpoints: safetensors and JSON in a folder that is either whole or not there; nothing pickled.

RUN/checkpoints/samples-000000123456/
    trunk.safetensors      the encoder, keys as timm names them
    head.safetensors       the classification head
    optimizer.safetensors  first and second moments and step, by parameter name
    state.json             samples seen, and the fingerprints that must match on resume
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from labels.errors import UserError
from labels.files import TEMPORARY_SUFFIX, fsync_directory
from train.model import Classifier
from train.weights import load_exactly, read_weights

_PREFIX = "samples-"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def checkpoint_folders(run: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob(f"{_PREFIX}*")
    return sorted(folder for folder in folders if folder.is_dir() and folder.name.removeprefix(_PREFIX).isdigit())


def save_checkpoint(run: Path, model: Classifier, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int) -> Path:
    """Write one checkpoint, then remove all but the newest `keep`.

    Args:
        run: the run's folder.
        model: as it is trained, without wrappers.
        optimizer: over the model's parameters.
        state: JSON values, with `samples_seen`.
        keep: how many checkpoints stay.
    """
    folder = run / "checkpoints" / f"{_PREFIX}{state['samples_seen']:012d}"
    partial = folder.with_name(folder.name + TEMPORARY_SUFFIX)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(_contiguous(model.trunk.state_dict()), partial / "trunk.safetensors")
    save_file(_contiguous(model.head.state_dict()), partial / "head.safetensors")
    save_file(_moments(model, optimizer), partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True) + "\n", encoding="utf8")
    for path in partial.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    fsync_directory(partial)
    if folder.exists():  # the same samples once more, after a resume: the same bytes
        shutil.rmtree(folder)
    os.replace(partial, folder)
    fsync_directory(folder.parent)
    for old in checkpoint_folders(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint.

    Raises:
        UserError: missing or damaged.
    """
    try:
        state = json.loads((folder / "state.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder / 'state.json'} is not readable: {error}", mend=f"remove {folder}; the checkpoint before it is taken"
        ) from None
    return state


def load_checkpoint(folder: Path, model: Classifier, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's weights and moments into `model` and `optimizer`, in place.

    Raises:
        UserError: a file is damaged, or of another model.
    """
    for name, module in (("trunk", model.trunk), ("head", model.head)):
        path = folder / f"{name}.safetensors"
        load_exactly(module, read_weights(path), path)
    path = folder / "optimizer.safetensors"
    moments = read_weights(path)
    state: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        values = {moment: moments.get(f"{moment}.{name}") for moment in _MOMENTS}
        missing = [moment for moment, value in values.items() if value is None]
        if missing or values["exp_avg"].shape != parameter.shape:  # type: ignore[union-attr]
            raise UserError(
                f"{path} has no fitting {', '.join(missing) or 'exp_avg'} for {name}",
                mend=f"use the configuration in {folder.parent.parent / 'config.yaml'}, or another --out",
            )
        state[parameter] = {moment: value if moment == "step" else value.to(parameter.device) for moment, value in values.items()}  # type: ignore[union-attr]
    optimizer.state.update(state)


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _moments(model: Classifier, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state
    named = {name: parameter for name, parameter in model.named_parameters() if parameter in state}
    return {f"{moment}.{name}": state[parameter][moment].contiguous() for name, parameter in named.items() for moment in _MOMENTS}
