"""`preprocess idf`: the IDF table of some shards, or of several OUTs together, summed from the counts that each shard keeps.

OUT/manifest.json (shards, their rows) + OUT/counts/<shard>.parquet, of each OUT -> one Parquet file like idf.parquet

Exact, since every caption is in one shard; no caption is read, so it takes seconds.
"""

import tempfile
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import duckdb
import pyarrow.parquet as pq

from labels.choices import Formula
from labels.errors import UserError
from labels.files import is_remote, local_copy
from labels.idf import read_idf
from labels.layout import Layout
from labels.manifest import Manifest, ShardPart, read_manifest
from preprocess.counts import document_frequencies, sum_counts, write_idf_parquet

# The tokenizer's fingerprint apart, what decides which label a caption gets: counts that differ in one of these are of different things.
_SAME_OPTIONS = ("context", "stop_words", "ngrams")


@dataclass(frozen=True)
class Summed:
    """What a table was made of: N captions of so many shards, with the formula that was used."""

    captions: int
    shards: int
    formula: Formula

    def __str__(self) -> str:
        return f"IDF ({self.formula}) of {self.captions:,} captions in {self.shards:,} {'shard' if self.shards == 1 else 'shards'}"


def sum_idf(
    outs: list[Path],
    target: Path,
    *,
    shards: str | None = None,
    formula: Formula | None = None,
    recount: bool = False,
    memory: str = "1GiB",
) -> Summed:
    """Write the IDF table of the given OUTs together: token_id, token, document_frequency, idf, one row a vocabulary entry.

    Args:
        outs: finished OUTs of one tokenizer and one set of labels.
        target: the Parquet file to write, outside of all of them.
        shards: a pattern of shard names such as `0000[0-4]*`; None takes all.
        formula: None takes the one that the OUTs were built with.
        recount: count the label files anew instead of summing what is kept of each shard.
        memory: DuckDB's limit.

    Raises:
        UserError: an OUT is unfinished or given twice, or has other labels than the first; no shard's name fits; counts are missing.
    """
    _check_target(target, outs)
    manifests = [read_manifest(out) for out in outs]
    names = _common_tokens(outs, manifests)
    formula = formula or _common_formula(outs, manifests)
    chosen = [(out, part) for out, manifest in zip(outs, manifests, strict=True) for part in manifest.shards if _fits(part, shards)]
    if not chosen:
        known = [part.name for manifest in manifests for part in manifest.shards]
        raise UserError(f"no shard's name fits --shards {shards}", allowed=f"patterns of {len(known)} names from {known[0]} to {known[-1]}")
    files = [Layout(out).label_file(part.name) if recount else _count_file(out, part) for out, part in chosen]
    count = document_frequencies if recount else sum_counts
    captions = sum(part.rows for _, part in chosen)
    mend = f"run `preprocess verify` on {_told(outs)}"
    try:
        with tempfile.TemporaryDirectory() as spill:
            frequency = count(files, len(names), memory, Path(spill))
    except (duckdb.Error, IndexError) as error:
        raise UserError(f"the shards' counts cannot be summed: {error}", mend=mend) from None
    if frequency.max(initial=0) > captions:
        raise UserError(f"the shards' counts hold a token {frequency.max()} times, in {captions} captions", mend=mend)
    write_idf_parquet(target, names, frequency, captions, formula)
    return Summed(captions, len(chosen), formula)


def _check_target(target: Path, outs: list[Path]) -> None:
    """Refuse, before any work, a file that cannot be written or that belongs to a build, and the same captions twice."""
    places = [out if is_remote(out) else out.resolve() for out in outs]
    for place, out in zip(places, outs, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{out} is given twice: its captions would count twice", mend="name every OUT once")
        if not is_remote(place) and target.resolve().is_relative_to(place):
            raise UserError(f"--out {target} lies in {out}, whose files only a build writes", mend="give a file elsewhere")
    if target.suffix != ".parquet" or target.is_dir():
        raise UserError(f"--out {target} is not the name of a Parquet file", allowed="a path that ends in .parquet")


def _fits(part: ShardPart, pattern: str | None) -> bool:
    return pattern is None or fnmatchcase(part.name, pattern)


def _common_tokens(outs: list[Path], manifests: list[Manifest]) -> list[str]:
    """The vocabulary, position = id, if it and the meaning of labels are the same in all OUTs."""
    names = _tokens(outs[0])
    for out, manifest in zip(outs[1:], manifests[1:], strict=True):
        for thing, first, other in _label_facts(manifests[0], manifest):
            if first != other:
                raise UserError(
                    f"{outs[0]} and {out} differ in {thing}: {first} and {other}",
                    allowed="OUTs with the same labels",
                    mend="build the labels of one of them anew with the other's options",
                )
        if _tokens(out) != names:
            raise UserError(
                f"{outs[0]} and {out} have other classes: each chose its own word pairs (labels.ngrams)",
                mend="build them as one OUT, or both with labels.ngrams=1",
            )
    return names


def _label_facts(first: Manifest, other: Manifest) -> list[tuple[str, object, object]]:
    facts: list[tuple[str, object, object]] = [("their tokenizer's fingerprint", first.tokenizer.fingerprint, other.tokenizer.fingerprint)]
    options, others = first.options.get("labels", {}), other.options.get("labels", {})
    return facts + [(f"labels.{key}", options.get(key), others.get(key)) for key in _SAME_OPTIONS]


def _tokens(out: Path) -> list[str]:
    path = Layout(out).idf_parquet
    read_idf(path)  # says so if it is missing or damaged
    with local_copy(path) as file:
        return pq.read_table(file, columns=["token"])["token"].to_pylist()


def _common_formula(outs: list[Path], manifests: list[Manifest]) -> Formula:
    formulas = sorted({manifest.idf_formula for manifest in manifests})
    if len(formulas) > 1:
        raise UserError(f"{_told(outs)} were built with different IDF formulas: {', '.join(formulas)}", mend="choose one with --formula")
    return formulas[0]  # type: ignore[return-value]  # idf_weights refuses another


def _count_file(out: Path, part: ShardPart) -> Path:
    path = Layout(out).count_file(part.name)
    if not path.is_file():
        raise UserError(f"no counts of shard {part.name} at {path}", mend=f"run the build-labels command of {out} again")
    return path


def _told(outs: list[Path]) -> str:
    return ", ".join(map(str, outs))
