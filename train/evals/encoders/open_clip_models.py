"""Encoders from open_clip: the image tower of any of its configurations, weights from a local file.

Without --layer and --pool the features are the image embedding, after the projection, as clip_benchmark probes it; with them,
the tower's tokens before the projection.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from labels.errors import UserError
from train.encoders.encoder import Encoder, EncoderSpec, ImageForm, finish
from train.encoders.text import TextSide, open_clip_text_side
from train.evals.encoders.readout import Blocks, read_out
from train.weights import load_exactly, read_weights, weights_fingerprint


def load_open_clip(asked: EncoderSpec, name: str) -> Encoder:
    """The image tower of open_clip's `name` with the weights of the file `asked.weights`.

    Raises:
        UserError: open_clip is missing, has no such model, or the weights do not fit.
    """
    model = load_clip(name, asked.weights)
    visual = model.visual
    size = visual.image_size
    form = ImageForm(size if isinstance(size, int) else int(size[0]), tuple(visual.image_mean), tuple(visual.image_std))
    text: Callable[[], TextSide] | None = None
    net, words = visual, {"pool": str(getattr(visual, "pool_type", "own")), "layer": "embedding, after the projection"}
    if asked.layer is not None or asked.pool is not None:
        net, words = read_out(asked, visual, _blocks(visual))
    else:
        text, words = partial(open_clip_text_side, name, model), {**words, "text_tower": weights_fingerprint(model)}
    words = {"architecture": name, "architecture_args": {}, "checkpoint": asked.weights, **words}
    return replace(finish(asked, net, form, words), text=text)


def load_clip(name: str, weights: str | None) -> Any:
    """open_clip's model `name`, both towers, in evaluation mode on the CPU, with the tensors of a local file and no others.

    Raises:
        UserError: as for load_open_clip.
    """
    try:
        import open_clip
    except ImportError:
        raise UserError("open_clip is not installed", mend="pip install 'superclass-lean[evals]'") from None
    if name not in open_clip.list_models():
        raise UserError(f"open_clip has no model named {name!r}", allowed="any name of open_clip.list_models()", mend="mend --encoder")
    if weights is None:
        raise UserError(
            f"the encoder 'open_clip:{name}' has no weights",
            allowed="--weights FILE (open_clip_model.safetensors, or a .pt file of tensors)",
            mend=f"--encoder open_clip:{name} --weights FILE",
        )
    model: nn.Module = open_clip.create_model(name, load_weights=False)
    load_exactly(model, read_weights(Path(weights)), Path(weights))
    return model.eval()


def _blocks(visual: Any) -> Blocks:
    """open_clip's towers give intermediates as a dictionary, patches and prefix tokens apart."""
    trunk = getattr(visual, "trunk", None)  # a timm model
    transformer = hasattr(visual, "transformer") or hasattr(trunk, "num_prefix_tokens")
    prefix = int(getattr(trunk, "num_prefix_tokens", 0)) if trunk is not None else int(transformer)
    own_depth = len(visual.transformer.resblocks) if hasattr(visual, "transformer") else 5  # ModifiedResNet: stem and four stages
    depth = own_depth if trunk is None else len(trunk.feature_info)
    options: dict[str, Any] = {"output_fmt": "NLC", "output_extra_tokens": True, "normalize_intermediates": True} if transformer else {}

    def tokens(images: Tensor, block: int) -> Tensor:
        found = visual.forward_intermediates(images, indices=[block], intermediates_only=True, stop_early=True, **options)
        patches = found["image_intermediates"][0]
        if not transformer:
            return patches.flatten(2).transpose(1, 2)
        return torch.cat([*found.get("image_intermediates_prefix", []), patches], dim=1)

    own = "cls" if prefix and getattr(visual, "pool_type", "tok") == "tok" else "avg"
    return Blocks(depth, prefix, tokens, "final norm" if transformer else "none", own)
