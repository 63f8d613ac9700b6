"""What every encoder is: a frozen net, the form of its images, the width of its features, and words for a result JSON.

B batch, S image side, W feature width.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from labels.errors import UserError
from train.weights import weights_fingerprint

if TYPE_CHECKING:
    from train.encoders.text import TextSide

KINDS = (
    "run:RUN (or the path of a run), untrained:RUN, untrained:timm:NAME, timm:NAME and open_clip:NAME with --weights, hf:DIR, pixels:SIDE"
)


class EncoderSpec(NamedTuple):
    """What a user asks for.

    spec: run:RUN, timm:NAME, ... weights: a local file, for the kinds that need one. layer: a block, counted from 1, or from the end
    with -1 for the last; pool: `avg`, `cls` or `cls+avg`; None of both: what the model itself gives out. tag: see told_apart.
    """

    spec: str
    weights: str | None = None
    layer: int | None = None
    pool: str | None = None
    tag: str | None = None

    @property
    def name(self) -> str:
        """What tables call it: the spec, with layer and pool where they were asked for."""
        words = [f"layer {self.layer}"] if self.layer is not None else []
        return ", ".join([self.spec, *words, *(word for word in (self.pool, self.tag) if word)])


def told_apart(asked: Sequence[EncoderSpec]) -> list[EncoderSpec]:
    """The same encoders, each with a name of its own: where two have one, their weight files stand in it.

    Raises:
        UserError: one is asked for twice.
    """
    names = Counter(one.name for one in asked)
    found = [one._replace(tag=one.weights) if names[one.name] > 1 else one for one in asked]
    name, count = Counter(one.name for one in found).most_common(1)[0]
    if count > 1:
        raise UserError(f"the encoder {name!r} is asked for {count} times", allowed="each encoder, with its weights, layer and pool, once")
    return found


class ImageForm(NamedTuple):
    """The images that a net wants: S pixels a side; channels in [0, 1], less `mean`, divided by `std`."""

    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Encoder:
    """A frozen net: normalised float images [B, 3, S, S] -> features [B, W].

    `seeded` says that its weights were drawn from a seed, so that a spread over seeds has to include drawing them anew.
    `checkpoint` is the folder of a run's checkpoint, with the pre-training head, if it is one. `text` loads the text tower of those that
    have one: its weights take memory only where they are used.
    """

    asked: EncoderSpec
    net: nn.Module
    images: ImageForm
    width: int
    seeded: bool
    description: dict[str, Any]
    checkpoint: Path | None = None
    text: "Callable[[], TextSide] | None" = None

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.asked.name

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images [B, 3, S, S] -> features [B, W]."""
        return self.net(images)

    def describe(self) -> dict[str, Any]:
        """JSON-able: architecture, pool, layer, weights and images. Equal descriptions give equal features."""
        form = {"image_size": self.images.side, "mean": list(self.images.mean), "std": list(self.images.std)}
        return {**self.description, **form, "width": self.width}


def finish(
    asked: EncoderSpec, net: nn.Module, form: ImageForm, words: dict[str, Any], *, seeded: bool = False, checkpoint: Path | None = None
) -> Encoder:
    """Freeze the net, measure the width of its features, and take the weights' fingerprint.

    Args:
        words: architecture, checkpoint, pool, layer: what the description says besides.

    Raises:
        UserError: the features are not [B, W].
    """
    net.eval().requires_grad_(False)
    with torch.inference_mode():
        features = net(torch.zeros(1, 3, form.side, form.side))
    if features.ndim != 2:
        raise UserError(
            f"the encoder {asked.name!r} gives features of shape {list(features.shape)}",
            allowed="[B, W], pooled",
            mend="give --pool avg or --pool cls",
        )
    held = getattr(net, "net", net)  # a readout holds the model as `net`: its weights are the same whatever is read
    words = {**words, "weights": weights_fingerprint(held)}
    return Encoder(asked, net, form, features.shape[1], seeded, words, checkpoint)
