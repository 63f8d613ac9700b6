"""Encoders from this trainer: a run's checkpoint, and the same trunk untrained."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from labels.config import load_pipeline
from labels.errors import UserError
from labels.settings import Model, Train
from labels.storage import sha256_file
from train.checkpoint import checkpoint_folders
from train.encoders.encoder import Encoder, EncoderSpec, ImageForm, finish
from train.encoders.libraries import with_readout
from train.encoders.text import Foreign, foreign_encoder, run_text_side
from train.model import build_trunk
from train.weights import load_exactly, read_weights


def load_run(asked: EncoderSpec, path: Path) -> Encoder:
    """The trunk of `path`: a run's newest checkpoint, or one checkpoint's folder; with its text tower, if it has one."""
    path = path.resolve()
    checkpoint = path if path in checkpoint_folders(path.parent.parent) else newest_checkpoint(path)
    if foreign := foreign_encoder(checkpoint.parent.parent):
        return _with_text(_load_foreign(asked, foreign, checkpoint), checkpoint)
    train = load_pipeline(checkpoint.parent.parent / "config.yaml").train
    trunk, file = build_trunk(train.model), checkpoint / "trunk.safetensors"
    load_exactly(trunk, read_weights(file), file)
    net, words = with_readout(asked, trunk)
    words = {**_architecture(train), "checkpoint": checkpoint.name, **words}
    return _with_text(finish(asked, net, _form(train), words, checkpoint=checkpoint), checkpoint)


def _with_text(encoder: Encoder, checkpoint: Path) -> Encoder:
    """With the text tower of its checkpoint, which goes with the run's own features alone."""
    towers = [checkpoint / f"{name}.safetensors" for name in ("text", "joint")]
    if not all(file.is_file() for file in towers) or encoder.asked.layer is not None or encoder.asked.pool is not None:
        return encoder
    words = {**encoder.description, "text_tower": "-".join(sha256_file(file)[:16] for file in towers)}
    return replace(encoder, description=words, text=lambda: run_text_side(checkpoint))


def _load_foreign(asked: EncoderSpec, foreign: Foreign, checkpoint: Path) -> Encoder:
    """The encoder that `train lit` has frozen, from where it was then."""
    from train.encoders.load import load_encoder  # LAZY: it imports this module

    found = load_encoder(EncoderSpec(foreign.spec, foreign.weights, asked.layer, asked.pool))
    if found.describe()["weights"] != foreign.weights_fingerprint:
        raise UserError(
            f"the encoder {foreign.spec!r} has other weights than when {checkpoint.parent.parent} was trained: "
            f"{found.describe()['weights']}, then {foreign.weights_fingerprint}",
            mend="put its weights back",
        )
    words = {**found.description, "checkpoint": checkpoint.name, "frozen": foreign.spec}
    return replace(found, asked=asked, description=words, checkpoint=checkpoint, text=None, seeded=False)


def untrained_run(asked: EncoderSpec, run: Path, seed: int) -> Encoder:
    """The trunk that RUN/config.yaml describes, drawn from `seed`."""
    if not run.is_dir():
        raise UserError(f"no run folder at {run}", allowed="untrained:RUN, RUN holding a config.yaml", mend="mend --encoder")
    train = load_pipeline(run / "config.yaml").train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net, words = with_readout(asked, build_trunk(train.model))
    words = {**_architecture(train), "checkpoint": f"none, drawn from seed {seed}", **words}
    return finish(asked, net, _form(train), words, seeded=True)


def trained_model(encoder: Encoder) -> Model | None:
    """The trunk's configuration where an encoder is a run, trained or not; None for other kinds."""
    run = encoder.checkpoint.parent.parent if encoder.checkpoint else Path(encoder.asked.spec.removeprefix("untrained:"))
    own = (run / "config.yaml").is_file() and foreign_encoder(run) is None
    return load_pipeline(run / "config.yaml").train.model if own else None


def newest_checkpoint(run: Path) -> Path:
    """The finished checkpoint of `run` with the most samples seen; `.partial` folders are never taken.

    Raises:
        UserError: there is none.
    """
    folders = checkpoint_folders(run)
    if not folders:
        raise UserError(
            f"{run} has no finished checkpoint",
            allowed="a run folder with checkpoints/samples-<number>/, or one such folder",
            mend="train first (train run), or wait for the run's first checkpoint",
        )
    return folders[-1]


def _form(train: Train) -> ImageForm:
    return ImageForm(train.model.image_size, tuple(train.data.mean), tuple(train.data.std))


def _architecture(train: Train) -> dict[str, Any]:
    return {"architecture": train.model.trunk, "architecture_args": train.model.trunk_args}
