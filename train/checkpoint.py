"""Checkpoints: safetensors and JSON in a folder that is either whole or not there; nothing pickled.

RUN/checkpoints/samples-000000123456/
    trunk.safetensors      the encoder, keys as timm names them
    head.safetensors       the classification head; of two towers instead: text.safetensors, joint.safetensors
    trunk_ema.safetensors, head_ema.safetensors   their moving averages, where asked for
    optimizer.safetensors  first and second moments and step, by parameter name
    state.json             samples seen, counts, loss scale, and the fingerprints that must match on resume

All tensors are whole, also of a model that FSDP splits: they are gathered one by one to the first rank's memory. So a
    run can be
resumed with another number of ranks, or the other kind of parallelism.
"""

import hashlib
import json
import os
import pickle
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import load_state_dict
from torch import nn

from labels.settings import Section
from labels.storage import TEMPORARY_SUFFIX, UserError, disk_errors, fsync_directory
from train.distributed import laid_out_like, whole
from train.loop import TrainState

# ---- weights: Weights from files: read without running code, loaded without a key left over, and told apart by a
# fingerprint.


SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_KEYS_SHOWN = 6
_DAMAGES = (
    SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    AttributeError,
)


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
            fix="fetch or write the file again",
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
def copy_exactly(
    wanted: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], file: Path, what: str = "this run"
) -> None:
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
            fix="give the weights and the architecture (and image size) of the same model",
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


_PREFIX = "samples-"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
Tensors = dict[str, dict[str, torch.Tensor]]
"""File name without its ending -> tensors by name."""


class State(Section):
    """state.json. What is no tensor and yet belongs to a run."""

    samples_seen: int
    number: int
    labels: str
    idf: str
    betons: str
    options: str
    vocabulary: int
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    loss_scale: list[float] | None = None
    method: str = "superclass"


def checkpoint_folders(run: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob(f"{_PREFIX}*")
    return sorted(folder for folder in folders if folder.is_dir() and folder.name.removeprefix(_PREFIX).isdigit())


class CheckpointWriter:
    """Writes checkpoints from a thread while training goes on; use it in a `with` block, which waits for the last one.

    Args:
        run: the run's folder.
        keep: how many of the newest checkpoints stay.
        keep_every: of the older ones, those whose number is a multiple of this stay; 0: none.
    """

    def __init__(self, run: Path, keep: int, keep_every: int) -> None:
        self._folder, self._run, self._keep, self._keep_every = run / "checkpoints", run, keep, keep_every
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        for partial in self._folder.glob(f"*{TEMPORARY_SUFFIX}"):  # of a process that was killed while it wrote
            shutil.rmtree(partial)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True)
        self._wait()

    def save(self, tensors: Tensors, state: State) -> None:
        """Begin to write one checkpoint, after the one before is finished. The tensors must not change any more.

        Raises:
            UserError: the one before could not be written.
        """
        self._wait()
        self._writing = self._pool.submit(self._write, tensors, state)

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _write(self, tensors: Tensors, state: State) -> None:
        folder = self._folder / f"{_PREFIX}{state.samples_seen:012d}"
        partial = folder.with_name(folder.name + TEMPORARY_SUFFIX)
        with disk_errors(partial):
            partial.mkdir(parents=True)
            for name, named in tensors.items():
                save_file(named, partial / f"{name}.safetensors")
            text = json.dumps(state.model_dump(), indent=1, sort_keys=True) + "\n"
            (partial / "state.json").write_text(text, encoding="utf8")
            for path in partial.iterdir():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
            fsync_directory(partial)
            if folder.exists():  # the same samples once more, after a resume from an older one
                shutil.rmtree(folder)
            os.replace(partial, folder)
            fsync_directory(folder.parent)
        for old in checkpoint_folders(self._run)[: -self._keep]:
            if not self._keep_every or read_state(old).number % self._keep_every:
                shutil.rmtree(old)


def snapshot(train_state: TrainState, on_this_rank: bool) -> Tensors:
    """Copies in host memory of all that a checkpoint holds; all ranks call it together.

    Args:
        train_state: after a step.
        on_this_rank: whether this rank keeps what is gathered.
    """
    tensors: Tensors = {}

    def keep(file: str, name: str, tensor: torch.Tensor) -> None:
        gathered = whole(tensor.detach())
        if on_this_rank:
            tensors.setdefault(file, {})[name] = (
                gathered.cpu().contiguous() if gathered.is_cuda else gathered.clone().contiguous()
            )

    for file, state in (
        ("{}", train_state.model.state_dict()),
        ("{}_ema", train_state.ema.average if train_state.ema else {}),
    ):
        for name, tensor in state.items():
            child, _, rest = name.partition(".")
            keep(file.format(child), rest, tensor)
    for name, tensor in _moments(train_state).items():
        keep("optimizer", name, tensor)
    return tensors


def read_state(folder: Path) -> State:
    """state.json of a checkpoint.

    Raises:
        UserError: missing, damaged, or not of this folder.
    """
    path, fix = folder / "state.json", f"remove {folder}; the checkpoint before it is taken"
    try:
        state = State.model_validate(json.loads(path.read_bytes()))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise UserError(f"{path} is not valid: {'.'.join(map(str, fault['loc']))}: {fault['msg']}", fix=fix) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable: {error}", fix=fix) from None
    if state.samples_seen != int(folder.name.removeprefix(_PREFIX)):
        raise UserError(f"{path} says {state.samples_seen} samples seen, its folder {folder.name}", fix=fix)
    return state


def load_checkpoint(folder: Path, train_state: TrainState, state: State) -> None:
    """Put a checkpoint's weights, moments, averages and scale into `train_state`, in place; each rank keeps its part.

    Raises:
        UserError: a file is damaged, or of another model.
    """
    for name, child in train_state.model.named_children():
        if child.state_dict():
            path = folder / f"{name}.safetensors"
            load_exactly(child, read_weights(path), path)
    if train_state.ema:
        parts = {
            name: folder / f"{name}_ema.safetensors"
            for name, child in train_state.model.named_children()
            if child.state_dict()
        }
        averages = {
            f"{name}.{key}": tensor for name, path in parts.items() for key, tensor in read_weights(path).items()
        }
        copy_exactly(train_state.ema.average, averages, folder / "*_ema.safetensors")
    path = folder / "optimizer.safetensors"
    copy_exactly(_moments(train_state), read_weights(path), path)
    if train_state.scale and state.loss_scale:
        train_state.scale.load(state.loss_scale)


def _moments(train_state: TrainState) -> dict[str, torch.Tensor]:
    """The optimiser's tensors by their names in a checkpoint; train/optim.py has made them for every trained parameter."""
    named = {
        name: train_state.optimizer.state[parameter]
        for name, parameter in train_state.model.named_parameters()
        if parameter.requires_grad
    }
    return {f"{moment}.{name}": state[moment] for name, state in named.items() for moment in _MOMENTS}
