"""A fuzz run over the tar walker and the label path: mutated tars and captions; counts of labelled and rejected ones.

    python tests/helpers/fuzz.py --inputs 100000 [--seed 0]

Every input must end within seconds, raise nothing, give the rows and faults of the reference walk, and have every
sample of that walk either labelled or counted by a reason. One input in 50 goes through the whole job of a shard, files
and marker included.
"""

import io
import json
import random
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from fuzz_runs import check_all, main
from labels.settings import Labels
from labels.storage import Layout
from labels.tars import TAR_REASONS
from labels.tokenizers.tokenizer import make_tokenizer
from preprocess.readers.base import Fault, parse_caption_key
from preprocess.readers.shards import Shard
from preprocess.readers.tar import APART, REPEATED, read_row, read_tar_rows, walk
from preprocess.shard import LabelTask, label_shard
from shard_factory import Member, healthy, sample, tar_bytes

CHOICES = parse_caption_key(["txt", "json:caption"])
WHOLE_JOB_EVERY = 50
_PIECES = [
    *[
        "a red cat",
        "&amp;",
        "&lt;p&gt;",
        "Ã©",
        "â€™",
        "’",
        "日本",
        "\u200b",
        "\u0301",
        "\x00",
        "\x1b[31m",
        "<end_of_text>",
        "'s",
        "ſ",
        "\ufeff",
    ],
    *["\ud83d", "ﬁ", "İ", "ΑΣ", "\r\n", "\t", "😀", "\u2028", "x" * 200, "1234567890", "R&B", "<", "\u00a0", "\x7f"],
]


def caption(draw: random.Random) -> bytes:
    """Pieces that cleaning is about, any code points, or any bytes."""
    kind = draw.randrange(4)
    if kind == 0:
        return draw.randbytes(draw.randrange(40))
    if kind == 1:
        return "".join(chr(draw.randrange(0x110000)) for _ in range(draw.randrange(20))).encode("utf8", "surrogatepass")
    return (
        draw.choice(["", " "])
        .join(draw.choices(_PIECES, k=draw.randrange(12)))
        .encode("utf8", "surrogatepass" if kind == 2 else "ignore")
    )


def about(draw: random.Random) -> bytes:
    """A sample's json, valid or not."""
    value: dict[str, Any] = {
        "uid": f"{draw.randrange(1 << 30):032x}",
        "width": draw.choice([32, 0, -1, 1 << 40, None, "32", 3.5]),
        "height": 32,
    }
    raw = json.dumps(value).encode()
    if draw.random() < 0.3:
        place = draw.randrange(len(raw))
        raw = raw[:place] + draw.randbytes(draw.randrange(3)) + raw[place + draw.randrange(3) :]
    return raw


def made(draw: random.Random) -> bytes:
    """A tar of a few samples, some of them odd, in one of the formats that writers use."""
    members: list[Member] = []
    for number in range(draw.randrange(1, 6)):
        key = draw.choice([f"{number:09d}", f"{number:09d}", "same", f"d/{number}", "é", "k" * draw.randrange(1, 120)])
        if draw.random() < 0.5:
            members += healthy(1, first=number, side=8)
        else:
            members += [
                *sample(key, caption(draw)),
                (f"{key}.{draw.choice(['json', 'JSON', 'txt', 'cls'])}", about(draw)),
            ]
    draw.random() < 0.1 and draw.shuffle(members)  # type: ignore[func-returns-value]
    if draw.random() < 0.5:
        return tar_bytes(members)
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=draw.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    ) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1700000000.25 if archive.format == tarfile.PAX_FORMAT else 1700000000  # type: ignore[assignment]
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def mutated(draw: random.Random, data: bytes) -> bytes:
    """A few bytes changed, mostly in headers, whose checksums are fixed half of the time; or a stretch cut, doubled or
    dropped.
    """
    if draw.random() < 0.2:
        return data
    out = bytearray(data)
    for _ in range(draw.randrange(5)):
        start = draw.randrange(max(1, len(out) // 512)) * 512
        place = start + draw.choice([0, 1, 99, 124, 135, 148, 156, 257, 345, draw.randrange(512)])
        if place < len(out):
            out[place] = draw.choice([0, 0x20, 0x2E, 0x2F, 0x30, 0x37, 0x4C, 0x78, 0x80, 0xFF, draw.randrange(256)])
        if draw.random() < 0.5 and start + 512 <= len(out):
            header = np.frombuffer(bytes(out[start : start + 512]), np.uint8)
            total = int(header.sum()) - int(header[148:156].sum()) + 8 * 0x20
            out[start + 148 : start + 156] = b"%06o\0 " % total
    kind = draw.randrange(8)
    at, length = draw.randrange(len(out) + 1), draw.randrange(2048)
    if kind == 0:
        del out[at:]
    elif kind == 1:
        del out[at : at + length]
    elif kind == 2:
        out[at:at] = out[at : at + length]
    elif kind == 3:
        out[at : at + length] = bytes(length)
    return bytes(out)


def check(data: bytes, folder: Path, whole_job: bool) -> Counter[str]:
    """Numbers of labelled and rejected samples of one input; AssertionError if the readers differ or one is lost."""
    path = folder / "fuzz.tar"
    path.write_bytes(data)
    shard = Shard("fuzz", str(path), len(data), "")
    walked = list(walk(io.BytesIO(data), len(data)))
    expected = [found if isinstance(found, Fault) else read_row(found, CHOICES) for found in walked]
    batches = list(read_tar_rows(shard, CHOICES))
    rows = [row for batch in batches for row in batch.table.to_pylist()]
    faults = [fault for batch in batches for fault in batch.faults]
    assert rows == [vars(row) for row in expected if not isinstance(row, Fault)]
    # Of a sample whose members are apart, that fault comes alone.
    apart = {fault.key: fault for fault in reversed(expected) if isinstance(fault, Fault) and fault.reason == APART}
    due = [
        fault if fault.reason in (REPEATED, *TAR_REASONS) else apart.get(fault.key, fault)
        for fault in expected
        if isinstance(fault, Fault)
    ]
    assert faults == [
        fault for number, fault in enumerate(due) if fault not in apart.values() or fault not in due[:number]
    ]
    tokenizer = make_tokenizer(Labels())
    ids, offsets, label_ids, label_offsets = tokenizer.encode_rows([row["caption"] for row in rows], 75)
    assert len(offsets) == len(label_offsets) == len(rows) + 1 and np.diff(offsets).max(initial=0) <= 75
    for row in range(len(rows)):
        labels = label_ids[label_offsets[row] : label_offsets[row + 1]]
        assert labels.tolist() == sorted(set(ids[offsets[row] : offsets[row + 1]].tolist()))
    assert not len(ids) or 0 <= ids.min() <= ids.max() < len(tokenizer.tokens) - 2
    reasons = Counter(fault.reason for fault in faults)
    if whole_job:
        layout = Layout(folder / "out")
        marker = label_shard(LabelTask(shard, layout.out, Labels(), CHOICES, False, "fuzz"))
        table = pq.read_table(layout.label_file("fuzz"))
        assert marker.rows == len(table) == len(rows) and marker.reasons == dict(reasons)
        assert table["label_ids"].combine_chunks().flatten().to_pylist() == label_ids.tolist()
    return reasons + Counter(labelled=len(rows))


def fuzz(inputs: int, seed: int, folder: Path) -> Counter[str]:
    """Check `inputs` inputs: numbers of labelled and rejected samples."""
    return check_all(
        inputs,
        seed,
        lambda draw: mutated(draw, made(draw)),
        lambda data, number: check(data, folder, number % WHOLE_JOB_EVERY == 0),
        lambda data: ("fuzz-failed.tar", data),
    )


if __name__ == "__main__":
    main(__doc__, "no crash, no hang, none lost", lambda chosen, folder: fuzz(chosen.inputs, chosen.seed, folder))
