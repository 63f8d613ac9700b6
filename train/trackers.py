"""Where metrics go besides metrics.jsonl: TensorBoard's event files, Weights & Biases. Both take the same lines."""

from pathlib import Path
from typing import Any, Protocol

from labels.errors import UserError
from labels.settings import Log
from labels.storage import fingerprint


class Tracker(Protocol):
    """Takes lines of metrics: JSON values by name, with `step`."""

    def add(self, line: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def make_trackers(run: Path, log: Log, first_step: int, config: dict[str, Any]) -> list[Tracker]:
    """The trackers that `train.log` asks for.

    Args:
        run: the run's folder.
        log: `train.log`.
        first_step: what an interrupted run wrote beyond it is hidden.
        config: the resolved configuration, shown by W&B.

    Raises:
        UserError: W&B is asked for and not installed.
    """
    trackers: list[Tracker] = []
    if log.tensorboard:
        trackers.append(_TensorBoard(run, first_step))
    if log.wandb:
        trackers.append(_WeightsAndBiases(run, log.wandb, config))
    return trackers


class _TensorBoard:
    def __init__(self, run: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second, and may be switched off

        self._writer = SummaryWriter(str(run), purge_step=first_step + 1)  # the step that is named is hidden too

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
                allowed="null, where wandb is not",
                mend="pip install 'superclass-lean[wandb]', or --set train.log.wandb=null",
            ) from None
        # The same name for every part of a run, so that a resumed one goes on in the same chart.
        name = fingerprint(str(run.resolve()))
        self._run = wandb.init(project=project, name=run.name, id=name, resume="allow", dir=str(run), config=config)

    def add(self, line: dict[str, Any]) -> None:
        self._run.log(_numbers(line), step=line["step"])

    def close(self) -> None:
        self._run.finish()


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name not in ("step", "samples") and value is not None}
