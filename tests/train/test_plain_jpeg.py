"""The compiled decoder of plain JPEGs against Pillow: the same crops and pixels; and the images it passes to Pillow."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from labels.storage import UserError
from train.evals import features
from train.evals.features import decode_plain_jpeg

CROPS = [None, (0, 1, 2), (3, 0, 7), (5, 4, 1)]


def jpeg(width: int, height: int, mode: str = "RGB", **options) -> bytes:
    noise = np.random.default_rng(width).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(
        buffer, "JPEG", quality=90, **options
    )
    return buffer.getvalue()


def by_pillow(encoded: bytes, side: int, crop: tuple[int, int, int] | None) -> np.ndarray:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "_plain_jpeg", lambda *_: None)
        found = features.decode(encoded, side) if crop is None else features.decode_crop(encoded, side, *crop)
    return found.astype(int)


@pytest.mark.parametrize("shape", [(256, 256), (500, 375), (375, 501), (1001, 667), (33, 300), (40, 30), (9, 17)])
@pytest.mark.parametrize("kind", [("RGB", {}), ("RGB", {"subsampling": 0, "progressive": True}), ("L", {})])
def test_pixels_are_pillows(shape: tuple[int, int], kind: tuple[str, dict]) -> None:
    encoded = jpeg(*shape, kind[0], **kind[1])
    for side in (32, 224):
        for crop in CROPS:
            found = decode_plain_jpeg(encoded, side, crop)
            assert found is not None
            difference = np.abs(found - by_pillow(encoded, side, crop))
            assert difference.max() <= 2 and difference.mean() < 0.2, (side, crop)


def test_a_shifted_crop_would_be_seen() -> None:
    encoded = jpeg(500, 375)
    difference = np.abs(by_pillow(encoded, 224, (0, 1, 2)) - by_pillow(encoded, 224, (0, 1, 3)))
    assert difference.max() > 2 and difference.mean() > 0.2


def test_a_damaged_header_leaves_the_next_images_to_the_compiled_decoder() -> None:
    whole = jpeg(256, 200)
    expected = decode_plain_jpeg(whole, 32, None)
    assert expected is not None
    for end in (22, 91, 165, whole.index(b"\xff\xda") + 5):
        assert decode_plain_jpeg(whole[:end], 32, None) is None
        found = decode_plain_jpeg(whole, 32, None)
        assert found is not None and np.array_equal(found, expected)


def test_images_that_pillow_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = jpeg(256, 200)
    assert decode_plain_jpeg(whole[: len(whole) // 2], 32, None) is None  # the decoder would fill it with grey
    assert (
        decode_plain_jpeg(b"\xff\xd8 nothing", 32, None) is None
        and decode_plain_jpeg(jpeg(64, 64, "CMYK"), 32, None) is None
    )
    with pytest.raises(OSError, match="truncated"):
        features.decode(whole[: len(whole) // 2], 32)
    assert features.decode(jpeg(64, 64, "CMYK"), 32).shape == (32, 32, 3)
    features._has_turbojpeg.cache_clear()
    monkeypatch.setattr(features, "load_turbojpeg", missing)
    assert (features.decode(whole, 32) == by_pillow(whole, 32, None)).all()
    features._has_turbojpeg.cache_clear()


def missing() -> None:
    raise UserError("libturbojpeg is not installed")


def test_threads_have_memory_of_their_own() -> None:
    images = [jpeg(100 + 40 * number, 90) for number in range(24)]
    alone = [features.decode(image, 32) for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: features.decode(image, 32), images * 4))
    assert all((one == other).all() for one, other in zip(alone * 4, together, strict=True))
