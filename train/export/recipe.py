"""What an encoder's card says of its training and its worth: the run's configuration and data, the results measured on these weights."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from labels.errors import UserError
from train.encoders.encoder import Encoder
from train.report.results import Row, read_results

_SECTIONS = ("labels", "train")  # of config.yaml: what decides what is learnt; with two towers `text_tower` too
_PLACES = ("beton", "labels", "sources")  # paths of the machine that trained
_FOLDERS = re.compile(r"(^|[:`])/[^`]*/")


class Training(NamedTuple):
    """How an encoder came to its weights.

    Attributes:
        told: in a sentence or two: which command has trained what, for how many of its samples; or that nothing here has.
        recipe: what of the run's config.yaml decides what it learnt; empty where there is none.
        data: data.json without paths; empty likewise.
    """

    told: str
    recipe: dict[str, Any]
    data: dict[str, Any]


def training_of(encoder: Encoder) -> Training:
    """How a run was trained; of other encoders, that this project has not trained them."""
    if encoder.checkpoint is None:
        return Training(_told_of_others(encoder), {}, {})
    run = encoder.checkpoint.parent.parent
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf8"))
    data = json.loads((run / "data.json").read_bytes()) if (run / "data.json").is_file() else {}
    frozen, method = data.get("encoder"), data.get("method", "run")
    seen, wanted = int(encoder.checkpoint.name.rpartition("-")[2]), int(config["train"]["samples"])
    told = f"By `train {method}`: {seen:,} of {wanted:,} samples seen."
    if frozen is not None:
        told += (
            " It has trained a text tower and a projection. The image tower was frozen: "
            f"`{frozen['spec']}` as it was, weights' fingerprint `{frozen['fingerprint']}`; recipe and data below are not its own."
        )
    sections = [*_SECTIONS, *(["text_tower"] if encoder.text is not None else [])]
    recipe = {key: config[key] for key in sections if key in config}
    if data.get("label_options"):  # the labels' own: the configuration that a run was started with may say something else
        recipe["labels"] = data["label_options"]
    if frozen is not None and not frozen["by_config"]:
        recipe["train"] = {key: value for key, value in recipe["train"].items() if key != "model"}  # it describes no trunk
    return Training(
        _without_folders(told), _without_folders(recipe), _without_folders({key: data[key] for key in data if key not in _PLACES})
    )


def _told_of_others(encoder: Encoder) -> str:
    name, source = f"`{encoder.describe()['architecture']}`", str(encoder.describe()["checkpoint"])
    if encoder.seeded:
        return f"Not trained: {name}, its weights {source.removeprefix('none, ')}."
    return f"Not by this project: {name}, its weights from `{Path(source).name}`."


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
