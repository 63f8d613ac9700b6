"""The loader delivers the right pixels and labels, whatever the threads, and names damage."""

import gc
import io
import json
import multiprocessing
import os
import random
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from beton_factory import build_out
from labels import beton
from labels.native import Decompressor
from labels.settings import Data
from labels.storage import UserError
from train.data import decode
from train.data.dataset import BetonSet
from train.data.loader import Batch, Loader
from train.data.order import Order, flipped, random_crop

SIDE = 32


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_out(tmp_path_factory.mktemp("loader"), [20, 7, 30])


def load(
    out: Path, steps: int = 3, *, threads: int = 2, batch: int = 19, **options: int
) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    settings = Data(crop_scale=[0.3, 1.0], flip=True)
    loader = Loader(
        BetonSet(out),
        settings,
        image_size=SIDE,
        batch_size=batch,
        seed=1,
        first_step=options.pop("first_step", 0),
        last_step=steps,
        threads=threads,
        **options,
    )
    with loader:
        return [(batch.images.clone(), batch.label_ids.clone(), batch.bad) for batch in loader]


def meta_of(out: Path) -> tuple[np.ndarray, list[bytes]]:
    """Metadata of all samples in order, and their JPEG bytes."""
    metas, jpegs = [], []
    for path in sorted((out / "beton").glob("*.beton")):
        data = np.fromfile(path, np.uint8)
        header = data[: beton.HEADER.itemsize].view(beton.HEADER)[0]
        meta = data[beton.METADATA_OFFSET :][: int(header["num_samples"]) * beton.METADATA.itemsize].view(
            beton.METADATA
        )
        metas.append(meta)
        jpegs += [data[row["image"]["data_ptr"] : row["labels_ptr"]].tobytes() for row in meta]
    return np.concatenate(metas), jpegs


def test_pixels_are_pils_crop_and_labels_the_rows(out: Path) -> None:
    import pyarrow.parquet as pq

    images, label_ids, bad = load(out, 1)[0]
    meta, jpegs = meta_of(out)
    rows = [
        row
        for path in sorted((out / "labels").glob("*.parquet"))
        for row in pq.read_table(path)["label_ids"].to_pylist()
    ]
    samples, _ = Order([57], (1,), 64, 1024, 1).batch(0, 19, 0, 1)
    assert bad == 0
    for row, sample in enumerate(samples):
        index = int(meta[sample]["index"])
        picture = Image.open(io.BytesIO(jpegs[sample]))
        left, top, width, height = random_crop(*picture.size, (0.3, 1.0), (0.75, 1.3333333333), 1, 0, index)
        expected = picture.crop((left, top, left + width, top + height)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        if flipped(1, 0, index):
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        difference = np.abs(np.asarray(expected, int) - images[row].numpy())
        # The decoder shrinks large crops by itself, with another filter: close on the whole, not to the level.
        shrinks = min(width, height) >= 2 * SIDE
        assert difference.max() <= (24 if shrinks else 2)
        assert difference.mean() <= (3 if shrinks else 0.6)
        assert [label for label in label_ids[row].tolist() if label >= 0] == rows[index]


def test_same_batches_for_any_number_of_threads_and_any_start(out: Path) -> None:
    reference = load(out, 5, threads=1)
    for threads in (2, 5, 19):
        for one, other in zip(reference, load(out, 5, threads=threads), strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])
    resumed = load(out, 5, first_step=3)
    assert torch.equal(resumed[0][0], reference[3][0])
    assert len(resumed) == 2


def shares(betons: BetonSet, first: int, last: int, world: int) -> list[list[tuple[Any, ...]]]:
    """What each of `world` ranks gets in steps [first, last): epoch, position, pixels and labels of every sample."""
    settings, found = Data(crop_scale=[0.3, 1.0], flip=True), []
    for rank in range(world):
        loader = Loader(
            betons,
            settings,
            image_size=8,
            batch_size=24,
            seed=1,
            first_step=first,
            last_step=last,
            rank=rank,
            world=world,
        )
        with loader:
            found.append(
                [
                    (epoch, position, image.numpy().tobytes(), labels.numpy().tobytes())
                    for batch in loader
                    for epoch, position, image, labels in zip(
                        batch.epochs.tolist(), batch.positions.tolist(), batch.images, batch.label_ids, strict=True
                    )
                ]
            )
    return found


def test_any_number_of_ranks_and_twenty_restarts_give_the_same_samples(out: Path) -> None:
    """57 samples, 19 steps of 24 = 8 epochs: each sample once an epoch, with the pixels that it has on one rank."""
    betons, dice, steps = BetonSet(out), random.Random(0), 19
    [alone] = shares(betons, 0, steps, 1)
    assert Counter((epoch, position) for epoch, position, *_ in alone) == Counter(
        (e, p) for e in range(8) for p in range(57)
    )
    for world in (2, 3, 8):
        assert Counter(sample for rank in shares(betons, 0, steps, world) for sample in rank) == Counter(alone)
    for _ in range(20):
        stop, before, after = dice.randint(1, steps - 1), *dice.sample([1, 2, 3, 8], 2)
        parts = [*shares(betons, 0, stop, before), *shares(betons, stop, steps, after)]
        assert Counter(sample for rank in parts for sample in rank) == Counter(alone), (stop, before, after)


def test_crops_change_from_epoch_to_epoch_but_not_between_runs(out: Path) -> None:
    boxes = [random_crop(300, 200, (0.3, 1.0), (0.75, 1.33), 0, epoch, 7) for epoch in range(40)]
    assert len(set(boxes)) > 30
    assert boxes == [random_crop(300, 200, (0.3, 1.0), (0.75, 1.33), 0, epoch, 7) for epoch in range(40)]
    for left, top, width, height in boxes:
        assert left >= 0
        assert left + width <= 300
        assert top >= 0
        assert top + height <= 200
    # Squares out of a square are never rejected: their shares are uniform in the range.
    shares = [
        w * h / 90000
        for _, _, w, h in (random_crop(300, 300, (0.3, 1.0), (1.0, 1.0), 1, 0, index) for index in range(2000))
    ]
    assert min(shares) > 0.29
    assert max(shares) <= 1.0
    assert abs(float(np.mean(shares)) - 0.65) < 0.02
    assert abs(float(np.mean([flipped(0, 0, index) for index in range(4000)])) - 0.5) < 0.03


def test_extreme_shapes_fall_back_to_the_centre() -> None:
    left, top, width, height = random_crop(1000, 10, (0.9, 1.0), (0.75, 1.33), 0, 0, 0)
    assert (top, height, width) == (0, 10, 13)
    assert left == (1000 - 13) // 2
    assert random_crop(1, 1, (0.9, 1.0), (0.75, 1.33), 0, 0, 0) == (0, 0, 1, 1)


def test_a_thousand_epochs_with_early_breaks_leave_nothing_behind(out: Path) -> None:
    """In a process of its own: what other tests have left in this one opens and closes files too."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        left = pool.submit(thousand_epochs, out).result()
    assert left.changed == []
    assert left.grown < 16 << 20
    assert left.torchs_threads[0] == left.torchs_threads[1]
    assert left.decompresses


@dataclass
class Left:
    """What epochs leave: those after which threads or descriptors were others, bytes of memory from the 100th on,
    torch's threads before and after, whether JPEGs can still be read."""

    changed: list[tuple[Any, ...]]
    grown: int
    torchs_threads: tuple[int, int]
    decompresses: bool


def thousand_epochs(out: Path) -> Left:
    betons, memory, changed = BetonSet(out), 0, []

    def state() -> tuple[int, dict[int, str]]:
        return threading.active_count(), open_files()

    before, torchs = state(), torch.get_num_threads()
    for epoch in range(1000):
        loader = Loader(
            betons,
            Data(),
            image_size=8,
            batch_size=19,
            seed=0,
            first_step=3 * epoch,
            last_step=3 * epoch + 3,
            threads=3,
        )
        for batch in loader:
            if epoch % 3 == 0 or batch.bad:
                break
        if (after := state()) != before:
            changed.append((epoch, before, after))
        if epoch == 100:
            memory = resident()
    return Left(changed[:3], resident() - memory, (torchs, torch.get_num_threads()), bool(Decompressor().handle))


def open_files() -> dict[int, str]:
    """Descriptors of this process and what they are of; the one that reads them is not among them."""
    found = {}
    for number in map(int, os.listdir("/proc/self/fd")):
        with suppress(FileNotFoundError):
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return found


@pytest.fixture(autouse=True)
def _nothing_of_other_tests() -> None:
    """Errors that were caught elsewhere hold frames, and those open sets, until they are collected."""
    gc.collect()


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_threads_end_when_the_loop_fails_and_when_the_block_does(out: Path) -> None:
    before = threading.active_count()
    loader = Loader(BetonSet(out), Data(), image_size=SIDE, batch_size=8, seed=0, first_step=0, last_step=50, threads=3)
    with pytest.raises(ZeroDivisionError), loader:
        next(1 // 0 for _ in loader)
    assert threading.active_count() == before
    with loader:
        kept = iter(loader)
        next(kept)
        assert threading.active_count() > before
    assert threading.active_count() == before


def test_files_of_a_set_are_closed_with_it(out: Path) -> None:
    def opened() -> list[str]:
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return [os.readlink(link) for link in links if os.path.exists(link) and os.readlink(link).endswith(".beton")]

    before = opened()
    betons = BetonSet(out)
    assert len(opened()) == len(before) + 3
    del betons
    assert opened() == before


@pytest.mark.parametrize(("prefetch", "slots"), [(1, 2), (19 * (SIDE * SIDE * 3 + 75 * 4) * 5, 5), (2**40, 21)])
def test_prefetch_is_bounded_in_bytes(out: Path, prefetch: int, slots: int) -> None:
    loader = Loader(
        BetonSet(out), Data(prefetch=prefetch), image_size=SIDE, batch_size=19, seed=0, first_step=0, last_step=20
    )
    memory = {batch.images.data_ptr() for batch in loader}
    assert len(memory) <= slots
    assert len(memory) >= min(slots, 20) - 1


def test_small_batches_are_not_decoded_by_the_gigabyte_before_the_first_steps(out: Path) -> None:
    with Loader(
        BetonSet(out), Data(prefetch=2**30), image_size=8, batch_size=2, seed=0, first_step=0, last_step=1000
    ) as loader:
        assert len({batch.images.data_ptr() for batch in loader}) <= 64


def test_canvases_count_for_prefetch(out: Path) -> None:
    settings, largest = Data(crop_scale=[1.0, 1.0], prefetch=6 * 19 * (96 * 96 * 3 + 75 * 4)), 0
    loader = Loader(
        BetonSet(out), settings, image_size=SIDE, batch_size=19, seed=0, first_step=0, last_step=40, device=True
    )
    memory = {}
    for step, batch in enumerate(loader):
        if step >= 20:  # every size has been met
            memory[batch.images.data_ptr()] = batch.images.untyped_storage().nbytes()
            largest = max(largest, memory[batch.images.data_ptr()])
    assert largest > 19 * 64 * 64 * 3
    assert settings.prefetch - largest - 19 * 75 * 4 < sum(memory.values()) + 19 * 75 * 4 * len(memory) + largest
    assert sum(memory.values()) <= settings.prefetch


def test_the_next_batch_is_decoded_while_the_loop_has_one(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Semaphore(0)
    load_rows = decode.load_rows

    def count(*arguments: Any) -> int:
        begun.release()
        return load_rows(*arguments)

    monkeypatch.setattr(decode, "load_rows", count)
    settings = Data(prefetch=1)  # two batches, the least
    with Loader(BetonSet(out), settings, image_size=8, batch_size=19, seed=0, first_step=0, last_step=9) as loader:
        batches = iter(loader)
        next(batches)
        next(batches)
        for number in range(3):
            assert begun.acquire(timeout=60), number


def test_a_flipped_bit_in_the_table_is_an_error(out: Path, tmp_path: Path) -> None:
    """The pointers of image and labels bound each other: the bytes between them are the JPEG."""
    at = beton.METADATA_OFFSET + 5 * beton.METADATA.itemsize + beton.METADATA.fields["labels_ptr"][1]  # type: ignore[index]
    copy = patched(out, tmp_path, 0, at + 7, b"\x80")
    with pytest.raises(UserError, match=r"00000\.beton, sample 5: its table entry points outside the file"):
        load(copy, 3)


def patched(out: Path, tmp_path: Path, number: int, at: int, data: bytes) -> Path:
    """A copy of the output folder with bytes of one beton overwritten."""
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    with open(copy / "beton" / f"{number:05d}.beton", "r+b") as file:
        file.seek(at)
        file.write(data)
    return copy


def test_a_damaged_jpeg_is_grey_named_and_without_labels(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta, jpegs = meta_of(out)
    copy = patched(out, tmp_path, 1, int(meta[22]["image"]["data_ptr"]), bytes(200))
    batches = load(copy, 3)
    assert sum(bad for _, _, bad in batches) == 1
    assert "00001.beton, sample 2, index 22" in capsys.readouterr().out
    grey = [
        (images[row], labels[row]) for images, labels, _ in batches for row in range(19) if (images[row] == 128).all()
    ]
    assert len(grey) == 1
    assert (grey[0][1] == -1).all()
    assert len(jpegs) == 57


def test_a_label_beyond_the_head_is_an_error(out: Path, tmp_path: Path) -> None:
    meta, _ = meta_of(out)
    copy = patched(out, tmp_path, 0, int(meta[3]["labels_ptr"]), (49_408).to_bytes(4, "little"))
    with pytest.raises(
        UserError,
        match=r"00000\.beton, sample 3 has the label 49408(.|\n)*allowed: 0 to 49407, the head's width(.|\n)*verify",
    ):
        load(copy, 3)


def test_a_table_entry_outside_the_file_is_an_error(out: Path, tmp_path: Path) -> None:
    at = beton.METADATA_OFFSET + 5 * beton.METADATA.itemsize + 5
    copy = patched(out, tmp_path, 0, at, (1 << 50).to_bytes(8, "little"))
    with pytest.raises(UserError, match=r"00000\.beton, sample 5: its table entry points outside the file"):
        load(copy, 3)


def copied(out: Path, tmp_path: Path) -> Path:
    shutil.copytree(out, tmp_path / "copy")
    return tmp_path / "copy"


def endless(out: Path) -> Iterator[Batch]:
    """Batches of very many epochs in blocks of 4 samples, windows of 2 blocks."""
    settings = Data(shuffle_block=4, shuffle_window=2, prefetch=1)
    return iter(
        Loader(BetonSet(out), settings, image_size=8, batch_size=19, seed=0, first_step=0, last_step=10_000, threads=2)
    )


def test_a_beton_that_is_cut_during_the_run_is_an_error_that_names_it(out: Path, tmp_path: Path) -> None:
    copy = copied(out, tmp_path)
    batches = endless(copy)
    next(batches)
    os.truncate(copy / "beton" / "00002.beton", 4096)
    with pytest.raises(
        UserError, match=r"00002\.beton (has 4096 bytes, and had \d+ when it was opened|cannot be read at byte)"
    ):
        for _ in batches:
            pass


def test_a_beton_that_disappears_during_the_run_is_an_error_that_names_it(out: Path, tmp_path: Path) -> None:
    copy = copied(out, tmp_path)
    batches = endless(copy)
    next(batches)
    (copy / "beton" / "00000.beton").unlink()
    with pytest.raises(UserError, match=r"00000\.beton was removed or replaced while it was in use(.|\n)*put it back"):
        for _ in batches:
            pass


def test_a_read_that_fails_is_an_error_that_names_the_file(out: Path, tmp_path: Path) -> None:
    betons = BetonSet(copied(out, tmp_path))
    os.truncate(betons.paths[1], 3000)
    with pytest.raises(
        UserError, match=r"00001\.beton cannot be read at byte \d+ \(it has 3000 bytes now\): it was cut"
    ):
        next(iter(Loader(betons, Data(), image_size=8, batch_size=57, seed=0, first_step=0, last_step=1)))


def edit_manifest(out: Path, tmp_path: Path, **values: object) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | values))
    return copy


def test_what_does_not_fit_is_refused_before_training(out: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist(.|\n)*build-labels"):
        BetonSet(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no manifest\.json: the build is unfinished"):
        BetonSet(tmp_path / "empty")
    with pytest.raises(UserError, match="built with --no-beton"):
        BetonSet(edit_manifest(out, tmp_path / "a", betons=[]))
    with pytest.raises(
        UserError, match=r"not the table that the betons were built with: SHA-256 \w{16}\.\.\., in the manifest 0000"
    ):
        BetonSet(edit_manifest(out, tmp_path / "b", idf_sha256="0" * 64))
    version = patched(out, tmp_path / "c", 2, 0, b"\x07\x00")
    with pytest.raises(UserError, match=r"00002\.beton is of beton version 7(.|\n)*allowed: 2"):
        BetonSet(version)
    cut = patched(out, tmp_path / "d", 1, 0, b"")
    path = cut / "beton" / "00001.beton"
    path.write_bytes(path.read_bytes()[:-24])
    with pytest.raises(UserError, match=r"00001\.beton has \d+ bytes, in the manifest \d+: it was cut or replaced"):
        BetonSet(cut)
    path.unlink()
    with pytest.raises(UserError, match=r"00001\.beton is missing"):
        BetonSet(cut)
