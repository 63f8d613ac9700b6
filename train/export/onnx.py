"""ONNX: one graph, normalised float images [batch, 3, S, S] -> features [batch, W], the batch axis free; run by
onnxruntime to check it.
"""

import logging
from pathlib import Path

import torch

from labels.storage import UserError
from train.encoders.encoder import Encoder
from train.export.format import Features, Format, Written
from train.export.hf import write_processor

_FILE = "model.onnx"
_FAULTS = (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError, TypeError, NotImplementedError)
_CODE = """\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(folder + "/model.onnx", providers=["CPUExecutionProvider"])
side, short = {side}, min(image.size)
left, top = (image.width - short) / 2, (image.height - short) / 2
box = (left, top, left + short, top + short)
pixels = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC, box=box), dtype=np.float32) / 255
images = ((pixels - {mean}) / {std}).transpose(2, 0, 1)[None].astype(np.float32)
(features,) = session.run(["features"], {{"images": images}})
"""


def _write(encoder: Encoder, folder: Path) -> Written:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError(
            "onnx, onnxscript and onnxruntime are not all installed", fix="pip install 'superclass-lean[onnx]'"
        ) from None
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
        program.save(folder / _FILE)
    except _FAULTS as error:
        raise UserError(
            f"torch cannot export {encoder.name!r} to ONNX: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            fix="take --format timm or hf; or another --layer and --pool",
        ) from None
    write_processor(folder, form)
    pooling = f"The graph's only output is the encoder's feature: layer {encoder.description['layer']}, pool `{encoder.description['pool']}`."
    code = _CODE.format(side=form.side, mean=list(form.mean), std=list(form.std))
    return Written("onnx graph", pooling, code, _read)


def _read(folder: Path) -> Features:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / _FILE, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])


ONNX = Format("onnx", "onnx", _write)
