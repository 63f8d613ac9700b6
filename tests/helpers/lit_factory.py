"""What tests of two towers share: small runs of all three methods on one label dataset, and a data set of classes."""

from pathlib import Path
from typing import Any

import pytest

from image_folders import write_folders
from labels.config import load_pipeline
from labels.storage import UserError
from train.clip import train_clip
from train.data.open import Chosen
from train.encoders.encoder import EncoderSpec
from train.evals.data.sets import DataSet, load_pair
from train.evals.lit import train_lit
from train.trainer import train_run
from trainer_factory import small_config, small_out

SHORT = [
    "train.samples=160",
    "text_tower={embed_dim: 8, width: 16, heads: 2, layers: 1, context: 8}",
    "train.optimizer.warmup_samples=0",
]


class Runs:
    """A run of classification, one of CLIP, and text towers for both trunks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, small_out(folder)
        self.config = small_config(folder)
        self.pipeline = load_pipeline(self.config, SHORT)
        self.chosen = Chosen([str(self.out)])
        assert train_run(self.chosen, folder / "run", self.pipeline)
        assert train_clip(self.chosen, folder / "clip", self.pipeline)
        assert self.lit(f"run:{folder / 'run'}", "lit")

    def lit(self, spec: str, name: str, weights: str | None = None, *overrides: str) -> bool:
        return train_lit(
            EncoderSpec(spec, weights),
            self.chosen,
            self.folder / name,
            load_pipeline(self.config, [*SHORT, *overrides]),
        )


def refused(call: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


def three_classes(folder: Path) -> DataSet:
    """Two images of each class to train on, three to test."""
    write_folders(folder / "train", {"red_bird": 2, "the_dog": 2, "sun": 2})
    return load_pair(
        folder / "train", write_folders(folder / "test", {"red_bird": 3, "the_dog": 3, "sun": 3}, start=40)
    )
