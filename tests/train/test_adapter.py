"""Training next to frozen parts: a stopped and resumed run is the same bit for bit; checkpoints hold only what is
trained.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from labels.storage import UserError
from loop_factory import Made, settings
from train.distributed import World
from train.trainer import train_model

pytestmark = pytest.mark.usefixtures("one_thread")
HERE = World(0, 1, torch.device("cpu"))


class Half(nn.Module):
    """A trained layer before a frozen one that is no child."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self._held = (nn.Linear(4, 3).requires_grad_(False),)
        self.mapper = nn.Linear(8, 4)

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self._held[0](self.mapper(features)), targets)


def batches(first: int, steps: int) -> Iterator[Made]:
    for step in range(first, steps):
        dice = torch.Generator().manual_seed(step)
        yield Made(torch.randn(16, 8, generator=dice), torch.randint(3, (16,), generator=dice))


def go(run: Path, stop_after: int | None = None, identity: str = "one") -> tuple[bool, Half]:
    model, left = Half(), [stop_after or 0]

    def stopping() -> bool:
        left[0] -= 1
        return stop_after is not None and left[0] == 0

    ended = train_model(
        model,
        batches,
        lambda batch: (batch.images, batch.label_ids),
        settings("optimizer.clip_norm=1.0"),
        run,
        identity,
        HERE,
        stopping,
    )
    return ended, model


def losses(run: Path) -> list[float]:
    return [
        line["loss"]
        for text in (run / "metrics.jsonl").read_text().splitlines()
        if "loss" in (line := json.loads(text))
    ]


def test_stopped_and_resumed(tmp_path: Path) -> None:
    ended, whole = go(tmp_path / "whole")
    assert (
        ended
        and len(losses(tmp_path / "whole")) == 6
        and losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0]
    )
    ended, _ = go(tmp_path / "parts", stop_after=2)
    assert not ended and len(losses(tmp_path / "parts")) == 2
    ended, again = go(tmp_path / "parts")
    assert ended and losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert torch.equal(again.mapper.weight, whole.mapper.weight)
    # Finished: the weights are read, nothing is trained.
    ended, read = go(tmp_path / "whole")
    assert ended and torch.equal(read.mapper.weight, whole.mapper.weight)
    (folder,) = [path for path in (tmp_path / "whole").glob("checkpoints/*") if path.name.endswith("96")]
    assert set(load_file(folder / "mapper.safetensors")) == {"weight", "bias"}
    assert sorted(path.name for path in folder.iterdir()) == [
        "mapper.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    go(tmp_path)
    with pytest.raises(
        UserError, match="begun with other data, weights or settings: fingerprint one, now two"
    ) as caught:
        go(tmp_path, identity="two")
    assert "or another --out" in str(caught.value)
