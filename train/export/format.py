"""What a format is: it writes an encoder into a folder, and says how its library reads it back. B batch, S image side,
W feature width.
"""

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from labels.storage import UserError
from train.encoders.encoder import Encoder
from train.encoders.load import trained_model
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
    """A format by name. `library` is the Hub's word for what loads it; `write` raises UserError for encoders that it
    cannot hold.
    """

    name: str
    library: str
    write: Callable[[Encoder, Path], Written]


class TimmTower(NamedTuple):
    """A timm model: `timm.create_model(architecture, num_classes=0, **arguments)` builds `net`. `arguments` are
    JSON-able.
    """

    net: Any
    architecture: str
    arguments: dict[str, Any]


def timm_tower(encoder: Encoder, format_name: str) -> TimmTower:
    """The timm model that an encoder is, and how it is built.

    Raises:
        UserError: it is none, or another layer or pool than its own was asked for.
    """
    asked = encoder.requested
    if asked.layer is not None or asked.pool is not None:
        raise UserError(
            f"--format {format_name} holds the whole model, not layer {asked.layer or 'last'} with pool {asked.pool or 'its own'}",
            allowed="--layer and --pool with --format onnx",
            fix="leave them out: the library's own words choose layer and pool there",
        )
    spec = encoder.description.get("frozen", asked.spec)  # what `train lit` has frozen
    kind, _, name = spec.removeprefix("untrained:").partition(":")
    if kind == "timm":
        return TimmTower(encoder.net, name.partition(".")[0], {})
    if (model := trained_model(encoder)) is None:
        raise UserError(
            f"the encoder {encoder.name!r} is no timm model, as --format {format_name} wants it",
            allowed="run:RUN, untrained:RUN, timm:NAME, untrained:timm:NAME",
            fix="--format onnx takes any encoder" + (", --format open_clip this one" if kind == "open_clip" else ""),
        )
    return TimmTower(encoder.net, *trunk_arguments(model))


# ---- check: An export is what it says: the same images through the encoder and through what its library has read back.
# B batch, S image side.


TOLERANCE = 1e-4
"""Largest difference of a feature."""
_BATCHES = (1, 3)  # two sizes: a batch axis that was frozen would show


@torch.inference_mode()
def check(encoder: Encoder, written: Written, folder: Path) -> float:
    """The largest difference of any feature over random images, in fp32 on the CPU.

    Raises:
        UserError: it is above TOLERANCE, or not a number, or the shapes differ.
    """
    read: Features = written.read(folder)
    own = written.wanted or encoder
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch in _BATCHES:
        images = torch.randn(batch, 3, encoder.images.side, encoder.images.side, generator=generator)
        wanted, found = own(images), read(images)
        if wanted.shape != found.shape:
            raise UserError(
                f"the {written.holds} gives features of shape {list(found.shape)}, the encoder {list(wanted.shape)}"
            )
        worst = max(worst, float((wanted - found).abs().max().nan_to_num(nan=float("inf"))))
    if written.text is not None:
        worst = max(worst, written.text(folder))
    if not worst <= TOLERANCE:
        raise UserError(
            f"the {written.holds} differs from the encoder {encoder.name!r} by {worst:.1e}; nothing was written",
            allowed=f"at most {TOLERANCE:.0e}",
            fix="take another --format; if the weights are sound, this is a fault of the conversion: please report it",
        )
    return worst


# ---- replace: Folders that are given away: which may be replaced (those with what a command of this project wrote
# alone), and who may read them.


def check_replaceable(out: Path, mark: str, command: str) -> None:
    """Refuse to write into `out` where it holds anything that `command` has not written: it would be lost.

    Args:
        mark: the file in which the command tells, as `files`, what else it has written.
        command: e.g. `train export`, for the message.

    Raises:
        UserError: naming what would be lost.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    fix = "give another --out, or move that away yourself"
    try:
        files = set(json.loads((out / mark).read_bytes())["files"])
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(
            f"--out {out} exists and is not of `{command}`: it has no {mark} of ours",
            allowed=f"a new or empty folder, or one that `{command}` has written",
            fix=fix,
        ) from None
    others = sorted(path.name for path in out.iterdir() if path.name not in files | {mark})
    if others:
        raise UserError(
            f"--out {out} holds what `{command}` has not written there, and replacing the folder would remove it: {', '.join(others[:4])}",
            allowed=f"a new or empty folder, or one as `{command}` has written it",
            fix=fix,
        )


def share_like(file: Path) -> None:
    """Give all files beside `file` its rights: safetensors writes for its owner alone, whatever the umask says."""
    mode = stat.S_IMODE(file.stat().st_mode)
    for other in file.parent.iterdir():
        if other.is_file():
            other.chmod(mode)
