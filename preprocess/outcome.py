"""How a build ends: the checks on what was left out, quarantine.parquet, the manifest and the summary."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from labels.errors import UserError
from labels.files import fingerprint, sha256_file, write_whole
from labels.layout import Layout
from labels.manifest import BetonPart, Manifest, ShardPart, TokenizerPart
from labels.schema import QUARANTINE
from preprocess.plan import Build, Marker


def check_enough(build: Build, parts: list[ShardPart], markers: list[Marker]) -> None:
    rows, faults = sum(part.rows for part in parts), sum(len(marker["faults"]) for marker in markers)
    if rows == 0:
        reasons = Counter(reason for marker in markers for _, reason, _ in marker["faults"])
        raise UserError(
            f"none of {len(parts)} shards gave a usable sample" + (f": {_told(reasons)}" if reasons else ": they are empty"),
            allowed="webdataset tars with an image (.jpg, .png, ...) and a caption (.txt, or `caption` in .json) a key",
        )
    check_share(build, faults, rows + faults)


def check_share(build: Build, bad: int, total: int) -> None:
    limit = build.settings.build.max_bad_fraction
    if bad > limit * total:
        raise UserError(
            f"{bad} of {total} samples are bad ({bad / total:.1%})",
            allowed=f"build.max_bad_fraction = {limit:.1%}",
            mend=f"see the reasons in {build.layout.markers}/*/*.json; raise the limit with --set build.max_bad_fraction=...",
        )


def _told(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())


def write_quarantine(layout: Layout, faults: list[tuple[str, str, str, str, str]]) -> None:
    columns = list(zip(*faults, strict=True)) if faults else [[]] * 5
    names = ["shard", "stage", "key", "reason", "detail"]
    table = pa.table(dict(zip(names, map(list, columns), strict=True))).select(QUARANTINE.names).cast(QUARANTINE)
    write_whole(layout.quarantine, lambda partial: pq.write_table(table, partial, compression="zstd"))


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
