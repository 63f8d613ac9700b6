"""What every phase of check.py uses: its rows, its time, timers, and small training runs.

    phase -> kit.item(name, function) -> Result -> one line of rows.jsonl, at once, so that a cut run keeps it

A phase ends by itself: an item that no longer fits into the phase's time is written as skipped, one that raises as
failed, and the next one begins.
"""

import gc
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from labels.config import load_pipeline
from labels.settings import Pipeline, Train
from train.distributed import World
from train.loop import Budget, TrainState, run_loop
from train.metrics import Metrics, Speed
from train.trainer import make_train_state


@dataclass(frozen=True)
class Result:
    """What an item found: a text for the table, whether its goal is met (None: it has none), figures for JSON."""

    text: str
    ok: bool | None = None
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Kit:
    """A phase's surroundings. `small`: sizes that a CPU runs in seconds; `data`: what pack.sh made; `out`: for results;
    `work`: for caches and scratch files; `deadline`: of time.monotonic().
    """

    device: torch.device
    small: bool
    data: Path
    out: Path
    work: Path
    deadline: float

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def world(self) -> World:
        return World(0, 1, self.device)

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def item(self, name: str, function: Callable[[], Result], *, goal: str = "", seconds: float = 2.0) -> Any:
        """Run `function`, which needs about `seconds`, and write its row; returns its figures, {} if there are none."""
        begun = time.monotonic()
        if self.seconds_left < seconds:
            result, state = Result(f"skipped: {seconds:.0f} s do not fit into the phase's time"), "skipped"
        else:
            try:
                result, state = function(), "done"
            except Exception as error:
                traceback.print_exc()
                lines = str(error).splitlines() or [""]
                result, state = Result(f"failed: {type(error).__name__}: {lines[0][:200]}", False), "failed"
        spent = round(time.monotonic() - begun, 2)
        self.forget()
        row = {"name": name, "goal": goal, "state": state, "seconds": spent}
        with open(self.work / "rows.jsonl", "a", encoding="utf8") as file:
            file.write(json.dumps(row | asdict(result)) + "\n")
        print(f"{name}: {result.text} ({row['seconds']} s)", flush=True)
        return result.figures

    def forget(self) -> None:
        """Free an item's memory and compiled code, so that the next one neither misses nor inherits anything."""
        gc.collect()
        if self.on_gpu:
            torch.compiler.reset()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    # -- time and memory

    def finished(self) -> float:
        """The time when the device has done all its work."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def milliseconds(self, *steps: Callable[[], Any], repeats: int = 10) -> list[float]:
        """The median time of each step; they take turns after a warm-up of two rounds."""
        repeats = 2 if self.small else repeats
        times: list[list[float]] = [[] for _ in steps]
        for number in range(2 + repeats):
            for step, spent in zip(steps, times, strict=True):
                begun = self.finished()
                step()
                if number >= 2:
                    spent.append(1e3 * (self.finished() - begun))
        return [statistics.median(spent) for spent in times]

    def peak_mib(self, step: Callable[[], Any]) -> float | None:
        """Device memory that a warm step allocates beyond what is there before it; None on a CPU."""
        if not self.on_gpu:
            return None
        step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    # -- training

    def pipeline(self, *keys: str) -> Pipeline:
        """The default configuration on this device, with `train.` keys changed; trackers and checkpoints are off."""
        quiet = ["log.tensorboard=false", "optimizer.warmup_samples=0", f"runtime.device={self.device.type}"]
        return load_pipeline(None, [f"train.{key}" for key in (*quiet, *keys)])

    def train_state(self, settings: Train, vocabulary: int) -> TrainState:
        """A new model with its optimizer; the same for the same settings. Labels weigh between 1 and 10."""
        return make_train_state(settings, 1 + 9 * torch.linspace(0, 1, vocabulary), self.world)

    def run_steps(
        self, train_state: TrainState, settings: Train, batches: Iterable[Any], inputs: Any, steps: int
    ) -> list[float]:
        """Steps of the project's loop, without checkpoints; returns their losses."""
        with tempfile.TemporaryDirectory(dir=self.work) as run:
            metrics = Metrics(
                Path(run),
                self.world,
                settings,
                steps=steps,
                first_step=0,
                skipped=(0, 0),
                speed=Speed(1, None),
                trackers=[],
            )
            budget = Budget(steps, 1, 0)
            rest = (inputs, train_state, settings, budget, self.world, metrics)
            run_loop(batches, *rest, save=lambda _: None, stopping=lambda: False)
            metrics.close()
            lines = (Path(run) / "metrics.jsonl").read_text(encoding="utf8").splitlines()
        return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


SMALL_VIT = (
    "{trunk: vit_tiny_patch16_224, trunk_args: {patch_size: 8, depth: 2, embed_dim: 64, num_heads: 2}, image_size: 32}"
)
"""A trunk for phases on a CPU: 16 patches, 0.1 M parameters."""
