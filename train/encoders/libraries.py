"""Encoders from timm: any of its models without the classifier, weights from a local file, timm's hub, or a seed."""

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

from labels.storage import UserError
from train.checkpoint import load_exactly, read_weights, weights_fingerprint
from train.encoders.encoder import Blocks, Encoder, EncoderSpec, ImageForm, finish, read_out, timm_blocks
from train.encoders.text import TextSide, open_clip_text_side

HUB = "hub"


def load_timm(requested: EncoderSpec, name: str) -> Encoder:
    """timm's `name` with the weights of `requested.weights`: a file, or `hub`.

    Raises:
        UserError: no such model, no weights, or weights that do not fit.
    """
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
            raise UserError(
                f"timm's weights of {name!r} cannot be fetched: {error}", fix="give --weights FILE"
            ) from None
    else:
        net = timm.create_model(name, pretrained=False, num_classes=0)
        head = getattr(net, "pretrained_cfg", {}).get("classifier") or ()
        prefixes = tuple(f"{part}." for part in ((head,) if isinstance(head, str) else head))
        tensors = read_weights(Path(weights))
        load_exactly(net, {key: value for key, value in tensors.items() if not key.startswith(prefixes)}, Path(weights))
    return _finish(requested, name, net, weights, seeded=False)


def untrained_timm(requested: EncoderSpec, name: str, seed: int) -> Encoder:
    """timm's `name`, its weights drawn from `seed`."""
    _check_name(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = timm.create_model(name, pretrained=False, num_classes=0)
    return _finish(requested, name, net, f"none, drawn from seed {seed}", seeded=True)


def with_readout(requested: EncoderSpec, net: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """A timm net as it is, or with the layer and pool that were asked for; and what a description says of them."""
    if requested.layer is None and requested.pool is None:
        return net, {"pool": _pool_of(net), "layer": "last, before the classifier"}
    return read_out(requested, net, timm_blocks(net))


def _finish(requested: EncoderSpec, name: str, net: nn.Module, weights: str, *, seeded: bool) -> Encoder:
    config = resolve_model_data_config(net)
    form = ImageForm(int(config["input_size"][-1]), tuple(config["mean"]), tuple(config["std"]))
    net, words = with_readout(requested, net)
    return finish(
        requested,
        net,
        form,
        {"architecture": name, "architecture_args": {}, "checkpoint": weights, **words},
        seeded=seeded,
    )


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        raise UserError(
            f"timm has no model named {name!r}", allowed="any name of timm.list_models()", fix="fix --encoder"
        )


def _pool_of(net: nn.Module) -> str:
    """timm keeps the pool as a word (ViT) or as a module, of the net or of its head (convolutional nets)."""
    for holder in (net, getattr(net, "head", None)):
        pool = getattr(holder, "global_pool", None)
        if pool is not None:
            return pool if isinstance(pool, str) else str(getattr(pool, "pool_type", type(pool).__name__))
    return "none"


# ---- open_clip_models: Encoders from open_clip: the image tower of any of its configurations, weights from a local
# file.
#
# Without --layer and --pool the features are the image embedding, after the projection, as clip_benchmark probes it;
# with them, the tower's tokens before the projection.


def load_open_clip(requested: EncoderSpec, name: str) -> Encoder:
    """The image tower of open_clip's `name` with the weights of the file `requested.weights`.

    Raises:
        UserError: open_clip is missing, has no such model, or the weights do not fit.
    """
    model = load_clip(name, requested.weights)
    visual = model.visual
    size = visual.image_size
    form = ImageForm(size if isinstance(size, int) else int(size[0]), tuple(visual.image_mean), tuple(visual.image_std))
    text: Callable[[], TextSide] | None = None
    net, words = visual, {"pool": str(getattr(visual, "pool_type", "own")), "layer": "embedding, after the projection"}
    if requested.layer is not None or requested.pool is not None:
        net, words = read_out(requested, visual, _blocks(visual))
    else:
        text, words = partial(open_clip_text_side, name, model), {**words, "text_tower": weights_fingerprint(model)}
    words = {"architecture": name, "architecture_args": {}, "checkpoint": requested.weights, **words}
    return replace(finish(requested, net, form, words), text=text)


def load_clip(name: str, weights: str | None) -> Any:
    """open_clip's model `name`, both towers, in evaluation mode on the CPU, with the tensors of a local file and no
    others.

    Raises:
        UserError: as for load_open_clip.
    """
    try:
        import open_clip
    except ImportError:
        raise UserError("open_clip is not installed", fix="pip install 'superclass-lean[evals]'") from None
    if name not in open_clip.list_models():
        raise UserError(
            f"open_clip has no model named {name!r}",
            allowed="any name of open_clip.list_models()",
            fix="fix --encoder",
        )
    if weights is None:
        raise UserError(
            f"the encoder 'open_clip:{name}' has no weights",
            allowed="--weights FILE (open_clip_model.safetensors, or a .pt file of tensors)",
            fix=f"--encoder open_clip:{name} --weights FILE",
        )
    model: nn.Module = open_clip.create_model(name, load_weights=False)
    load_exactly(model, read_weights(Path(weights)), Path(weights))
    return model.eval()


def _blocks(visual: Any) -> Blocks:
    """open_clip's towers give intermediates as a dictionary, patches and prefix tokens apart."""
    trunk = getattr(visual, "trunk", None)  # a timm model
    transformer = hasattr(visual, "transformer") or hasattr(trunk, "num_prefix_tokens")
    prefix = int(getattr(trunk, "num_prefix_tokens", 0)) if trunk is not None else int(transformer)
    own_depth = (
        len(visual.transformer.resblocks) if hasattr(visual, "transformer") else 5
    )  # ModifiedResNet: stem and four stages
    depth = own_depth if trunk is None else len(trunk.feature_info)
    options: dict[str, Any] = (
        {"output_fmt": "NLC", "output_extra_tokens": True, "normalize_intermediates": True} if transformer else {}
    )

    def tokens(images: Tensor, block: int) -> Tensor:
        found = visual.forward_intermediates(
            images, indices=[block], intermediates_only=True, stop_early=True, **options
        )
        patches = found["image_intermediates"][0]
        if not transformer:
            return patches.flatten(2).transpose(1, 2)
        return torch.cat([*found.get("image_intermediates_prefix", []), patches], dim=1)

    own = "cls" if prefix and getattr(visual, "pool_type", "tok") == "tok" else "avg"
    return Blocks(depth, prefix, tokens, "final norm" if transformer else "none", own)


# ---- pretrained: Models of transformers from a local folder: every weight there, and no code and no pickle of the
# folder run.


_SHOWN = 4
_POINTER = b"version https://git-lfs"
_WEIGHTS = ("*.safetensors", "*.bin")


def import_transformers() -> Any:
    """The library, without progress bars and warnings of missing weights: those are errors here.

    Raises:
        UserError: it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise UserError("transformers is not installed", fix="pip install 'superclass-lean[evals]'") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_folder(auto: str, folder: Path, what: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model and what transformers tells of its loading; see check_whole.

    Args:
        auto: the class of transformers that loads it.
        what: the folder holds, for messages: "a vision model".
        options: of its from_pretrained.

    Raises:
        UserError: transformers cannot load it, by tensors alone.
    """
    safe: dict[str, Any] = {
        "local_files_only": True,
        "trust_remote_code": False,
        "weights_only": True,
        "output_loading_info": True,
    }
    try:
        return getattr(import_transformers(), auto).from_pretrained(folder, **safe, **options)
    except Exception as error:  # transformers raises what it likes; the folder is the user's
        reason = str(error).splitlines()[0].partition(". ")[0] if str(error) else type(error).__name__
        raise UserError(
            f"{folder} cannot be loaded by transformers: {reason}",
            allowed=f"a folder of {what}, whole, without code of its own",
            fix=_mend(folder, reason),
        ) from None


def check_whole(folder: Path, info: dict[str, Any]) -> None:
    """Refuse a model of which weights would be random.

    Raises:
        UserError: naming the first that are missing or of another shape.
    """
    faults = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if faults:
        shown = ", ".join(faults[:_SHOWN])
        raise UserError(
            f"{folder}: {len(faults)} weights are missing or of another shape, the first: {shown}",
            fix="download it again",
        )


def _mend(folder: Path, reason: str) -> str:
    for file in sorted(file for pattern in _WEIGHTS for file in folder.glob(pattern)):
        with open(file, "rb") as opened:
            if opened.read(len(_POINTER)) == _POINTER:
                return f"git lfs pull: {file.name} is a pointer to the weights, not the weights"
    if "Weights only load failed" in reason:
        return "take its weights as safetensors: the .bin files hold more than tensors, and are not unpickled"
    return "download it again"


# ---- hf_models: Encoders from a local folder in Hugging Face's form: config.json, model.safetensors,
# preprocessor_config.json. No code in it is run.
#
# The features are the model's `pooler_output`, or, where it has none, the class token or else the mean of its last
# tokens; `--layer` and `--pool` read `hidden_states`. A CLIP-like folder with both towers gives its image tower, before
# the projection.


_NORMS = ("layernorm", "post_layernorm", "norm")


def load_hf(requested: EncoderSpec, folder: Path) -> Encoder:
    """The vision model in `folder`.

    Raises:
        UserError: transformers is missing; the folder lacks configuration or weights; weights do not fit; it is no
            vision model.
    """
    for name, fix in (
        ("config.json", "give hf: a folder that save_pretrained wrote, or that was downloaded whole"),
        ("preprocessor_config.json", "save the image processor beside the model: it says size, mean and std"),
    ):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}", allowed="hf:DIR, a folder in Hugging Face's form", fix=fix)
    form = image_form(folder)
    model = load_vision_model(folder)
    net, words = _Pooled(model), {"pool": "the model's own", "layer": "last"}
    if requested.layer is not None or requested.pool is not None:
        net, words = read_out(requested, model, _blocks_hf_models(model, form.side))
    words = {"architecture": type(model).__name__, "architecture_args": {}, "checkpoint": str(folder), **words}
    return finish(requested, net, form, words)


def load_vision_model(folder: Path) -> Any:
    """transformers' vision model in `folder`, its image tower where it has two, in evaluation mode on the CPU.

    Raises:
        UserError: transformers is missing; the folder lacks weights, or some of them; it holds no vision model.
    """
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise UserError(
            f"{folder} has no weights",
            allowed="model.safetensors, or pytorch_model.bin",
            fix="download the weights too; after git clone: git lfs pull",
        )
    model, info = load_folder("AutoModel", folder, "a vision model")
    if any(key.startswith("pooler.") for key in info["missing_keys"]):  # a pooler that the weights lack would be random
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
        found = self.net(pixel_values=images)
        pooled = getattr(found, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)  # convolutional models give [B, W, 1, 1]
        tokens = found.last_hidden_state
        if tokens.ndim == 4:
            return tokens.mean((2, 3))
        return tokens[:, 0] if _prefix(self.net, tokens.shape[1], images.shape[-1]) else tokens.mean(1)


def _blocks_hf_models(model: Any, side: int) -> Blocks:
    with torch.inference_mode():
        states = model(pixel_values=torch.zeros(1, 3, side, side), output_hidden_states=True).hidden_states
    if not states or states[-1].ndim not in (3, 4):
        raise UserError(f"{type(model).__name__} gives no hidden states", fix="leave --layer and --pool out")
    grid = states[-1].ndim == 4
    norm = (
        None
        if grid
        else next((getattr(model, name) for name in _NORMS if isinstance(getattr(model, name, None), nn.Module)), None)
    )

    def tokens(images: Tensor, block: int) -> Tensor:
        found = model(pixel_values=images, output_hidden_states=True).hidden_states[
            block + 1
        ]  # the first are the embeddings
        if grid:
            return found.flatten(2).transpose(1, 2)
        return norm(found) if norm is not None else found

    prefix = 0 if grid else _prefix(model, states[-1].shape[1], side)
    return Blocks(
        len(states) - 1, prefix, tokens, "final norm" if norm is not None else "none", "cls" if prefix else "avg"
    )


def _prefix(model: Any, tokens: int, side: int) -> int:
    """Tokens before the patches: what is left beyond a whole grid of patches."""
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
        raise UserError(
            f"{file} gives no size, mean and std: {error!r}", allowed="size or crop_size, image_mean, image_std"
        ) from None
