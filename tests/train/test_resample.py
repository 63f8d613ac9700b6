"""Both ways of resampling are PIL's bicubic to the level, on noise and on smooth pictures; neither shows aliasing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from train.data.inputs import coarse_part, resample_canvas
from train.data.resize import margin_bytes, resize_crop, vertical_first, work_bytes

BICUBIC = Image.Resampling.BICUBIC


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(width: int, height: int) -> np.ndarray:
    return np.asarray(Image.fromarray(noise(7, 7)).resize((width, height), BICUBIC))


def passes(pixels: np.ndarray, size: int) -> np.ndarray:
    """PIL's two passes in the order of Pillow 13, which older versions do not choose by themselves."""
    height, width = pixels.shape[:2]
    between = (width, size) if vertical_first(width, height, size) else (size, height)
    return np.asarray(Image.fromarray(pixels).resize(between, BICUBIC).resize((size, size), BICUBIC), int)


def on_host(pixels: np.ndarray, size: int, flip: bool = False) -> np.ndarray:
    height, width = pixels.shape[:2]
    source = np.zeros(pixels.size + margin_bytes(3 * width, float(height), size), np.uint8)
    source[: pixels.size] = pixels.ravel()
    out, work = (
        np.empty(3 * size * size, np.uint8),
        np.empty(work_bytes(height, width, float(width), float(height), size), np.uint8),
    )
    resize_crop(
        source, 3 * width, height, width, 0.0, 0.0, float(width), float(height), flip, size, out, 3 * size, work
    )
    return out.reshape(size, size, 3).astype(int)


def on_device(pixels: np.ndarray, size: int, flip: bool = False) -> np.ndarray:
    height, width = pixels.shape[:2]
    canvas = np.full((1, height + 5, width + 11, 3), 255, np.uint8)  # what surrounds the crop must not matter
    canvas[0, :height, :width] = pixels
    boxes = torch.tensor([[0, 0, width, height, 0, 0, width, height, flip]], dtype=torch.float32)
    first = np.array([vertical_first(width, height, size)])
    return resample_canvas(torch.from_numpy(canvas), boxes, first, size)[0].permute(1, 2, 0).numpy().astype(int)


SHAPES = [(70, 55), (50, 90), (40, 30), (33, 300), (300, 33), (32, 32), (31, 33), (9, 7), (200, 190)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("picture", [noise, smooth])
def test_the_device_is_pil_within_a_level(shape: tuple[int, int], picture) -> None:
    pixels = picture(*shape)
    assert np.abs(on_device(pixels, 32) - passes(pixels, 32)).max() <= 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("picture", [noise, smooth])
def test_the_host_is_pil_within_two_levels_and_mostly_equal(shape: tuple[int, int], picture) -> None:
    pixels = picture(*shape)
    difference = np.abs(on_host(pixels, 32) - passes(pixels, 32))
    assert difference.max() <= 2
    assert difference.mean() < 0.05


def test_the_order_of_passes_is_pillows() -> None:
    for width, height in SHAPES:
        pixels = noise(width, height)
        assert np.array_equal(passes(pixels, 32), np.asarray(Image.fromarray(pixels).resize((32, 32), BICUBIC), int))


@given(st.integers(1, 120), st.integers(1, 120), st.integers(4, 40), st.booleans())
@settings(max_examples=40, deadline=None)
def test_both_modes_agree_and_keep_flat_colours(width: int, height: int, size: int, flip: bool) -> None:
    pixels = noise(width, height)
    assert np.abs(on_host(pixels, size, flip) - on_device(pixels, size, flip)).max() <= 2
    flat = np.full_like(pixels, 137)
    assert (on_host(flat, size) == 137).all()
    assert (on_device(flat, size) == 137).all()


def test_mirrored_is_mirrored() -> None:
    pixels = noise(75, 60)
    assert np.array_equal(on_host(pixels, 32, True), on_host(pixels, 32)[:, ::-1])
    assert np.array_equal(on_device(pixels, 32, True), on_device(pixels, 32)[:, ::-1])


def test_a_zone_plate_does_not_alias() -> None:
    """Rings finer than the output's pixels have to become flat grey; INTER_LINEAR without a wider filter leaves half of
    their contrast.
    """
    side, size = 448, 224
    y, x = np.mgrid[:side, :side] - side / 2
    radius = np.hypot(x, y)
    rings = 127.5 + 127.5 * np.cos(np.pi * radius**2 / side)  # one cycle in 448 / radius pixels
    pixels = np.repeat(rings[..., None], 3, 2).astype(np.uint8)
    # The output holds cycles of 2 output pixels, 4 source pixels, which are at radius 112. Beyond 190 nothing may be
    # left.
    far = (radius > 190)[::2, ::2]
    for resampled in (on_host(pixels, size), on_device(pixels, size)):
        assert resampled[far].std() < 8
        assert resampled[~far].std() > 40


def test_the_coarse_part_of_weights_is_tf32_and_the_rest_is_small() -> None:
    weights = torch.rand(1000) - 0.1
    coarse = coarse_part(weights)
    assert (coarse.view(torch.int32) & 0x1FFF == 0).all()
    assert ((weights - coarse).abs() <= weights.abs() * 2**-10).all()
    assert torch.equal(coarse + (weights - coarse), weights)
