"""The loader's work on a sample cut into its stages, with the loader's own compiled parts, to time each by itself.

K label limit.
"""

import statistics
import time

import numpy as np

from labels.native import Decompressor, njit
from labels.settings import Train
from train.batch import Slot
from train.data import decode
from train.data.dataset import BetonSet
from train.data.image_index import OK, TABLE_BYTES, Tables, copy_labels, find, read_sample
from train.data.loader import Loader
from train.data.resize import aligned
from train.pixels import Crops, decompress, shrunk, window_of

LABELS, READ, DECODE = range(3)
_ROUNDS = 5
_FIRST_SCRATCH_BYTES = 1 << 20


@njit(nogil=True, cache=True)
def run_stages(
    tables: Tables, samples: np.ndarray, epochs: np.ndarray, last: int, crops: Crops, vocabulary: int, handle: int, scratch: np.ndarray,
    labels: np.ndarray,
) -> int:  # fmt: skip
    """Do the stages up to `last` for some samples, and forget the results.

    Args:
        tables, crops, vocabulary, handle: as of train/data/decode.py.
        samples, epochs: int64 [N].
        last: LABELS finds each sample and copies a label row; READ reads its bytes too; DECODE decodes them as far as its crop needs.
        scratch: uint8, large enough for the largest of the samples, for DECODE its pixels included.
        labels: int32 [K], written.

    Returns:
        bytes of images and label rows that were found.
    """
    total, limit = 0, len(labels)
    for row in range(len(samples)):
        place = find(tables, samples[row], limit, scratch)
        if place.status != OK:
            continue
        total += place.bytes + 4 * limit
        at = TABLE_BYTES + place.bytes
        if last >= READ:
            read_sample(place, limit, scratch)
        copy_labels(scratch, at if last >= READ else TABLE_BYTES, vocabulary, labels)
        if last >= DECODE:
            shrink = window_of(place.width, place.height, crops, epochs[row], place.row).shrink
            pixels = scratch[aligned(at + 4 * limit) :]
            columns, lines = shrunk(place.width, shrink), shrunk(place.height, shrink)
            decompress(scratch[TABLE_BYTES:].ctypes.data, place.bytes, columns, lines, handle, pixels, 3 * columns)
    return total


def time_stages(betons: BetonSet, settings: Train, loader: Loader, count: int) -> dict[str, float]:
    """Microseconds of processor time a sample, on one thread, page cache warm: the medians of a few rounds in turns.

    Args:
        betons: the open set.
        settings: `train`.
        loader: whose crops and order are taken.
        count: N, how many samples.

    Returns:
        `labels` (finding a sample, its index and its labels), `read`, `decode`, `resize` (where the device resamples: the copy of the crop
        into its canvas) and `all`.
    """
    samples, epochs = loader.order.take(0, count)
    samples = betons.chosen(samples)
    worker, scratch = Decompressor(), np.empty(_FIRST_SCRATCH_BYTES, np.uint8)
    slot = Slot(count, settings.model.image_size, betons.label_limit, False, loader.crops.device)
    times: dict[int, list[float]] = {LABELS: [], READ: [], DECODE: [], DECODE + 1: []}
    betons.bring(betons.numbers(samples))
    with betons.held(samples):
        if loader.crops.device:
            table = np.empty(TABLE_BYTES, np.uint8)
            slot.fit(*decode.canvas_shape(betons.tables, samples, epochs, betons.label_limit, loader.crops, table))
        whole = (betons.tables, samples, epochs, 0, count, loader.crops, betons.vocabulary, worker.handle)
        while needed := decode.load_rows(*whole, scratch, slot.rows):
            scratch = np.empty(needed, np.uint8)
        rest = (loader.crops, betons.vocabulary, worker.handle, scratch, np.empty(betons.label_limit, np.int32))
        for number in range(_ROUNDS + 1):
            for last, found in times.items():
                begun = time.thread_time()
                if last > DECODE:
                    decode.load_rows(*whole, scratch, slot.rows)
                else:
                    run_stages(betons.tables, samples, epochs, last, *rest)
                if number:  # the first round compiles, and touches memory
                    found.append(1e6 * (time.thread_time() - begun) / count)
    labels, read, decoded, everything = (statistics.median(found) for found in times.values())
    parts = {"labels": labels, "read": read - labels, "decode": decoded - read, "resize": everything - decoded}
    return {name: max(value, 0.0) for name, value in parts.items()} | {"all": everything}
