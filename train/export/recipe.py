"""What an encoder's card says of its training and its worth: the run's configuration and data, the results measured on these weights."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from labels.errors import UserError
from train.evals.encoders.encoder import Encoder
from train.report.results import Row, read_results

_SECTIONS = ("labels", "train")  # of config.yaml: what decides what is learnt; with two towers `text_tower` too
_PLACES = ("beton", "labels", "sources")  # paths of the machine that trained
_FOLDERS = re.compile(r"(^|:)/.*/")


class Training(NamedTuple):
    """`recipe`: what of the run's config.yaml decides what it learnt; `data`: data.json without paths; both empty where there is none."""

    recipe: dict[str, Any]
    data: dict[str, Any]


def training_of(encoder: Encoder) -> Training:
    """How a run was trained; nothing for other encoders."""
    if encoder.checkpoint is None:
        return Training({}, {})
    run = encoder.checkpoint.parent.parent
    recipe = yaml.safe_load((run / "config.yaml").read_text(encoding="utf8"))
    data = json.loads((run / "data.json").read_bytes()) if (run / "data.json").is_file() else {}
    sections = [*_SECTIONS, *(["text_tower"] if encoder.text is not None else [])]
    return Training(
        _without_folders({key: recipe[key] for key in sections if key in recipe}),
        _without_folders({key: value for key, value in data.items() if key not in _PLACES}),
    )


def _without_folders(value: Any) -> Any:
    """A JSON value whose strings name files and folders by their last part alone: cards are published."""
    if isinstance(value, dict):
        return {key: _without_folders(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_folders(part) for part in value]
    return _FOLDERS.sub(r"\1", value) if isinstance(value, str) else value


def results_of(encoder: Encoder, places: Sequence[Path]) -> list[Row]:
    """Results that were measured on these very weights.

    Args:
        places: result JSONs, or folders of them; none: the run's own folder is searched, if the encoder is a run.

    Raises:
        UserError: none in the places that were named is of these weights, or one of them cannot be read.
    """
    run = encoder.checkpoint.parent.parent if encoder.checkpoint else None
    searched = list(places) or ([run] if run else [])
    rows = read_results(searched, may_be_none=not places)
    weights, text_tower = encoder.describe()["weights"], encoder.description.get("text_tower")
    own = [row for row in rows if row.weights == weights and row.text_tower in (None, text_tower)]
    if places and not own:
        raise UserError(
            f"no result in {', '.join(map(str, places))} is of the weights of {encoder.name!r} (fingerprint {weights})",
            allowed=f"results of {', '.join(sorted({row.encoder for row in rows if row.weights == weights})) or 'this checkpoint'}",
            mend="measure this checkpoint (train probe, fewshot, knn, eval), or leave --results out",
        )
    return own
