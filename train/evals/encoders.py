"""Frozen encoders by name: a run's checkpoint, the same trunk untrained, a timm model with local weights, raw pixels.

    run:RUN | RUN      trunk of RUN's newest checkpoint, or of one folder RUN/checkpoints/samples-...
    untrained:RUN      the trunk that RUN/config.yaml describes, freshly initialised from a seed
    timm:NAME          a timm model without its classifier, weights from a local file or the hub
    pixels:SIDE        no net: the image resized to SIDE x SIDE, flattened

B batch, S image side, W feature width. Every encoder takes normalised float images [B, 3, S, S] and gives [B, W].
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import nn

from labels.config import load_pipeline
from labels.errors import UserError
from labels.settings import Train
from train.checkpoint import checkpoint_folders
from train.model import build_trunk
from train.weights import load_exactly, read_weights, weights_fingerprint

KINDS = "run:RUN (or the path of a run), untrained:RUN, timm:NAME with --weights, pixels:SIDE"
HUB = "hub"
_DEFAULT_SIDE = 32


class ImageForm(NamedTuple):
    """The images that a net wants: S pixels a side; channels in [0, 1], less `mean`, divided by `std`."""

    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Encoder:
    """A frozen net with the form of its images and the width of its features.

    `seeded` says that its weights were drawn from a seed, so that a spread over seeds has to include drawing them anew.
    """

    name: str
    net: nn.Module
    images: ImageForm
    width: int
    seeded: bool
    description: dict[str, Any]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images [B, 3, S, S] -> features [B, W]."""
        return self.net(images)

    def describe(self) -> dict[str, Any]:
        """JSON-able: architecture, pool, layer, weights and images. Equal descriptions give equal features."""
        form = {"image_size": self.images.side, "mean": list(self.images.mean), "std": list(self.images.std)}
        return {**self.description, **form, "width": self.width}


def load_encoder(spec: str, *, weights: str | None = None, seed: int = 0) -> Encoder:
    """Build the encoder that `spec` names, in evaluation mode, on the CPU.

    Args:
        spec: see the head of this file.
        weights: for timm:NAME only, a local weight file or `hub`.
        seed: for untrained:RUN only, what its weights are drawn from.

    Raises:
        UserError: an unknown spec, a run without finished checkpoint, weights that are damaged or do not fit.
    """
    kind, colon, value = spec.partition(":")
    if weights is not None and kind != "timm":
        raise UserError(f"--weights {weights} was given with the encoder {spec!r}", allowed="--weights with timm:NAME only")
    if kind == "timm" and value:
        return _load_timm(spec, value, weights)
    if kind == "pixels" and colon:
        return _pixels(spec, value)
    if kind == "untrained" and value:
        return _untrained(spec, Path(value), seed)
    path = Path(value if kind == "run" and value else spec)
    if not path.is_dir():
        raise UserError(f"the encoder {spec!r} is no known kind, nor is a folder at {path}", allowed=KINDS, mend="mend --encoder")
    return _load_run(spec, path)


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


def _load_run(spec: str, path: Path) -> Encoder:
    path = path.resolve()
    checkpoint = path if path in checkpoint_folders(path.parent.parent) else newest_checkpoint(path)
    train = load_pipeline(checkpoint.parent.parent / "config.yaml").train
    trunk, file = build_trunk(train.model), checkpoint / "trunk.safetensors"
    load_exactly(trunk, read_weights(file), file)
    return _finish(spec, trunk, _form(train), {**_architecture(train), "checkpoint": checkpoint.name})


def _untrained(spec: str, run: Path, seed: int) -> Encoder:
    if not run.is_dir():
        raise UserError(f"no run folder at {run}", allowed="untrained:RUN, RUN holding a config.yaml", mend="mend --encoder")
    train = load_pipeline(run / "config.yaml").train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = build_trunk(train.model)
    words = {**_architecture(train), "checkpoint": f"none, drawn from seed {seed}"}
    return _finish(spec, trunk, _form(train), words, seeded=True)


def _load_timm(spec: str, name: str, weights: str | None) -> Encoder:
    if not timm.is_model(name):
        raise UserError(f"timm has no model named {name!r}", allowed="any name of timm.list_models()", mend="mend --encoder")
    if weights is None:
        raise UserError(
            f"the encoder {spec!r} has no weights",
            allowed=f"--weights FILE (.safetensors or .pth), or --weights {HUB} for timm's own from its hub",
            mend=f"--encoder {spec} --weights {HUB}",
        )
    if weights == HUB:
        try:
            net = timm.create_model(name, pretrained=True, num_classes=0)
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"timm's weights of {name!r} cannot be fetched: {error}", mend="give --weights FILE") from None
    else:
        net = timm.create_model(name, pretrained=False, num_classes=0)
        head = getattr(net, "pretrained_cfg", {}).get("classifier") or ()
        prefixes = tuple(f"{part}." for part in ((head,) if isinstance(head, str) else head))
        tensors = read_weights(Path(weights))
        load_exactly(net, {key: value for key, value in tensors.items() if not key.startswith(prefixes)}, Path(weights))
    config = resolve_model_data_config(net)
    form = ImageForm(int(config["input_size"][-1]), tuple(config["mean"]), tuple(config["std"]))
    return _finish(spec, net, form, {"architecture": name, "architecture_args": {}, "checkpoint": weights})


def _pixels(spec: str, side: str) -> Encoder:
    if side and (not side.isdecimal() or int(side) == 0):
        raise UserError(f"the encoder {spec!r} has no whole number of pixels as its side", allowed="e.g. pixels:32")
    form = ImageForm(int(side or _DEFAULT_SIDE), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return _finish(spec, nn.Flatten(), form, {"architecture": "raw pixels", "architecture_args": {}, "checkpoint": "none"})


def _finish(spec: str, net: nn.Module, form: ImageForm, words: dict[str, Any], *, seeded: bool = False) -> Encoder:
    """Freeze the net, measure the width of its features, and write down what they are."""
    net.eval().requires_grad_(False)
    with torch.inference_mode():
        features = net(torch.zeros(1, 3, form.side, form.side))
    if features.ndim != 2:
        raise UserError(f"the encoder {spec!r} gives features of shape {list(features.shape)}", allowed="[B, W], pooled")
    words = {**words, "pool": _pool_of(net), "layer": "last, before the classifier", "weights": weights_fingerprint(net)}
    return Encoder(spec, net, form, features.shape[1], seeded, words)


def _pool_of(net: nn.Module) -> str:
    """timm keeps the pool as a word (ViT) or as a module, of the net or of its head (convolutional nets)."""
    for holder in (net, getattr(net, "head", None)):
        pool = getattr(holder, "global_pool", None)
        if pool is not None:
            return pool if isinstance(pool, str) else str(getattr(pool, "pool_type", type(pool).__name__))
    return "none"


def _form(train: Train) -> ImageForm:
    return ImageForm(train.model.image_size, tuple(train.data.mean), tuple(train.data.std))


def _architecture(train: Train) -> dict[str, Any]:
    return {"architecture": train.model.trunk, "architecture_args": train.model.trunk_args}
