"""An encoder: a frozen net, the form of its images, the width of its features, and its description for result JSONs.

    EncoderSpec (run:RUN, timm:NAME, ... with weights, layer, pool) -> load.py -> Encoder: images [B, 3, S, S] -> [B, W]

`read_out` makes the net for `--layer` and `--pool`: which block's tokens become the features, and how they are pooled.
Blocks are counted from 1; -1 is the last. Convolutional nets have stages for blocks and no class token.
B batch, S image side, W feature width, P prefix tokens (class token first, then registers), N patches.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from labels.storage import UserError
from train.checkpoint import weight_file, weights_fingerprint

if TYPE_CHECKING:
    from train.encoders.text import TextSide

POOLS = ("avg", "cls", "cls+avg")  # avg: the mean over patches alone; cls+avg: both, concatenated


class EncoderSpec(NamedTuple):
    """The encoder that a user requests."""

    spec: str  # run:RUN, timm:NAME, ...
    weights: str | None = None  # a local file, for the kinds that need one
    layer: int | None = None  # a block, from 1, or from the end with -1 for the last; None: the model's own output
    pool: str | None = None  # of POOLS; None: the model's own
    tag: str | None = None  # see with_unique_names

    @property
    def averaged(self) -> bool:
        """Whether a run's moving averages are requested, not its weights."""
        return self.spec.startswith("ema:")

    @property
    def name(self) -> str:
        """The name in tables: the spec, with the requested layer and pool."""
        layer = f"layer {self.layer}" if self.layer is not None else None
        return ", ".join([self.spec, *(word for word in (layer, self.pool, self.tag) if word)])


def with_unique_names(requested: Sequence[EncoderSpec]) -> list[EncoderSpec]:
    """The same encoders; a repeated name gets its weight file appended, so that no row of a table hides another."""
    names = Counter(spec.name for spec in requested)
    unique = [spec._replace(tag=spec.weights) if names[spec.name] > 1 else spec for spec in requested]
    name, count = Counter(spec.name for spec in unique).most_common(1)[0]
    if count > 1:
        allowed = "each encoder, with its weights, layer and pool, once"
        raise UserError(f"the encoder {name!r} is given {count} times", allowed=allowed)
    return unique


class ImageForm(NamedTuple):
    """The images that a net takes: S pixels a side; channels in [0, 1], less `mean`, divided by `std`."""

    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Encoder:
    """A frozen net: normalised float images [B, 3, S, S] -> features [B, W]."""

    requested: EncoderSpec
    net: nn.Module
    images: ImageForm
    width: int
    seeded: bool  # weights drawn from a seed: a spread over seeds includes drawing them again
    description: dict[str, Any]
    checkpoint: Path | None = None  # of a run: its folder, with the pre-training head
    text: "Callable[[], TextSide] | None" = None  # loads the text tower: takes memory only where it is used

    @property
    def name(self) -> str:
        """The name in tables."""
        return self.requested.name

    def weight_file(self, part: str) -> Path:
        """The file of its checkpoint with the weights of a part (head, text, ...), or with their moving averages."""
        assert self.checkpoint is not None
        return weight_file(self.checkpoint, part, averaged=self.requested.averaged)

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> features [B, W]."""
        return self.net(images)

    def describe(self) -> dict[str, Any]:
        """JSON values: architecture, pool, layer, weights and images. Equal descriptions give equal features."""
        form = {"image_size": self.images.side, "mean": list(self.images.mean), "std": list(self.images.std)}
        return {**self.description, **form, "width": self.width}


def finish(
    requested: EncoderSpec,
    net: nn.Module,
    form: ImageForm,
    description: dict[str, Any],
    *,
    seeded: bool = False,
    checkpoint: Path | None = None,
) -> Encoder:
    """Freeze the net, measure the width of its features, and add the weights' fingerprint to the description."""
    net.eval().requires_grad_(False)
    try:
        with torch.inference_mode():
            features = net(torch.zeros(1, 3, form.side, form.side))
    except (RuntimeError, ValueError, TypeError, AssertionError, LookupError) as error:  # whatever libraries raise
        problem = f"the encoder {requested.name!r} cannot take RGB images of {form.side} x {form.side}: {error}"
        raise UserError(problem, allowed="an encoder of square RGB images", fix="name another --encoder") from None
    if features.ndim != 2:
        raise UserError(
            f"the encoder {requested.name!r} gives features of shape {list(features.shape)}",
            allowed="[B, W], pooled",
            fix="give --pool avg or --pool cls",
        )
    model = getattr(net, "net", net)  # a Readout's model: its weights are the same whichever block is read
    description = {**description, "weights": weights_fingerprint(model)}
    return Encoder(requested, net, form, features.shape[1], seeded, description, checkpoint)


class Blocks(NamedTuple):
    """A trunk, block by block."""

    depth: int
    prefix: int  # P
    tokens: Callable[[Tensor, int], Tensor]  # images [B, 3, S, S] and a block, counted from 0 -> [B, P + N, W], normed
    norm: str  # the norm of the tokens, in a word
    own_pool: str
    after_pool: Callable[[Tensor], Tensor] = lambda pooled: pooled  # the final norm of trunks that have it there


class Readout(nn.Module):
    """Images [B, 3, S, S] -> pooled features of one block, [B, W] (`cls+avg`: [B, 2W]). `net` is held for its weights.

    Any block goes through the trunk's final norm, before the pool, or after it where the trunk has it there: the last
    layer with the trunk's own pool is the trunk's own output.
    """

    def __init__(self, net: nn.Module, blocks: Blocks, block: int, pool: str) -> None:
        super().__init__()
        self.net, self._blocks, self._block, self._pool = net, blocks, block, pool

    def forward(self, images: Tensor) -> Tensor:
        tokens = self._blocks.tokens(images, self._block)
        parts = {"cls": tokens[:, 0], "avg": tokens[:, self._blocks.prefix :].mean(1)}
        return torch.cat([self._blocks.after_pool(parts[name]) for name in self._pool.split("+")], dim=1)


def read_out(requested: EncoderSpec, net: nn.Module, blocks: Blocks) -> tuple[nn.Module, dict[str, Any]]:
    """The net with the requested layer and pool, and their entries in the description."""
    depth, pool = blocks.depth, requested.pool or blocks.own_pool
    layer = -1 if requested.layer is None else requested.layer
    if not (1 <= layer <= depth or -depth <= layer <= -1):
        raise UserError(
            f"the encoder {requested.spec!r} has no layer {layer}: it has {depth}",
            allowed=f"1 to {depth}, or -1 (the last) to -{depth}",
            fix="fix --layer",
        )
    if pool not in POOLS:
        raise UserError(f"the pool {pool!r} is unknown", allowed=", ".join(POOLS), fix="fix --pool")
    if "cls" in pool and not blocks.prefix:
        problem = f"the encoder {requested.spec!r} has no class token to pool by {pool!r}"
        raise UserError(problem, allowed="avg", fix="give --pool avg")
    block = layer - 1 if layer > 0 else depth + layer
    return Readout(net, blocks, block, pool), {"pool": pool, "layer": f"{block + 1} of {depth}", "norm": blocks.norm}


def timm_blocks(net: Any) -> Blocks:
    """The blocks of any timm net that gives intermediate features."""
    if not hasattr(net, "forward_intermediates"):
        problem = f"timm's {type(net).__name__} gives no intermediate features"
        raise UserError(problem, fix="omit --layer and --pool")
    prefix = int(getattr(net, "num_prefix_tokens", 0))
    transformer = "return_prefix_tokens" in inspect.signature(net.forward_intermediates).parameters
    normed = transformer and not isinstance(getattr(net, "norm", None), nn.Identity)
    options: dict[str, Any] = {"norm": True, "return_prefix_tokens": True, "output_fmt": "NLC"} if transformer else {}
    options |= {"intermediates_only": True, "stop_early": True}

    def tokens(images: Tensor, block: int) -> Tensor:
        (features,) = net.forward_intermediates(images, indices=[block], **options)
        if not transformer:
            return features.flatten(2).transpose(1, 2)  # [B, W, H, W'] -> [B, N, W]
        patches, prefix_tokens = features if isinstance(features, tuple) else (features, None)
        return patches if prefix_tokens is None else torch.cat([prefix_tokens, patches], dim=1)

    own = "cls" if getattr(net, "global_pool", "avg") == "token" and prefix else "avg"
    late_norm = getattr(net, "fc_norm", None) if transformer and not normed else None
    if late_norm is not None:
        return Blocks(len(net.feature_info), prefix, tokens, "final norm, after the pool", own, late_norm)
    return Blocks(len(net.feature_info), prefix, tokens, "final norm" if normed else "none", own)
