"""What needs all shards: the word pairs of the corpus, and the IDF table of the summed counts."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from labels.files import fingerprint, is_remote, plain_disk_faults, sha256_file, write_json
from labels.layout import Layout
from labels.manifest import ShardPart
from preprocess.counts import sum_counts, write_idf_duckdb, write_idf_parquet
from preprocess.ngrams import choose_pairs, pair_names, read_pairs, write_pairs
from preprocess.pairs_job import PairsTask, add_pairs
from preprocess.passes import run_pass
from preprocess.plan import Build, Marker, read_marker
from preprocess.progress import Meter


def pair_pass(build: Build, markers: list[Marker], fresh: frozenset[str] = frozenset(), *, keep: bool = False) -> list[Marker]:
    """The word pairs of the whole corpus, chosen unless they are chosen for exactly these rows, and put into every label file.

    `fresh`: as in `label_pass`; `keep`: those that are chosen already serve the shards that were added since.
    """
    layout, labels = build.layout, build.settings.labels
    # What decides the token ids; the label files themselves change when the pairs are put in.
    rows = [[marker["shard"], marker["source"], marker["options"], marker["keys_sha256"]] for marker in markers]
    wanted = {"rows": fingerprint(rows), "classes": labels.ngram_classes, "min_count": labels.ngram_min_count}
    marker_path = layout.markers / "pairs.json"
    chosen = read_marker(marker_path)
    if not chosen or (chosen.get("of") != wanted and not keep) or not layout.pairs.is_file():
        marker_path.unlink(missing_ok=True)
        with spill_folder(layout) as spill:
            files = [layout.label_file(marker["shard"]) for marker in markers]
            memory = build.settings.build.duckdb_memory
            pairs = choose_pairs(files, *build.tokenizer.whole_words, labels.ngram_classes, labels.ngram_min_count, memory, spill)
        write_pairs(layout.pairs, pairs)
        chosen = {"of": wanted, "sha256": sha256_file(layout.pairs)}
        write_json(marker_path, chosen)
    tasks = [
        PairsTask(marker["shard"], layout.out, labels, chosen["sha256"]) for marker in markers if marker.get("pairs") != chosen["sha256"]
    ]
    done = {marker["shard"]: marker for marker in markers}
    if tasks:
        if any(task.shard not in fresh for task in tasks):
            layout.manifest.unlink(missing_ok=True)
        with Meter("word pairs", len(markers), len(markers) - len(tasks)) as meter:
            for marker in run_pass(build, add_pairs, tasks):
                done[marker["shard"]] = marker
                meter.advance(marker["rows"])
    return [done[marker["shard"]] for marker in markers]


@contextmanager
def spill_folder(layout: Layout) -> Iterator[Path]:
    """Where DuckDB may put what does not fit its memory: in OUT, or on this machine's disk where OUT is an object store."""
    if is_remote(layout.out):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    spill = layout.out / "spill.partial"
    try:
        with plain_disk_faults(spill):
            yield spill
    finally:
        shutil.rmtree(spill, ignore_errors=True)


def class_names(build: Build) -> list[str]:
    """Names of all label classes, position = id: the tokens, and behind them the word pairs."""
    tokens = build.tokenizer.tokens
    if build.settings.labels.ngrams == 1:
        return tokens
    return [*tokens, *pair_names(read_pairs(build.layout.pairs, len(tokens)), tokens)]


def write_idf(build: Build, parts: list[ShardPart], markers: list[Marker]) -> int:
    """idf.parquet and idf.duckdb, made anew unless they belong to exactly these label files (`markers`: theirs); the number of captions."""
    layout, tokenizer, formula = build.layout, build.tokenizer, build.settings.labels.idf
    captions = sum(part.rows for part in parts)
    if idf_is_done(build, parts):
        return captions
    layout.manifest.unlink(missing_ok=True)
    marker_path = layout.markers / "idf.json"
    marker_path.unlink(missing_ok=True)
    names = class_names(build)
    with spill_folder(layout) as spill:
        files = [layout.count_file(part.name) for part in parts]
        frequency = sum_counts(files, len(names), build.settings.build.duckdb_memory, spill)
    write_idf_parquet(layout.idf_parquet, names, frequency, captions, formula)
    tokens = sum(marker["tokens"] for marker in markers) if all("tokens" in marker for marker in markers) else None
    write_idf_duckdb(
        layout, captions=captions, tokens=tokens, formula=formula, tokenizer=tokenizer.name,
        fingerprint=tokenizer.fingerprint, shards=parts,
    )  # fmt: skip
    write_json(marker_path, {"of": _idf_of(build, parts), "sha256": sha256_file(layout.idf_parquet)})
    return captions


def idf_is_done(build: Build, parts: list[ShardPart]) -> bool:
    """Whether idf.parquet and idf.duckdb belong to exactly these label files."""
    layout = build.layout
    marker = read_marker(layout.markers / "idf.json")
    return bool(marker and marker.get("of") == _idf_of(build, parts) and layout.idf_parquet.is_file() and layout.idf_duckdb.is_file())


def _idf_of(build: Build, parts: list[ShardPart]) -> dict[str, str]:
    return {"formula": build.settings.labels.idf, "shards": fingerprint([part.model_dump() for part in parts])}
