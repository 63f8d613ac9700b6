"""What `--beton` names: output folders, opened by their manifests, checked to belong together, and mixed by shares.

    --beton A --beton 'pool/out*' --beton B/beton/00000.beton      all samples of all of them, one set
    --beton A=0.7 --beton 'pool/out*=0.3'                          a mixture: 7 of 10 samples from A, 3 from the others

parse_sources -> Mixture of DataSources -> open_source -> OpenedSource -> check_agreement, idf_of. Shares are exact:
each period of a mixture (train/data/order.py) is a permutation of its quotas, and a group's own order continues from
period to period.
"""

import glob
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from labels.arrays import check_same_rows
from labels.idf import read_idf
from labels.manifest import BetonPart, Manifest, read_manifest
from labels.show.terminal import count
from labels.storage import Layout, UserError, is_remote, is_url, local_copy, sha256_file, user_path

_FORMS = (
    "an output folder, its manifest.json, its beton/*.beton, or a glob of these; each may end in =SHARE, e.g. out=0.3"
)
_LONGEST_PERIOD = 1_000_000
_GLOB = re.compile(r"[*?[]")


@dataclass(frozen=True)
class DataSource:
    """An output folder, or some of its betons."""

    out: Path  # a UPath in an object store
    labels: Path | None = None  # another output folder, whose labels are taken for the same rows
    numbers: tuple[int, ...] | None = None  # of the betons that are taken; None takes all
    group: int = 0  # the number of the `--beton` whose share it belongs to; 0 without shares


@dataclass(frozen=True)
class Mixture:
    """Sources, and how many of every `sum(quotas)` samples come from each group."""

    sources: tuple[DataSource, ...]
    quotas: tuple[int, ...] = (1,)


def parse_sources(texts: Sequence[str], labels: Sequence[Path] = ()) -> Mixture:
    """The sources that the values of `--beton` name, in their order; `labels` is empty or has a folder for each source.

    Raises UserError where a name matches nothing, a folder is named twice, or shares are given to some only.
    """
    parsed = [_split_share(text) for text in texts]
    shares = [share for _, share in parsed if share is not None]
    if shares and len(shares) < len(parsed):
        without = next(text for text, share in parsed if share is None)
        allowed = "a share for all of them, or for none"
        raise UserError(f"--beton {without} has no share, others have", allowed=allowed, fix="add =SHARE")
    sources: list[DataSource] = []
    for group, (text, _) in enumerate(parsed):
        sources += [replace(source, group=group if shares else 0) for source in _sources_of(text)]
    folders = [str(source.out) for source in sources]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        fix = "name every output folder once; its betons together, as one glob"
        raise UserError(f"--beton names {twice} twice", fix=fix)
    if labels and len(labels) != len(sources):
        problem = f"{len(labels)} --labels for {count(len(sources), 'output folder')} of --beton"
        raise UserError(problem, allowed="none, or one for each output folder, in the same order")
    if labels:
        sources = [replace(source, labels=folder) for source, folder in zip(sources, labels, strict=True)]
    return Mixture(tuple(sources), _quotas(shares) if shares else (1,))


def _split_share(text: str) -> tuple[str, Fraction | None]:
    name, equals, share = text.rpartition("=")
    if not equals or (not is_url(text) and user_path(text).exists()):
        return text, None
    try:
        value = Fraction(share)
    except (ValueError, ZeroDivisionError):
        return text, None
    if value <= 0:
        raise UserError(f"--beton {text}: the share is {share}", allowed="more than 0")
    return name, value


def _quotas(shares: list[Fraction]) -> tuple[int, ...]:
    """The smallest whole numbers in the proportion of the shares."""
    scale = math.lcm(*(share.denominator for share in shares))
    wholes = [int(share * scale) for share in shares]
    quotas = tuple(whole // math.gcd(*wholes) for whole in wholes)
    if sum(quotas) > _LONGEST_PERIOD:
        raise UserError(
            f"the shares {', '.join(map(str, shares))} repeat only every {sum(quotas):,} samples",
            allowed=f"every {_LONGEST_PERIOD:,} at most",
            fix="round them, e.g. to three digits",
        )
    return quotas


def _sources_of(text: str) -> list[DataSource]:
    """The sources under one name; betons of the same output folder are one source."""
    path = user_path(text)
    if is_remote(path):
        return [DataSource(_without_manifest(path))]
    plain, paths = str(path), [path]
    if not path.exists() and _GLOB.search(plain):
        paths = [Path(match) for match in sorted(glob.glob(plain))]
        if not paths:
            raise UserError(f"--beton {text} matches nothing", allowed=_FORMS)
    sources: dict[Path, DataSource] = {}
    for path in paths:
        if path.suffix == ".beton":
            out, number = path.resolve().parent.parent, _beton_number(path)
            taken = sources.setdefault(out, DataSource(out, numbers=())).numbers
            sources[out] = DataSource(out, numbers=(*(taken or ()), number))
        else:
            sources.setdefault(_without_manifest(path), DataSource(_without_manifest(path)))
    return list(sources.values())


def _beton_number(path: Path) -> int:
    if not path.stem.isdigit() or path.resolve() != Layout(path.resolve().parent.parent).beton_file(int(path.stem)):
        problem = f"--beton {path} is not a beton of an output folder"
        raise UserError(problem, allowed=_FORMS, fix="give the output folder that build-labels wrote")
    return int(path.stem)


def _without_manifest(path: Path) -> Path:
    return path.parent if path.name == "manifest.json" else path


@dataclass(frozen=True)
class OpenedSource:
    """One source with its manifests; `labels` is the manifest of its labels, which may be another folder's."""

    source: DataSource
    manifest: Manifest
    labels: Manifest

    @property
    def labels_out(self) -> Path:
        return self.source.labels or self.source.out

    @property
    def parts(self) -> list[BetonPart]:
        """Its sample files (betons or image indexes), those that are taken."""
        parts, numbers = self.manifest.betons or self.manifest.image_index, self.source.numbers
        return [part for part in parts if numbers is None or part.number in numbers]

    @property
    def rebuild(self) -> str:
        """The command that makes its files again."""
        option = " --no-images" if self.manifest.image_index else ""
        return f"run `preprocess build-labels DATA --out {self.source.out}{option}`"

    def path(self, part: BetonPart) -> Path:
        layout = Layout(self.source.out)
        return layout.image_index_file(part.number) if self.manifest.image_index else layout.beton_file(part.number)


def open_source(source: DataSource) -> OpenedSource:
    """Read the manifests; UserError where one is missing or damaged, has no samples, or describes other rows."""
    out = source.out
    manifest = read_manifest(out)
    opened = OpenedSource(source, manifest, read_manifest(source.labels) if source.labels else manifest)
    parts = manifest.betons or manifest.image_index
    if not parts:
        problem = f"{out} holds labels but no betons (it was built with --no-beton)"
        raise UserError(problem, fix=f"{opened.rebuild} without --no-beton")
    if manifest.samples == 0:
        problem = f"the betons of {out} hold no samples: every image was quarantined"
        raise UserError(problem, fix="see quarantine.parquet")
    known = {part.number for part in parts}
    if unknown := sorted(set(source.numbers or ()) - known):
        allowed = f"{len(known)} from {min(known)} to {max(known)}"
        raise UserError(f"beton {unknown[0]:05d} is not in the manifest of {out}", allowed=allowed)
    if source.labels:
        check_same_rows(out, manifest, source.labels, opened.labels)
    return opened


def check_agreement(opened: list[OpenedSource]) -> None:
    """Refuse sources whose labels mean different things: UserError for the first two that differ."""

    def facts(source: OpenedSource) -> dict[str, str | int]:
        tokenizer = source.labels.tokenizer
        return {
            "their tokenizer's fingerprint": tokenizer.fingerprint,
            "the size of their vocabulary": tokenizer.vocabulary,
            "the label limit": source.labels.label_limit,
        }

    expected = facts(opened[0])
    for source in opened[1:]:
        for name, value in facts(source).items():
            if value != expected[name]:
                folders = f"{opened[0].labels_out} and {source.labels_out}"
                relabel = "preprocess build-labels DATA --out NEW --no-beton --set labels..."
                raise UserError(
                    f"{folders} differ in {name}: {expected[name]} and {value}",
                    allowed="output folders with the same labels",
                    fix=f"label one with the other's options (`{relabel}`), and give a --labels for each --beton",
                )


def idf_table(first: OpenedSource, idf: Path | None) -> Path:
    """The IDF table of a set: `--idf`, an idf.parquet or an output folder that has one, or its first source's."""
    folder = idf or first.labels_out
    return Layout(folder).idf_parquet if folder.is_dir() or not idf else folder


def idf_of(opened: list[OpenedSource], idf: Path | None) -> tuple[np.ndarray, str]:
    """The IDF of a set, float32 [V], and the SHA-256 of its table.

    It is the table of `idf` (`--idf`: an idf.parquet, or an output folder that has one), else the sources' own.
    UserError where the sources have different tables and none was given, or where a table does not fit.
    """
    first, folders = opened[0], " ".join(str(source.labels_out) for source in opened)
    if idf:
        path, own_path = idf_table(first, idf), idf_table(first, None)
        table = read_idf(path)
        if len(table) != first.labels.tokenizer.vocabulary or _tokens(path) != _tokens(own_path):
            problem = f"{path} is the table of other tokens than those of {first.labels_out}"
            raise UserError(problem, fix=f"run `preprocess idf {folders} --out {path}`")
        return table, sha256_file(path)
    if len({source.labels.idf_sha256 for source in opened}) > 1:
        raise UserError(
            f"{folders} have different IDF tables",
            allowed="--idf with one of these output folders, or with a table of them all",
            fix=f"run `preprocess idf {folders} --out idf.parquet`, then give --idf idf.parquet",
        )
    return _own_idf(first), first.labels.idf_sha256


def _tokens(path: Path) -> list[str]:
    with local_copy(path) as file, pq.ParquetFile(file, pre_buffer=False) as table:
        return table.read(["token"], use_threads=False)["token"].to_pylist()


def _own_idf(opened: OpenedSource) -> np.ndarray:
    out, manifest = opened.labels_out, opened.labels
    path, rebuild = idf_table(opened, None), f"run `preprocess build-labels DATA --out {out}`"
    idf = read_idf(path)
    if len(idf) != manifest.tokenizer.vocabulary:
        raise UserError(f"{path} has {len(idf)} tokens, the manifest {manifest.tokenizer.vocabulary}", fix=rebuild)
    actual, expected = sha256_file(path), manifest.idf_sha256
    if actual != expected:
        built = "labels" if opened.source.labels else "betons"
        sha256 = f"SHA-256 {actual[:16]}..., in the manifest {expected[:16]}..."
        raise UserError(f"{path} is not the table that the {built} were built with: {sha256}", fix=rebuild)
    return idf
