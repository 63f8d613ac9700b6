"""The label stage, compared with HF tokenizers, open_clip and webdataset.

Every ratio is from one run; medians of rounds in which the sides take turns.

    python benchmarks/labels.py tables --captions FILE.parquet [--rows 20M]   caption Parquet -> labels, IDF; the steps
    python benchmarks/labels.py tars --captions FILE.parquet                  img2dataset tars -> labels; webdataset
    python benchmarks/labels.py count --captions FILE.parquet [--rows 100M]   peak memory; counts by DuckDB and numpy

FILE.parquet has a column `caption`. `--work DIR` stores the inputs made from it, for later runs, and the results.
`tars` needs `pip install webdataset`. On shared machines only the ratios are comparable.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

# This folder is searched for the first import alone: this file would hide the package `labels` (also in worker
# processes).
_HERE = str(Path(__file__).resolve().parent)
sys.path = [_HERE, *(entry for entry in sys.path if str(Path(entry or ".").resolve()) != _HERE)]
from caption_corpus import recombined, write_tables, write_tars
from label_stage import LIMIT, build, steps

sys.path.remove(_HERE)

import numpy as np
import pyarrow.parquet as pq
import regex
from open_clip.tokenizer import SimpleTokenizer
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Engine
from tokenizers.models import BPE

from labels.settings import parse_count
from labels.tokenizers.kinds.clip import ClipTokenizer

DATACOMP_1B = 1_280_000_000
SPECIALS = "<start_of_text>|<end_of_text>|"
GIB = 1 << 30
LINKS = 5
FILES = 20


def open_clip_tokenizer() -> SimpleTokenizer:
    """open_clip's own, except that a caption which spells a special token stays ordinary text."""
    tokenizer = SimpleTokenizer()
    tokenizer.pat = regex.compile(tokenizer.pat.pattern.removeprefix(SPECIALS), regex.IGNORECASE)
    tokenizer.cache = {}
    return tokenizer


def hugging_face_tokenizer(theirs: SimpleTokenizer) -> Engine:
    """The same vocabulary in `tokenizers`, set up as CLIP's tokenizer.json is: no ftfy, no HTML entities."""
    merges = [(first, second) for first, second in sorted(theirs.bpe_ranks, key=theirs.bpe_ranks.__getitem__)]
    engine = Engine(BPE(vocab=theirs.encoder, merges=merges, end_of_word_suffix="</w>", continuing_subword_prefix=""))
    white_space = normalizers.Replace(Regex(r"\s+"), " ")
    engine.normalizer = normalizers.Sequence([normalizers.NFC(), white_space, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(theirs.pat.pattern), "removed", invert=True)
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return engine


def timed(job: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of this process' processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    job()
    return time.perf_counter() - wall, time.process_time() - cpu


_theirs: SimpleTokenizer | None = None


def open_clip_part(captions: list[str]) -> None:
    """In a worker: open_clip's tokenizer, kept warm from round to round."""
    global _theirs
    _theirs = _theirs or open_clip_tokenizer()
    for caption in captions:
        _theirs.encode(caption)


def kernel_alone(tokenizer: ClipTokenizer, captions: Any) -> None:
    """The compiled part only: bytes to ids in rows, without label sets, joining blocks, or cleaning."""
    from labels.tokenizers.word_table import _blocks, _buffers

    rows, counts = np.empty((8192, LIMIT), np.int32), np.empty(8192, np.int64)
    for block in _blocks(captions, LIMIT):
        tokenizer.fast._encode(*_buffers(block), np.arange(len(block)), rows, counts)


def tables(captions: list[str], rows: int, rounds: int, work: Path) -> dict[str, Any]:
    """Whole stage, kernel and steps, compared with the two tokenizers."""
    data = work / f"tables-{rows}"
    if not data.is_dir():
        write_tables(work / "making", captions, rows, files=FILES)
        (work / "making").rename(data)
    sample = next(recombined(captions, 200_000, seed=99))
    theirs, tokenizer = open_clip_tokenizer(), ClipTokenizer()
    engine = hugging_face_tokenizer(theirs)
    texts = sample.to_pylist()
    small, middle = texts[:20_000], texts[:100_000]
    ids, offsets = tokenizer.encode(sample.slice(0, 20_000), LIMIT)
    for caption, (start, end) in zip(small, pairwise(offsets), strict=True):
        assert ids[start:end].tolist() == theirs.encode(caption)[:LIMIT], f"other ids for {caption!r}"
    tokenizer.encode_rows(sample, LIMIT)
    seconds: dict[str, list[float]] = {}
    cores: dict[str, list[float]] = {}

    def note(name: str, count: int, wall: float, cpu: float | None = None) -> None:
        seconds.setdefault(name, []).append(count / wall)
        if cpu is not None:
            cores.setdefault(name, []).append(count / cpu)

    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for number in range(rounds + 1):
            halves = [small[:10_000], small[10_000:]]
            wall, _ = timed(lambda: list(pool.map(open_clip_part, halves)))  # noqa: B023
            if number:  # the first round warms every cache
                note("open_clip, two processes", len(small), wall)
            timing = timed(lambda: engine.encode_batch_fast(middle, add_special_tokens=False))
            if number:
                note("tokenizers encode_batch_fast, both cores", len(middle), *timing)
            timing = timed(lambda: [theirs.encode(caption) for caption in small[:10_000]])
            if number:
                note("open_clip, one process", 10_000, *timing)
            timing = timed(lambda: kernel_alone(tokenizer, sample))
            if number:
                note("kernel alone, one core", len(sample), *timing)
            timing = timed(lambda: tokenizer.encode_rows(sample, LIMIT))
            if number:
                note("ids and label sets, one core", len(sample), *timing)
                wall, _ = build(data, work / "out", watched=False)
                note("WHOLE STAGE, two workers", rows, wall)
        _, peak = build(data, work / "out")
    spent = steps(data, work)
    return {
        "rows": rows,
        "captions_per_s": {name: statistics.median(values) for name, values in seconds.items()},
        "captions_per_core_s": {name: statistics.median(values) for name, values in cores.items()},
        "peak_gib": peak / GIB,
        "steps_us": {name: value / (rows // FILES) * 1e6 for name, value in spent.items()},
    }


def print_tables(result: dict[str, Any]) -> None:
    """Speeds, ratios, steps."""
    rate, core = result["captions_per_s"], result["captions_per_core_s"]
    whole = rate["WHOLE STAGE, two workers"]
    fast, clip = rate["tokenizers encode_batch_fast, both cores"], rate["open_clip, two processes"]
    fast_core = core["tokenizers encode_batch_fast, both cores"]
    for name, value in rate.items():
        per_core = f"{core[name]:14,.0f} a core" if name in core else ""
        print(f"{name:44}{value:14,.0f} captions/s{per_core}")
    kernel = core["kernel alone, one core"]
    print(f"whole stage / encode_batch_fast on both cores: {whole / fast:.1f}x")
    print(f"whole stage / open_clip in two processes: {whole / clip:.1f}x")
    one = core["open_clip, one process"]
    print(
        f"kernel a core / encode_batch_fast a core: {kernel / fast_core:.1f}x; / open_clip a core: {kernel / one:.1f}x"
    )
    hours = DATACOMP_1B / whole / 3600
    print(f"{hours:.2f} hours for 1.28 billion captions; peak memory of all processes {result['peak_gib']:.2f} GiB")
    spent = result["steps_us"]
    shares = ", ".join(f"{name} {value / sum(spent.values()):.0%} ({value:.3f})" for name, value in spent.items())
    print(f"share of each step (microseconds of CPU time per caption): {shares}")


def webdataset_part(paths: list[str]) -> int:
    """In a worker: every caption of some tars by webdataset."""
    import webdataset

    return sum(1 for _ in webdataset.WebDataset(paths, shardshuffle=False).decode().to_tuple("txt"))


def tars(captions: list[str], rows: int, rounds: int, work: Path) -> dict[str, Any]:
    """From tars in the page cache, compared with webdataset. Every tar is read under several names, to make start-up
    negligible.
    """
    shards = max(4, rows // 10_000)
    data = work / f"tars-{rows}"
    if not data.is_dir():
        write_tars(work / "making", captions, shards, rows // shards, image_bytes=20_000)
        (work / "making").rename(data)
    every = sorted(map(str, data.glob("*.tar")))
    subprocess.run(["cat", *every], stdout=subprocess.DEVNULL, check=True)
    paths = every[: max(4, len(every) // 4)]  # webdataset is slow: a quarter is enough
    for number in range(LINKS):
        for path in map(Path, every):
            link = work / f"links-{rows}" / str(number) / path.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.hardlink_to(path)
    ours, theirs = [], []
    build(data, work / "out")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(webdataset_part, [paths[:1], paths[1:2]]))
        for _ in range(rounds):
            wall, _ = timed(
                lambda: print("webdataset read", sum(pool.map(webdataset_part, [paths[::2], paths[1::2]])), "captions")
            )
            theirs.append(len(paths) * (rows // shards) / wall)
            ours.append(LINKS * rows / build(work / f"links-{rows}", work / "out", watched=False)[0])
    return {"rows": rows, "ours": statistics.median(ours), "webdataset": statistics.median(theirs)}


def count(captions: list[str], rows: int, _rounds: int, work: Path) -> dict[str, Any]:
    """Peak memory at 2 million and at `rows` captions; document frequencies by DuckDB and by a bincount."""
    from labels.manifest import read_manifest
    from preprocess.counts import sum_idf

    peaks = {}
    for size in (2_000_000, rows):
        data = work / f"tables-{size}-count"
        if not data.is_dir():
            write_tables(work / "making", captions, size, files=max(2, size // 1_000_000))
            (work / "making").rename(data)
        wall, peak = build(data, work / "out")
        peaks[size] = {"seconds": wall, "peak_gib": peak / GIB}
        if size != rows:
            shutil.rmtree(work / "out")
    out = work / "out"
    recount, _ = timed(lambda: sum_idf([out], work / "recounted.parquet", recount=True, memory="1GiB"))
    summed, _ = timed(lambda: sum_idf([out], work / "summed.parquet", memory="1GiB"))
    naive = np.zeros(read_manifest(out).tokenizer.vocabulary, np.int64)
    for path in sorted((out / "labels").glob("*.parquet")):
        for batch in pq.ParquetFile(path, pre_buffer=False).iter_batches(columns=["label_ids"]):
            naive += np.bincount(batch["label_ids"].flatten().to_numpy(), minlength=len(naive))
    equal = {
        name: bool(np.array_equal(pq.read_table(path)["document_frequency"].to_numpy(), naive))
        for name, path in (
            ("idf.parquet", out / "idf.parquet"),
            ("recounted", work / "recounted.parquet"),
            ("summed", work / "summed.parquet"),
        )
    }
    return {
        "rows": rows,
        "stage": peaks,
        "labels": int(naive.sum()),
        "recount_s": recount,
        "sum_s": summed,
        "equal_to_bincount": equal,
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["tables", "tars", "count"])
    parser.add_argument("--captions", required=True, help="Parquet with a column `caption`")
    parser.add_argument("--rows", type=parse_count, help="recombined captions (default: 20M, 400k, 100M)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("bench"), help="folder for inputs and results")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    captions = pq.read_table(arguments.captions, columns=["caption"])["caption"].to_pylist()
    default = {"tables": 20_000_000, "tars": 400_000, "count": 100_000_000}[arguments.part]
    arguments.work.mkdir(parents=True, exist_ok=True)
    run = {"tables": tables, "tars": tars, "count": count}[arguments.part]
    result = run(captions, int(arguments.rows or default), arguments.rounds, arguments.work)
    if arguments.part == "tables":
        print_tables(result)
    else:
        print(json.dumps(result, indent=2))
    if arguments.part == "tars":
        print(f"ours / webdataset: {result['ours'] / result['webdataset']:.1f}x")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
