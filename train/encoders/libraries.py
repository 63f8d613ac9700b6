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
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
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
    channels, *sides = config["input_size"]
    if channels != 3 or len(set(sides)) > 1:
        problem = f"the encoder {requested.spec!r} takes images of {' x '.join(map(str, config['input_size']))}"
        raise UserError(problem, allowed="an encoder of square RGB images", fix="name another --encoder")
    form = ImageForm(int(sides[0]), tuple(config["mean"]), tuple(config["std"]))
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
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        problem = f"the encoder {requested.spec!r} takes images of {height} x {width}"
        raise UserError(problem, allowed="an encoder of square images", fix="name another --encoder")
    form = ImageForm(int(height), tuple(visual.image_mean), tuple(visual.image_std))
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
    form, flips = image_form(folder)
    model = load_vision_model(folder)
    if flips:
        model.register_forward_pre_hook(flip_channels, with_kwargs=True)
    net, readout = _Pooled(model), {"pool": "the model's own", "layer": "last"}
    if requested.layer is not None or requested.pool is not None:
        net, readout = read_out(requested, model, _hf_blocks(model, form.side))
    about = _description(type(model).__name__, str(folder), readout) | ({"channels": "BGR"} if flips else {})
    return finish(requested, net, form, about)


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


_SIDES = (64, 96)  # of the images that a processor is asked about
_BLACK, _COLOURS, _MIXED = (0, 0, 0), ((255, 0, 0), (0, 255, 0), (0, 0, 255)), (51, 102, 204)


class Processed(NamedTuple):
    """What a folder's image processor makes of images; `flips`: the model takes blue first."""

    form: ImageForm
    flips: bool


def image_form(folder: Path) -> Processed:
    """Side, mean, std and order of the channels, measured: transformers' own processor is given images of one colour.

    So every flag of every class counts (do_rescale, rescale_offset, do_flip_channel_order, ...), with its defaults.
    UserError: transformers cannot load it, or pixels of one colour do not become one value a channel.
    """
    processor = _load_processor(folder)
    black, *primary = (_channels(processor, folder, colour) for colour in (_BLACK, *_COLOURS))
    side, offset = black
    slopes = np.stack([values - offset for _, values in primary], axis=1)  # [channel of the model, colour]
    order = np.abs(slopes).argmax(axis=1)
    slope = slopes[range(3), order]
    mixed = (_channels(processor, folder, _MIXED).values - offset) / np.where(slope, slope, np.inf)
    if order.tolist() not in ([0, 1, 2], [2, 1, 0]) or np.abs(mixed - np.array(_MIXED)[order] / 255).max() > 1e-3:
        allowed = "one value for each of red, green and blue, a multiple of the pixel plus a constant"
        raise UserError(f"the image processor of {folder} mixes colours", allowed=allowed, fix="name another encoder")
    mean = _rounded((-offset / slope)[order], getattr(processor, "image_mean", None))
    std = _rounded((1 / slope)[order], getattr(processor, "image_std", None))
    return Processed(ImageForm(side, mean, std), order[0] != 0)


def _rounded(measured: np.ndarray, stated: Any) -> tuple[float, ...]:
    """The values that the processor states, if they are those that were measured in float32."""
    values = np.array(stated if np.shape(stated) == (3,) else np.nan, np.float64)
    if np.allclose(measured, values, rtol=1e-5, atol=1e-6):
        return tuple(values.tolist())
    return tuple(float(f"{value:.7g}") for value in measured)


def _load_processor(folder: Path) -> Any:
    try:
        auto = import_transformers().AutoImageProcessor
        return auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # transformers raises many types; the folder is the user's
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{folder / 'preprocessor_config.json'} cannot be loaded by transformers: {reason}",
            allowed="what an image processor's save_pretrained writes",
            fix="save the image processor of the model there again",
        ) from None


class _Channels(NamedTuple):
    side: int
    values: np.ndarray  # float64 [3]


def _channels(processor: Any, folder: Path, colour: tuple[int, int, int]) -> _Channels:
    """The side of the processor's images, and the values that it gives for a colour."""
    file, shapes, values = folder / "preprocessor_config.json", [], np.zeros(3)
    for side in _SIDES:
        try:
            pixels = processor(images=Image.new("RGB", (side, side), colour), return_tensors="pt")["pixel_values"]
        except Exception as error:  # as above
            problem = f"{file} cannot be applied to an image of {side} x {side}: {str(error) or type(error).__name__}"
            raise UserError(problem, allowed="a processor of single RGB images", fix="fix the file") from None
        shapes.append(tuple(getattr(pixels, "shape", ())))
        if len(shapes[-1]) != 4 or shapes[-1][:2] != (1, 3) or shapes[-1][2] != shapes[-1][3]:
            problem = f"{file} gives square images the shape {list(shapes[-1])}"
            raise UserError(problem, allowed="[1, 3, S, S]", fix="set `size` or `crop_size` to a square")
        values = pixels[0, :, shapes[-1][2] // 2, shapes[-1][2] // 2].double().numpy()
    sides = {shape[2] for shape in shapes}
    side = sides.pop() if len(sides) == 1 else _own_side(folder)
    if side is None:
        problem = f"{file} neither resizes nor crops images, and config.json has no `image_size`"
        raise UserError(problem, allowed="one image size", fix="set do_resize: true and `size`")
    return _Channels(side, values)


def _own_side(folder: Path) -> int | None:
    """The image size in a model's configuration."""
    config = json.loads((folder / "config.json").read_bytes())
    size = config.get("vision_config", config).get("image_size")
    size = size[0] if isinstance(size, list) and len(set(size)) == 1 else size
    return size if isinstance(size, int) else None


def flip_channels(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A hook before the forward of a model that takes blue first: `pixel_values` are RGB everywhere else."""
    return args, {**kwargs, "pixel_values": kwargs["pixel_values"].flip(1)}
