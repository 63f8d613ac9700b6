"""All protocols by name: the files of train/evals/protocols/kinds."""

from importlib import import_module

from labels.kinds import EVALUATORS, names_in
from train.evals.protocol import Evaluation


def protocol_names() -> list[str]:
    """In alphabetical order; none of them is imported."""
    return names_in(EVALUATORS)


def load_protocol(name: str) -> Evaluation:
    """The protocol of one of these names."""
    return import_module(f"{EVALUATORS}.{name}").EVALUATION
