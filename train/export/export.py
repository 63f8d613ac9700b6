"""`train export`: an encoder in another library's form, checked by loading it back, with its card; whole or not there."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from labels import __version__
from labels.storage import UserError, whole_folder, write_json
from train.encoders.encoder import Encoder, EncoderSpec
from train.encoders.load import load_encoder
from train.evals.features import TRANSFORM
from train.evals.protocol import format_metric
from train.evals.results import Row, read_results, readout_of
from train.export.format import TOLERANCE, Format, Written, check, check_replaceable, share_like
from train.export.hf import HF
from train.export.onnx import ONNX
from train.export.open_clip import OPEN_CLIP
from train.export.timm import TIMM

# ---- recipe: What an encoder's card says of its training and its worth: the run's configuration and data, the results
# measured on these weights.


_SECTIONS = ("labels", "train")  # of config.yaml: what decides what is learnt; with two towers `text_tower` too
_PLACES = ("beton", "labels", "sources")  # paths of the machine that trained
_FOLDERS = re.compile(r"(^|[:`])/[^`]*/")


class Training(NamedTuple):
    """How an encoder came to its weights.

    Attributes:
        told: in a sentence or two: which command has trained what, for how many of its samples; or that nothing here
            has.
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
    if data.get(
        "label_options"
    ):  # the labels' own: the configuration that a run was started with may say something else
        recipe["labels"] = data["label_options"]
    if frozen is not None and not frozen["by_config"]:
        recipe["train"] = {
            key: value for key, value in recipe["train"].items() if key != "model"
        }  # it describes no trunk
    return Training(
        _without_folders(told),
        _without_folders(recipe),
        _without_folders({key: data[key] for key in data if key not in _PLACES}),
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
            fix="measure this checkpoint (train probe, fewshot, knn, eval), or leave --results out",
        )
    return own


# ---- card: The model card (README.md) beside an export: what it is, how it is loaded, which pool, how it was trained,
# what was measured.


_OPEN = "from PIL import Image\n\nfolder = {folder!r}\nimage = Image.open({image!r})\n\n"


def card(
    name: str,
    encoder: Encoder,
    form: Format,
    written: Written,
    difference: float,
    training: Training,
    results: Sequence[Row],
) -> str:
    """The card's text, Markdown with the Hub's metadata at its head.

    Args:
        name: of the export's folder.
        difference: largest difference of a feature between the encoder and the export, loaded back.
        training: how it came to its weights.
        results: measured on these weights.
    """
    head = {"library_name": form.library, "pipeline_tag": "image-feature-extraction", "tags": ["superclass"]}
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {name}\n",
        _facts(encoder, written, difference),
        f"## Load it\n\n{written.pooling}\n\n```python\n{_OPEN.format(folder=name, image='photo.jpg')}{written.code}```\n",
        _training(training),
        _results(results, encoder),
    ]
    return "\n".join(parts)


def _facts(encoder: Encoder, written: Written, difference: float) -> str:
    about, form = encoder.describe(), encoder.images
    mean, std = (", ".join(f"{value:.8g}" for value in values) for values in (form.mean, form.std))
    lines = {
        "architecture": f"`{about['architecture']}`"
        + (f" with `{about['architecture_args']}`" if about["architecture_args"] else ""),
        "checkpoint": f"`{Path(about['checkpoint']).name}`",
        "features": f"{written.projected or encoder.width}, {readout_of(about)}"
        + (", projected" if written.projected else ""),
        "images": f"{form.side} x {form.side}: RGB, shorter side to {form.side} by antialiased bicubic resampling, centre crop",
        "normalisation": f"[0, 1], less ({mean}), by ({std})",
        "weights' fingerprint": f"`{about['weights']}`",
        "checked": f"loaded back and run on random images: no feature differs by more than {difference:.1e} ({TOLERANCE:.0e} is allowed)",
    }
    rows = "".join(f"| {key} | {value} |\n" for key, value in lines.items())
    return f"A frozen image encoder as {written.holds}, written by superclass-lean {__version__}.\n\n| | |\n|---|---|\n{rows}"


def _training(training: Training) -> str:
    text = f"## Training\n\n{training.told}\n"
    if training.data:
        prints = json.dumps(training.data.get("fingerprints", {}), sort_keys=True)
        data = json.dumps(training.data, indent=1, sort_keys=True, ensure_ascii=False)
        text += f"\nData (fingerprints `{prints}`):\n\n```json\n{data}\n```\n"
    elif training.recipe:
        text += "\nThe run says nothing of its data.\n"
    if training.recipe:
        recipe = yaml.safe_dump(training.recipe, sort_keys=False, allow_unicode=True)
        text += f"\nRecipe, as `pipeline.yaml` takes it:\n\n```yaml\n{recipe}```\n"
    return text


def _results(results: Sequence[Row], encoder: Encoder) -> str:
    if not results:
        return "## Results\n\nNothing was measured on these weights yet.\n"
    lines, own = (
        ["| data | protocol | metric | value | seeds |", "|---|---|---|---:|---:|"],
        readout_of(encoder.describe()),
    )
    for row in results:
        other = (
            f" (of {row.readout})" if row.readout not in (None, own) else ""
        )  # not the features that this export gives
        for metric, (mean, spread) in row.metrics.items():
            if mean is None:  # top-5 of three classes
                continue
            value = format_metric(metric, mean) + (f" ± {format_metric(metric, spread)}" if spread is not None else "")
            lines.append(
                f"| {row.data} | {row.variant}: {row.protocol}{other} | {metric} | {value} | {row.seeds or '-'} |"
            )
    return (
        f"## Results\n\nOf the encoder's features: {own}. Pixels: {TRANSFORM}; large JPEGs are first shrunk by their decoder, to "
        "twice image_size or more. Accuracies and recalls in percent; ± is the deviation over seeds.\n\n"
        + "\n".join(lines)
        + "\n"
    )


FORMATS: dict[str, Format] = {form.name: form for form in (TIMM, HF, OPEN_CLIP, ONNX)}
MARK = "export.json"
"""What a folder of ours holds: no other is ever replaced."""


def export_encoder(asked: EncoderSpec, format_name: str, out: Path, results: Sequence[Path] = ()) -> dict[str, Any]:
    """Write the encoder into the folder `out`, in place of an earlier export there.

    Args:
        asked: any encoder that the format can hold.
        format_name: a key of FORMATS.
        out: new, empty, or of an earlier export with nothing else beside it.
        results: result JSONs for the card, or folders of them; none: those in the run's folder.

    Returns:
        What export.json says: format, holds, difference, encoder, files, version.

    Raises:
        UserError: `out` is something else, the format cannot hold the encoder, or what was read back differs; nothing
            is written then.
    """
    check_replaceable(out, MARK, "train export")
    form = FORMATS[format_name]
    if asked.spec.startswith("pixels:"):
        raise UserError(f"the encoder {asked.spec!r} has no weights to export", allowed="any other kind of encoder")
    encoder = load_encoder(asked)
    rows, training = results_of(encoder, results), training_of(encoder)
    out = out.resolve()
    with whole_folder(out) as folder:
        written = form.write(encoder, folder)
        difference = check(encoder, written, folder)
        text = card(out.name, encoder, form, written, difference, training, rows)
        (folder / "README.md").write_text(text, encoding="utf8")
        said = {
            "format": form.name,
            "holds": written.holds,
            "difference": difference,
            "encoder": {
                **encoder.describe(),
                "checkpoint": Path(encoder.description["checkpoint"]).name,
            },  # no places of this machine
            "files": sorted(path.name for path in folder.iterdir()),
            "version": __version__,
        }
        write_json(folder / MARK, said)
        share_like(folder / MARK)
    print(f"{out}: {written.holds}, loaded back: no feature differs by more than {difference:.1e}")
    print(written.pooling)
    return said
