"""How a build ends: the checks on what was left out, quarantine.parquet, the manifest and the summary."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from labels.config import dump_yaml
from labels.errors import UserError
from labels.files import fingerprint, sha256_file, write_whole
from labels.layout import Layout
from labels.manifest import BetonPart, Manifest, ShardPart, TokenizerPart
from labels.schema import QUARANTINE
from preprocess.plan import Build, Marker

FaultRow = tuple[str, str, str, str, str]
"""One row of quarantine.parquet: shard, key, stage, reason, detail."""


def fault_rows(stage: str, markers: list[Marker]) -> list[FaultRow]:
    return [(marker["shard"], key, stage, reason, detail) for marker in markers for key, reason, detail in marker["faults"]]


def check_usable(build: Build, faults: list[FaultRow], samples: int) -> None:
    """End the build if too little is left; quarantine.parquet then says why.

    Args:
        build: whose limit counts.
        faults: everything left out so far.
        samples: how many are left.

    Raises:
        UserError: no sample left, or more bad ones than `max_bad_fraction` of all.
    """
    bad, total = len(faults), len(faults) + samples
    limit = build.settings.build.max_bad_fraction
    if samples and bad <= limit * total:
        return
    if not build.layout.manifest.is_file():  # a finished OUT keeps the table that its manifest names
        write_quarantine(build.layout, faults)
    reasons = _told(Counter(reason for _, _, _, reason, _ in faults))
    if samples == 0:
        raise UserError(
            f"the input gave no usable sample: {reasons or 'its tars are empty'}",
            allowed="webdataset tars with an image (.jpg, .png, ...) and a caption (.txt, or `caption` in .json) a key",
            mend=f"see {build.layout.quarantine}" if faults else None,
        )
    raise UserError(
        f"{bad} of {total} samples are bad ({bad / total:.1%}): {reasons}",
        allowed=f"build.max_bad_fraction = {limit:.1%}",
        mend=f"see {build.layout.quarantine}; raise the limit with --set build.max_bad_fraction=...",
    )


def _told(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())


def write_quarantine(layout: Layout, faults: list[FaultRow]) -> None:
    table = pa.Table.from_pylist([dict(zip(QUARANTINE.names, fault, strict=True)) for fault in faults], QUARANTINE)
    write_whole(layout.quarantine, lambda partial: pq.write_table(table, partial, compression="zstd"))


def write_config(build: Build) -> None:
    """config.yaml: the resolved configuration, as far as it decides what is in OUT."""
    dump_yaml(build.layout.config, build.settings, leave_out={"paths": True, "train": True, "probe": True, "build": {"workers"}})


def make_manifest(build: Build, parts: list[ShardPart], captions: int, written: list[Marker]) -> Manifest:
    betons = []
    for number, marker in enumerate(written):
        reasons = Counter(reason for _, reason, _ in marker["faults"])
        betons.append(
            BetonPart(
                number=number,
                shard=marker["shard"],
                samples=marker["samples"],
                bytes=marker["bytes"],
                sha256=marker["sha256"],
                quarantined=dict(sorted(reasons.items())),
            )
        )
    return Manifest(
        fingerprint=fingerprint([build.label_options, [[part.name, part.rows, part.labels_sha256] for part in parts]]),
        options=build.options,
        label_limit=build.settings.labels.context,
        tokenizer=TokenizerPart(
            name=build.tokenizer.name,
            fingerprint=build.tokenizer.fingerprint,
            vocabulary=len(build.tokenizer.tokens),
            excluded=build.tokenizer.excluded.tolist(),
        ),
        captions=captions,
        idf_formula=build.settings.labels.idf,
        idf_sha256=sha256_file(build.layout.idf_parquet),
        quarantine_sha256=sha256_file(build.layout.quarantine),
        shards=parts,
        betons=betons,
    )


def print_summary(manifest: Manifest, out: Path) -> None:
    """What came out, in a few lines on standard output."""
    bad = Counter[str]()
    for part in [*manifest.shards, *manifest.betons]:
        bad.update(part.quarantined)
    gib = sum(beton.bytes for beton in manifest.betons) / 2**30
    print(f"{out}: {manifest.captions:,} label rows from {len(manifest.shards)} shards, vocabulary {manifest.tokenizer.vocabulary:,}")
    if manifest.betons:
        print(f"  {manifest.samples:,} samples in {len(manifest.betons)} betons, {gib:.2f} GiB")
    print(f"  quarantined: {bad.total():,}" + (f" ({_told(bad)})" if bad else ""))
