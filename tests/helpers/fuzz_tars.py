"""A fuzz run over the structure of tars: sparse files of every kind, joined tars, PAX, long names, links, cuts.

    python tests/helpers/fuzz_tars.py --inputs 100000 [--seed 0]

What tarfile (with ignore_zeros) finds is compared: every sample is labelled or rejected with a reason, or the rest of
the tar is; the sum is equal, and so are the captions and the image bytes of the labelled ones. A sample of plain files
is never rejected.
"""

import io
import random
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fuzz_runs import check_all, main
from preprocess.readers.base import parse_caption_key
from preprocess.readers.images import find_images
from preprocess.readers.shards import Shard
from preprocess.readers.tar import read_tar_rows
from tar_parts import BLOCK, END, SPARSE_KINDS, big_number, head, long_name, member, records, sparse

CHOICES = parse_caption_key(["txt"])
_IMAGE = b"\xff\xd8\xff\xe0"
_END_REASONS = {"not a tar", "compressed tar", "tar cut or damaged", "bytes after the end of the tar"}


def _spans(draw: random.Random, size: int) -> list[tuple[int, int]]:
    """What of a file is no hole, in whole blocks, as GNU tar finds it; sometimes all of it."""
    if draw.random() < 0.2:
        return [(0, size)]
    kept = [block for block in range(0, size, BLOCK) if draw.random() < 0.6]
    spans = [(block, min(BLOCK, size - block)) for block in kept]
    return spans if spans and draw.random() < 0.5 else [*spans, (size, 0)]


def _stored(draw: random.Random, name: str, data: bytes, links: list[str]) -> bytes:
    """One file in one of the forms that tars have for it, or in its place something that is no file."""
    kind = draw.randrange(24)
    if kind < 12:
        if len(name) > 90 or kind == 0:
            return long_name(name) + member(name[:90], data)
        return member(name, data, draw.choice([tarfile.REGTYPE] * 4 + [tarfile.AREGTYPE, tarfile.CONTTYPE]))
    if kind == 12:
        return records(("path", name), ("mtime", 1.5)) + member("x", data)
    if kind == 13:
        return records(("size", len(data)), ("path", name)) + head("x") + member("x", data)[BLOCK:]
    if kind == 14 and len(name) < 90:
        return big_number(name, data)
    if kind == 15 and links:
        target = draw.choice([*links, "gone.jpg"])
        return long_name(name) + long_name(target, of_link=True) + head("x", 0, tarfile.LNKTYPE, target[:90])
    if kind == 16:
        types = [tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE]
        return long_name(name) + head("x", 0, draw.choice(types), draw.choice(["", "gone.jpg"]))
    if kind == 17:
        return long_name(name) + member("x", data, draw.choice([b"M", b"Z", b"N"]))
    if kind < 21 and len(name) < 80:
        spans = _spans(draw, len(data))
        holed = bytearray(len(data))
        for offset, length in spans:
            holed[offset : offset + length] = data[offset : offset + length]
        return sparse(name, bytes(holed), spans, draw.choice(SPARSE_KINDS))
    return records(("comment", "c" * draw.randrange(1, 600))) + long_name(name) + member("x", data)


def _between(draw: random.Random) -> bytes:
    """Headers that are no files."""
    return draw.choice(
        [
            head("folder.jpg", 0, tarfile.DIRTYPE),
            head("volume.txt", 0, b"V"),
            member("k.jpg", b"user::rw-", b"A"),
            member("folder/", b"Yk.jpg\0\0", b"D"),
            member("README", b"no sample"),
            member("._k.jpg", b"Mac OS X"),
            records(("comment", "for all"), kind=tarfile.XGLTYPE),
        ]
    )


def made(draw: random.Random) -> bytes:
    """One tar or several joined, of a few samples each, some of them cut or with other bytes behind."""
    out, links = b"", []
    for part in range(draw.choice([1, 1, 2, 3])):
        files: list[tuple[str, bytes]] = []
        for number in range(draw.randrange(5)):
            key = draw.choice(
                [f"{part}{number:08d}", f"d/{number}", "same", "l" * draw.randrange(1, 150), f"\u00e9{number}"]
            )
            files.append((f"{key}.{draw.choice(['jpg', 'jpg', 'png'])}", _IMAGE + draw.randbytes(draw.randrange(4000))))
            files += [(f"{key}.txt", f"a cat {draw.randrange(99)}".encode())] * (draw.random() < 0.9)
            files += [(f"{key}.npy", draw.randbytes(draw.randrange(1500)))] * (draw.random() < 0.2)
        if draw.random() < 0.1:
            draw.shuffle(files)
        if draw.random() < 0.05:
            files.sort(key=lambda file: file[0][::-1])
        for name, data in files:
            out += _between(draw) if draw.random() < 0.1 else b""
            out += _stored(draw, name, data, links) if draw.random() < 0.6 else _plain(name, data)
            links.append(name)
        out += draw.choice([END, END, END, bytes(BLOCK), bytes(BLOCK * draw.randrange(1, 40)), b""])
    kind = draw.randrange(10)
    if kind == 0:
        out = out[: draw.randrange(len(out) + 1)]
    elif kind == 1:
        out += draw.choice(
            [b"\n", draw.randbytes(draw.randrange(1, 1500)), bytes(700) + b"x", b"\0" * draw.randrange(900)]
        )
    elif kind == 2:
        out += member("late.jpg", _IMAGE)[: draw.randrange(1, 2 * BLOCK)]
    return out


def _plain(name: str, data: bytes) -> bytes:
    return member(name, data) if len(name.encode()) < 90 else long_name(name) + member("x", data)


@dataclass
class _Run:
    """Members in succession that have one key, as tarfile gives them."""

    key: str
    files: dict[str, bytes | None]  # suffix -> bytes, None where tarfile finds none
    plain: bool  # all are files, none is sparse

    @property
    def image(self) -> bytes | None:
        return next((self.files[suffix] for suffix in ("jpg", "png") if suffix in self.files), None)


def by_tarfile(data: bytes) -> list[_Run]:
    """The samples as another reader sees them; it stops where it can read no more."""
    runs: list[_Run] = []
    files: dict[str, bytes | None] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), ignore_zeros=True) as archive:
            for info in archive:
                # extractfile would first read the whole tar for a link.
                file = archive.extractfile(info) if info.isreg() else None
                content = files[info.name] = file.read() if file else files.get(info.linkname) if info.islnk() else None
                folder, slash, base = info.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if not stem or not suffix or info.type in (tarfile.DIRTYPE, b"D", b"V", b"A"):
                    continue
                key = folder + slash + stem
                if not runs or runs[-1].key != key or suffix in runs[-1].files:
                    runs.append(_Run(key, {}, True))
                runs[-1].files[suffix] = content
                runs[-1].plain &= info.isreg() and not info.issparse()
    except (tarfile.TarError, EOFError, IndexError, ValueError):
        pass  # the last two: tarfile's own, at a cut sparse header
    return runs


def check(data: bytes, folder: Path) -> Counter[str]:
    """Numbers of labelled and rejected samples of one input; AssertionError if tarfile finds others."""
    path = folder / "fuzz.tar"
    path.write_bytes(data)
    shard = Shard("fuzz", str(path), len(data), "")
    batches = list(read_tar_rows(shard, CHOICES))
    rows = [row for batch in batches for row in batch.table.to_pylist()]
    faults = [fault for batch in batches for fault in batch.faults]
    reasons = Counter(fault.reason for fault in faults)
    ended = [fault for fault in faults if fault.reason in _END_REASONS]
    assert len(ended) <= 1 and all(fault.detail for fault in faults)
    runs = by_tarfile(data)
    first: dict[str, _Run] = {}
    expected: Counter[str] = Counter()  # key -> labelled and rejected
    labelled = {row["key"] for row in rows}
    suffixes: dict[str, set[str]] = {}
    apart: set[str] = set()
    for run in runs:
        earlier = suffixes.setdefault(run.key, set())
        if run.key not in first:
            first[run.key] = run
        elif earlier.isdisjoint(run.files):
            apart.add(run.key)
            earlier |= set(run.files)
            continue
        earlier |= set(run.files)
        expected[run.key] += 1
    for key in apart:  # one reason for all parts; a first part that is whole is labelled
        expected[key] += key in labelled
    counted = Counter(row["key"] for row in rows) + Counter(fault.key for fault in faults if fault not in ended)
    if ended:
        assert all(counted[key] <= expected[key] for key in counted), (counted, expected)
    else:
        assert counted == expected, (counted, expected)
        for key, run in first.items():
            whole = run.plain and run.image is not None and "txt" in run.files
            assert key in labelled or not whole, f"{key} is rejected, but whole"
    for row in rows:
        text = first[row["key"]].files["txt"]
        assert text is not None and row["caption"] == text.decode()
    if rows:
        table = batches[0].table
        images = find_images(shard, table["key"].combine_chunks(), CHOICES, folder)
        for row, (begin, end) in zip(rows, images.spans.tolist(), strict=True):
            assert images.data[begin:end].tobytes() == first[row["key"]].image
    return reasons + Counter(labelled=len(rows))


def fuzz_tars(inputs: int, seed: int, folder: Path) -> Counter[str]:
    """Check `inputs` inputs: numbers of labelled and rejected samples."""
    return check_all(inputs, seed, made, lambda data, _: check(data, folder), lambda data: ("fuzz-failed.tar", data))


if __name__ == "__main__":
    main(
        __doc__,
        "as tarfile finds them, none lost",
        lambda chosen, folder: fuzz_tars(chosen.inputs, chosen.seed, folder),
    )
