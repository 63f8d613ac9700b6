"""Lines of metrics.jsonl -> curves with few enough points to draw. N steps, P points."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from labels.html import Series
from train.report.runs import Run

_POINTS, _RAW_POINTS = 200, 1_500


def loss_curves(runs: Sequence[Run], shown: Sequence[Run]) -> list[Series]:
    """Means of neighbouring steps, and behind a single run's the steps themselves; skipped steps are left out.

    `shown` of all `runs`, whose order gives each its colour.
    """
    curves = []
    for hue, run in enumerate(runs):
        if run not in shown:
            continue
        samples, losses = _columns([line for line in run.steps if line["loss"] is not None], "loss")
        if len(runs) == 1 and len(samples):
            kept = np.unique(np.linspace(0, len(samples) - 1, _RAW_POINTS).round().astype(int))
            curves.append(Series(samples[kept].tolist(), losses[kept].tolist(), "faint"))
        curves.append(_series(samples, losses, run.name if len(runs) > 1 else "", hue))
    return [curve for curve in curves if len(curve.xs)]


def throughput_curves(runs: Sequence[Run], key: str, factor: float = 1.0) -> list[Series]:
    """One value of the lines with throughput, times `factor`; runs without it are left out."""
    curves = []
    for hue, run in enumerate(runs):
        samples, values = _columns([line for line in run.throughput if key in line], key)
        if len(samples):
            curves.append(_series(samples, values * factor, run.name if len(runs) > 1 else "", hue))
    return curves


def binned(values: np.ndarray, points: int = _POINTS) -> np.ndarray:
    """Means of neighbours: float64 [N] -> [min(N, P)]."""
    edges = np.linspace(0, len(values), min(len(values), points) + 1).astype(int)
    return np.add.reduceat(values, edges[:-1]) / np.diff(edges) if len(values) else values


def _columns(lines: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    return np.array([line["samples"] for line in lines], float), np.array([line[key] for line in lines], float)


def _series(samples: np.ndarray, values: np.ndarray, name: str, hue: int) -> Series:
    return Series(binned(samples).tolist(), binned(values).tolist(), name=name, hue=hue)
