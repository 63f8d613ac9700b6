"""Images that stay in the user's tars: the same order, pixels, labels and losses as from betons, and damage that is
named.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from beton_factory import build_out
from image_index_factory import with_image_index
from labels.config import load_pipeline
from labels.settings import Data
from labels.storage import Layout, UserError
from train.data.dataset import BetonSet
from train.data.loader import Loader
from train.data.open import make_rows
from train.trainer import train_run

TINY = [
    "train.samples=40",
    "train.batch_size=8",
    "train.model.trunk=vit_tiny_patch16_224",
    "train.model.image_size=16",
    "train.model.trunk_args={patch_size: 8, depth: 1, embed_dim: 24, num_heads: 2}",
    "train.data.threads=2",
    "train.optimizer.warmup_samples=8",
    "train.runtime.device=cpu",
    "train.runtime.precision=fp32",
    "train.runtime.threads=1",
    "train.log.tensorboard=false",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Betons in out/, an image index in places/, over the same tars in shards/."""
    folder = tmp_path_factory.mktemp("places")
    with_image_index(build_out(folder, [20, 9, 15]), folder / "shards", folder / "places")
    return folder


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """An image index of one's own, over tars of one's own."""
    shutil.copytree(folder / "shards", tmp_path / "shards")
    shutil.copytree(folder / "places", tmp_path / "places")
    sources = tmp_path / "places" / "places" / "sources.json"
    sources.write_text(sources.read_text().replace(str(folder.resolve()), str(tmp_path.resolve())))
    list(make_rows(tmp_path / "places", tmp_path / "places"))
    return tmp_path / "places"


def batches(out: Path, **options: int) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    loader = Loader(
        BetonSet(out),
        Data(crop_scale=[0.3, 1.0], flip=True, shuffle_block=4, shuffle_window=3),
        image_size=24,
        batch_size=11,
        seed=1,
        first_step=0,
        last_step=8,
        threads=2,
        **options,
    )
    return [(batch.images.clone(), batch.label_ids.clone(), batch.bad) for batch in loader]


def test_pixels_labels_and_losses_are_those_of_betons(folder: Path, own: Path, tmp_path: Path) -> None:
    for (images, labels, bad), (same, also, _) in zip(batches(folder / "out"), batches(own), strict=True):
        assert torch.equal(images, same)
        assert torch.equal(labels, also)
        assert bad == 0
        assert (labels >= 0).any(dim=1).all()
    losses = []
    for name, out in (("a", folder / "out"), ("b", own)):
        shutil.rmtree(out / "rows", ignore_errors=True)  # which training makes by itself
        assert train_run(out, tmp_path / name, load_pipeline(overrides=TINY))
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5


def test_tars_that_are_gone_cut_or_replaced_are_named(own: Path) -> None:
    tar = own.parent / "shards" / "00000001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-512])
    with pytest.raises(UserError, match=rf"{tar} has \d+ bytes, and had {len(whole)} when its image index was made"):
        BetonSet(own)
    tar.unlink()
    with pytest.raises(
        UserError, match=rf"{tar}, the tar of shard 00000001, cannot be opened(.|\n)*sources\.json where it is"
    ):
        BetonSet(own)
    sources = Layout(own).image_sources
    sources.write_text(
        json.dumps({name: value for name, value in json.loads(sources.read_text()).items() if name != "00000001"})
    )
    with pytest.raises(UserError, match=r"sources\.json does not say where the tar of shard 00000001 is"):
        BetonSet(own)
    sources.unlink()
    with pytest.raises(UserError, match=r"sources\.json cannot be read"):
        BetonSet(own)


def test_a_tar_that_is_cut_while_training_is_named(own: Path) -> None:
    betons = BetonSet(own)
    tar = own.parent / "shards" / "00000002.tar"
    os.truncate(tar, 512)
    with pytest.raises(UserError, match=rf"{tar} cannot be read at byte \d+ \(it has 512 bytes now\): it was cut"):
        list(Loader(betons, Data(), image_size=16, batch_size=11, seed=0, first_step=0, last_step=4))


def test_image_indexes_of_another_form_are_refused(own: Path) -> None:
    path = Layout(own).image_index_file(0)
    data = path.read_bytes()
    path.write_bytes(data[:-4])
    with pytest.raises(UserError, match=r"00000\.npy (cannot be read|holds)"):
        BetonSet(own)
    path.write_bytes(Layout(own).image_index_file(1).read_bytes())
    with pytest.raises(UserError, match=r"00000\.npy holds 9 images, in the manifest 20"):
        BetonSet(own)
