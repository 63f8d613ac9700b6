"""The image bytes of a shard's label rows, in the rows' order, whatever the shard is."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from labels.errors import UserError
from preprocess.inputs.captions import Choice
from preprocess.inputs.rows import read_rows, reads_side
from preprocess.inputs.shards import Shard
from preprocess.inputs.tableimages import largest_image, table_images
from preprocess.inputs.tarrows import IndexedSample, SampleLike, local_index, wanted_suffixes
from preprocess.inputs.tars import Fault, Sample, walk


@dataclass(frozen=True)
class Pictures:
    """`largest`: upper bound in bytes of the largest image file; `rows`: a row's number, and its image file or why there is none."""

    largest: int
    rows: Iterator[tuple[int, bytes | Fault]]


@contextmanager
def open_pictures(shard: Shard, keys: list[str], choices: tuple[Choice, ...]) -> Iterator[Pictures]:
    """The images of a shard's label rows.

    Args:
        shard: open until the block ends.
        keys: of the label rows, in order; a repeated key is a repeated sample.
        choices: where the captions of those rows came from.

    Raises:
        UserError: the tar that the rows were read from no longer holds one of them.
    """
    if shard.kind != "tar":
        yield Pictures(largest_image(shard), table_images(shard, keys))
        return
    index = local_index(shard, choices)
    if index is not None:
        wanted = wanted_suffixes(choices)
        samples: dict[str, SampleLike] = {key: IndexedSample(index, wanted, number) for number, key in enumerate(index.keys.to_pylist())}
        yield _of_samples(shard, keys, choices, samples)
        return
    with shard.open() as file:
        walked: dict[str, SampleLike] = {}
        for sample in walk(file, shard.bytes):
            if isinstance(sample, Sample):
                walked.setdefault(sample.key, sample)
        yield _of_samples(shard, keys, choices, walked)


def _of_samples(shard: Shard, keys: list[str], choices: tuple[Choice, ...], samples: dict[str, SampleLike]) -> Pictures:
    sizes = [sample.size(sample.image_suffix) for sample in samples.values() if sample.image_suffix]
    return Pictures(max(sizes, default=0), _tar_pictures(shard, keys, choices, samples))


def _tar_pictures(
    shard: Shard, keys: list[str], choices: tuple[Choice, ...], samples: dict[str, SampleLike]
) -> Iterator[tuple[int, bytes | Fault]]:
    from_side = reads_side(shard, choices)
    expected = {}
    if from_side:
        for batch in read_rows(shard, choices):
            expected.update(zip(batch.table["key"].to_pylist(), batch.table["caption"].to_pylist(), strict=True))
    for row, key in enumerate(keys):
        sample = samples.get(key)
        if sample is None or sample.image_suffix is None:
            if not from_side:
                raise UserError(
                    f"{shard.path} no longer holds the sample {key!r} that its label file has",
                    mend="the tar changed during the build: run the same command again",
                )
            yield row, Fault(key, "not in the tar", "the side Parquet has it")
            continue
        text = sample.read("txt") if from_side else None
        if text is not None and text != expected[key].encode("utf8"):
            yield row, Fault(key, "caption differs", "the tar's txt is not the side Parquet's caption")
            continue
        yield row, sample.read(sample.image_suffix) or b""
