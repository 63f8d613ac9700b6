"""How a build ends: the checks on what was left out, quarantine.parquet, the manifest and the summary."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from labels.config import dump_yaml
from labels.errors import UserError
from labels.files import fingerprint, sha256_file, write_whole
from labels.layout import Layout
from labels.manifest import BetonPart, Manifest, ShardPart, TokenizerPart
from labels.schema import QUARANTINE
from preprocess.plan import Build, Marker, read_marker

_ROWS_AT_ONCE = 65_536


def check_usable(build: Build, bad: Counter[str], samples: int, outside: int, parts: list[ShardPart]) -> None:
    """End the build if too little is left; quarantine.parquet then says why.

    Args:
        build: whose limit counts.
        bad: reasons of everything left out so far.
        samples: how many are left.
        outside: how many good ones are not in the subset; bad samples are counted whether or not they would be.
        parts: the shards, whose markers say which were left out.

    Raises:
        UserError: no sample left, or more bad ones than `max_bad_fraction` of all.
    """
    total = bad.total() + samples + outside
    limit = build.settings.build.max_bad_fraction
    if samples and bad.total() <= limit * total:
        return
    if not build.layout.manifest.is_file():  # a finished OUT keeps the table that its manifest names
        write_quarantine(build.layout, parts)
    reasons = _told(bad)
    if samples == 0:
        others = f"; {outside} are outside of the subset" if build.subset else ""
        raise UserError(
            f"the input gave no usable sample: {reasons or 'its shards are empty'}{others}",
            allowed="tars with an image (.jpg, .png, ...) and a caption (.txt, or `caption` in .json) a key; tables with a caption",
            mend=f"see {build.layout.quarantine}" if bad else None,
        )
    raise UserError(
        f"{bad.total()} of {total} samples are bad ({bad.total() / total:.1%}): {reasons}",
        allowed=f"build.max_bad_fraction = {limit:.1%}",
        mend=f"see {build.layout.quarantine}; raise the limit with --set build.max_bad_fraction=...",
    )


def _told(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())


def write_quarantine(layout: Layout, parts: list[ShardPart], image_markers: Sequence[Path] = ()) -> None:
    """quarantine.parquet from the markers of the shards and of the image pass, a marker at a time: there may be many faults."""
    sources = [("labels", layout.label_marker(part.name)) for part in parts if part.quarantined]
    sources += [("images", path) for path in image_markers]

    def write(partial: Path) -> None:
        with pq.ParquetWriter(partial, QUARANTINE, compression="zstd") as writer:
            rows: list[tuple[str, ...]] = []
            for stage, path in sources:
                marker = read_marker(path) or {"faults": []}
                for fault in marker["faults"]:
                    shard, key, reason, detail = fault if stage == "images" else [marker["shard"], *fault]
                    rows.append((shard, key, stage, reason, detail))
                if len(rows) >= _ROWS_AT_ONCE:
                    writer.write_table(_table(rows))
                    rows = []
            writer.write_table(_table(rows))

    write_whole(layout.quarantine, write)


def _table(rows: list[tuple[str, ...]]) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(QUARANTINE.names, row, strict=True)) for row in rows], QUARANTINE)


def write_config(build: Build) -> None:
    """config.yaml: the resolved configuration, as far as it decides what is in OUT."""
    dump_yaml(build.layout.config, build.settings, leave_out={"paths": True, "train": True, "probe": True, "build": {"workers", "engine"}})


def make_manifest(build: Build, parts: list[ShardPart], captions: int, written: list[Marker], classes: int, *, copy: bool) -> Manifest:
    """The manifest of what is whole in OUT. `written`: markers of the image pass, whose files are betons (`copy`) or places."""
    files = [BetonPart(**file) for marker in written for file in marker["files"]]
    return Manifest(
        fingerprint=fingerprint([build.label_options, [[part.name, part.rows, part.labels_sha256] for part in parts]]),
        options=build.options,
        label_limit=build.label_limit,
        tokenizer=TokenizerPart(
            name=build.tokenizer.name,
            fingerprint=build.tokenizer.fingerprint,
            path=build.tokenizer.path,
            vocabulary=classes,
            excluded=build.tokenizer.excluded.tolist(),
        ),
        captions=captions,
        idf_formula=build.settings.labels.idf,
        idf_sha256=sha256_file(build.layout.idf_parquet),
        quarantine_sha256=sha256_file(build.layout.quarantine),
        shards=parts,
        betons=files if copy else [],
        places=[] if copy else files,
    )


def print_summary(manifest: Manifest, out: Path) -> None:
    """What came out, in a few lines on standard output."""
    bad = Counter[str]()
    for part in [*manifest.shards, *manifest.betons, *manifest.places]:
        bad.update(part.quarantined)
    gib = sum(beton.bytes for beton in manifest.betons) / 2**30
    print(f"{out}: {manifest.captions:,} label rows from {len(manifest.shards)} shards, vocabulary {manifest.tokenizer.vocabulary:,}")
    if manifest.betons:
        print(f"  {manifest.samples:,} samples in {len(manifest.betons)} betons, {gib:.2f} GiB")
    if manifest.places:
        print(f"  {manifest.samples:,} samples at their places in the tars that {Layout(out).place_sources} names; keep those")
    print(f"  quarantined: {bad.total():,}" + (f" ({_told(bad)})" if bad else ""))
