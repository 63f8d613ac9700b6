"""metrics.jsonl, the log line, and trackers (TensorBoard, Weights & Biases), which get the same lines.

metrics.jsonl has a line for every step: step, samples, loss, lr, grad_norm (null for a loss or norm that is not finite,
with "skipped": true), and one every `train.log.every_seconds`: step, samples, samples_per_s, data_wait, eta_s, ...
Losses are copied from the device together at log time, so that no step waits for them. A checkpoint is written after
the losses before it; on resume, lines beyond the checkpoint are removed and written again.
"""

import json
import math
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from labels.settings import Log, Train
from labels.storage import UserError, disk_errors, fingerprint, write_whole
from train.distributed import World

STABLE = "lower train.optimizer.lr, lengthen train.optimizer.warmup_samples, set train.optimizer.clip_norm, or use bf16"


@dataclass(frozen=True)
class Speed:
    """`flops` of a sample; `peak` FLOP/s of one device, None if it is not known."""

    flops: int
    peak: float | None

    def utilisation(self, samples_per_s: float) -> float | None:
        """MFU of one device: FLOP/s that the model needs, by the peak; recomputed operations count once."""
        return None if self.peak is None else self.flops * samples_per_s / self.peak


class Metrics:
    """Collects the values of every step on all ranks, and writes them on the first.

    `steps` are those of the whole run, `first_step` is where this process starts, `skipped` counts the steps skipped
    before it, in all and in a row. `skipped` and `skipped_in_a_row` count all steps flushed so far.
    """

    def __init__(
        self,
        run: Path,
        world: World,
        settings: Train,
        *,
        steps: int,
        first_step: int,
        skipped: tuple[int, int],
        speed: Speed,
        trackers: list["Tracker"],
    ) -> None:
        self._world, self._settings, self._steps, self._step, self._speed = world, settings, steps, first_step, speed
        self.skipped, self.skipped_in_a_row = skipped
        self._pending: list[tuple[Tensor, float]] = []
        self._flushed, self._flushed_step, self._waited, self._bad_images = time.monotonic(), first_step, 0.0, 0
        self._trackers, self._file = trackers, None
        if world.is_first:
            path = run / "metrics.jsonl"
            _drop_lines_after(path, first_step)
            self._file = open(path, "a", encoding="utf8")  # noqa: SIM115  (closed by close)

    def record(self, loss: Tensor, norm: Tensor, skipped: Tensor, lr: float, waited_s: float, bad_images: int) -> None:
        """Keep one step's values; loss, gradient norm and `skipped` (1.0 or 0.0) are scalars on the device."""
        self._pending.append((torch.stack([loss.double(), norm.double(), skipped.double()]), lr))
        self._waited += waited_s
        self._bad_images += bad_images

    @property
    def seconds_since_flush(self) -> float:
        return time.monotonic() - self._flushed

    def flush(self, durable: bool = False) -> None:
        """Write what was recorded; `durable` waits until it is on the disk. All ranks call it at the same step.

        UserError if too many steps in a row were skipped.
        """
        if not self._pending:
            return
        rows = zip(torch.stack([values for values, _ in self._pending]).tolist(), self._pending, strict=True)
        lines = [self._step_line(loss, norm, skipped, lr) for (loss, norm, skipped), (_, lr) in rows]
        self._pending.clear()
        throughput = self._throughput()
        self._write([*lines, throughput], durable)
        limit = self._settings.runtime.max_skipped_steps
        if self.skipped_in_a_row >= limit:
            raise UserError(
                f"the last {self.skipped_in_a_row} steps, up to step {self._step}, were skipped: their loss or "
                "gradient is not finite",
                allowed=f"fewer than train.runtime.max_skipped_steps = {limit} in a row",
                fix=STABLE,
            )
        if self._world.is_first:
            print(self._log_line(lines[-1], throughput), flush=True)

    def note(self, **values: float) -> None:
        """Write and print values of another kind than a step's; all ranks call it, right after `flush`."""
        line = {"step": self._step, "samples": self._step * self._settings.batch_size, **values}
        self._write([line], durable=False)
        if self._world.is_first:
            shown = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())
            print(f"step {self._step}/{self._steps}  {shown}", flush=True)
        self._flushed = time.monotonic()  # samples/s are those of training

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()
        if self._file:
            self._file.close()

    def _step_line(self, loss: float, norm: float, skipped: float, lr: float) -> dict[str, Any]:
        self._step += 1
        line = {
            "step": self._step,
            "samples": self._step * self._settings.batch_size,
            "loss": loss if math.isfinite(loss) else None,
            "lr": lr,
            "grad_norm": norm if math.isfinite(norm) else None,
        }
        if skipped:
            line["skipped"] = True
        self.skipped += bool(skipped)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        return line

    def _throughput(self) -> dict[str, Any]:
        now, done = time.monotonic(), (self._step - self._flushed_step) * self._settings.batch_size
        seconds, size = max(now - self._flushed, 1e-9), self._world.size
        rate = max(done / seconds, 1e-9)
        bad_images, waited = self._world.total(self._bad_images, self._waited)
        line = {
            "step": self._step,
            "samples": self._step * self._settings.batch_size,
            "samples_per_s": rate,
            "samples_per_s_per_device": rate / size,
            "data_wait": waited / size / seconds,
            "mfu": self._speed.utilisation(rate / size),
            "memory_gib": peak_memory_gib(self._world.device),
            "skipped_steps": self.skipped,
            "bad_images": round(bad_images),
            "eta_s": (self._steps - self._step) * self._settings.batch_size / rate,
        }
        self._flushed, self._flushed_step, self._waited = now, self._step, 0.0
        return {name: value for name, value in line.items() if value is not None}

    def _write(self, lines: list[dict[str, Any]], durable: bool) -> None:
        if self._file:
            with disk_errors(Path(self._file.name)):
                self._file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
                self._file.flush()
                if durable:
                    os.fsync(self._file.fileno())
        for tracker in self._trackers:
            for line in lines:
                tracker.add(line)

    def _log_line(self, last: dict[str, Any], throughput: dict[str, Any]) -> str:
        loss = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
        fields = [
            f"step {self._step}/{self._steps}",
            f"samples {throughput['samples']:,}",
            f"loss {loss}",
            f"lr {last['lr']:.2e}",
            f"{throughput['samples_per_s']:,.0f} samples/s",
            f"{throughput['samples_per_s_per_device']:,.0f} per device",
            f"data wait {throughput['data_wait']:.1%}",
            *([f"MFU {throughput['mfu']:.1%}"] if "mfu" in throughput else []),
            f"memory {throughput['memory_gib']:.1f} GiB",
            *([f"skipped {self.skipped}"] if self.skipped else []),
            f"ETA {throughput['eta_s']:,.0f} s",
        ]
        return "  ".join(fields)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in use: on a GPU, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """All lines of metrics.jsonl, and the numbers of the damaged ones, from 1. The last line may be cut, in a run that
    is writing or was killed.
    """
    texts, lines, damaged = path.read_bytes().split(b"\n"), [], []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(_whole_line(text))
        except (ValueError, RecursionError):
            if number < len(texts):
                damaged.append(number)
    return lines, damaged


def _whole_line(text: bytes) -> dict[str, Any]:
    """ValueError unless it is a mapping of finite numbers with step and samples, as `Metrics` writes it."""
    line = json.loads(text.decode("utf8"))
    if not isinstance(line, dict) or not {"step", "samples"} <= line.keys():
        raise ValueError("no line of metrics")
    for name, value in line.items():
        if value is None and name in ("loss", "grad_norm"):
            continue
        if not isinstance(value, int | float) or not math.isfinite(value) or (name == "samples_per_s" and value <= 0):
            raise ValueError(f"{name} is {value!r}")
    return line


def _drop_lines_after(path: Path, step: int) -> None:
    """Remove lines beyond the checkpoint, which will be written again, a line cut by a kill, and damaged lines."""
    if not path.is_file():
        return
    lines, damaged = read_metrics(path)
    if damaged:
        print(f"{path}: damaged lines are removed: {', '.join(map(str, damaged))}", flush=True)
    kept = "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step)
    write_whole(path, lambda partial: partial.write_text(kept, encoding="utf8"))


# -- trackers


class Tracker(Protocol):
    """Takes lines of metrics: JSON values by name, with `step`."""

    def add(self, line: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def make_trackers(run: Path, log: Log, first_step: int, config: dict[str, Any]) -> list[Tracker]:
    """The trackers of `train.log`. TensorBoard hides what an interrupted run wrote beyond `first_step`; W&B shows the
    resolved `config`. UserError if one is not installed.
    """
    trackers: list[Tracker] = []
    if log.tensorboard:
        trackers.append(_TensorBoard(run, first_step))
    if log.wandb:
        trackers.append(_WeightsAndBiases(run, log.wandb, config))
    return trackers


class _TensorBoard:
    def __init__(self, run: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import
        except ImportError as error:
            raise UserError(
                f"train.log.tensorboard is true, but tensorboard cannot be imported: {error}",
                allowed="false",
                fix="pip install tensorboard, or --set train.log.tensorboard=false",
            ) from None
        self._writer = SummaryWriter(str(run), purge_step=first_step + 1)  # hides that step too

    def add(self, line: dict[str, Any]) -> None:
        for name, value in _numbers(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, run: Path, project: str, config: dict[str, Any]) -> None:
        try:
            import wandb  # type: ignore[import-not-found]
        except ImportError:
            raise UserError(
                f"train.log.wandb is {project!r}, but wandb is not installed",
                allowed="null",
                fix="pip install 'superclass-lean[wandb]', or --set train.log.wandb=null",
            ) from None
        # The same name for every part of a run, so that a resumed run continues its chart.
        name = fingerprint(str(run.resolve()))
        self._run = wandb.init(project=project, name=run.name, id=name, resume="allow", dir=str(run), config=config)

    def add(self, line: dict[str, Any]) -> None:
        self._run.log(_numbers(line), step=line["step"])

    def close(self) -> None:
        self._run.finish()


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name not in ("step", "samples") and value is not None}
