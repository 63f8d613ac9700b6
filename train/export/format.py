"""What an export format is, the check of an export, and the two simple formats: timm and ONNX.

    encoder -> Format.write(encoder, folder) -> Written -> check: random images [B, 3, S, S] through the encoder and
    through what the format's library reads back from the folder -> features [B, W], at most TOLERANCE apart

Hugging Face's format is in hf.py, open_clip's two towers are in open_clip.py; export.py has the list of all four.
check_replaceable protects what a user has put into the output folder.
"""

import json
import logging
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from labels.storage import UserError, write_json
from train.encoders.encoder import Encoder, ImageForm
from train.encoders.load import trained_model
from train.model import feature_width, trunk_arguments

Features = Callable[[Tensor], Tensor]
"""Normalised images [B, 3, S, S] -> features [B, W]."""
TOLERANCE = 1e-4
"""Largest difference of a feature."""
_BATCHES = (1, 3)  # two sizes: a batch axis that was frozen would show


class Written(NamedTuple):
    """What a format has written into a folder."""

    holds: str  # what it is, in a word or two
    pooling: str  # which of its outputs are the encoder's features, in a sentence
    code: str  # Python that loads it from `folder` and computes `features` of the RGB PIL image `image` of S x S pixels
    read: Callable[[Path], Features]  # loads it from a folder by the format's own library
    text_difference: Callable[[Path], float] | None = None  # with a text tower: the largest difference of its features
    expected: Features | None = None  # what it is compared with, if not the encoder itself: its projected features
    projected: int | None = None  # their width


class Format(NamedTuple):
    """`library` is the Hub's name of what loads it; `write` raises UserError for encoders that it cannot hold."""

    name: str
    library: str
    write: Callable[[Encoder, Path], Written]


@torch.inference_mode()
def check(encoder: Encoder, written: Written, folder: Path) -> float:
    """The largest difference of any feature over random images, in fp32 on the CPU.

    Raises:
        UserError: it is above TOLERANCE, or not a number, or the shapes differ.
    """
    read, expected = written.read(folder), written.expected or encoder
    generator, side = torch.Generator().manual_seed(0), encoder.images.side
    worst = written.text_difference(folder) if written.text_difference else 0.0
    for batch in _BATCHES:
        images = torch.randn(batch, 3, side, side, generator=generator)
        own, exported = expected(images), read(images)
        if own.shape != exported.shape:
            shapes = f"features of shape {list(exported.shape)}, the encoder {list(own.shape)}"
            raise UserError(f"the {written.holds} gives {shapes}", fix="take another --format")
        worst = max(worst, float((own - exported).abs().max().nan_to_num(nan=float("inf"))))
    if not worst <= TOLERANCE:
        raise UserError(
            f"the {written.holds} differs from the encoder {encoder.name!r} by {worst:.1e}; nothing was written",
            allowed=f"at most {TOLERANCE:.0e}",
            fix="take another --format; if the weights are sound, this is a fault of the conversion: please report it",
        )
    return worst


def check_replaceable(out: Path, mark: str, command: str) -> None:
    """Refuse to write into `out` if it holds anything that `command` (`train export`) has not written.

    `mark` is the JSON file in which the command lists the `files` of the folder.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    allowed = f"a new or empty folder, or one as `{command}` has written it"
    fix = "give another --out, or move that away yourself"
    try:
        files = {mark, *json.loads((out / mark).read_bytes())["files"]}
    except (OSError, ValueError, LookupError, TypeError):
        problem = f"--out {out} exists and is not of `{command}`: it has no {mark} with a list of its files"
        raise UserError(problem, allowed=allowed, fix=fix) from None
    if foreign := sorted(path.name for path in out.iterdir() if path.name not in files):
        names = ", ".join(foreign[:4])
        problem = f"--out {out} has files that `{command}` has not written and would remove: {names}"
        raise UserError(problem, allowed=allowed, fix=fix)


def share_like(file: Path) -> None:
    """Give all files next to `file` its mode: safetensors ignores the umask and writes for the owner only."""
    mode = stat.S_IMODE(file.stat().st_mode)
    for path in file.parent.iterdir():
        if path.is_file():
            path.chmod(mode)


def save_weights(net: nn.Module, file: Path) -> None:
    """All tensors of `net` as safetensors, under their own keys."""
    save_file({key: tensor.contiguous() for key, tensor in net.state_dict().items()}, file)


# -- timm: model.safetensors with timm's keys, config.json as timm's hub format has it (timm/models/_hub.py)


class TimmTower(NamedTuple):
    """`timm.create_model(architecture, num_classes=0, **arguments)` builds `net`; `arguments` are JSON-able."""

    net: Any
    architecture: str
    arguments: dict[str, Any]


def timm_tower(encoder: Encoder, format_name: str) -> TimmTower:
    """The encoder as a timm model.

    Raises:
        UserError: it is none, or a layer or pool other than the model's own was requested.
    """
    spec = encoder.requested
    if spec.layer is not None or spec.pool is not None:
        part = f"layer {spec.layer or 'last'} with pool {spec.pool or 'its own'}"
        raise UserError(
            f"--format {format_name} holds the whole model, not {part}",
            allowed="--layer and --pool with --format onnx",
            fix="omit them: layer and pool are chosen in the library that loads the export",
        )
    # A run of `train lit` has frozen another encoder: that one is the model.
    kind, _, name = encoder.description.get("frozen", spec.spec).removeprefix("untrained:").partition(":")
    if kind == "timm":
        return TimmTower(encoder.net, name.partition(".")[0], {})
    if (model := trained_model(encoder)) is None:
        raise UserError(
            f"the encoder {encoder.name!r} is no timm model, as --format {format_name} requires",
            allowed="run:RUN, ema:RUN, untrained:RUN, timm:NAME, untrained:timm:NAME",
            fix="--format onnx takes any encoder" + (", --format open_clip this one" if kind == "open_clip" else ""),
        )
    return TimmTower(encoder.net, *trunk_arguments(model))


_COPIED = ("first_conv", "classifier", "fixed_input_size")
_TIMM_CODE = """\
import timm
import torch

model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
with torch.inference_mode():
    features = model(transform(image).unsqueeze(0))
"""


def pretrained_config(net: Any, form: ImageForm) -> dict[str, Any]:
    """timm's `pretrained_cfg`: the images that the net takes, and the names of its first and last layers."""
    own = getattr(net, "pretrained_cfg", {})
    return {
        **{key: own[key] for key in _COPIED if own.get(key) is not None},
        "num_classes": 0,
        "input_size": [3, form.side, form.side],
        "mean": list(form.mean),
        "std": list(form.std),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }


def _write_timm(encoder: Encoder, folder: Path) -> Written:
    net, architecture, arguments = timm_tower(encoder, "timm")
    save_weights(net, folder / "model.safetensors")
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": feature_width(net),
        "model_args": {**arguments, "num_classes": 0},
        "pretrained_cfg": pretrained_config(net, encoder.images),
    }
    write_json(folder / "config.json", config)
    pooling = f"The model's own output is the encoder's feature: its pool is `{encoder.description['pool']}`."
    return Written(f"timm {architecture}", pooling, _TIMM_CODE, _read_timm)


def _read_timm(folder: Path) -> Features:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


TIMM = Format("timm", "timm", _write_timm)


# -- ONNX: one graph, normalised float images [batch, 3, S, S] -> features [batch, W], the batch axis free

_ONNX_FILE = "model.onnx"
_EXPORT_ERRORS = (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError, TypeError, NotImplementedError)
_ONNX_CODE = """\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(folder + "/model.onnx", providers=["CPUExecutionProvider"])
pixels = np.asarray(image, dtype=np.float32) / 255
images = ((pixels - {mean}) / {std}).transpose(2, 0, 1)[None].astype(np.float32)
(features,) = session.run(["features"], {{"images": images}})
"""


def write_processor(folder: Path, form: ImageForm) -> None:
    """preprocessor_config.json: shorter side to S by bicubic resampling, centre crop, mean and std."""
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": form.side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": form.side, "width": form.side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(form.mean),
        "image_std": list(form.std),
    }
    write_json(folder / "preprocessor_config.json", processor)


def _write_onnx(encoder: Encoder, folder: Path) -> Written:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        fix = "pip install 'superclass-lean[onnx]'"
        raise UserError("onnx, onnxscript and onnxruntime are not all installed", fix=fix) from None
    form = encoder.images
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        program = torch.onnx.export(
            encoder.net,
            (torch.zeros(2, 3, form.side, form.side),),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
        assert program is not None  # with dynamo=True
        program.save(folder / _ONNX_FILE)
    except _EXPORT_ERRORS as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        fix = "take --format timm or hf; or another --layer and --pool"
        raise UserError(f"torch cannot export {encoder.name!r} to ONNX: {reason}", fix=fix) from None
    write_processor(folder, form)
    layer, pool = encoder.description["layer"], encoder.description["pool"]
    pooling = f"The graph's only output is the encoder's feature: layer {layer}, pool `{pool}`."
    code = _ONNX_CODE.format(mean=list(form.mean), std=list(form.std))
    return Written("onnx graph", pooling, code, _read_onnx)


def _read_onnx(folder: Path) -> Features:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / _ONNX_FILE, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])


ONNX = Format("onnx", "onnx", _write_onnx)
