"""What a run trains on its set: the one thing in which `train run`, `train clip` and `train lit` differ."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from labels.rows import Column
from labels.settings import Train
from train.betons import BetonSet
from train.costs import Costs
from train.distributed import World
from train.images import ImageInput
from train.loop import Inputs, TrainState

SUPERCLASS = "superclass"


@dataclass(frozen=True)
class Method:
    """One way of pre-training.

    Attributes:
        name: as state.json and data.json keep it.
        command: of `train`, for messages.
        column: what the loader's rows are of.
        build: model, optimiser and the rest, for the settings and the set, on a rank.
        costs: of that model.
        inputs: makes the model's arguments from a batch, by way of the images'.
        kept: what beside the section `train` has to stay the same from the first to the last step; JSON values.
        facts: for data.json.
    """

    name: str
    command: str
    column: Column
    build: Callable[[Train, BetonSet, World], TrainState]
    costs: Callable[[Train, BetonSet], Costs]
    inputs: Callable[[ImageInput, BetonSet], Inputs] = lambda images, _: images
    kept: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
