"""The label stage for benchmarks/labels.py: seconds and memory of a build, and the CPU time of its steps."""

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LIMIT = 75


def build(data: Path, out: Path, *options: str, watched: bool = True) -> tuple[float, float]:
    """Run `preprocess build-labels` with two workers: seconds, and the peak memory of all its processes in bytes.

    Without `watched` the memory is 0: measuring it ten times a second takes a tenth of the workers' time.
    """
    shutil.rmtree(out, ignore_errors=True)
    words = ["build-labels", str(data), "--out", str(out), "--workers", "2", "--no-beton", *options]
    command = [sys.executable, "-m", "preprocess", *words]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = [0]

    def watch() -> None:
        while process.poll() is None:
            peak[0] = max(peak[0], tree_memory(process.pid))
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    if watched:
        watcher.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - start
    if watched:
        watcher.join()
    if process.returncode:
        sys.exit(errors)
    return seconds, peak[0]


def tree_memory(pid: int) -> int:
    """Memory of a process and its descendants in bytes (PSS: each counts its share of shared pages)."""
    total, todo = 0, [pid]
    while todo:
        process = Path(f"/proc/{todo.pop()}")
        try:
            for thread in (process / "task").iterdir():
                todo += map(int, (thread / "children").read_text().split())
            total += int((process / "smaps_rollup").read_text().split("\nPss:")[1].split()[0]) * 1024
        except (OSError, IndexError):
            continue
    return total


def steps(data: Path, out: Path) -> dict[str, float]:
    """Seconds of processor time of each step of one shard, in this process, after one shard has warmed it up."""
    import pyarrow as pa

    from labels.settings import Labels
    from labels.storage import Layout
    from labels.tokenizers import word_table
    from labels.tokenizers.tokenizer import make_tokenizer
    from preprocess.counts import ShardCounts
    from preprocess.readers import read_rows
    from preprocess.readers.base import parse_caption_key
    from preprocess.readers.shards import Shard, find_shards
    from preprocess.shard import label_table, write_labels

    shards = find_shards([str(data)]).shards[:2]
    tokenizer = make_tokenizer(Labels())
    choices = parse_caption_key(["auto"])
    spent = {"read": 0.0, "clean": 0.0, "split and look up": 0.0, "label sets": 0.0, "write": 0.0}
    inner = {"clean": 0.0, "label sets": 0.0, "count": 0.0}

    def clocked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = time.process_time()
            try:
                return function(*arguments)
            finally:
                inner[name] += time.process_time() - start

        return run

    fast = tokenizer.fast  # type: ignore[attr-defined]
    fast._learn = clocked("clean", fast._learn)
    fast._slow = clocked("clean", fast._slow)
    word_table._gather = clocked("label sets", word_table._gather)
    ShardCounts.add = clocked("count", ShardCounts.add)
    ShardCounts.write = clocked("count", ShardCounts.write)
    for shard in shards:
        spent = dict.fromkeys(spent, 0.0)
        inner.update(dict.fromkeys(inner, 0.0))
        mark = [time.process_time()]

        def spend(name: str, spent: dict[str, float] = spent, mark: list[float] = mark) -> None:
            mark.append(time.process_time())
            spent[name] += mark[-1] - mark[-2]

        def batches(shard: Shard = shard, spend: Callable[[str], None] = spend) -> Iterator[pa.Table]:
            for batch in read_rows(shard, choices):
                spend("read")
                rows = tokenizer.encode_rows(batch.table["caption"], LIMIT)
                spend("split and look up")
                yield label_table(batch.table, *rows)
                spend("write")

        write_labels(Layout(out / "steps"), "steps", batches())
        spend("write")
    spent["split and look up"] -= inner["clean"] + inner["label sets"]
    spent["write"] -= inner["count"]
    return spent | inner
