"""The OUTs of a set: their manifests, whether they belong together, and the IDF that counts for all of them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from labels.arrays import check_same_rows
from labels.errors import UserError
from labels.idf import read_idf
from labels.layout import Layout
from labels.manifest import BetonPart, Manifest, read_manifest
from labels.storage import local_copy, sha256_file
from train.sources import Source


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
        parts, numbers = self.manifest.betons or self.manifest.places, self.source.numbers
        return [part for part in parts if numbers is None or part.number in numbers]

    @property
    def rebuild(self) -> str:
        """The command that makes its files anew."""
        return f"run `preprocess build-labels DATA --out {self.source.out}{' --no-images' if self.manifest.places else ''}`"

    def path(self, part: BetonPart) -> Path:
        layout = Layout(self.source.out)
        return layout.place_file(part.number) if self.manifest.places else layout.beton_file(part.number)


def open_out(source: Source) -> Opened:
    """Read the manifests of one source.

    Raises:
        UserError: they are missing or damaged, hold no samples, or those of other rows.
    """
    out, other = source.out, source.labels
    manifest = read_manifest(out)
    opened = Opened(source, manifest, read_manifest(other) if other else manifest)
    if not manifest.betons and not manifest.places:
        raise UserError(f"{out} holds labels but no betons (it was built with --no-beton)", mend=f"{opened.rebuild} without --no-beton")
    if manifest.samples == 0:
        raise UserError(f"the betons of {out} hold no samples: every image was quarantined", mend="see quarantine.parquet")
    known = {part.number for part in manifest.betons or manifest.places}
    if strange := sorted(set(source.numbers or ()) - known):
        raise UserError(
            f"beton {strange[0]:05d} is not in the manifest of {out}", allowed=f"{len(known)} from {min(known)} to {max(known)}"
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
                    mend="label the rows of one with the other's options (`preprocess build-labels DATA --out NEW --no-beton "
                    "--set labels...`), and give a --labels for each --beton",
                )


def idf_of(opened: list[Opened], chosen: Path | None) -> tuple[np.ndarray, str]:
    """The IDF of a set, float32 [V], and the SHA-256 of its table: the OUTs' own if they agree, else the one that was chosen.

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
                mend=f"run `preprocess idf {_told(opened)} --out {path}`",
            )
        return idf, sha256_file(path)
    tables = {one.labels.idf_sha256 for one in opened}
    if len(tables) > 1:
        raise UserError(
            f"{_told(opened)} have different IDF tables",
            allowed="--idf with one of these OUTs, or with a table of them all",
            mend=f"run `preprocess idf {_told(opened)} --out idf.parquet`, then give --idf idf.parquet",
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
        raise UserError(f"{path} has {len(idf)} tokens, the manifest {manifest.tokenizer.vocabulary}", mend=rebuild)
    found = sha256_file(path)
    if found != manifest.idf_sha256:
        whose = "labels" if opened.source.labels else "betons"
        raise UserError(
            f"{path} is not the table that the {whose} were built with: SHA-256 {found[:16]}..., "
            f"in the manifest {manifest.idf_sha256[:16]}...",
            mend=rebuild,
        )
    return idf
