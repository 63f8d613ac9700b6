"""An export is what it says: the same images through the encoder and through what its library has read back. B batch, S image side."""

from pathlib import Path

import torch

from labels.errors import UserError
from train.encoders.encoder import Encoder
from train.export.format import Features, Written

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
            raise UserError(f"the {written.holds} gives features of shape {list(found.shape)}, the encoder {list(wanted.shape)}")
        worst = max(worst, float((wanted - found).abs().max().nan_to_num(nan=float("inf"))))
    if written.text is not None:
        worst = max(worst, written.text(folder))
    if not worst <= TOLERANCE:
        raise UserError(
            f"the {written.holds} differs from the encoder {encoder.name!r} by {worst:.1e}; nothing was written",
            allowed=f"at most {TOLERANCE:.0e}",
            mend="take another --format; if the weights are sound, this is a fault of the conversion: please report it",
        )
    return worst
