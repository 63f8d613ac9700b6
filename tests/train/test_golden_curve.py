"""The demo's configuration, cut short, on drawings made in code: the losses are those of golden_curve.json.

After a change that is meant to change them: `python tests/train/test_golden_curve.py` writes the file again.
"""

import json
import tempfile
from pathlib import Path

import pytest

from labels.config import load_pipeline
from train.trainer import train_run
from trainer_factory import losses, small_out

GOLDEN = Path(__file__).with_name("golden_curve.json")
DEMO = Path(__file__).parents[2] / "examples" / "openclipart" / "demo.yaml"
CUT = [
    "samples=128",
    "batch_size=16",
    "optimizer.warmup_samples=32",
    "runtime={device: cpu, precision: fp32, threads: 1}",
]


def curve(folder: Path) -> list[float]:
    """Eight steps of sixteen drawings, from JPEG and caption to loss."""
    assert train_run(small_out(folder), folder / "run", load_pipeline(DEMO, [f"train.{key}" for key in CUT]))
    return [loss for _, loss, _ in losses(folder / "run")]


def test_the_demos_losses_are_the_golden_ones(tmp_path: Path) -> None:
    found, golden = curve(tmp_path), json.loads(GOLDEN.read_text())
    # Another CPU adds in another order; a wrong crop, weight or rate moves the second digit.
    assert found == pytest.approx(golden, rel=1e-3)
    assert found[-1] < max(found) - 0.3


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        GOLDEN.write_text(json.dumps([round(loss, 6) for loss in curve(Path(name))], indent=1) + "\n")
