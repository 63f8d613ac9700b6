"""`train eval --suite FILE --out DIR`: every encoder by every protocol on every data set, and one table at the end.

    encoders: [run:run, {encoder: timm:vit_base_patch16_224.mae, weights: mae.pth, layer: -2, pool: avg}]
    data: [pets:/data/pets, folders:mine, coco:/data/coco, {train: mine/a, test: mine/b, class_key: colour}]
    protocols: [probe, {protocol: probe, set: {recipe: mae}}, fewshot, knn, zeroshot, retrieval, caption]

A cell is one encoder by one protocol on one data set; protocols of classes run on data with classes, retrieval and
caption on captioned data.

DIR/features/         features, shared by all protocols and by later calls; checkpoints of models that are trained
DIR/results/<fingerprint>.json, .splits.parquet   one cell, named by everything that determines it: a rerun skips it
DIR/suite.json, table.md   all cells together
DIR/differences.md         of each encoder to the first, image by image: paired.py
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field, ValidationError

from labels.config import load_pipeline, read_yaml
from labels.settings import Pipeline, Section
from labels.show.terminal import visible
from labels.storage import UserError, fingerprint, printable, user_path, write_json, write_whole
from train.encoders.encoder import Encoder, EncoderSpec, with_unique_names
from train.encoders.load import load_encoder
from train.evals.data.captions import CAPTION_KINDS, CaptionSet, load_caption_set
from train.evals.data.sets import DataSet
from train.evals.features import TRANSFORM, Extractor
from train.evals.measure import Grid, floor_rows, measure, named_data, result, write_splits
from train.evals.paired import add_versus
from train.evals.protocol import Evaluation, load_protocol, protocol_names


class EncoderEntry(Section):
    """`run:run`, or a mapping."""

    encoder: str
    weights: str | None = None
    layer: int | None = None
    pool: str | None = None

    @property
    def requested(self) -> EncoderSpec:
        """For load_encoder."""
        return EncoderSpec(self.encoder, self.weights, self.layer, self.pool)


class DataEntry(Section):
    """`pets:/data/pets`, or a mapping: `data`, or `train` with `test`; `class_key`: as the option `--class-key`."""

    data: str | None = None
    train: str | None = None
    test: str | None = None
    class_key: str | None = None

    def load(self, cache: Path | None) -> DataSet | CaptionSet:
        """The data set."""
        if (
            self.data
            and self.data.partition(":")[0] in CAPTION_KINDS
            and not (self.train or self.test or self.class_key)
        ):
            return load_caption_set(self.data, cache)
        train, test = (None if folder is None else user_path(folder) for folder in (self.train, self.test))
        return named_data(self.data, train, test, cache, self.class_key)


class ProtocolEntry(Section):
    """`probe`, or a mapping: `set` overrides keys of the protocol's section, `name` precedes its variants in tables."""

    protocol: str
    name: str | None = None
    set: Annotated[dict[str, Any], Field(default_factory=dict)]

    @property
    def evaluation(self) -> Evaluation:
        """The protocol of that name."""
        if self.protocol not in (names := protocol_names()):
            problem = f"the protocol {self.protocol!r} is unknown"
            raise UserError(problem, allowed=", ".join(names), fix="fix the suite file")
        return load_protocol(self.protocol)

    def pipeline(self, config: Path | None, overrides: tuple[str, ...]) -> Pipeline:
        """The configuration with this entry's own keys."""
        return load_pipeline(config, [*overrides, *_dotted(self.protocol, self.set)])


def _entry(key: str) -> BeforeValidator:
    """A bare word stands for a mapping with that key alone."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


class Suite(Section):
    """The whole file."""

    encoders: Annotated[list[Annotated[EncoderEntry, _entry("encoder")]], Field(min_length=1)]
    data: Annotated[list[Annotated[DataEntry, _entry("data")]], Field(min_length=1)]
    protocols: Annotated[list[Annotated[ProtocolEntry, _entry("protocol")]], Field(min_length=1)]


def read_suite(file: Path) -> Suite:
    """Read and check a suite file; the error names every key that is wrong, missing or unknown."""
    try:
        return Suite.model_validate(read_yaml(file))
    except ValidationError as error:
        faults = [f"  {'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors(include_url=False)]
        raise UserError(
            "\n".join([f"{file} is not a suite:", *faults]),
            allowed="encoders, data and protocols, each a list; an encoder with weights, layer, pool; a protocol with "
            "name, set; data with data or train and test, class_key",
        ) from None


def _dotted(prefix: str, values: dict[str, Any]) -> list[str]:
    """`prefix.key=value` overrides of nested mappings."""
    overrides: list[str] = []
    for key, value in values.items():
        name = f"{prefix}.{key}"
        overrides += _dotted(name, value) if isinstance(value, dict) else [f"{name}={json.dumps(value)}"]
    return overrides


class _Planned(NamedTuple):
    """A protocol with its configuration."""

    evaluation: Evaluation
    pipeline: Pipeline
    prefix: str  # of its variants in the table

    def fits(self, data: DataSet | CaptionSet) -> bool:
        return self.evaluation.takes == ("classes" if isinstance(data, DataSet) else "captions")


class _Cell(NamedTuple):
    """One encoder by one protocol on one data set."""

    data: DataSet | CaptionSet
    encoder: EncoderSpec
    planned: _Planned
    file: Path
    reason: str | None  # why the protocol cannot evaluate the encoder


def run_suite(
    suite: Suite, out: Path, extract: Extractor, config: Path | None = None, overrides: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Measure every cell that is not there yet, print the tables, and write suite.json, table.md and
    differences.md.

    `extract` keeps its features below `out`; the protocols' own keys override `config` and `overrides`. Encoders, data
    and protocols are all checked before the first is measured. Returns the content of suite.json: `results`, one row
    for each data set, encoder and variant.
    """
    planned = [
        _Planned(entry.evaluation, entry.pipeline(config, overrides), f"{entry.name}: " if entry.name else "")
        for entry in suite.protocols
    ]
    encoders = with_unique_names([entry.requested for entry in suite.encoders])
    data_sets = [
        entry.load(extract.cache) for entry in {entry.model_dump_json(): entry for entry in suite.data}.values()
    ]
    _check(planned, data_sets)
    # Each is loaded once for checks and descriptions and freed: many large encoders would not fit in memory together.
    about = [_about(requested, planned) for requested in encoders]
    cells = list(_cells(out, data_sets, about, planned, extract))
    encoder: Encoder | None = None
    for number, cell in enumerate(cells, start=1):
        if cell.reason or cell.file.is_file():
            continue
        name = f"{cell.data.name}: {cell.planned.evaluation.name}: {cell.encoder.name}"
        print(f"[{number}/{len(cells)}] {visible(name)}", flush=True)
        if encoder is None or encoder.requested != cell.encoder:
            encoder = load_encoder(cell.encoder)
        _measure(cell, encoder, extract)
    rows = list(_numbered(row for cell in cells for row in _rows(cell)))
    rows = [{"data": data.name, **row} for data in data_sets for row in floor_rows(data)] + rows
    names = [data.name for data in data_sets]
    rows.sort(key=lambda row: names.index(row["data"]))  # stable: within a data set as the suite file has them
    add_versus(rows)
    grid = Grid(rows)
    metrics = "top-1 % (retrieval: recall at the first k; caption: CIDEr-D x 100)"
    grid.print(f"{metrics}, mean ± deviation over seeds: {out}")
    skipped = (f"{cell.planned.evaluation.name} of {cell.encoder.name}: {cell.reason}" for cell in cells if cell.reason)
    for reason in dict.fromkeys(skipped):
        print(f"skipped: {reason}")
    stems = [cell.file.stem for cell in cells if not cell.reason]
    content = {"results": rows, "suite": suite.model_dump(), "cells": stems}
    write_json(out / "suite.json", content)
    for name, table in (("table.md", grid.markdown()), ("differences.md", grid.markdown_of_differences())):
        text = printable(table)
        write_whole(out / name, lambda partial, text=text: partial.write_text(text, encoding="utf8"))
    return content


def _check(planned: list[_Planned], data_sets: list[DataSet | CaptionSet]) -> None:
    """Refuse data that a protocol cannot be run on, protocols that have no data, and data that no protocol takes."""
    for plan in planned:
        fitting = [data for data in data_sets if plan.fits(data)]
        if not fitting:
            problem = f"{plan.evaluation.name} takes data with {plan.evaluation.takes}, and the suite has none"
            raise UserError(problem, fix="add such data, or remove the protocol")
        for data in fitting:
            plan.evaluation.check(data, plan.evaluation.settings(plan.pipeline))
    for data in data_sets:
        if not any(plan.fits(data) for plan in planned):
            fix = "add one (retrieval or caption for captions), or remove the data"
            raise UserError(f"no protocol of the suite takes {data.name}", fix=fix)


def _about(requested: EncoderSpec, planned: list[_Planned]) -> tuple[EncoderSpec, dict[str, Any], list[str | None]]:
    """An encoder's description, and for each protocol why it cannot evaluate the encoder, or None."""
    encoder = load_encoder(requested)
    return requested, encoder.describe(), [plan.evaluation.unfit(encoder) for plan in planned]


def _cells(
    out: Path, data_sets: list[DataSet | CaptionSet], about: list[Any], planned: list[_Planned], extract: Extractor
) -> Iterator[_Cell]:
    for data in data_sets:
        for requested, description, reasons in about:
            for plan, reason in zip(planned, reasons, strict=True):
                if not plan.fits(data):
                    continue
                settings: Any = plan.evaluation.settings(plan.pipeline)
                parts = [part for part in (data.train, data.test) if part is not None]
                data_key = [data.name, *((part.fingerprint, part.state) for part in parts)]
                protocol_key = [plan.evaluation.describe(settings), settings.model_dump()]
                key = [data_key, [*protocol_key, requested.name, description, extract.precision, TRANSFORM]]
                yield _Cell(data, requested, plan, out / "results" / f"{fingerprint(key)}.json", reason)


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
        fix = "remove it; the same command measures it again"
        raise UserError(f"{cell.file} is damaged: {error!r}", fix=fix) from None
    for row in rows:
        yield {"data": cell.data.name, **row, "variant": cell.planned.prefix + row["variant"], "cell": cell.file.stem}


def _numbered(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Number equal variants (two entries of one protocol with another `set` alone) in the suite's order, so that no row
    hides another.
    """
    seen = Counter[tuple[str, str, str]]()
    for row in rows:
        seen[key := (row["data"], row["encoder"], row["variant"])] += 1
        yield row if seen[key] == 1 else {**row, "variant": f"{row['variant']} ({seen[key]})"}
