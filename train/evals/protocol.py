"""What every protocol is: for one encoder and one data set it gives scores, one for each seed and variant. N samples, C
classes.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from labels.config import own_section
from labels.settings import EVALUATORS, Pipeline, Section, names_in
from train.encoders.encoder import Encoder
from train.evals.features import Extractor

_SHARES = ("top", "r@", "recall", "accuracy")  # metrics in shares of 1, by the beginning of their names


def format_metric(name: str, value: float | None) -> str:
    """A metric's value for tables: shares of 1 in percent, other metrics unchanged."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if is_share(name) else f"{value:.1f}"


def is_share(name: str) -> bool:
    """Whether a metric is a share of 1, shown in percent."""
    return name.startswith(_SHARES)


@dataclass(frozen=True)
class Score:
    """One figure's worth of work.

    Attributes:
        variant: what tables call it, e.g. `10-shot`.
        seed: what was drawn from it.
        metrics: name -> value, shares of 1 but for `cider`; None where it does not apply. The first is the main one.
        detail: JSON values: what was chosen, and how the solver ended.
        trials: what the metrics are shares of, where that is not the test part's images.
        standard_error: what the size of the test part alone leaves, of a metric that is no share.
        split: rows of the training part that were drawn, in their order; None where all of it was used.
    """

    variant: str
    seed: int
    metrics: dict[str, float | None]
    detail: dict[str, Any] = field(default_factory=dict)
    split: np.ndarray | None = None
    trials: int | None = None
    standard_error: float | None = None


class Evaluation:
    """Base of the evaluators. The test part is used for the final figure only: nothing is chosen by it."""

    name: str  # of its file, its command and its section of the configuration
    takes: Literal["classes", "captions"]  # `data` is a DataSet or a CaptionSet
    section: type[Section]  # the keys of the section, with `seeds` among them

    def settings(self, pipeline: Pipeline) -> Any:
        """Its section of the configuration, an instance of `section`."""
        return own_section(pipeline, self.name, self.section)

    def describe(self, settings: Any) -> str:
        """What it does, in words by which results can be compared."""
        raise NotImplementedError

    def check(self, data: Any, settings: Any) -> None:
        """Raise a UserError for data that it cannot be run on, before anything expensive."""

    def unfit(self, encoder: Encoder) -> str | None:
        """Why it cannot evaluate this encoder, and what would help; None if it can."""
        return None

    def scores(
        self, encoder: Encoder, data: Any, settings: Any, extract: Extractor, seeds: Sequence[int]
    ) -> list[Score]:
        """Run it. `seeds`: those of the settings, or one of them where the encoder itself is drawn from a seed."""
        raise NotImplementedError


@contextmanager
def work_folder(extract: Extractor, name: str) -> Iterator[Path]:
    """Where what a protocol trains has its checkpoints: in the cache, so that a stopped one goes on; without one,
    nowhere for long.
    """
    if extract.cache is not None:
        yield extract.cache / name
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def top_k(logits: Tensor, y: Tensor, k: int) -> float:
    """The share of rows whose class y [N] is among the k greatest of logits [N, C]."""
    return float((logits.topk(k, dim=1).indices == y[:, None]).any(1).double().mean())


def accuracies(logits: Tensor, y: Tensor) -> dict[str, float | None]:
    """top1, and top5 where there are more than 5 classes, of logits [N, C] for the classes y [N]."""
    return {"top1": top_k(logits, y, 1), "top5": top_k(logits, y, 5) if logits.shape[1] > 5 else None}


# ---- registry: All protocols by name: the files of train/evals/kinds.


def protocol_names() -> list[str]:
    """In alphabetical order; none of them is imported."""
    return names_in(EVALUATORS)


def load_protocol(name: str) -> Evaluation:
    """The protocol of one of these names."""
    return import_module(f"{EVALUATORS}.{name}").EVALUATION
