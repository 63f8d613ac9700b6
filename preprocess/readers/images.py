"""Where the image files of a shard's label rows lie, whatever the shard is: places in one mapped file.

local tar -> its own places | remote tar -> a copy of it | table -> a file of its images, one after another
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported)

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from labels.errors import UserError
from preprocess.inputs.stretches import gather_strings
from preprocess.inputs.tableimages import table_images
from preprocess.inputs.tars import REPEATED, Sample, walk
from preprocess.readers.base import IMAGE_SUFFIXES, Fault
from preprocess.readers.caption_key import Choice
from preprocess.readers.rows import read_rows, reads_side
from preprocess.readers.scratch import Spool, map_path
from preprocess.readers.shards import Shard
from preprocess.readers.tar import wanted_suffixes
from preprocess.readers.tar_index import index_data


@dataclass(frozen=True)
class Pictures:
    """The images of R rows.

    `data`: uint8 [bytes], mapped; `places`: int64 [R, 2], begin and end of each row's image file in it, begin -1 where there is none;
    `faults`: why there is none, by row.
    """

    data: np.ndarray
    places: np.ndarray
    faults: dict[int, Fault]


def is_local_tar(shard: Shard) -> bool:
    """Whether a shard's images can be read where they lie."""
    return shard.kind == "tar" and "://" not in shard.path


def find_pictures(shard: Shard, keys: pa.StringArray, choices: tuple[Choice, ...], scratch: Path | None) -> Pictures:
    """The images of a shard's label rows.

    Args:
        shard: the shard.
        keys: of the R label rows, in order; a repeated key is a repeated sample.
        choices: where the captions of those rows came from.
        scratch: a local folder for what is not in a local tar; None takes the system's.

    Raises:
        UserError: the shard no longer holds one of the rows, or cannot be read.
    """
    if shard.kind != "tar":
        return _of_table(shard, keys, scratch)
    with shard.open() as file:
        if is_local_tar(shard):
            return _of_tar(shard, file, map_path(Path(shard.path)), keys, choices)
        with Spool(scratch) as spool:
            spool.copy(file)
            return _of_tar(shard, spool.file, spool.view(), keys, choices)


def _of_table(shard: Shard, keys: pa.StringArray, scratch: Path | None) -> Pictures:
    places = np.full((len(keys), 2), -1, np.int64)
    faults: dict[int, Fault] = {}
    with Spool(scratch) as spool:
        for row, image in table_images(shard, keys.to_pylist()):
            if isinstance(image, Fault):
                faults[row] = image
            else:
                places[row] = spool.append(image)
        return Pictures(spool.view(), places, faults)


def _of_tar(shard: Shard, file: BinaryIO, data: np.ndarray, keys: pa.StringArray, choices: tuple[Choice, ...]) -> Pictures:
    wanted = wanted_suffixes(choices)
    index = index_data(data, wanted) if len(data) == shard.bytes else None
    samples, members, cut = (index.keys, index.places, None) if index else _walked(file, len(data), wanted)
    images = members[:, [wanted.index(suffix) for suffix in IMAGE_SUFFIXES]]
    first = (images[:, :, 0] >= 0).argmax(axis=1)
    places = images[np.arange(len(images)), first]
    numbers = pc.fill_null(pc.index_in(keys, value_set=samples), -1).to_numpy()
    of_rows = np.where(numbers[:, None] >= 0, places[numbers], -1) if len(places) else np.full((len(keys), 2), -1, np.int64)
    missing = of_rows[:, 0] < 0
    if not reads_side(shard, choices):
        if missing.any():
            raise UserError(
                f"{shard.path} no longer holds the sample {keys[int(missing.argmax())].as_py()!r} that its label file has",
                mend="the tar changed during the build: run the same command again",
            )
        return Pictures(data, of_rows, {})
    texts = np.where(missing[:, None], -1, members[numbers, wanted.index("txt")]) if len(members) else of_rows
    differs = ~_same_captions(shard, keys, choices, gather_strings(data, texts))
    told = (
        (missing, *((cut.reason, cut.detail) if cut else ("not in the tar", "the side Parquet has it"))),
        (differs, "caption differs", "the tar's txt is not the side Parquet's caption"),
    )
    faults = {int(row): Fault(keys[int(row)].as_py(), *words) for which, *words in told for row in np.flatnonzero(which)}
    of_rows[differs] = -1
    return Pictures(data, of_rows, faults)


def _same_captions(shard: Shard, keys: pa.StringArray, choices: tuple[Choice, ...], texts: pa.LargeBinaryArray) -> np.ndarray:
    """bool [R]: whether a row's txt, where it has one, is the caption that the side Parquet had for its key."""
    batches = [batch.table.select(["key", "caption"]) for batch in read_rows(shard, choices)]
    table = pa.concat_tables(batches).combine_chunks()
    numbers = pc.index_in(keys, value_set=table["key"])
    captions = table["caption"].take(numbers).combine_chunks().cast(pa.large_binary())
    return pc.fill_null(pc.equal(captions, texts), True).to_numpy(zero_copy_only=False)


def _walked(file: BinaryIO, size: int, wanted: tuple[str, ...]) -> tuple[pa.StringArray, np.ndarray, Fault | None]:
    """Of a tar that only `walk` can read: keys of its S samples, places int64 [S, W, 2] of the wanted members, and what ended it early."""
    keys: list[str] = []
    places, cut = [], None
    for sample in walk(file, size):
        if isinstance(sample, Sample):
            keys.append(sample.key)
            found = [sample.members.get(suffix) for suffix in wanted]
            places.append([(-1, -1) if member is None else (member.offset_data, member.offset_data + member.size) for member in found])
        elif sample.reason != REPEATED:
            cut = sample
    return pa.array(keys, pa.string()), np.array(places, np.int64).reshape(len(keys), len(wanted), 2), cut
