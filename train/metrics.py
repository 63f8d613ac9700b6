"""metrics.jsonl, TensorBoard and the log line.

metrics.jsonl has a line for every step ({"step", "samples", "loss", "lr"}) and, every N seconds, one with
throughput ({"step", "samples", "samples_per_s", "data_wait", "eta_s", ...}). Losses are copied from the device only
then, so that no step waits for them.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from labels.errors import UserError
from labels.files import write_whole
from train.distributed import World


class Metrics:
    """Collects losses of all ranks, writes them on the first one.

    Args:
        run: the run's folder.
        world: this process among all.
        steps: of the whole run.
        batch_size: samples a step, over all ranks.
        first_step: where this process begins; later lines of an interrupted run are dropped.
        tensorboard: whether to write its event files.
    """

    def __init__(self, run: Path, world: World, *, steps: int, batch_size: int, first_step: int, tensorboard: bool) -> None:
        self._world, self._steps, self._batch_size, self._step = world, steps, batch_size, first_step
        self._pending: list[tuple[torch.Tensor, float]] = []
        self._mark, self._marked_step, self._waited, self.bad_images = time.monotonic(), first_step, 0.0, 0
        self._file, self._board = None, None
        if world.is_first:
            path = run / "metrics.jsonl"
            _drop_lines_after(path, first_step)
            self._file = open(path, "a", encoding="utf8")  # noqa: SIM115  (closed by close)
            self._board = SummaryWriter(str(run), purge_step=first_step) if tensorboard else None

    def record(self, loss: torch.Tensor, lr: float, waited_s: float, bad: int) -> None:
        """One step: its loss on this rank (a scalar left on the device), rate, seconds waited for data, bad images."""
        self._pending.append((loss.detach(), lr))
        self._waited += waited_s
        self.bad_images += bad

    @property
    def seconds_since_flush(self) -> float:
        return time.monotonic() - self._mark

    def flush(self) -> None:
        """Write what has been recorded. All ranks call it at the same step.

        Raises:
            UserError: a loss is not finite.
        """
        if not self._pending:
            return
        losses = self._world.mean(torch.stack([loss for loss, _ in self._pending]).float()).tolist()
        lines: list[dict[str, Any]] = []
        for loss, (_, lr) in zip(losses, self._pending, strict=True):
            self._step += 1
            lines.append({"step": self._step, "samples": self._step * self._batch_size, "loss": loss, "lr": lr})
        self._pending.clear()
        lines.append(self._throughput())
        self._write(lines)
        bad = next((line for line in lines[:-1] if not torch.isfinite(torch.tensor(line["loss"]))), None)
        if bad:
            raise UserError(
                f"the loss of step {bad['step']} is {bad['loss']}",
                allowed="finite numbers",
                mend="lower train.optimizer.lr or lengthen train.optimizer.warmup_samples; the last checkpoint was saved before this step",
            )
        if self._world.is_first:
            print(self._line(losses[-1], lines[-2]["lr"], lines[-1]), flush=True)

    def close(self) -> None:
        """End the files."""
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()

    def _throughput(self) -> dict[str, Any]:
        now, done = time.monotonic(), (self._step - self._marked_step) * self._batch_size
        seconds = max(now - self._mark, 1e-9)
        rate = done / seconds
        line = {
            "step": self._step, "samples": self._step * self._batch_size, "samples_per_s": rate,
            "samples_per_s_per_device": rate / self._world.size, "data_wait": self._waited / seconds,
            "bad_images": self.bad_images, "eta_s": (self._steps - self._step) * self._batch_size / max(rate, 1e-9),
        }  # fmt: skip
        self._mark, self._marked_step, self._waited = now, self._step, 0.0
        return line

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if self._file:
            self._file.write("".join(json.dumps(line) + "\n" for line in lines))
            self._file.flush()
        if self._board:
            for line in lines:
                for name in line.keys() - {"step", "samples"}:
                    self._board.add_scalar(name, line[name], line["step"])

    def _line(self, loss: float, lr: float, throughput: dict[str, Any]) -> str:
        return (
            f"step {self._step}/{self._steps}  samples {throughput['samples']:,}  loss {loss:.4f}  lr {lr:.2e}  "
            f"{throughput['samples_per_s']:,.0f} samples/s  {throughput['samples_per_s_per_device']:,.0f} per device  "
            f"data wait {throughput['data_wait']:.1%}  ETA {throughput['eta_s']:,.0f} s"
        )


def _drop_lines_after(path: Path, step: int) -> None:
    """Lines beyond the checkpoint will be written anew; a line cut by a kill is dropped with them."""
    if not path.is_file():
        return
    kept = []
    for text in path.read_text(encoding="utf8").splitlines(keepends=True):
        try:
            line = json.loads(text)
        except ValueError:
            break
        if line["step"] > step:
            break
        kept.append(text)
    write_whole(path, lambda partial: partial.write_text("".join(kept), encoding="utf8"))
    os.sync()
