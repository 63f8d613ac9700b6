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

from labels.storage import UserError
from train.checkpoint import weights_fingerprint

if TYPE_CHECKING:
    from train.encoders.text import TextSide
import inspect

from torch import Tensor

KINDS = "run:RUN (or the path of a run), untrained:RUN, untrained:timm:NAME, timm:NAME and open_clip:NAME with --weights, hf:DIR, pixels:SIDE"


class EncoderSpec(NamedTuple):
    """What a user asks for.

    spec: run:RUN, timm:NAME, ... weights: a local file, for the kinds that need one. layer: a block, counted from 1, or
        from the end
    with -1 for the last; pool: `avg`, `cls` or `cls+avg`; None of both: what the model itself gives out. tag: see
    with_unique_names.
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


def with_unique_names(requested: Sequence[EncoderSpec]) -> list[EncoderSpec]:
    """The same encoders, each with a name of its own: where two have one, their weight files stand in it.

    Raises:
        UserError: one is asked for twice.
    """
    names = Counter(one.name for one in requested)
    found = [one._replace(tag=one.weights) if names[one.name] > 1 else one for one in requested]
    name, count = Counter(one.name for one in found).most_common(1)[0]
    if count > 1:
        raise UserError(
            f"the encoder {name!r} is asked for {count} times",
            allowed="each encoder, with its weights, layer and pool, once",
        )
    return found


class ImageForm(NamedTuple):
    """The images that a net wants: S pixels a side; channels in [0, 1], less `mean`, divided by `std`."""

    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Encoder:
    """A frozen net: normalised float images [B, 3, S, S] -> features [B, W].

    `seeded` says that its weights were drawn from a seed, so that a spread over seeds has to include drawing them again.
    `checkpoint` is the folder of a run's checkpoint, with the pre-training head, if it is one. `text` loads the text
    tower of those that have one: its weights take memory only where they are used.
    """

    requested: EncoderSpec
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
        return self.requested.name

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images [B, 3, S, S] -> features [B, W]."""
        return self.net(images)

    def describe(self) -> dict[str, Any]:
        """JSON-able: architecture, pool, layer, weights and images. Equal descriptions give equal features."""
        form = {"image_size": self.images.side, "mean": list(self.images.mean), "std": list(self.images.std)}
        return {**self.description, **form, "width": self.width}


def finish(
    requested: EncoderSpec,
    net: nn.Module,
    form: ImageForm,
    words: dict[str, Any],
    *,
    seeded: bool = False,
    checkpoint: Path | None = None,
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
            f"the encoder {requested.name!r} gives features of shape {list(features.shape)}",
            allowed="[B, W], pooled",
            fix="give --pool avg or --pool cls",
        )
    held = getattr(net, "net", net)  # a readout holds the model as `net`: its weights are the same whatever is read
    words = {**words, "weights": weights_fingerprint(held)}
    return Encoder(requested, net, form, features.shape[1], seeded, words, checkpoint)


# ---- readout: Which block's tokens become the features, and how they are pooled: `--layer` and `--pool`.
#
# Blocks are counted from 1; -1 is the last, -2 the one before it. Pools: `avg` the mean over patches, class token and
# registers left out; `cls` the class token; `cls+avg` both, side by side. The trunk's final norm is laid on the tokens
# before the pool, or on what was pooled where the trunk has it there, whichever block it is. Convolutional nets have
# stages in the place of blocks and no class token.
#
# B batch, P prefix tokens (class token first, then registers), N patches, W width.


POOLS = ("avg", "cls", "cls+avg")


class Blocks(NamedTuple):
    """A trunk, block by block.

    Attributes:
        depth: number of blocks.
        prefix: P, tokens before the patches.
        tokens: images [B, 3, S, S] and a block, counted from 0 -> [B, P + N, W], normed.
        norm: what is laid on them, in a word.
        own_pool: what the model itself pools by.
        after_pool: laid on what was pooled: the final norm of trunks that have it there.
    """

    depth: int
    prefix: int
    tokens: Callable[[Tensor, int], Tensor]
    norm: str
    own_pool: str
    after_pool: Callable[[Tensor], Tensor] = lambda pooled: pooled


class Readout(nn.Module):
    """Images [B, 3, S, S] -> pooled features of one block, [B, W] (`cls+avg`: [B, 2W]). `net` is held for its weights."""

    def __init__(self, net: nn.Module, blocks: Blocks, block: int, pool: str) -> None:
        super().__init__()
        self.net, self._blocks, self._block, self._pool = net, blocks, block, pool

    def forward(self, images: Tensor) -> Tensor:
        tokens = self._blocks.tokens(images, self._block)
        parts = {"cls": tokens[:, 0], "avg": tokens[:, self._blocks.prefix :].mean(1)}
        return torch.cat([self._blocks.after_pool(parts[name]) for name in self._pool.split("+")], dim=1)


def read_out(requested: EncoderSpec, net: nn.Module, blocks: Blocks) -> tuple[nn.Module, dict[str, Any]]:
    """The net with the layer and pool that were asked for, and what a description says of them.

    Raises:
        UserError: the trunk has no such block, or no class token.
    """
    layer, pool = -1 if requested.layer is None else requested.layer, requested.pool or blocks.own_pool
    if not (1 <= layer <= blocks.depth or -blocks.depth <= layer <= -1):
        raise UserError(
            f"the encoder {requested.spec!r} has no layer {layer}: it has {blocks.depth}",
            allowed=f"1 to {blocks.depth}, or -1 (the last) to -{blocks.depth}",
            fix="fix --layer",
        )
    if pool not in POOLS:
        raise UserError(f"the pool {pool!r} is unknown", allowed=", ".join(POOLS), fix="fix --pool")
    if "cls" in pool and not blocks.prefix:
        raise UserError(
            f"the encoder {requested.spec!r} has no class token to pool by {pool!r}",
            allowed="avg",
            fix="give --pool avg",
        )
    block = layer - 1 if layer > 0 else blocks.depth + layer
    words = {"pool": pool, "layer": f"{block + 1} of {blocks.depth}", "norm": blocks.norm}
    return Readout(net, blocks, block, pool), words


def timm_blocks(net: Any) -> Blocks:
    """The blocks of any timm net that gives intermediate features.

    Raises:
        UserError: it does not give them.
    """
    if not hasattr(net, "forward_intermediates"):
        raise UserError(
            f"timm's {type(net).__name__} gives no intermediate features", fix="leave --layer and --pool out"
        )
    prefix = int(getattr(net, "num_prefix_tokens", 0))
    takes = inspect.signature(net.forward_intermediates).parameters
    transformer = "return_prefix_tokens" in takes
    normed = transformer and not isinstance(getattr(net, "norm", None), nn.Identity)
    options: dict[str, Any] = {"norm": True, "return_prefix_tokens": True, "output_fmt": "NLC"} if transformer else {}
    late = getattr(net, "fc_norm", None) if transformer and not normed else None

    def tokens(images: Tensor, block: int) -> Tensor:
        (found,) = net.forward_intermediates(
            images, indices=[block], intermediates_only=True, stop_early=True, **options
        )
        if not transformer:
            return found.flatten(2).transpose(1, 2)  # [B, W, H, W'] -> [B, N, W]
        patches, before = found if isinstance(found, tuple) else (found, None)
        return patches if before is None else torch.cat([before, patches], dim=1)

    own = "cls" if getattr(net, "global_pool", "avg") == "token" and prefix else "avg"
    if late is not None:
        return Blocks(len(net.feature_info), prefix, tokens, "final norm, after the pool", own, late)
    return Blocks(len(net.feature_info), prefix, tokens, "final norm" if normed else "none", own)
