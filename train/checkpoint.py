"""Checkpoints of a run: safetensors and JSON in a folder that is complete or absent, nothing pickled; and where a run
resumes.

    run/checkpoints/samples-000000123456/
        trunk.safetensors      the encoder, keys as timm names them
        head.safetensors       the classification head; of two towers: text.safetensors, joint.safetensors
        trunk_ema.safetensors, head_ema.safetensors   their moving averages, if configured
        optimizer.safetensors  first and second moments and step (of Muon its momentum), by parameter name
        state.json             samples seen, counts, loss scale, and the fingerprints that must match on resume

TrainState -> snapshot (whole tensors, also of FSDP, gathered one by one on rank 0) -> CheckpointWriter (a thread); and
back by load_checkpoint. So a run can resume with another number of ranks or another kind of parallelism.
"""

import hashlib
import json
import pickle
import shlex
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import load_state_dict
from torch import Tensor, nn

from labels.config import dotted, load_pipeline, read_yaml
from labels.settings import MACHINE, MAY_CHANGE, Section, Train, marked_keys
from labels.storage import TEMPORARY_SUFFIX, UserError, fingerprint, whole_folder
from train.data.dataset import BetonSet
from train.distributed import local, split_like, whole
from train.loop import TrainState

_PREFIX = "samples-"
Tensors = dict[str, dict[str, Tensor]]
"""File name without .safetensors -> tensors by name."""


class State(Section):
    """state.json: what is no tensor; `labels`, `idf`, `betons`, `options` are fingerprints."""

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
    cooldown: list[int] | None = None  # Train.cooldown
    method: str = "superclass"


def checkpoint_folders(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob(f"{_PREFIX}*")
    return sorted(folder for folder in folders if folder.is_dir() and folder.name.removeprefix(_PREFIX).isdigit())


def weight_file(checkpoint: Path, part: str, *, averaged: bool = False) -> Path:
    """The file with the weights of a part of the model (trunk, head, text, joint), or with their moving averages."""
    return checkpoint / f"{part}{'_ema' if averaged else ''}.safetensors"


class CheckpointWriter:
    """Writes checkpoints in a thread while training continues; leaving its `with` block waits for the last one.

    The newest `keep` checkpoints are kept, and older ones whose number is a multiple of `keep_every` (0: none).
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
        """Start to write a checkpoint after the previous one is complete, or raise that one's UserError. `tensors` must
        not change any more.
        """
        self._wait()
        self._writing = self._pool.submit(self._write, tensors, state)

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _write(self, tensors: Tensors, state: State) -> None:
        folder = self._folder / f"{_PREFIX}{state.samples_seen:012d}"
        with whole_folder(folder) as partial:
            for name, named in tensors.items():
                save_file(named, partial / f"{name}.safetensors")
            text = json.dumps(state.model_dump(), indent=1, sort_keys=True) + "\n"
            (partial / "state.json").write_text(text, encoding="utf8")
        for old in checkpoint_folders(self._run)[: -self._keep]:
            if not self._keep_every or read_state(old).number % self._keep_every:
                shutil.rmtree(old)


def snapshot(train_state: TrainState, on_this_rank: bool) -> Tensors:
    """Copies in host memory of all tensors of a checkpoint, empty unless `on_this_rank`; all ranks call it together."""
    tensors: Tensors = {}

    def keep(file: str, name: str, tensor: Tensor) -> None:
        gathered = whole(tensor.detach())
        if on_this_rank:
            copy = gathered.cpu() if gathered.is_cuda else gathered.clone()
            tensors.setdefault(file, {})[name] = copy.contiguous()

    averages = train_state.ema.average if train_state.ema else {}
    for suffix, state in (("", train_state.model.state_dict()), ("_ema", averages)):
        for name, tensor in state.items():
            child, _, rest = name.partition(".")
            keep(child + suffix, rest, tensor)
    for name, tensor in _moments(train_state).items():
        keep("optimizer", name, tensor)
    return tensors


@torch.no_grad()
def is_finite(train_state: TrainState) -> bool:
    """Whether this rank's part of all tensors of a checkpoint is finite; waits for the device once."""
    averages = train_state.ema.average if train_state.ema else {}
    tensors = [*train_state.model.state_dict().values(), *averages.values(), *_moments(train_state).values()]
    return bool(torch.stack([local(each).isfinite().all() for each in tensors]).all())


def read_state(folder: Path) -> State:
    """state.json of a checkpoint; UserError if it is missing, damaged, or of another folder."""
    path, fix = folder / "state.json", _without(folder)
    try:
        state = State.model_validate(json.loads(path.read_bytes()))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise UserError(f"{path} is not valid: {'.'.join(map(str, fault['loc']))}: {fault['msg']}", fix=fix) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable: {error}", fix=fix) from None
    if state.samples_seen != samples_of(folder):
        raise UserError(f"{path} has {state.samples_seen} samples seen, its folder is {folder.name}", fix=fix)
    return state


def _without(folder: Path) -> str:
    """How to go on without a damaged checkpoint."""
    before = [path.name for path in checkpoint_folders(folder.parent.parent) if path.name < folder.name]
    then = f"{before[-1]}, the checkpoint before it, is taken" if before else "a run without a checkpoint starts again"
    return f"`rm -r {shlex.quote(str(folder))}`; then {then}"


def load_checkpoint(folder: Path, train_state: TrainState, state: State) -> None:
    """Load a checkpoint into `train_state`, in place; each rank keeps its part. UserError if a file is damaged, or of
    another model.
    """
    children = {name: child for name, child in train_state.model.named_children() if child.state_dict()}
    for name, child in children.items():
        path = folder / f"{name}.safetensors"
        load_exactly(child, read_weights(path), path)
    if train_state.ema:
        averages = {
            f"{name}.{key}": tensor
            for name in children
            for key, tensor in read_weights(folder / f"{name}_ema.safetensors").items()
        }
        copy_exactly(train_state.ema.average, averages, folder / "*_ema.safetensors")
    path = folder / "optimizer.safetensors"
    copy_exactly(_moments(train_state), read_weights(path), path)
    if train_state.scale and state.loss_scale:
        train_state.scale.load(state.loss_scale)


def _moments(train_state: TrainState) -> dict[str, Tensor]:
    """The optimizer's tensors by their names in a checkpoint; train/optim.py made them for every trained parameter."""
    states = train_state.optimizer.state
    trained = {name: weight for name, weight in train_state.model.named_parameters() if weight.requires_grad}
    return {f"{key}.{name}": moment for name, weight in trained.items() for key, moment in states[weight].items()}


# -- where a run resumes

_NOT_KEPT = marked_keys(Train, MAY_CHANGE, MACHINE)


def resume_point(
    run: Path,
    betons: BetonSet,
    settings: Train,
    *,
    name: str,
    command: str,
    kept: dict[str, Any],
    branch: Path | None = None,
) -> tuple[Path | None, State]:
    """The newest checkpoint of `run` and its state; None and the state before the first step if there is none.

    UserError if the run was started by another method than `name`, with other data or another configuration, or if its
    cooldown has begun and is now another. `kept` must not change either. `branch`: a checkpoint of another run,
    which is taken, by the same rules, where `run` has none.
    """
    options = fingerprint(kept_settings(settings, kept))
    folders = checkpoint_folders(run)
    branch = None if folders else branch
    if branch:
        run, folders = branch.parent.parent, [branch]
    if not folders:
        start = first_state(options, betons.vocabulary)
        return None, start.model_copy(update={"method": name} | betons.identity)
    state = read_state(folders[-1])
    if state.method != name:
        raise UserError(f"{run} holds a run of the method {state.method}, not of `{command}`", fix="give another --out")
    names = {
        "labels": ("with other labels: fingerprint", betons.labels_out),
        "idf": ("with another IDF table: SHA-256", betons.labels_out),
        "betons": ("on other betons: fingerprint", betons.out),
    }
    for part, now in betons.identity.items():
        before, (what, where) = getattr(state, part), names[part]
        if before != now:
            raise UserError(
                f"{run} was trained {what} {before[:16]}, {where} has {now[:16]}",
                fix="give the --beton and --labels that the run was begun with, or another --out",
            )
    if state.options != options:
        _check_older(run, state, settings, kept)
    _check_cooldown(run, state, settings)
    return folders[-1], state.model_copy(update={"options": options}) if branch else state


def _check_older(run: Path, state: State, settings: Train, kept_by_method: dict[str, Any]) -> None:
    """A run of an older version, whose configuration lacks newer keys, may go on with their defaults. UserError: a key
    has another value, or RUN/config.yaml is not what the checkpoint was written with.
    """
    file, facts_file = run / "config.yaml", run / "data.json"
    pipeline, written = load_pipeline(file), read_yaml(file).get("train") or {}
    facts = json.loads(facts_file.read_bytes()) if facts_file.is_file() else {}
    kept = facts.get("kept", {})
    filled = kept | ({"text_tower": pipeline.text_tower.model_dump()} if "text_tower" in kept else {})
    sections = [given.model_dump(exclude=_NOT_KEPT) for given in (pipeline.train, settings)]
    if pipeline.train.optimizer.schedule == settings.optimizer.schedule:
        sections = [_without_end(section) for section in sections]
    before, now = (
        {key: value for key, value in dotted({"train": section, **kept}).items() if value != {}}
        for section, kept in zip(sections, (filled, kept_by_method), strict=True)
    )
    changed = [
        f"{key} was {_shown(before, key)}, is now {_shown(now, key)}"
        for key in before | now
        if before.get(key) != now.get(key)
    ]
    if changed or state.options != fingerprint(_without_end(_without_keys(written, _NOT_KEPT)) | kept):
        raise UserError(
            f"{run} was begun with another configuration"
            + (f": {'; '.join(changed)}" if changed else f", and {file} was changed since"),
            allowed="the configuration it was begun with",
            fix=f"take --config {file} without --set and --recipe{_init_option(facts, changed)}, or another --out"
            if changed
            else f"undo the change of {file}, or take another --out",
        )


def _init_option(facts: dict[str, Any], changed: list[str]) -> str:
    """The options of `train run` for the weights that a run was begun with, if others are among what has changed."""
    init = facts.get("init")
    if not any(line.startswith("init.") for line in changed):
        return ""
    if not init:
        return ", without --init"
    weights = f" --init-weights {shlex.quote(init['weights'])}" if init["weights"] else ""
    return f", with --init {shlex.quote(init['spec'])}{weights}{' --init-head' if init['head'] else ''}"


def _shown(values: dict[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "not set"


def _without_keys(values: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """`values` without `keys`, which are those of `marked_keys`."""
    return {
        key: _without_keys(value, keys[key]) if key in keys else value
        for key, value in values.items()
        if keys.get(key) is not True
    }


def resume_point_of_model(run: Path, identity: str) -> tuple[Path | None, State]:
    folders = checkpoint_folders(run)
    if not folders:
        return None, first_state(identity, vocabulary=0)
    state = read_state(folders[-1])
    if state.options != identity:
        raise UserError(
            f"{run} was begun with other data, weights or settings: fingerprint {state.options}, now {identity}",
            fix="give what it was begun with, or another --out",
        )
    return folders[-1], state


def first_state(options: str, vocabulary: int) -> State:
    return State(samples_seen=0, number=0, labels="", idf="", betons="", options=options, vocabulary=vocabulary)


def kept_settings(settings: Train, kept: dict[str, Any]) -> dict[str, Any]:
    """Settings that must not change on resume: those of `train`, and those of the method."""
    return _without_end(settings.model_dump(exclude=_NOT_KEPT)) | kept


def _without_end(train: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that only decide where a cooldown begins and ends: see `_check_cooldown`. With `weights: visual`
    the budget also decides when gains are measured.
    """
    optimizer = train.get("optimizer") or {}
    if optimizer.get("schedule", "cosine") == "cosine" or train.get("weights") == "visual":
        return train
    rest = {key: value for key, value in train.items() if key != "samples"}
    return rest | {"optimizer": {key: value for key, value in optimizer.items() if key != "cooldown_samples"}}


def _check_cooldown(run: Path, state: State, settings: Train) -> None:
    """A run may get another end while its steps are those of both ends: UserError if one of them is of a cooldown."""
    before, now, seen = state.cooldown, settings.cooldown, state.samples_seen
    if before is None or now is None or before == now or seen <= min(before[0], now[0]):
        return
    if seen <= before[0]:
        raise UserError(
            f"{run} has seen {seen:,} samples, but its cooldown would begin at {now[0]:,}",
            allowed="train.samples less the cooldown: as many samples as it has seen, or more",
            fix=f"--set train.samples={seen + now[1] - now[0]}, or another train.optimizer.cooldown_samples",
        )
    earlier = [folder for folder in checkpoint_folders(run) if samples_of(folder) <= min(before[0], now[0])]
    again = f", or remove its checkpoints after {earlier[-1].name}: training goes on from there" if earlier else ""
    raise UserError(
        f"{run} has seen {seen:,} samples: its cooldown, from {before[0]:,} to {before[1]:,}, has begun; "
        f"now it would be from {now[0]:,} to {now[1]:,}",
        allowed="another train.samples or train.optimizer.cooldown_samples before the cooldown",
        fix=f"--set train.samples={before[1]} --set train.optimizer.cooldown_samples={before[1] - before[0]}{again}",
    )


def recorded(run: Path, name: str) -> dict[str, Any]:
    """An entry of data.json of a run with checkpoints, by its name; empty without it."""
    file = run / "data.json"
    facts = json.loads(file.read_bytes()) if checkpoint_folders(run) and file.is_file() else {}
    return {name: facts[name]} if name in facts else {}


def samples_of(folder: Path) -> int:
    """The samples seen of a checkpoint, by its name."""
    return int(folder.name.removeprefix(_PREFIX))


# -- weight files, also those of other projects

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_KEYS_SHOWN = 6
_DAMAGE = (
    SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    AttributeError,
)


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a torch file (`weights_only=True`: only tensors are unpickled).

    timm enters a `state_dict` or `model` entry and removes prefixes of wrappers. UserError if the file is missing,
    damaged, of another kind, or holds other objects.
    """
    in_run = file.parent in checkpoint_folders(file.parent.parent.parent)
    if file.suffix not in SUFFIXES or not file.is_file():
        allowed = f"a file with an ending of {', '.join(SUFFIXES)}"
        raise UserError(f"no weight file at {file}", allowed=allowed, fix=_without(file.parent) if in_run else None)
    try:
        tensors = load_state_dict(str(file), device="cpu", weights_only=True)
    except _DAMAGE as error:
        raise UserError(
            f"{file} cannot be read as weights: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            allowed="a complete .safetensors file, or a torch file of tensors only",
            fix=_without(file.parent) if in_run else "fetch or write the file again",
        ) from None
    others = [key for key, value in tensors.items() if not isinstance(value, Tensor)]
    if others or not tensors:
        raise UserError(
            f"{file} holds " + (f"entries that are not tensors: {_shorten(others)}" if others else "no tensor"),
            allowed="a mapping of names to tensors, plain or below `state_dict` or `model`",
        )
    return tensors


def load_exactly(net: nn.Module, tensors: dict[str, Tensor], file: Path) -> None:
    """Load `tensors` into `net`; UserError unless the keys and shapes of both are the same."""
    copy_exactly(net.state_dict(), tensors, file, type(net).__name__)


@torch.no_grad()
def copy_exactly(expected: dict[str, Tensor], tensors: dict[str, Tensor], file: Path, owner: str = "this run") -> None:
    """Copy `tensors` over `expected`, in place; a split tensor takes its part.

    UserError with the missing, unexpected and misshapen keys, before anything is copied.
    """
    misshapen = [
        f"{key} is {list(tensors[key].shape)}, expected {list(expected[key].shape)}"
        for key in sorted(expected.keys() & tensors.keys())
        if tensors[key].shape != expected[key].shape
    ]
    faults = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - expected.keys()),
        "other shape": misshapen,
    }
    if any(faults.values()):
        listed = "; ".join(f"{name} ({len(keys)}): {_shorten(keys)}" for name, keys in faults.items() if keys)
        raise UserError(
            f"{file} does not fit the architecture: {listed}",
            allowed=f"the {len(expected)} tensors of {owner}, by their own names",
            fix="give the weights and the architecture (and image size) of the same model",
        )
    for key, tensor in expected.items():
        tensor.copy_(split_like(tensors[key], tensor))


def weights_fingerprint(net: nn.Module) -> str:
    """The `tensors_fingerprint` of all weights and buffers."""
    return tensors_fingerprint(net.state_dict())


def tensors_fingerprint(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, 16 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _shorten(names: list[str]) -> str:
    rest = len(names) - _KEYS_SHOWN
    return ", ".join(names[:_KEYS_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
