"""`load_encoder`: a spec -> a frozen `Encoder`, in evaluation mode, on the CPU.

run:RUN | RUN        trunk of RUN's newest checkpoint, or of one folder RUN/checkpoints/samples-...
ema:RUN              likewise, with the moving average of its weights (train.optimizer.ema_decay)
untrained:RUN        the trunk that RUN/config.yaml describes, initialised from a seed; untrained:timm:NAME likewise
timm:NAME            a timm model without its classifier, weights from a local file or the hub
open_clip:NAME       the image tower of an open_clip model, weights from a local file
hf:DIR               a vision model in Hugging Face's form
pixels:SIDE          no net: the image resized to SIDE x SIDE, flattened

The kinds of other libraries are in libraries.py; runs are loaded here.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labels.config import load_pipeline
from labels.settings import Model, Train
from labels.storage import UserError, local_path, sha256_file
from train.checkpoint import checkpoint_folders, load_exactly, read_weights, weight_file
from train.encoders.encoder import Encoder, EncoderSpec, ImageForm, finish, with_unique_names
from train.encoders.libraries import load_hf, load_open_clip, load_timm, untrained_timm, with_readout
from train.encoders.text import Foreign, foreign_encoder, run_text_side
from train.model import build_trunk

KINDS = (
    "run:RUN (or the path of a run), ema:RUN, untrained:RUN, untrained:timm:NAME, timm:NAME and open_clip:NAME with "
    "--weights, hf:DIR, pixels:SIDE"
)
_WITH_WEIGHTS = ("timm", "open_clip")
_DEFAULT_SIDE = 32


def load_encoder(requested: EncoderSpec | str, *, seed: int = 0) -> Encoder:
    """Build the requested encoder. `seed`: what the weights of `untrained:` are drawn from.

    Raises UserError for an unknown spec, a run without finished checkpoint, weights that are damaged or do not fit, a
    layer that does not exist.
    """
    requested = EncoderSpec(requested) if isinstance(requested, str) else requested
    kind, colon, value = requested.spec.partition(":")
    if requested.weights is not None and kind not in _WITH_WEIGHTS:
        raise UserError(
            f"--weights {requested.weights} was given with the encoder {requested.spec!r}",
            allowed="--weights with timm:NAME and open_clip:NAME only",
        )
    if kind == "timm" and value:
        return load_timm(requested, value)
    if kind == "open_clip" and value:
        return load_open_clip(requested, value)
    if kind == "hf" and value:
        return load_hf(requested, local_path(value))
    if kind == "pixels" and colon:
        return _pixels(requested, value)
    if kind == "untrained" and value:
        if value.startswith("timm:"):
            return untrained_timm(requested, value.removeprefix("timm:"), seed)
        return _untrained_run(requested, local_path(value), seed)
    path = local_path(value if kind in ("run", "ema") and value else requested.spec)
    if not path.is_dir():
        problem = f"the encoder {requested.spec!r} is no known kind, nor is a folder at {path}"
        raise UserError(problem, allowed=KINDS, fix="fix --encoder")
    return _load_run(requested, path)


def pair_weights(
    specs: Sequence[str], weights: Sequence[str], layer: int | None = None, pool: str | None = None
) -> list[EncoderSpec]:
    """Encoders of a command line: weights in the order of the encoders that take some, one layer and pool for all."""
    taking = [spec for spec in specs if spec.partition(":")[0] in _WITH_WEIGHTS]
    if not specs:
        raise UserError("no encoder is named", fix="give --encoder, e.g. run:RUN")
    if len(weights) not in (0, len(taking)):
        encoders = f"{len(taking)} timm and open_clip encoders ({', '.join(taking) or 'none'})"
        raise UserError(
            f"--weights was given {len(weights)} times for {encoders}",
            allowed="one --weights for each timm:NAME and open_clip:NAME, in their order",
        )
    files = iter(weights)
    encoders = [EncoderSpec(spec, next(files, None) if spec in taking else None, layer, pool) for spec in specs]
    return with_unique_names(encoders)


def _load_run(requested: EncoderSpec, path: Path) -> Encoder:
    """The trunk of a run's newest checkpoint, or of one checkpoint's folder; with its text tower, if it has one."""
    path = path.resolve()
    checkpoint = path if path in checkpoint_folders(path.parent.parent) else newest_checkpoint(path)
    if requested.averaged and not weight_file(checkpoint, "trunk", averaged=True).is_file():
        raise UserError(
            f"{checkpoint} has no moving average: train.optimizer.ema_decay was not set",
            allowed="ema:RUN of a run that was trained with it",
            fix=f"give run:{checkpoint}, or start another run with --set train.optimizer.ema_decay=0.9999",
        )
    if foreign := foreign_encoder(checkpoint.parent.parent):
        return _with_text(_load_foreign(requested, foreign, checkpoint), checkpoint)
    train = load_pipeline(checkpoint.parent.parent / "config.yaml").train
    trunk, file = build_trunk(train.model), weight_file(checkpoint, "trunk", averaged=requested.averaged)
    load_exactly(trunk, read_weights(file), file)
    weights = checkpoint.name + (", moving average" if requested.averaged else "")
    return _with_text(_finish_run(requested, trunk, train, weights, checkpoint=checkpoint), checkpoint)


def _finish_run(requested: EncoderSpec, trunk: nn.Module, train: Train, weights: str, **options: Any) -> Encoder:
    net, readout = with_readout(requested, trunk)
    architecture = {"architecture": train.model.trunk, "architecture_args": train.model.trunk_args}
    form = ImageForm(train.model.image_size, tuple(train.data.mean), tuple(train.data.std))
    return finish(requested, net, form, {**architecture, "checkpoint": weights, **readout}, **options)


def _with_text(encoder: Encoder, checkpoint: Path) -> Encoder:
    """With the text tower of its checkpoint, which goes with the run's own features alone."""
    requested = encoder.requested
    towers = [encoder.weight_file(name) for name in ("text", "joint")]
    if not all(file.is_file() for file in towers) or requested.layer is not None or requested.pool is not None:
        return encoder
    description = {**encoder.description, "text_tower": "-".join(sha256_file(file)[:16] for file in towers)}
    return replace(encoder, description=description, text=lambda: run_text_side(checkpoint, *towers))


def _load_foreign(requested: EncoderSpec, foreign: Foreign, checkpoint: Path) -> Encoder:
    """The encoder that `train lit` has frozen, loaded by its spec, and refused if its weights have changed."""
    encoder = load_encoder(EncoderSpec(foreign.spec, foreign.weights, requested.layer, requested.pool))
    weights = encoder.describe()["weights"]
    if weights != foreign.weights_fingerprint:
        raise UserError(
            f"the encoder {foreign.spec!r} has other weights than when {checkpoint.parent.parent} was trained: "
            f"{weights}, then {foreign.weights_fingerprint}",
            fix="put its weights back",
        )
    description = {**encoder.description, "checkpoint": checkpoint.name, "frozen": foreign.spec}
    changes = {"requested": requested, "description": description, "checkpoint": checkpoint}
    return replace(encoder, **changes, text=None, seeded=False)


def _untrained_run(requested: EncoderSpec, run: Path, seed: int) -> Encoder:
    """The trunk that RUN/config.yaml describes, drawn from `seed`."""
    if not run.is_dir():
        allowed = "untrained:RUN, RUN holding a config.yaml"
        raise UserError(f"no run folder at {run}", allowed=allowed, fix="fix --encoder")
    train = load_pipeline(run / "config.yaml").train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = build_trunk(train.model)
    return _finish_run(requested, trunk, train, f"none, drawn from seed {seed}", seeded=True)


def _pixels(requested: EncoderSpec, side: str) -> Encoder:
    if side and (not side.isdecimal() or int(side) == 0):
        problem = f"the encoder {requested.spec!r} has no whole number of pixels as its side"
        raise UserError(problem, allowed="e.g. pixels:32")
    if requested.layer is not None or requested.pool is not None:
        problem = f"the encoder {requested.spec!r} has no layers to choose from"
        raise UserError(problem, fix="omit --layer and --pool")
    form = ImageForm(int(side or _DEFAULT_SIDE), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    nothing = dict.fromkeys(("checkpoint", "pool", "layer"), "none")
    return finish(requested, nn.Flatten(), form, {"architecture": "raw pixels", "architecture_args": {}, **nothing})


def trained_model(encoder: Encoder) -> Model | None:
    """The trunk's configuration if the encoder is a run, trained or not; None for other kinds."""
    spec, checkpoint = encoder.requested.spec, encoder.checkpoint
    run = checkpoint.parent.parent if checkpoint else local_path(spec.removeprefix("untrained:"))
    own = (run / "config.yaml").is_file() and foreign_encoder(run) is None
    return load_pipeline(run / "config.yaml").train.model if own else None


def newest_checkpoint(run: Path) -> Path:
    """The finished checkpoint of `run` with the most samples seen; `.partial` folders are never taken."""
    folders = checkpoint_folders(run)
    if not folders:
        raise UserError(
            f"{run} has no finished checkpoint",
            allowed="a run folder with checkpoints/samples-<number>/, or one such folder",
            fix="train first (train run), or wait for the run's first checkpoint",
        )
    return folders[-1]
