"""Features: of the right images in the right order, once for each encoder and data set, with every fault named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fuzz_images import png_chunk
from image_folders import encoded, write_folders
from labels.settings import Features, Train
from labels.storage import UserError
from run_factory import write_run
from train.encoders.load import load_encoder
from train.evals import features
from train.evals.data.sets import DataSet, load_pair
from train.evals.features import Extractor, decode

CPU = torch.device("cpu")


def extractor(batch_size: int = 2, cache: Path | None = None, threads: int = 3) -> Extractor:
    return Extractor(CPU, Features(batch_size=batch_size, threads=threads), cache)


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    train_dir = write_folders(tmp_path / "train", {"a": 3, "b": 2})
    for index, file in enumerate(sorted(train_dir.rglob("*.png"))):
        file.write_bytes(encoded((index * 40, 255 - index, 7)))
    return load_pair(train_dir, write_folders(tmp_path / "test", {"a": 2}, start=9))


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("threads", [1, 5])
def test_pixel_features_are_the_pixels_in_order(data: DataSet, batch_size: int, threads: int) -> None:
    found = extractor(batch_size, threads=threads)(load_encoder("pixels:4"), data.train)
    assert found.shape == (5, 48) and found.dtype == np.float32
    expected = np.array([[index * 40, 255 - index, 7] for index in range(5)]) / 255
    assert np.allclose(found.reshape(5, 3, 16), expected[:, :, None], atol=1e-6)
    assert load_encoder("pixels:").images.side == 32


def test_a_stream_gives_the_requested_rows(data: DataSet) -> None:
    encoder, rows = load_encoder("pixels:1"), np.array([4, 0, 4, 2, 1])
    seen = []

    def decoded_by(image: bytes, side: int, row: int) -> np.ndarray:
        seen.append(row)
        return decode(image, side)

    pieces = list(extractor(2).stream(encoder, data.train, rows, decoded_by))
    assert [len(piece) for piece in pieces] == [2, 2, 1] and sorted(seen) == sorted(rows)
    assert (torch.cat(pieces)[:, 0] * 255).round().int().tolist() == [160, 0, 160, 80, 40]


def test_features_are_the_trunks_on_normalised_images(tmp_path: Path, data: DataSet) -> None:
    trunks = write_run(tmp_path / "run", 1)
    found = extractor()(load_encoder(f"{tmp_path}/run"), data.train)
    image = torch.tensor([2 * 40, 253, 7]).view(1, 3, 1, 1).expand(1, 3, 32, 32) / 255
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (Train().data.mean, Train().data.std))
    with torch.no_grad():
        expected = trunks[1]((image - mean) / std)[0].numpy()
    assert np.allclose(found[2], expected, atol=1e-4)


def test_cached_features_are_taken_and_belong_to_one_encoder_and_data(
    tmp_path: Path, data: DataSet, monkeypatch
) -> None:
    cache = tmp_path / "cache"
    extract = extractor(cache=cache)
    first = extract(load_encoder("pixels:4"), data.train)
    extract(load_encoder("pixels:5"), data.train)
    extract(load_encoder("pixels:4"), data.test)
    assert len(list(cache.iterdir())) == 3
    monkeypatch.setattr(features, "decoded_batches", lambda *_: pytest.fail("extracted again"))
    assert np.array_equal(extractor(3, cache)(load_encoder("pixels:4"), data.train), first)


def test_bf16_features_are_others_than_fp32(tmp_path: Path, data: DataSet) -> None:
    write_run(tmp_path / "run", 1)
    encoder, cache = load_encoder(f"{tmp_path}/run"), tmp_path / "cache"
    fp32 = extractor(cache=cache)(encoder, data.train)
    bf16 = Extractor(CPU, Features(precision="bf16"), cache)(encoder, data.train)
    assert bf16.dtype == np.float32 and not np.array_equal(fp32, bf16) and np.allclose(fp32, bf16, atol=0.1)
    assert len(list(cache.iterdir())) == 2


def test_unreadable_images_are_named_and_counted(data: DataSet) -> None:
    data.train.encoded[1].path.write_bytes(b"no image at all")
    data.train.encoded[4].path.write_bytes(encoded(size=(50, 50))[:-30])
    with pytest.raises(UserError) as caught:
        extractor()(load_encoder("pixels:4"), data.train)
    text = str(caught.value)
    assert (
        "2 of 5 images" in text
        and "a/1.png (UnidentifiedImageError" in text
        and "b/1.png" in text
        and "fix or remove" in text
    )


def test_images_with_damaged_metadata_are_decoded_and_counted(
    data: DataSet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = extractor()(load_encoder("pixels:4"), data.train)
    assert "images decoded" not in capsys.readouterr().out
    for index in (0, 3):
        path = data.train.encoded[index].path
        png = path.read_bytes()
        chunk = (b"tEXt", b"k\0v", 1) if index else (b"eXIf", b"II*\0\xff")
        path.write_bytes(png[:33] + png_chunk(*chunk) + png[33:])
    found = load_pair(data.train.directory, data.test.directory).train
    assert np.array_equal(extractor()(load_encoder("pixels:4"), found), expected)
    assert capsys.readouterr().out == "images decoded with damaged metadata: 2\n"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12 * 8 - 1)
    with pytest.warns(Image.DecompressionBombWarning):  # pytest's filters replace those of a command
        extractor()(load_encoder("pixels:4"), found)
    lines = ["images decoded with damaged metadata: 2", "images decoded with more than 95 pixels: 5", ""]
    assert capsys.readouterr().out == "\n".join(lines)


def test_features_that_are_not_finite_are_refused(tmp_path: Path, data: DataSet) -> None:
    write_run(tmp_path / "run", 1)
    encoder = load_encoder(f"{tmp_path}/run")
    encoder.net.state_dict()["norm.weight"].fill_(float("nan"))
    with pytest.raises(UserError, match=r"not finite, first for a/0\.png[\s\S]*earlier checkpoint"):
        extractor()(encoder, data.train)
