"""`train eval --suite FILE --out DIR`: every encoder by every protocol on every data set, and one table at the end.

    encoders:                                  protocols:
      - run:run                                  - probe
      - encoder: timm:vit_base_patch16_224.mae   - protocol: probe
        weights: mae.pth                           set: {recipe: mae}
        layer: -2                                - fewshot
        pool: avg                                - knn
    data: [pets:/data/pets, folders:mine, coco:/data/coco]   - zeroshot
                                                 - retrieval
                                                 - caption

Protocols of classes are run on data with classes, retrieval and caption on captioned data.

DIR/features/         features, shared by all protocols and by later calls; what is being trained
DIR/results/<fingerprint>.json, .splits.parquet   one cell; a cell that is there is not measured again
DIR/suite.json, table.md   all cells together
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field, ValidationError

from labels.config import load_pipeline, read_yaml
from labels.settings import Pipeline, Section
from labels.storage import UserError, fingerprint, write_json, write_whole
from train.encoders.encoder import Encoder, EncoderSpec, with_unique_names
from train.encoders.load import load_encoder
from train.evals.data.captions import CAPTION_KINDS, CaptionSet, load_caption_set
from train.evals.data.sets import DataSet, load_data
from train.evals.features import TRANSFORM, Extractor
from train.evals.measure import Grid, floor_rows, measure, result, write_splits
from train.evals.protocol import Evaluation, load_protocol, protocol_names

# ---- suite_file: The suite file: which encoders, on which data, by which protocols.


class EncoderEntry(Section):
    """`run:run`, or a mapping."""

    encoder: str
    weights: str | None = None
    layer: int | None = None
    pool: str | None = None

    @property
    def requested(self) -> EncoderSpec:
        """As load_encoder takes it."""
        return EncoderSpec(self.encoder, self.weights, self.layer, self.pool)


class ProtocolEntry(Section):
    """`probe`, or a mapping: `set` overrides keys of the protocol's section, `name` stands before its variants in the
    table.
    """

    protocol: str
    name: str | None = None
    set: Annotated[dict[str, Any], Field(default_factory=dict)]

    @property
    def evaluation(self) -> Evaluation:
        """The protocol of that name.

        Raises:
            UserError: there is none.
        """
        if self.protocol not in (names := protocol_names()):
            raise UserError(
                f"the protocol {self.protocol!r} is unknown", allowed=", ".join(names), fix="fix the suite file"
            )
        return load_protocol(self.protocol)

    def pipeline(self, config: Path | None, overrides: tuple[str, ...]) -> Pipeline:
        """The configuration with this entry's own keys laid over it."""
        return load_pipeline(config, [*overrides, *_dotted(self.protocol, self.set)])


def _entry(key: str) -> BeforeValidator:
    """A bare word stands for a mapping with that key alone."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


class Suite(Section):
    """The whole file."""

    encoders: Annotated[list[Annotated[EncoderEntry, _entry("encoder")]], Field(min_length=1)]
    data: Annotated[list[str], Field(min_length=1)]
    protocols: Annotated[list[Annotated[ProtocolEntry, _entry("protocol")]], Field(min_length=1)]


def read_suite(file: Path) -> Suite:
    """Read and check a suite file.

    Raises:
        UserError: naming every key that is wrong, missing or unknown.
    """
    try:
        return Suite.model_validate(read_yaml(file))
    except ValidationError as error:
        faults = [f"  {'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors(include_url=False)]
        raise UserError(
            "\n".join([f"{file} is not a suite:", *faults]),
            allowed="encoders, data and protocols, each a list; an encoder with weights, layer, pool; a protocol with name, set",
        ) from None


def _dotted(prefix: str, values: dict[str, Any]) -> list[str]:
    found: list[str] = []
    for key, value in values.items():
        name = f"{prefix}.{key}"
        found += _dotted(name, value) if isinstance(value, dict) else [f"{name}={json.dumps(value)}"]
    return found


class _Planned(NamedTuple):
    """A protocol with its configuration, and the word that stands before its variants."""

    evaluation: Evaluation
    pipeline: Pipeline
    prefix: str


class _Cell(NamedTuple):
    """One encoder by one protocol on one data set. `reason`: why it cannot be measured so."""

    data: DataSet | CaptionSet
    encoder: EncoderSpec
    planned: _Planned
    file: Path
    reason: str | None


def run_suite(
    suite: Suite, out: Path, extract: Extractor, config: Path | None = None, overrides: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Measure every cell that is not there yet, print the table, and write suite.json and table.md.

    Args:
        extract: keeps its features below `out`.
        config, overrides: the configuration that the protocols' own keys are laid over.

    Returns:
        What suite.json holds: `results`, one row a data set, encoder and variant.

    Raises:
        UserError: whatever does not fit; encoders, data and protocols are all checked before the first is measured.
    """
    planned = [_plan(entry, config, overrides) for entry in suite.protocols]
    encoders = with_unique_names([entry.requested for entry in suite.encoders])
    data_sets = [_load(spec, extract) for spec in dict.fromkeys(suite.data)]
    _check(planned, data_sets)
    # Loaded once to see that all are sound and what they are, and let go: many large ones would not fit side by side.
    about = [_about(requested, planned) for requested in encoders]
    cells = list(_cells(out, data_sets, about, planned, extract))
    held: tuple[EncoderSpec, Encoder] | None = None
    for number, cell in enumerate(cells, start=1):
        if cell.reason or cell.file.is_file():
            continue
        where = f"[{number}/{len(cells)}] {cell.data.name}: {cell.planned.evaluation.name}: {cell.encoder.name}"
        print(where, flush=True)
        if held is None or held[0] != cell.encoder:
            held = (cell.encoder, load_encoder(cell.encoder))
        _measure(cell, held[1], extract)
    rows = list(_numbered(row for cell in cells for row in _rows(cell)))
    rows = [{"data": data.name, **row} for data in data_sets for row in floor_rows(data)] + rows
    names = [data.name for data in data_sets]
    rows.sort(key=lambda row: names.index(row["data"]))  # stable: within a data set as the suite file has them
    grid = Grid(rows)
    grid.print(
        f"top-1 % (retrieval: recall at the first k; caption: CIDEr-D x 100), mean ± deviation over seeds: {out}"
    )
    for reason in dict.fromkeys(
        f"{cell.planned.evaluation.name} of {cell.encoder.name}: {cell.reason}" for cell in cells if cell.reason
    ):
        print(f"left out: {reason}")
    found = {
        "results": rows,
        "suite": suite.model_dump(),
        "cells": [cell.file.stem for cell in cells if not cell.reason],
    }
    write_json(out / "suite.json", found)
    write_whole(out / "table.md", lambda partial: partial.write_text(grid.markdown(), encoding="utf8"))
    return found


def _load(spec: str, extract: Extractor) -> DataSet | CaptionSet:
    return (
        load_caption_set(spec, extract.cache)
        if spec.partition(":")[0] in CAPTION_KINDS
        else load_data(spec, extract.cache)
    )


def _fits(plan: _Planned, data: DataSet | CaptionSet) -> bool:
    return plan.evaluation.takes == ("classes" if isinstance(data, DataSet) else "captions")


def _check(planned: list[_Planned], data_sets: list[DataSet | CaptionSet]) -> None:
    """Refuse data that a protocol cannot be run on, protocols that have no data, and data that no protocol takes."""
    for plan in planned:
        fitting = [data for data in data_sets if _fits(plan, data)]
        if not fitting:
            raise UserError(
                f"{plan.evaluation.name} takes data with {plan.evaluation.takes}, and the suite has none",
                fix="add some",
            )
        for data in fitting:
            plan.evaluation.check(data, plan.evaluation.settings(plan.pipeline))
    for data in data_sets:
        if not any(_fits(plan, data) for plan in planned):
            raise UserError(
                f"no protocol of the suite takes {data.name}",
                fix="add one (retrieval or caption for captions), or leave the data out",
            )


def _plan(entry: ProtocolEntry, config: Path | None, overrides: tuple[str, ...]) -> _Planned:
    return _Planned(entry.evaluation, entry.pipeline(config, overrides), f"{entry.name}: " if entry.name else "")


def _about(requested: EncoderSpec, planned: list[_Planned]) -> tuple[EncoderSpec, dict[str, Any], list[str | None]]:
    """An encoder's description, and for each protocol why it cannot be measured so."""
    encoder = load_encoder(requested)
    return requested, encoder.describe(), [plan.evaluation.unfit(encoder) for plan in planned]


def _cells(
    out: Path, data_sets: list[DataSet | CaptionSet], about: list[Any], planned: list[_Planned], extract: Extractor
) -> Iterator[_Cell]:
    for data in data_sets:
        for requested, description, reasons in about:
            for plan, reason in zip(planned, reasons, strict=True):
                if not _fits(plan, data):
                    continue
                settings: Any = plan.evaluation.settings(plan.pipeline)
                parts = [
                    data.name,
                    *((part.fingerprint, part.modified_ns) for part in (data.train, data.test) if part is not None),
                ]
                what = [
                    plan.evaluation.describe(settings),
                    settings.model_dump(),
                    requested.name,
                    description,
                    extract.precision,
                    TRANSFORM,
                ]
                yield _Cell(data, requested, plan, out / "results" / f"{fingerprint([parts, what])}.json", reason)


def _measure(cell: _Cell, encoder: Encoder, extract: Extractor) -> None:
    evaluation, pipeline = cell.planned.evaluation, cell.planned.pipeline
    measured = measure(evaluation, encoder, cell.data, pipeline, extract)
    if len(measured.splits):
        write_splits(cell.file.with_suffix(".splits.parquet"), [measured.splits])
    write_json(cell.file, result(evaluation, cell.data, pipeline, extract, measured.rows))


def _rows(cell: _Cell) -> Iterator[dict[str, Any]]:
    if cell.reason:
        return
    try:
        rows = json.loads(cell.file.read_bytes())["results"]
    except (ValueError, LookupError) as error:
        raise UserError(
            f"{cell.file} is damaged: {error!r}", fix="remove it; the same command measures it again"
        ) from None
    for row in rows:
        yield {"data": cell.data.name, **row, "variant": cell.planned.prefix + row["variant"], "cell": cell.file.stem}


def _numbered(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Entries of one protocol that give the same variant, as with another `set` alone, are told apart by a number in
    the suite's order.
    """
    seen = Counter[tuple[str, str, str]]()
    for row in rows:
        seen[key := (row["data"], row["encoder"], row["variant"])] += 1
        yield row if seen[key] == 1 else {**row, "variant": f"{row['variant']} ({seen[key]})"}
