"""What reaches the model: the same pixels in both modes, evaluators' crops, and torchvision's colours."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from numba.core.runtime import _nrt_python, rtsys  # type: ignore[attr-defined]  (numba's own statistics of memory)
from PIL import Image
from torchvision.transforms import functional

from beton_factory import build_out, photo
from labels.config import load_pipeline
from labels.native import Decompressor
from labels.settings import Data
from labels.storage import UserError
from train.data import decode
from train.data.dataset import BetonSet
from train.data.decode import BOX, Crops, decode_row, window_of
from train.data.inputs import ImageInput, draw, jitter, resample_canvas, resamples
from train.data.loader import Batch, Loader
from train.data.resize import vertical_first
from train.evals.features import decode as decode_for_evals

SIDE = 32
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_out(tmp_path_factory.mktemp("inputs"), [30, 20])


def inputs(out: Path, *, threads: int = 2, **values: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
    settings = Data(crop_scale=[0.3, 1.0], flip=True, **values)  # type: ignore[arg-type]
    to_model = ImageInput(settings, CPU, image_size=SIDE, seed=3)
    loader = Loader(
        BetonSet(out),
        settings,
        image_size=SIDE,
        batch_size=16,
        seed=3,
        first_step=0,
        last_step=4,
        threads=threads,
        device=resamples(settings, CPU),
    )
    with loader:
        return [tuple(tensor.clone() for tensor in to_model(batch)) for batch in loader]  # type: ignore[misc]


def test_both_modes_give_the_model_the_same(out: Path) -> None:
    for host, device in zip(inputs(out, resample="host"), inputs(out, resample="device"), strict=True):
        assert torch.equal(host[1], device[1])
        assert host[0].shape == device[0].shape == (16, 3, SIDE, SIDE)
        assert (host[0] - device[0]).abs().max() < 2.1 / 255 / 0.26


@pytest.mark.parametrize("mode", ["host", "device"])
def test_threads_do_not_change_pixels_and_normalisation_is_clips(out: Path, mode: str) -> None:
    jittered = {"resample": mode, "color_jitter_probability": 0.8, "grey_probability": 0.2}
    for one, other in zip(inputs(out, threads=1, **jittered), inputs(out, threads=5, **jittered), strict=True):
        assert torch.equal(one[0], other[0])
    plain = inputs(out, resample=mode)[0][0]
    levels = (plain * torch.tensor(Data().std).view(3, 1, 1) + torch.tensor(Data().mean).view(3, 1, 1)) * 255
    assert (levels - levels.round()).abs().max() < 1e-3
    assert levels.min() > -1e-3
    assert levels.max() < 255 + 1e-3


def test_auto_leaves_the_resampling_to_cuda_alone() -> None:
    assert not resamples(Data(), CPU)
    assert resamples(Data(), torch.device("cuda"))
    assert not resamples(Data(resample="host"), torch.device("cuda"))


def decoded(
    jpeg: bytes, device: bool, size: int, epoch: int | None = None, canvas: tuple[int, int] | None = None
) -> np.ndarray:
    """One image as decode_row leaves it: the crop of an epoch, or a centre crop; on a canvas of this many rows and
    columns.
    """
    width, height = Image.open(io.BytesIO(jpeg)).size
    crops = Crops((0.3, 0.8), (0.75, 1.33), epoch is not None, 0, size, epoch is None, device)
    window, data = window_of(width, height, crops, epoch or 0, 0), np.frombuffer(jpeg, np.uint8)
    image, box = np.zeros((*(canvas or (3 * size, 3 * size)), 3), np.uint8), np.zeros(BOX, np.float32)
    handle, scratch = Decompressor(), np.empty(1 << 22, np.uint8)
    assert (
        decode_row(data.ctypes.data, len(data), width, height, window, crops, handle.handle, scratch, image, box) == 0
    )
    if not device:
        return image[:size, :size].astype(int)
    first = np.array([vertical_first(window.width, window.height, size)])
    pixels = resample_canvas(torch.from_numpy(image)[None], torch.from_numpy(box)[None], first, size)
    return pixels[0].permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize(("width", "height"), [(90, 60), (61, 100), (32, 32), (150, 140), (288, 256), (20, 31)])
def test_the_centre_is_what_evaluators_see(width: int, height: int, device: bool) -> None:
    jpeg = photo(width, width, height)
    assert np.abs(decoded(jpeg, device, SIDE) - decode_for_evals(jpeg, SIDE)).max() <= (1 if device else 2)


def test_a_huge_crop_is_resampled_before_it_reaches_the_canvas() -> None:
    jpeg, size = photo(5, 1500, 1400), 16
    assert np.abs(decoded(jpeg, True, size) - decoded(jpeg, False, size)).max() == 0


def test_a_whole_image_on_the_canvas_shows_the_filter_the_crop_alone() -> None:
    jpeg = photo(7, 90, 70)
    for epoch in range(20):
        window = window_of(90, 70, Crops((0.3, 0.8), (0.75, 1.33), True, 0, SIDE, False, True), epoch, 0)
        assert window.columns < 90 or window.rows < 70
        cut = decoded(jpeg, True, SIDE, epoch, (window.rows, window.columns))
        assert np.array_equal(decoded(jpeg, True, SIDE, epoch, (72, 96)), cut), epoch


def test_colours_are_torchvisions() -> None:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.random((24, 3, 9, 8), np.float32))
    images[0] = 0.5  # no hue at all
    images[1, 1] = images[1, 0]
    strengths = np.array([0.32, 0.32, 0.32, 0.08])
    epochs, positions = np.zeros(24, np.int64), np.arange(24)
    factors, order, grey = draw(strengths, 0.8, 0.3, 5, epochs, positions)
    steps = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    )
    expected = images.clone()
    for row in range(24):
        for step in order[row]:
            if step >= 0:
                expected[row] = steps[step](expected[row], float(factors[row, step]))
        if grey[row]:
            expected[row] = functional.rgb_to_grayscale(expected[row], 3)
    jitter(images, factors, order, grey)
    assert (order >= 0).any() and grey.any()
    assert (images - expected).abs().max() < 2e-5


def test_draws_have_their_shares_and_depend_on_seed_epoch_and_position_alone() -> None:
    strengths, many = np.array([0.32, 0.32, 0.32, 0.08]), np.arange(20_000)
    factors, order, grey = draw(strengths, 0.8, 0.2, 1, np.zeros_like(many), many)
    jittered = order[:, 0] >= 0
    assert abs(jittered.mean() - 0.8) < 0.01
    assert abs(grey.mean() - 0.2) < 0.01
    assert (np.sort(order[jittered], axis=1) == np.arange(4)).all()
    assert all(abs((order[jittered, 0] == step).mean() - 0.25) < 0.015 for step in range(4))
    assert np.allclose(factors.min(0), [0.68, 0.68, 0.68, -0.08], atol=0.005)
    assert np.allclose(factors.max(0), [1.32, 1.32, 1.32, 0.08], atol=0.005)
    turned = draw(strengths, 0.8, 0.2, 1, np.zeros_like(many), many[::-1].copy())
    assert np.array_equal(turned[0][::-1], factors) and np.array_equal(turned[1][::-1], order)
    assert not np.array_equal(draw(strengths, 0.8, 0.2, 1, np.ones_like(many), many)[0], factors)


@pytest.mark.parametrize("device", [False, True])
def test_nothing_is_allocated_for_a_sample(out: Path, device: bool) -> None:
    betons, decoder = BetonSet(out), Decompressor()
    crops = Crops((0.3, 1.0), (0.75, 1.33), True, 0, SIDE, False, device)
    side, samples = 3 * SIDE, np.arange(50)
    rows = decode.Rows(
        np.zeros((50, side, side, 3) if device else (50, SIDE, SIDE, 3), np.uint8),
        np.zeros((50, BOX), np.float32),
        np.zeros((50, betons.label_limit), np.int32),
        np.zeros(50, np.int64),
        np.zeros(50, np.uint8),
    )
    epochs, scratch = np.zeros(50, np.int64), np.empty(1 << 22, np.uint8)
    allocations = []
    _nrt_python.memsys_enable_stats()
    try:
        with betons.held(samples):
            for end in (1, 50, 1, 50):
                before = rtsys.get_allocation_stats().alloc
                assert not decode.load_rows(
                    betons.tables, samples, epochs, 0, end, crops, betons.vocabulary, decoder.handle, scratch, rows
                )
                allocations.append(rtsys.get_allocation_stats().alloc - before)
    finally:
        _nrt_python.memsys_disable_stats()
    assert (rows.status == 0).all()
    assert allocations[2] == allocations[3]


def test_a_hue_beyond_half_a_circle_is_refused() -> None:
    with pytest.raises(UserError, match=r"color_jitter(.|\n)*the hue: 0 to 0\.5"):
        load_pipeline(overrides=["train.data.color_jitter=[0.1, 0.1, 0.1, 0.6]"])


def test_pixels_become_floats_by_a_table_of_the_same_floats() -> None:
    settings = load_pipeline().train.data
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).T.reshape(1, 16, 16, 3).contiguous()
    batch = Batch(pixels, None, torch.zeros(1, 2, dtype=torch.int32), np.zeros(1, np.int64), np.zeros(1, np.int64), 0)
    images, _ = ImageInput(settings, CPU, image_size=16, seed=0)(batch)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (settings.mean, settings.std))
    assert torch.equal(images, (pixels.permute(0, 3, 1, 2).float() / 255).sub_(mean).div_(std))
