"""What is wrong with samples that did not load: damage is an error that names the file; a bad JPEG is told and left out of the loss."""

import os

import numpy as np

from labels.errors import UserError
from train.data.dataset import BetonSet
from train.data.decode import Rows
from train.data.image_index import BAD_INDEX, BAD_LABEL, BAD_READ, BAD_TABLE, OK


def count_bad(betons: BetonSet, samples: np.ndarray, rows: Rows) -> int:
    """Number of bad images in a batch, each told in a line.

    Args:
        betons: the set.
        samples: int64 [B], the batch's sample numbers.
        rows: the batch, filled.

    Raises:
        UserError: damage of another kind; names the file and the sample.
    """
    bad = np.flatnonzero(rows.status != OK)
    for row in bad:
        sample, status = int(samples[row]), int(rows.status[row])
        if status == BAD_LABEL:
            _raise_label(betons, sample, int(rows.labels[row].max()))
        opened = betons.owner(sample)
        index = rows.positions[row] - betons.tables.first_rows[betons.number(sample)]
        mend = f"run `preprocess verify {opened.source.out}`, then the build-labels command again"
        if status == BAD_INDEX:
            raise UserError(f"{betons.name(sample)} has the index {index}, which is no row of its shard", mend=mend)
        if status == BAD_TABLE:
            raise UserError(f"{betons.name(sample)}: its table entry points outside the file", mend=mend)
        if status == BAD_READ:
            _raise_unread(betons, sample, mend)
        print(f"bad image, left out of the loss: {betons.name(sample)}, index {index}", flush=True)
    return len(bad)


def _raise_label(betons: BetonSet, sample: int, label: int) -> None:
    array, name = betons.label_array(sample), betons.name(sample)
    mend = f"run `preprocess verify {betons.owner(sample).source.out}`, then the build-labels command again"
    if array:
        name, mend = f"{array}, made for {name},", f"remove {array}; the same command makes it anew"
    raise UserError(f"{name} has the label {label}", allowed=f"0 to {betons.vocabulary - 1}, the head's width", mend=mend)


def _raise_unread(betons: BetonSet, sample: int, mend: str) -> None:
    """Say why a sample could not be read: of its beton or tar, or of its label array."""
    for path in (betons.paths[betons.number(sample)], betons.image_file(sample), betons.label_array(sample)):
        if path is not None and not path.is_file():
            raise UserError(f"{path} disappeared while it was in use", mend="put it back; the same command goes on")
    place = betons.place(sample)
    size = os.fstat(place.file).st_size
    raise UserError(
        f"{betons.image_file(sample)} cannot be read at byte {place.offset} (it has {size} bytes now): it was cut, or its disk fails; "
        f"wanted for {betons.name(sample)}",
        mend=mend,
    )
