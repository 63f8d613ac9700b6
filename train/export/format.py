"""What a format is: it writes an encoder into a folder, and says how its library reads it back. B batch, S image side, W feature width."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from labels.errors import UserError
from train.encoders.encoder import Encoder
from train.evals.encoders.runs import trained_model
from train.model import trunk_arguments

Features = Callable[[Tensor], Tensor]
"""Normalised images [B, 3, S, S] -> features [B, W]."""


class Written(NamedTuple):
    """What lies in the folder now.

    Attributes:
        holds: what it is, in a word.
        pooling: what of its output are the encoder's features, in a sentence.
        code: Python that loads it from `folder` and leaves `features` for the PIL image `image`.
        read: loads it from a folder by the format's own library.
        wanted: what it is compared with, where that is not the encoder itself: its projected features.
        projected: their width then.
        text: for a pair of towers: the largest difference of a text feature, from a folder.
    """

    holds: str
    pooling: str
    code: str
    read: Callable[[Path], Features]
    text: Callable[[Path], float] | None = None
    wanted: Features | None = None
    projected: int | None = None


class Format(NamedTuple):
    """A format by name. `library` is the Hub's word for what loads it; `write` raises UserError for encoders that it cannot hold."""

    name: str
    library: str
    write: Callable[[Encoder, Path], Written]


class TimmTower(NamedTuple):
    """A timm model: `timm.create_model(architecture, num_classes=0, **arguments)` builds `net`. `arguments` are JSON-able."""

    net: Any
    architecture: str
    arguments: dict[str, Any]


def timm_tower(encoder: Encoder, format_name: str) -> TimmTower:
    """The timm model that an encoder is, and how it is built.

    Raises:
        UserError: it is none, or another layer or pool than its own was asked for.
    """
    asked = encoder.asked
    if asked.layer is not None or asked.pool is not None:
        raise UserError(
            f"--format {format_name} holds the whole model, not layer {asked.layer or 'last'} with pool {asked.pool or 'its own'}",
            allowed="--layer and --pool with --format onnx",
            mend="leave them out: the library's own words choose layer and pool there",
        )
    spec = encoder.description.get("frozen", asked.spec)  # what `train lit` has frozen
    kind, _, name = spec.removeprefix("untrained:").partition(":")
    if kind == "timm":
        return TimmTower(encoder.net, name.partition(".")[0], {})
    if (model := trained_model(encoder)) is None:
        raise UserError(
            f"the encoder {encoder.name!r} is no timm model, as --format {format_name} wants it",
            allowed="run:RUN, untrained:RUN, timm:NAME, untrained:timm:NAME",
            mend="--format onnx takes any encoder" + (", --format open_clip this one" if kind == "open_clip" else ""),
        )
    return TimmTower(encoder.net, *trunk_arguments(model))
