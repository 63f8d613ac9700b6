"""The OUTs of a set: their manifests, whether they belong together, and the IDF that counts for all of them."""

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
from labels.storage import Layout, UserError, local_copy, out_path, sha256_file

# ---- sources: What `--beton` names: OUTs, manifests, single betons, globs of them, each with or without its share of the samples.
#
# --beton A --beton 'pool/out*' --beton B/beton/00000.beton      all samples of all, one set
# --beton A=0.7 --beton 'pool/out*=0.3'                          a mixture: 7 of 10 samples from A, 3 from the others together


_ALLOWED = "an OUT, its manifest.json, its beton/*.beton, or a glob of these; each may end in =SHARE, e.g. out=0.3"
_LONGEST_PERIOD = 1_000_000
_GLOB = re.compile(r"[*?[]")


@dataclass(frozen=True)
class Source:
    """One OUT, or some of its betons.

    Attributes:
        out: where it is; a UPath where it is in an object store.
        labels: another OUT whose labels are taken, for the same rows.
        numbers: of the betons that are taken; None takes all.
        group: number of the `--beton` whose share it is part of; 0 without shares.
    """

    out: Path
    labels: Path | None = None
    numbers: tuple[int, ...] | None = None
    group: int = 0


@dataclass(frozen=True)
class Mixture:
    """Sources, and how many of every `sum(quotas)` samples come from each group."""

    sources: tuple[Source, ...]
    quotas: tuple[int, ...] = (1,)


def parse_sources(texts: Sequence[str], labels: Sequence[Path] = ()) -> Mixture:
    """The sources that the values of `--beton` name, in their order.

    Args:
        texts: the values.
        labels: none, or for each OUT in turn another one whose labels are taken.

    Raises:
        UserError: nothing is there under a name, an OUT is named twice, or shares are given to some only.
    """
    parsed = [_split(text) for text in texts]
    shares = [share for _, share in parsed if share is not None]
    if shares and len(shares) < len(parsed):
        without = next(text for text, share in parsed if share is None)
        raise UserError(
            f"--beton {without} has no share, others have",
            allowed="a share for all of them, or for none",
            fix="add =SHARE",
        )
    sources: list[Source] = []
    for group, (text, _) in enumerate(parsed):
        sources += [replace(source, group=group if shares else 0) for source in _named(text)]
    places = [str(source.out) for source in sources]
    if twice := next((place for place in places if places.count(place) > 1), None):
        raise UserError(f"--beton names {twice} twice", fix="name every OUT once; its betons together, as one glob")
    if labels and len(labels) != len(sources):
        raise UserError(
            f"{len(labels)} --labels for {len(sources)} OUTs of --beton",
            allowed="none, or one for each OUT, in the same order",
        )
    if labels:
        sources = [replace(source, labels=other) for source, other in zip(sources, labels, strict=True)]
    return Mixture(tuple(sources), _quotas(shares) if shares else (1,))


def _split(text: str) -> tuple[str, Fraction | None]:
    name, equals, share = text.rpartition("=")
    if not equals or Path(text).exists():
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


def _named(text: str) -> list[Source]:
    """The OUTs under one name; betons of the same OUT are one source."""
    if "://" in text and not text.startswith(("file://", "local://")):
        return [Source(_without_manifest(out_path(text)))]
    plain = str(out_path(text))
    paths = [Path(plain)]
    if not paths[0].exists() and _GLOB.search(plain):
        paths = [Path(found) for found in sorted(glob.glob(plain))]
        if not paths:
            raise UserError(f"nothing fits --beton {text}", allowed=_ALLOWED)
    sources: dict[Path, Source] = {}
    for path in paths:
        if path.suffix == ".beton":
            out, number = path.resolve().parent.parent, _number(path)
            taken = sources.setdefault(out, Source(out, numbers=())).numbers
            sources[out] = Source(out, numbers=(*(taken or ()), number))
        else:
            sources.setdefault(_without_manifest(path), Source(_without_manifest(path)))
    return list(sources.values())


def _number(path: Path) -> int:
    if not path.stem.isdigit() or path.resolve() != Layout(path.resolve().parent.parent).beton_file(int(path.stem)):
        raise UserError(
            f"--beton {path} is no beton of an OUT", allowed=_ALLOWED, fix="give the OUT that build-labels wrote"
        )
    return int(path.stem)


def _without_manifest(path: Path) -> Path:
    return path.parent if path.name == "manifest.json" else path


@dataclass(frozen=True)
class Opened:
    """One source with its manifests; `labels` is the manifest of its labels, which may be those of another OUT."""

    source: Source
    manifest: Manifest
    labels: Manifest

    @property
    def labels_out(self) -> Path:
        return self.source.labels or self.source.out

    @property
    def parts(self) -> list[BetonPart]:
        """Its files of samples, those that were asked for."""
        parts, numbers = self.manifest.betons or self.manifest.image_index, self.source.numbers
        return [part for part in parts if numbers is None or part.number in numbers]

    @property
    def rebuild(self) -> str:
        """The command that makes its files again."""
        return f"run `preprocess build-labels DATA --out {self.source.out}{' --no-images' if self.manifest.image_index else ''}`"

    def path(self, part: BetonPart) -> Path:
        layout = Layout(self.source.out)
        return layout.image_index_file(part.number) if self.manifest.image_index else layout.beton_file(part.number)


def open_out(source: Source) -> Opened:
    """Read the manifests of one source.

    Raises:
        UserError: they are missing or damaged, hold no samples, or those of other rows.
    """
    out, other = source.out, source.labels
    manifest = read_manifest(out)
    opened = Opened(source, manifest, read_manifest(other) if other else manifest)
    if not manifest.betons and not manifest.image_index:
        raise UserError(
            f"{out} holds labels but no betons (it was built with --no-beton)",
            fix=f"{opened.rebuild} without --no-beton",
        )
    if manifest.samples == 0:
        raise UserError(
            f"the betons of {out} hold no samples: every image was quarantined", fix="see quarantine.parquet"
        )
    known = {part.number for part in manifest.betons or manifest.image_index}
    if strange := sorted(set(source.numbers or ()) - known):
        raise UserError(
            f"beton {strange[0]:05d} is not in the manifest of {out}",
            allowed=f"{len(known)} from {min(known)} to {max(known)}",
        )
    if other:
        check_same_rows(out, manifest, other, opened.labels)
    return opened


def check_agreement(opened: list[Opened]) -> None:
    """Refuse OUTs whose labels mean different things.

    Raises:
        UserError: naming the first two that differ, and in what.
    """
    first = opened[0]
    for other in opened[1:]:
        facts = (
            ("their tokenizer's fingerprint", first.labels.tokenizer.fingerprint, other.labels.tokenizer.fingerprint),
            ("the size of their vocabulary", first.labels.tokenizer.vocabulary, other.labels.tokenizer.vocabulary),
            ("the label limit", first.labels.label_limit, other.labels.label_limit),
        )
        for thing, one, another in facts:
            if one != another:
                raise UserError(
                    f"{first.labels_out} and {other.labels_out} differ in {thing}: {one} and {another}",
                    allowed="OUTs with the same labels",
                    fix="label the rows of one with the other's options (`preprocess build-labels DATA --out NEW --no-beton "
                    "--set labels...`), and give a --labels for each --beton",
                )


def idf_of(opened: list[Opened], chosen: Path | None) -> tuple[np.ndarray, str]:
    """The IDF of a set, float32 [V], and the SHA-256 of its table: the OUTs' own if they agree, else the one that was
    chosen.

    Args:
        opened: OUTs with the same vocabulary.
        chosen: `--idf`: an idf.parquet, or an OUT that has one.

    Raises:
        UserError: the OUTs have different tables and none was chosen, or a table does not fit.
    """
    vocabulary = opened[0].labels.tokenizer.vocabulary
    if chosen:
        path = Layout(chosen).idf_parquet if chosen.is_dir() else chosen
        idf = read_idf(path)
        if len(idf) != vocabulary or _tokens(path) != _tokens(Layout(opened[0].labels_out).idf_parquet):
            raise UserError(
                f"{path} is the table of other tokens than those of {opened[0].labels_out}",
                fix=f"run `preprocess idf {_told(opened)} --out {path}`",
            )
        return idf, sha256_file(path)
    tables = {one.labels.idf_sha256 for one in opened}
    if len(tables) > 1:
        raise UserError(
            f"{_told(opened)} have different IDF tables",
            allowed="--idf with one of these OUTs, or with a table of them all",
            fix=f"run `preprocess idf {_told(opened)} --out idf.parquet`, then give --idf idf.parquet",
        )
    return _own_idf(opened[0]), opened[0].labels.idf_sha256


def _told(opened: list[Opened]) -> str:
    return " ".join(str(one.labels_out) for one in opened)


def _tokens(path: Path) -> list[str]:
    with local_copy(path) as file, pq.ParquetFile(file, pre_buffer=False) as opened:
        return opened.read(["token"], use_threads=False)["token"].to_pylist()


def _own_idf(opened: Opened) -> np.ndarray:
    out, manifest = opened.labels_out, opened.labels
    path, rebuild = Layout(out).idf_parquet, f"run `preprocess build-labels DATA --out {out}`"
    idf = read_idf(path)
    if len(idf) != manifest.tokenizer.vocabulary:
        raise UserError(f"{path} has {len(idf)} tokens, the manifest {manifest.tokenizer.vocabulary}", fix=rebuild)
    found = sha256_file(path)
    if found != manifest.idf_sha256:
        whose = "labels" if opened.source.labels else "betons"
        raise UserError(
            f"{path} is not the table that the {whose} were built with: SHA-256 {found[:16]}..., "
            f"in the manifest {manifest.idf_sha256[:16]}...",
            fix=rebuild,
        )
    return idf
