"""Encoders of other libraries: timm, open_clip, and vision models in Hugging Face's form.

    load_timm        any timm model without its classifier; weights from a local file, timm's hub, or (untrained) a seed
    load_open_clip   the image tower of an open_clip model; weights from a local file
    load_hf          a local folder: config.json, model.safetensors, preprocessor_config.json

Each gives an `Encoder` (encoder.py). Its features are the model's own output, or `read_out` of one block for `--layer`
and `--pool`. No code and no pickle of the user's files is run. B batch, N tokens, W width.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from labels.storage import UserError, local_path
from train.checkpoint import load_exactly, read_weights, weights_fingerprint
from train.encoders.encoder import Blocks, Encoder, EncoderSpec, ImageForm, finish, read_out, timm_blocks
from train.encoders.text import TextSide, open_clip_text_side

HUB = "hub"
_INSTALL = "pip install 'superclass-lean[evals]'"

# -- timm


def load_timm(requested: EncoderSpec, name: str) -> Encoder:
    """timm's `name` with the weights of `requested.weights`: a file, or `hub`."""
    _check_name(name)
    weights = requested.weights
    if weights is None:
        raise UserError(
            f"the encoder {requested.spec!r} has no weights",
            allowed=f"--weights FILE (.safetensors or .pth), or --weights {HUB} for timm's own from its hub",
            fix=f"--encoder {requested.spec} --weights {HUB}",
        )
    if weights == HUB:
        try:
            net = timm.create_model(name, pretrained=True, num_classes=0)
        except (RuntimeError, OSError, ValueError) as error:
            problem = f"timm's weights of {name!r} cannot be fetched: {error}"
            raise UserError(problem, fix="give --weights FILE") from None
    else:
        net = timm.create_model(name, pretrained=False, num_classes=0)
        head = getattr(net, "pretrained_cfg", {}).get("classifier") or ()
        prefixes = tuple(f"{part}." for part in ((head,) if isinstance(head, str) else head))
        file = local_path(weights)
        kept = {key: value for key, value in read_weights(file).items() if not key.startswith(prefixes)}
        load_exactly(net, kept, file)
    return _finish_timm(requested, name, net, weights, seeded=False)


def untrained_timm(requested: EncoderSpec, name: str, seed: int) -> Encoder:
    """timm's `name`, its weights drawn from `seed`."""
    _check_name(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = timm.create_model(name, pretrained=False, num_classes=0)
    return _finish_timm(requested, name, net, f"none, drawn from seed {seed}", seeded=True)


def with_readout(requested: EncoderSpec, net: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """A timm net unchanged, or with the requested layer and pool; and their entries in the description."""
    if requested.layer is None and requested.pool is None:
        return net, {"pool": _pool_of(net), "layer": "last, before the classifier"}
    return read_out(requested, net, timm_blocks(net))


def _finish_timm(requested: EncoderSpec, name: str, net: nn.Module, weights: str, *, seeded: bool) -> Encoder:
    config = resolve_model_data_config(net)
    form = ImageForm(int(config["input_size"][-1]), tuple(config["mean"]), tuple(config["std"]))
    net, readout = with_readout(requested, net)
    return finish(requested, net, form, _description(name, weights, readout), seeded=seeded)


def _description(architecture: str, weights: str | None, readout: dict[str, Any]) -> dict[str, Any]:
    return {"architecture": architecture, "architecture_args": {}, "checkpoint": weights, **readout}


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        problem, allowed = f"timm has no model named {name!r}", "any name of timm.list_models()"
        raise UserError(problem, allowed=allowed, fix="fix --encoder")


def _pool_of(net: nn.Module) -> str:
    """timm keeps the pool as a word (ViT) or as a module, of the net or of its head (convolutional nets)."""
    for holder in (net, getattr(net, "head", None)):
        pool = getattr(holder, "global_pool", None)
        if pool is not None:
            return pool if isinstance(pool, str) else str(getattr(pool, "pool_type", type(pool).__name__))
    return "none"


# -- open_clip


def load_open_clip(requested: EncoderSpec, name: str) -> Encoder:
    """The image tower of open_clip's `name` with the weights of the file `requested.weights`.

    Its features are the image embedding, after the projection, as clip_benchmark probes it; with --layer or --pool, the
    tower's tokens before the projection.
    """
    model = load_clip(name, requested.weights)
    visual, size = model.visual, model.visual.image_size
    form = ImageForm(size if isinstance(size, int) else int(size[0]), tuple(visual.image_mean), tuple(visual.image_std))
    text: Callable[[], TextSide] | None = None
    if requested.layer is not None or requested.pool is not None:
        net, readout = read_out(requested, visual, _open_clip_blocks(visual))
    else:
        net, text = visual, partial(open_clip_text_side, name, model)
        readout = {"pool": str(getattr(visual, "pool_type", "own")), "layer": "embedding, after the projection"}
        readout["text_tower"] = weights_fingerprint(model)
    return replace(finish(requested, net, form, _description(name, requested.weights, readout)), text=text)


def load_clip(name: str, weights: str | None) -> Any:
    """open_clip's model `name`, both towers, in evaluation mode on the CPU, with the tensors of a local file alone."""
    try:
        import open_clip
    except ImportError:
        raise UserError("open_clip is not installed", fix=_INSTALL) from None
    if name not in open_clip.list_models():
        problem, allowed = f"open_clip has no model named {name!r}", "any name of open_clip.list_models()"
        raise UserError(problem, allowed=allowed, fix="fix --encoder")
    if weights is None:
        raise UserError(
            f"the encoder 'open_clip:{name}' has no weights",
            allowed="--weights FILE (open_clip_model.safetensors, or a .pt file of tensors)",
            fix=f"--encoder open_clip:{name} --weights FILE",
        )
    model: nn.Module = open_clip.create_model(name, load_weights=False)
    load_exactly(model, read_weights(local_path(weights)), local_path(weights))
    return model.eval()


def _open_clip_blocks(visual: Any) -> Blocks:
    """open_clip's towers give intermediates as a dictionary, patches and prefix tokens apart."""
    trunk = getattr(visual, "trunk", None)  # a timm model
    transformer = hasattr(visual, "transformer") or hasattr(trunk, "num_prefix_tokens")
    if trunk is not None:
        prefix, depth = int(getattr(trunk, "num_prefix_tokens", 0)), len(trunk.feature_info)
    else:  # a ModifiedResNet has a stem and four stages
        prefix, depth = int(transformer), len(visual.transformer.resblocks) if transformer else 5
    options: dict[str, Any] = {"intermediates_only": True, "stop_early": True}
    if transformer:
        options |= {"output_fmt": "NLC", "output_extra_tokens": True, "normalize_intermediates": True}

    def tokens(images: Tensor, block: int) -> Tensor:
        features = visual.forward_intermediates(images, indices=[block], **options)
        patches = features["image_intermediates"][0]
        if not transformer:
            return patches.flatten(2).transpose(1, 2)
        return torch.cat([*features.get("image_intermediates_prefix", []), patches], dim=1)

    own = "cls" if prefix and getattr(visual, "pool_type", "tok") == "tok" else "avg"
    return Blocks(depth, prefix, tokens, "final norm" if transformer else "none", own)


# -- folders in the form of Hugging Face's transformers

_FAULTS_SHOWN = 4
_LFS_POINTER = b"version https://git-lfs"
_NORMS = ("layernorm", "post_layernorm", "norm")


def import_transformers() -> Any:
    """The library, without progress bars and warnings of missing weights, which are errors here."""
    try:
        import transformers
    except ImportError:
        raise UserError("transformers is not installed", fix=_INSTALL) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_folder(auto: str, folder: Path, what: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model and transformers' report of its loading (see check_whole), by tensors alone.

    `auto`: the class of transformers that loads it; `what`: "a vision model", for messages; `options`: of its
    from_pretrained.
    """
    options |= {"local_files_only": True, "trust_remote_code": False, "weights_only": True, "output_loading_info": True}
    try:
        return getattr(import_transformers(), auto).from_pretrained(folder, **options)
    except Exception as error:  # transformers raises many types; the folder is the user's
        reason = str(error).splitlines()[0].partition(". ")[0] if str(error) else type(error).__name__
        raise UserError(
            f"{folder} cannot be loaded by transformers: {reason}",
            allowed=f"a folder of {what}, whole, without code of its own",
            fix=_loading_fix(folder, reason),
        ) from None


def check_whole(folder: Path, info: dict[str, Any]) -> None:
    """Refuse a model with missing weights, which would be random."""
    faults = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if faults:
        first = ", ".join(faults[:_FAULTS_SHOWN])
        problem = f"{folder}: {len(faults)} weights are missing or of another shape, the first: {first}"
        raise UserError(problem, fix="download it again")


def _loading_fix(folder: Path, reason: str) -> str:
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with open(file, "rb") as stream:
            if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
                return f"git lfs pull: {file.name} is a pointer to the weights, not the weights"
    if "Weights only load failed" in reason:
        return "take its weights as safetensors: the .bin files hold more than tensors, and are not unpickled"
    return "download it again"


def load_hf(requested: EncoderSpec, folder: Path) -> Encoder:
    """The vision model in `folder`; of a CLIP-like folder with both towers the image tower, before the projection.

    Its features are `pooler_output`, or without one the class token or else the mean of the last tokens; `--layer` and
    `--pool` read `hidden_states`.
    """
    for name, fix in (
        ("config.json", "give hf: a folder that save_pretrained wrote, or that was downloaded whole"),
        ("preprocessor_config.json", "save the image processor next to the model: it has size, mean and std"),
    ):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}", allowed="hf:DIR, a folder in Hugging Face's form", fix=fix)
    form = image_form(folder)
    model = load_vision_model(folder)
    net, readout = _Pooled(model), {"pool": "the model's own", "layer": "last"}
    if requested.layer is not None or requested.pool is not None:
        net, readout = read_out(requested, model, _hf_blocks(model, form.side))
    return finish(requested, net, form, _description(type(model).__name__, str(folder), readout))


def load_vision_model(folder: Path) -> Any:
    """transformers' vision model in `folder`, its image tower if it has two, in evaluation mode on the CPU."""
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        fix = "download the weights too; after git clone: git lfs pull"
        raise UserError(f"{folder} has no weights", allowed="model.safetensors, or pytorch_model.bin", fix=fix)
    model, info = load_folder("AutoModel", folder, "a vision model")
    if any(key.startswith("pooler.") for key in info["missing_keys"]):  # a pooler without weights would be random
        model, info = load_folder("AutoModel", folder, "a vision model", add_pooling_layer=False)
    check_whole(folder, info)
    model = getattr(model, "vision_model", model)
    if getattr(model.config, "model_type", "") == "vit_mae":
        model.config.mask_ratio = 0.0  # else three quarters of the patches are dropped
    if getattr(model, "main_input_name", "") != "pixel_values":
        raise UserError(f"{folder} holds a {type(model).__name__}, which takes no images", allowed="a vision model")
    return model.eval()


class _Pooled(nn.Module):
    """The model's own pooled output [B, W]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.net = model

    def forward(self, images: Tensor) -> Tensor:
        output = self.net(pixel_values=images)
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)  # convolutional models give [B, W, 1, 1]
        tokens = output.last_hidden_state
        if tokens.ndim == 4:
            return tokens.mean((2, 3))
        return tokens[:, 0] if _prefix(self.net, tokens.shape[1], images.shape[-1]) else tokens.mean(1)


def _hf_blocks(model: Any, side: int) -> Blocks:
    with torch.inference_mode():
        states = model(pixel_values=torch.zeros(1, 3, side, side), output_hidden_states=True).hidden_states
    if not states or states[-1].ndim not in (3, 4):
        raise UserError(f"{type(model).__name__} gives no hidden states", fix="omit --layer and --pool")
    grid = states[-1].ndim == 4  # of a convolutional model: [B, W, H, W']
    norms = [getattr(model, name, None) for name in _NORMS]
    norm = next((module for module in norms if isinstance(module, nn.Module) and not grid), None)

    def tokens(images: Tensor, block: int) -> Tensor:
        states = model(pixel_values=images, output_hidden_states=True).hidden_states
        features = states[block + 1]  # the first are the embeddings
        if grid:
            return features.flatten(2).transpose(1, 2)
        return norm(features) if norm is not None else features

    prefix = 0 if grid else _prefix(model, states[-1].shape[1], side)
    own = "cls" if prefix else "avg"
    return Blocks(len(states) - 1, prefix, tokens, "final norm" if norm is not None else "none", own)


def _prefix(model: Any, tokens: int, side: int) -> int:
    """Tokens before the patches: those beyond a whole grid of patches."""
    patch = getattr(model.config, "patch_size", None)
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    return max(0, tokens - (side // patch) ** 2) if patch else 0


def image_form(folder: Path) -> ImageForm:
    """Side, mean and std of the folder's image processor."""
    file = folder / "preprocessor_config.json"
    try:
        content = json.loads(file.read_bytes())
        size = content.get("crop_size") or content["size"]
        if isinstance(size, dict):
            size = size.get("shortest_edge") or size["height"]
        mean, std = content.get("image_mean") or [0.5] * 3, content.get("image_std") or [0.5] * 3
        return ImageForm(int(size), tuple(map(float, mean)), tuple(map(float, std)))
    except (ValueError, LookupError, TypeError) as error:
        problem = f"{file} gives no size, mean and std: {error!r}"
        raise UserError(problem, allowed="size or crop_size, image_mean, image_std") from None
