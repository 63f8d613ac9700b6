"""`train probe`: the linear probe of a list of encoders on one data set, as a table and a result JSON."""

import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from labels.errors import UserError
from labels.files import write_json
from labels.settings import Probe
from train.evals.datasets import LabelledImages, load_labelled
from train.evals.encoders import Encoder, load_encoder
from train.evals.features import TRANSFORM, extract
from train.evals.probe import PROTOCOL, linear_probe, majority

_VERSIONS = ("torch", "timm", "numpy", "pillow")


def run_probe(
    specs: Sequence[str],
    train_dir: Path,
    test_dir: Path,
    settings: Probe,
    *,
    weights: Sequence[str] = (),
    out: Path | None = None,
    cache: Path | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Probe every encoder, print one row for each and one for the majority class, and write the result.

    Args:
        specs: encoders as load_encoder takes them.
        train_dir, test_dir: as load_labelled takes them.
        weights: one file, or `hub`, for each timm: encoder, in their order.
        out: the result JSON.
        cache: a folder that keeps features between calls.
        device: of encoder and solver; the CPU if not given.

    Returns:
        What the JSON holds: accuracies as fractions of 1, seconds of wall clock.

    Raises:
        UserError: anything wrong with encoders, data, settings or `out`, found before the first feature where possible.
    """
    device, console = device or torch.device("cpu"), Console()
    if out and out.is_dir():
        raise UserError(f"--out {out} is a directory", allowed="the path of a JSON file")
    encoders = _load_all(specs, weights, settings.seeds[0])
    train, test = load_labelled(train_dir, test_dir)
    rows = [{"encoder": "majority class", **_summary([majority(train.targets, test.targets, classes=len(train.classes))], test)}]
    for encoder in encoders:
        console.print(f"probing {encoder.name}: {len(train)} + {len(test)} images, width {encoder.width}")
        rows.append(_probe_one(encoder, train, test, settings, device, cache))
    result = {
        "protocol": PROTOCOL,
        "transform": TRANSFORM,
        "settings": settings.model_dump(),
        "classes": list(train.classes),
        "train": train.describe(),
        "test": test.describe(),
        "device": str(device),
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in _VERSIONS}},
        "results": rows,
    }
    console.print(_table(rows, len(settings.seeds)))
    if out:
        write_json(out, result)
    return result


def _load_all(specs: Sequence[str], weights: Sequence[str], seed: int) -> list[Encoder]:
    """Load all encoders before the work begins: a mistake in the last one must not cost the others' time."""
    timm_specs = [spec for spec in specs if spec.startswith("timm:")]
    if not specs:
        raise UserError("no encoder is named", mend="give --encoder, e.g. run:RUN")
    if len(weights) not in (0, len(timm_specs)):
        raise UserError(
            f"--weights was given {len(weights)} times for {len(timm_specs)} timm encoders ({', '.join(timm_specs) or 'none'})",
            allowed="one --weights for each timm:NAME, in their order",
        )
    files = iter(weights)
    return [load_encoder(spec, weights=next(files, None) if spec in timm_specs else None, seed=seed) for spec in specs]


def _probe_one(
    encoder: Encoder, train: LabelledImages, test: LabelledImages, settings: Probe, device: torch.device, cache: Path | None
) -> dict[str, Any]:
    """All seeds of one encoder. A seeded one is drawn anew for each, so that its spread includes the initialisation."""
    began, seeds = time.monotonic(), []
    groups = [[seed] for seed in settings.seeds] if encoder.seeded else [settings.seeds]
    for group in groups:
        drawn = load_encoder(encoder.name, seed=group[0]) if encoder.seeded else encoder
        train_x, test_x = (extract(drawn, part, batch_size=settings.batch_size, device=device, cache=cache) for part in (train, test))
        found = linear_probe(
            train_x, train.targets, test_x, test.targets,
            classes=len(train.classes), settings=settings, seeds=group, device=device,
        )  # fmt: skip
        seeds += [{**one, "encoder_weights": drawn.describe()["weights"]} for one in found]
    return {
        "encoder": encoder.name,
        "description": encoder.describe(),
        "seed_varies": "initialisation and validation split" if encoder.seeded else "validation split",
        **_summary(seeds, test),
        "seeds": seeds,
        "seconds": round(time.monotonic() - began, 2),
    }


def _summary(seeds: list[dict[str, Any]], test: LabelledImages) -> dict[str, Any]:
    """Mean and standard deviation (n - 1) over seeds, and the standard error that the size of the test part alone leaves."""
    top1 = np.array([one["top1"] for one in seeds])
    top5 = [one["top5"] for one in seeds if one["top5"] is not None]
    mean = float(top1.mean())
    return {
        "top1": mean,
        "top1_std": float(top1.std(ddof=1)) if len(top1) > 1 else None,
        "top1_standard_error": float(np.sqrt(mean * (1 - mean) / len(test))),
        "top5": float(np.mean(top5)) if top5 else None,
    }


def _table(rows: list[dict[str, Any]], seeds: int) -> Table:
    table = Table(title=f"linear probe, {seeds} seeds ({PROTOCOL})")
    for column in ("encoder", "top-1 %", "± seeds", "± test size", "top-5 %", "weight decay", "seconds"):
        table.add_column(column, justify="left" if column == "encoder" else "right", overflow="fold")
    for row in rows:
        decays = ", ".join(f"{value:g}" for value in sorted({one["weight_decay"] for one in row.get("seeds", [])}))
        shares = [_percent(row[key]) for key in ("top1", "top1_std", "top1_standard_error", "top5")]
        table.add_row(row["encoder"], *shares, decays or "-", f"{row['seconds']:.0f}" if "seconds" in row else "-")
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
