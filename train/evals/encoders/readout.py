"""Which block's tokens become the features, and how they are pooled: `--layer` and `--pool`.

Blocks are counted from 1; -1 is the last, -2 the one before it. Pools: `avg` the mean over patches, class token and registers left out;
`cls` the class token; `cls+avg` both, side by side. The trunk's final norm is laid on the tokens before the pool, or on what was pooled
where the trunk has it there, whichever block it is.
Convolutional nets have stages in the place of blocks and no class token.

B batch, P prefix tokens (class token first, then registers), N patches, W width.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from labels.errors import UserError
from train.encoders.encoder import EncoderSpec

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


def read_out(asked: EncoderSpec, net: nn.Module, blocks: Blocks) -> tuple[nn.Module, dict[str, Any]]:
    """The net with the layer and pool that were asked for, and what a description says of them.

    Raises:
        UserError: the trunk has no such block, or no class token.
    """
    layer, pool = -1 if asked.layer is None else asked.layer, asked.pool or blocks.own_pool
    if not (1 <= layer <= blocks.depth or -blocks.depth <= layer <= -1):
        raise UserError(
            f"the encoder {asked.spec!r} has no layer {layer}: it has {blocks.depth}",
            allowed=f"1 to {blocks.depth}, or -1 (the last) to -{blocks.depth}",
            mend="mend --layer",
        )
    if pool not in POOLS:
        raise UserError(f"the pool {pool!r} is unknown", allowed=", ".join(POOLS), mend="mend --pool")
    if "cls" in pool and not blocks.prefix:
        raise UserError(f"the encoder {asked.spec!r} has no class token to pool by {pool!r}", allowed="avg", mend="give --pool avg")
    block = layer - 1 if layer > 0 else blocks.depth + layer
    words = {"pool": pool, "layer": f"{block + 1} of {blocks.depth}", "norm": blocks.norm}
    return Readout(net, blocks, block, pool), words


def timm_blocks(net: Any) -> Blocks:
    """The blocks of any timm net that gives intermediate features.

    Raises:
        UserError: it does not give them.
    """
    if not hasattr(net, "forward_intermediates"):
        raise UserError(f"timm's {type(net).__name__} gives no intermediate features", mend="leave --layer and --pool out")
    prefix = int(getattr(net, "num_prefix_tokens", 0))
    takes = inspect.signature(net.forward_intermediates).parameters
    transformer = "return_prefix_tokens" in takes
    normed = transformer and not isinstance(getattr(net, "norm", None), nn.Identity)
    options: dict[str, Any] = {"norm": True, "return_prefix_tokens": True, "output_fmt": "NLC"} if transformer else {}
    late = getattr(net, "fc_norm", None) if transformer and not normed else None

    def tokens(images: Tensor, block: int) -> Tensor:
        (found,) = net.forward_intermediates(images, indices=[block], intermediates_only=True, stop_early=True, **options)
        if not transformer:
            return found.flatten(2).transpose(1, 2)  # [B, W, H, W'] -> [B, N, W]
        patches, before = found if isinstance(found, tuple) else (found, None)
        return patches if before is None else torch.cat([before, patches], dim=1)

    own = "cls" if getattr(net, "global_pool", "avg") == "token" and prefix else "avg"
    if late is not None:
        return Blocks(len(net.feature_info), prefix, tokens, "final norm, after the pool", own, late)
    return Blocks(len(net.feature_info), prefix, tokens, "final norm" if normed else "none", own)
