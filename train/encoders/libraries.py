"""Encoders from timm: any of its models without the classifier, weights from a local file, timm's hub, or a seed."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import nn

from labels.errors import UserError
from train.encoders.encoder import Encoder, EncoderSpec, ImageForm, finish
from train.evals.encoders.readout import read_out, timm_blocks
from train.weights import load_exactly, read_weights

HUB = "hub"


def load_timm(asked: EncoderSpec, name: str) -> Encoder:
    """timm's `name` with the weights of `asked.weights`: a file, or `hub`.

    Raises:
        UserError: no such model, no weights, or weights that do not fit.
    """
    _check_name(name)
    weights = asked.weights
    if weights is None:
        raise UserError(
            f"the encoder {asked.spec!r} has no weights",
            allowed=f"--weights FILE (.safetensors or .pth), or --weights {HUB} for timm's own from its hub",
            mend=f"--encoder {asked.spec} --weights {HUB}",
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
    return _finish(asked, name, net, weights, seeded=False)


def untrained_timm(asked: EncoderSpec, name: str, seed: int) -> Encoder:
    """timm's `name`, its weights drawn from `seed`."""
    _check_name(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = timm.create_model(name, pretrained=False, num_classes=0)
    return _finish(asked, name, net, f"none, drawn from seed {seed}", seeded=True)


def with_readout(asked: EncoderSpec, net: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """A timm net as it is, or with the layer and pool that were asked for; and what a description says of them."""
    if asked.layer is None and asked.pool is None:
        return net, {"pool": _pool_of(net), "layer": "last, before the classifier"}
    return read_out(asked, net, timm_blocks(net))


def _finish(asked: EncoderSpec, name: str, net: nn.Module, weights: str, *, seeded: bool) -> Encoder:
    config = resolve_model_data_config(net)
    form = ImageForm(int(config["input_size"][-1]), tuple(config["mean"]), tuple(config["std"]))
    net, words = with_readout(asked, net)
    return finish(asked, net, form, {"architecture": name, "architecture_args": {}, "checkpoint": weights, **words}, seeded=seeded)


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        raise UserError(f"timm has no model named {name!r}", allowed="any name of timm.list_models()", mend="mend --encoder")


def _pool_of(net: nn.Module) -> str:
    """timm keeps the pool as a word (ViT) or as a module, of the net or of its head (convolutional nets)."""
    for holder in (net, getattr(net, "head", None)):
        pool = getattr(holder, "global_pool", None)
        if pool is not None:
            return pool if isinstance(pool, str) else str(getattr(pool, "pool_type", type(pool).__name__))
    return "none"
