"""Features of a frozen encoder, extracted once for each encoder and data set.

    place -> bytes -> PIL (RGB, alpha on white) -> shorter side to S, bicubic, centre crop -> normalise -> encoder -> [N, W]

N samples, B batch, S image side, W feature width.
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from labels.errors import UserError
from labels.files import fingerprint, whole_file
from train.evals.datasets import LabelledImages, Place
from train.evals.encoders import Encoder

TRANSFORM = "RGB, alpha on white, shorter side to image_size (PIL bicubic, antialiased), centre crop"
_BATCHES_AHEAD = 3
_BAD_SHOWN = 5


def extract(encoder: Encoder, data: LabelledImages, *, batch_size: int, device: torch.device, cache: Path | None = None) -> np.ndarray:
    """Features of every sample, in the order of `data.targets`: float32 [N, W].

    Args:
        encoder: moved to `device` and left there.
        batch_size: images at once through the encoder; it does not change the features' meaning.
        cache: a folder that keeps features between calls, under a fingerprint of encoder, data and transform.

    Raises:
        UserError: images that cannot be decoded (all are named or counted), or features that are not finite.
    """
    key = fingerprint([encoder.describe(), data.fingerprint, data.modified_ns, TRANSFORM])
    file = cache / f"{key}.npy" if cache else None
    if file and file.is_file():
        return np.load(file)
    features = _run(encoder, data, batch_size, device)
    if not np.isfinite(features).all():
        bad = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
        raise UserError(
            f"the encoder {encoder.name!r} gives features that are not finite, first for {data.keys[bad]}",
            mend="probe an earlier checkpoint: the weights of this one have diverged",
        )
    if file:
        with whole_file(file) as partial, open(partial, "wb") as stream:
            np.save(stream, features)
    return features


@torch.inference_mode()
def _run(encoder: Encoder, data: LabelledImages, batch_size: int, device: torch.device) -> np.ndarray:
    """Decode in threads, a few batches ahead of the encoder. After the first bad image only the decoding goes on."""
    net = encoder.net.to(device)
    mean, std = (torch.tensor(value, device=device).view(1, 3, 1, 1) for value in encoder.images[1:])
    features = np.empty((len(data), encoder.width), np.float32)
    bad: list[str] = []
    done = 0
    for decoded in _batches(data, batch_size, encoder.images.side):
        bad += [f"{data.keys[done + index]} ({image})" for index, image in enumerate(decoded) if isinstance(image, str)]
        if not bad:
            pixels = torch.from_numpy(np.stack([image for image in decoded if not isinstance(image, str)])).to(device)
            images = pixels.permute(0, 3, 1, 2).float().div(255)  # [B, 3, S, S]
            features[done : done + len(decoded)] = net((images - mean) / std).float().cpu().numpy()
        done += len(decoded)
    if bad:
        rest = f" and {len(bad) - _BAD_SHOWN} more" if len(bad) > _BAD_SHOWN else ""
        raise UserError(
            f"{len(bad)} of {len(data)} images of {data.directory} cannot be decoded: {', '.join(bad[:_BAD_SHOWN])}{rest}",
            allowed="whole image files that Pillow reads",
            mend="mend or remove them: leaving them out here would make accuracies on other copies of the data differ",
        )
    return features


def _batches(data: LabelledImages, batch_size: int, side: int) -> Iterator[list[np.ndarray | str]]:
    """Batches of decoded images, or of the reason why one cannot be decoded; at most `_BATCHES_AHEAD` wait."""
    waiting: deque[list[Future[np.ndarray | str]]] = deque()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for start in range(0, len(data), batch_size):
            waiting.append([pool.submit(_load, place, side) for place in data.places[start : start + batch_size]])
            if len(waiting) > _BATCHES_AHEAD:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]


def _load(place: Place, side: int) -> np.ndarray | str:
    try:
        return decode(place.read(), side)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"{type(error).__name__}: {error}"


def decode(encoded: bytes, side: int) -> np.ndarray:
    """Image bytes of any kind that Pillow reads -> uint8 [S, S, 3]: shorter side to S, bicubic, centre crop.

    Raises:
        OSError, ValueError, SyntaxError, DecompressionBombError: Pillow's own, for bytes that are no whole image.
    """
    with Image.open(BytesIO(encoded)) as image:
        image.draft(None, (2 * side, 2 * side))  # lets the JPEG decoder halve big images, never below twice the side
        rgb = _to_rgb(image)
    short = min(rgb.size)
    left, top = (rgb.width - short) / 2, (rgb.height - short) / 2
    square = rgb.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + short, top + short))
    return np.asarray(square)


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: 16-bit grey keeps its high byte (Pillow would clip it), transparency is laid on white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert("RGB")
