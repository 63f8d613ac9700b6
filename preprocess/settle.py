"""Rows of one shard to places in mapped files: plain JPEGs where they lie, converted ones in the spool, or why a row has no image."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from labels.settings import Build
from preprocess.betons.images import BadImage, lying, prepare
from preprocess.decode_check import DecodeCheck
from preprocess.jpegs import MAX_BYTES, scan_jpegs
from preprocess.readers.base import Fault
from preprocess.readers.images import Pictures
from preprocess.readers.scratch import Spool


@dataclass(frozen=True)
class Settled:
    """Of R rows: `good` bool [R], has an image; `spooled` bool [R], in the spool and not in the shard's own file; `places` int64 [R, 2],
    begin and end there; `width`, `height` int64 [R]; `faults`: row -> why it has none."""

    good: np.ndarray
    spooled: np.ndarray
    places: np.ndarray
    width: np.ndarray
    height: np.ndarray
    faults: dict[int, Fault]


def settle(pictures: Pictures, keys: pa.StringArray, settings: Build, spool: Spool | None) -> Settled:
    """Look at every image of a shard, and convert those that a beton does not take as they are.

    Args:
        pictures: where the images of R rows lie.
        keys: of the rows.
        settings: what is taken, and how the rest is converted.
        spool: gets the converted images; None converts nothing: what is no plain JPEG is a fault (`--no-images`).
    """
    data, places = pictures.data, pictures.places.copy()
    scan = scan_jpegs(data, places, settings)
    good, spooled, faults = scan.plain.copy(), np.zeros(len(places), np.bool_), dict(pictures.faults)
    width, height = scan.width, scan.height
    for row in np.flatnonzero(~good & (places[:, 0] >= 0)).tolist():
        begin, end = places[row].tolist()
        try:
            if end - begin > MAX_BYTES:
                raise BadImage("image file too large", f"{end - begin} bytes; allowed: {MAX_BYTES}")
            image = data[begin:end].tobytes()
            if spool is None:
                width[row], height[row] = lying(image, settings)
            else:
                jpeg, width[row], height[row] = prepare(image, settings)
                if jpeg is not image:
                    places[row], spooled[row] = spool.append(jpeg), True
            good[row] = True
        except BadImage as error:
            faults[row] = Fault(keys[row].as_py(), error.reason, str(error))
    if settings.decode_check == "full":
        check, address = DecodeCheck(), data.ctypes.data
        for row in np.flatnonzero(good & ~spooled).tolist():
            begin, end = places[row].tolist()
            if told := check.fault(address + begin, end - begin, int(width[row]), int(height[row])):
                faults[row], good[row] = Fault(keys[row].as_py(), "image cut or damaged", told), False
    return Settled(good, spooled, places, width, height, faults)
