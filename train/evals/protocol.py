"""What an evaluator is: from one encoder and one data set it gives `Score`s, one for each seed and variant.

Evaluators are the files of train/evals/kinds, found by name; measure.py runs them. N samples, C classes.
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


def markdown_line(cells: Sequence[str]) -> str:
    """A line of a Markdown table; a cell's line breaks are spaces, and its `|` is escaped."""
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |\n"


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
    """The metrics of one seed of one variant."""

    variant: str  # its name in tables, e.g. `10-shot`
    seed: int
    metrics: dict[str, float | None]  # shares of 1 but for `cider`; None: does not apply; the first is the main one
    detail: dict[str, Any] = field(default_factory=dict)  # JSON values: what was chosen, and how the solver ended
    split: np.ndarray | None = None  # rows of the training part that were drawn, in order; None: all of it was used
    trials: int | None = None  # what the metrics are shares of, if not the test part's images
    standard_error: float | None = None  # from the size of the test part, of a metric that is no share
    # bool, image by image, whether the first guess is right; None: does not apply
    correct: np.ndarray | None = field(default=None, compare=False)


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
    """The folder of checkpoints of a model that a protocol trains: in the cache, to resume; or else temporary."""
    if extract.cache is not None:
        yield extract.cache / name
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def top_k(logits: Tensor, y: Tensor, k: int) -> float:
    """The share of rows whose class y [N] is among the k largest of logits [N, C]."""
    return float((logits.topk(k, dim=1).indices == y[:, None]).any(1).double().mean())


def hits(logits: Tensor, y: Tensor) -> np.ndarray:
    """Whether the largest of logits [N, C] is that of the class y [N]: bool [N], of which top1 is the mean."""
    return (logits.topk(1, dim=1).indices[:, 0] == y).cpu().numpy()


def accuracies(logits: Tensor, y: Tensor) -> dict[str, float | None]:
    """top1, and top5 if there are more than 5 classes, of logits [N, C] for the classes y [N]."""
    return {"top1": top_k(logits, y, 1), "top5": top_k(logits, y, 5) if logits.shape[1] > 5 else None}


def protocol_names() -> list[str]:
    """All evaluators, in alphabetical order; none of them is imported."""
    return names_in(EVALUATORS)


def load_protocol(name: str) -> Evaluation:
    """The evaluator of one of these names."""
    return import_module(f"{EVALUATORS}.{name}").EVALUATION
