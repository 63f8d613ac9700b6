"""Metrics in other forms than metrics.jsonl: TensorBoard's files, and W&B if it is not installed."""

import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from labels.storage import UserError
from loop_factory import settings
from train.metrics import make_trackers


def test_missing_wandb_is_an_error_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what an import of a package that is not there finds
    with pytest.raises(UserError) as caught:
        make_trackers(tmp_path, settings("log.wandb=my-project").log, 0, {})
    assert "train.log.wandb is 'my-project', but wandb is not installed" in str(caught.value)
    assert "pip install 'superclass-lean[wandb]', or --set train.log.wandb=null" in str(caught.value)


def test_missing_tensorboard_is_an_error_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError) as caught:
        make_trackers(tmp_path, settings("log.tensorboard=true").log, 0, {})
    assert "train.log.tensorboard is true, but tensorboard cannot be imported" in str(caught.value)
    assert "fix: pip install tensorboard, or --set train.log.tensorboard=false" in str(caught.value)


def test_tensorboard_hides_what_an_interrupted_run_wrote_beyond_its_checkpoint(tmp_path: Path) -> None:
    log = settings("log.tensorboard=true").log
    for first, losses in ((0, [4.0, 3.0, 9.0]), (2, [2.0])):
        (tracker,) = make_trackers(tmp_path, log, first, {})
        for step, loss in enumerate(losses, start=first + 1):
            tracker.add({"step": step, "samples": 16 * step, "loss": loss, "mfu": None})
        tracker.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 4.0), (2, 3.0), (3, 2.0)]
