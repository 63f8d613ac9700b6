"""`train export`: an encoder in another library's format, with its model card.

    EncoderSpec -> load_encoder -> Format.write -> check (loaded back by its own library) -> card -> OUT, export.json

Everything is written under a temporary name, which is renamed only after the check. The card (README.md) describes
what the export is, how it is loaded, which pool gives the encoder's features, how the run was trained and what was
measured on these very weights. A folder without export.json is never replaced.
"""

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
from train.evals.measure import Row, read_results, readout_of
from train.evals.protocol import format_metric, markdown_line
from train.export.format import ONNX, TIMM, TOLERANCE, Format, Written, check, check_replaceable, share_like
from train.export.hf import HF
from train.export.open_clip import OPEN_CLIP

FORMATS: dict[str, Format] = {form.name: form for form in (TIMM, HF, OPEN_CLIP, ONNX)}
MARK = "export.json"


def export_encoder(spec: EncoderSpec, format_name: str, out: Path, results: Sequence[Path] = ()) -> dict[str, Any]:
    """Write the encoder into the folder `out`, in place of an earlier export there.

    Args:
        spec: any encoder that the format can hold.
        format_name: a key of FORMATS.
        out: new, empty, or an earlier export with nothing added.
        results: result JSONs for the card, or folders of them; none: those in the run's folder.

    Returns:
        The content of export.json: format, holds, difference, encoder, files, version.

    Raises:
        UserError: `out` is something else, the format cannot hold the encoder, or what was read back differs; nothing
            is written then.
    """
    check_replaceable(out, MARK, "train export")
    form = FORMATS[format_name]
    if spec.spec.startswith("pixels:"):
        raise UserError(f"the encoder {spec.spec!r} has no weights to export", allowed="any other kind of encoder")
    encoder = load_encoder(spec)
    rows, training = _measured_rows(encoder, results), _training_of(encoder)
    out = out.resolve()
    with whole_folder(out) as folder:
        written = form.write(encoder, folder)
        difference = check(encoder, written, folder)
        card = _card(out.name, encoder, form, written, difference, training, rows)
        (folder / "README.md").write_text(card, encoding="utf8")
        description = encoder.describe()
        content = {
            "format": form.name,
            "holds": written.holds,
            "difference": difference,
            "encoder": {**description, "checkpoint": Path(description["checkpoint"]).name},  # no paths of this machine
            "files": sorted(path.name for path in folder.iterdir()),
            "version": __version__,
        }
        write_json(folder / MARK, content)
        share_like(folder / MARK)
    print(f"{out}: {written.holds}, loaded back: no feature differs by more than {difference:.1e}")
    print(written.pooling)
    return content


# -- how the encoder was trained, and what was measured on it


class _Training(NamedTuple):
    summary: str  # which command has trained what, for how many of its samples; or that this project has not
    recipe: dict[str, Any]  # the sections of the run's config.yaml that decide what it learnt; or empty
    data: dict[str, Any]  # data.json without paths; or empty


_SECTIONS = ("labels", "train")
_PATHS = ("beton", "labels", "idf", "sources")  # keys of data.json: paths of the machine that trained
_FOLDERS = re.compile(r"(^|[:`])/[^`]*/")


def _training_of(encoder: Encoder) -> _Training:
    if encoder.checkpoint is None:
        return _Training(_foreign_summary(encoder), {}, {})
    run = encoder.checkpoint.parent.parent
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf8"))
    data = json.loads((run / "data.json").read_bytes()) if (run / "data.json").is_file() else {}
    frozen = data.get("encoder")
    seen, samples = int(encoder.checkpoint.name.rpartition("-")[2]), int(config["train"]["samples"])
    summary = f"By `train {data.get('method', 'run')}`: {seen:,} of {samples:,} samples seen."
    sections = (*_SECTIONS, "text_tower") if encoder.text is not None else _SECTIONS
    recipe = {key: config[key] for key in sections if key in config}
    if data.get("label_options"):  # how the labels were built; the run does not read its own section `labels`
        recipe["labels"] = data["label_options"]
    if frozen is not None:
        summary += (
            f" It has trained a text tower and a projection. The image tower was frozen: `{frozen['spec']}` as it was, "
            f"weights' fingerprint `{frozen['fingerprint']}`; recipe and data below are not its own."
        )
        if not frozen["by_config"]:  # `model` describes another trunk
            recipe["train"] = {key: value for key, value in recipe["train"].items() if key != "model"}
    data = {key: value for key, value in data.items() if key not in _PATHS}
    return _Training(_without_folders(summary), _without_folders(recipe), _without_folders(data))


def _foreign_summary(encoder: Encoder) -> str:
    about = encoder.describe()
    name, source = f"`{about['architecture']}`", str(about["checkpoint"])
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


def _measured_rows(encoder: Encoder, paths: Sequence[Path]) -> list[Row]:
    """Results measured on these weights, in `paths` or in the run's own folder.

    Raises:
        UserError: no result in `paths` is of these weights, or one of them cannot be read.
    """
    run = encoder.checkpoint.parent.parent if encoder.checkpoint else None
    rows = read_results(list(paths) or ([run] if run else []), may_be_none=not paths)
    weights, text_tower = encoder.describe()["weights"], encoder.description.get("text_tower")
    own = [row for row in rows if row.weights == weights and row.text_tower in (None, text_tower)]
    if paths and not own:
        names = ", ".join(sorted({row.encoder for row in rows if row.weights == weights})) or "this checkpoint"
        raise UserError(
            f"no result in {', '.join(map(str, paths))} is of the weights of {encoder.name!r} (fingerprint {weights})",
            allowed=f"results of {names}",
            fix="evaluate this checkpoint (train probe, fewshot, knn, eval), or omit --results",
        )
    return own


# -- the model card: Markdown with the Hub's metadata at its head


_OPENING = """\
from PIL import Image

folder, side = {name!r}, {side}
# The image as in training and evaluation: its central square, not rounded to whole pixels as by the library's own crop
image = Image.open("photo.jpg")
image.draft(None, (2 * side, 2 * side))
if image.has_transparency_data:
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
short = min(image.size)
left, top = (image.width - short) / 2, (image.height - short) / 2
box = (left, top, left + short, top + short)
image = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC, box=box)

"""


def _card(
    name: str, encoder: Encoder, form: Format, written: Written, difference: float, training: _Training, rows: list[Row]
) -> str:
    head = {"library_name": form.library, "pipeline_tag": "image-feature-extraction", "tags": ["superclass"]}
    opening = _OPENING.format(name=name, side=encoder.images.side)
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {' '.join(name.split())}\n",
        _facts(encoder, written, difference),
        f"## Load it\n\n{written.pooling}\n\n```python\n{opening}{written.code}```\n",
        _training_section(training),
        _results_section(rows, readout_of(encoder.describe())),
    ]
    return "\n".join(parts)


def _facts(encoder: Encoder, written: Written, difference: float) -> str:
    about, side = encoder.describe(), encoder.images.side
    mean, std = (", ".join(f"{value:.8g}" for value in values) for values in encoder.images[1:])
    arguments = f" with `{about['architecture_args']}`" if about["architecture_args"] else ""
    projected = ", projected" if written.projected else ""
    lines = {
        "architecture": f"`{about['architecture']}`{arguments}",
        "checkpoint": f"`{Path(about['checkpoint']).name}`",
        "features": f"{written.projected or encoder.width}, {readout_of(about)}{projected}",
        "images": f"{side} x {side}: RGB, shorter side to {side} by antialiased bicubic resampling, centre crop",
        "normalisation": f"[0, 1], less ({mean}), by ({std})",
        "weights' fingerprint": f"`{about['weights']}`",
        "checked": f"loaded back and run on random images: no feature differs by more than {difference:.1e} "
        f"({TOLERANCE:.0e} is allowed)",
    }
    table = "| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in lines.items())
    return f"A frozen image encoder as {written.holds}, written by superclass-lean {__version__}.\n\n{table}"


def _training_section(training: _Training) -> str:
    text = f"## Training\n\n{training.summary}\n"
    if training.data:
        prints = json.dumps(training.data.get("fingerprints", {}), sort_keys=True)
        data = json.dumps(training.data, indent=1, sort_keys=True, ensure_ascii=False)
        text += f"\nData (fingerprints `{prints}`):\n\n```json\n{data}\n```\n"
    elif training.recipe:
        text += "\nThe run has no record of its data.\n"
    if training.recipe:
        recipe = yaml.safe_dump(training.recipe, sort_keys=False, allow_unicode=True)
        text += f"\nRecipe, as `pipeline.yaml` takes it:\n\n```yaml\n{recipe}```\n"
    return text


def _results_section(rows: list[Row], own_readout: str | None) -> str:
    if not rows:
        return "## Results\n\nNothing was measured on these weights yet.\n"
    lines = ["| data | protocol | metric | value | seeds |", "|---|---|---|---:|---:|"]
    for row in rows:
        # Results of the same weights, but of features that this export does not give, say so.
        readout = f" (of {row.readout})" if row.readout not in (None, own_readout) else ""
        for metric, (mean, spread) in row.metrics.items():
            if mean is not None:  # as top-5 of three classes
                deviation = f" ± {format_metric(metric, spread)}" if spread is not None else ""
                protocol, value = f"{row.variant}: {row.protocol}{readout}", format_metric(metric, mean) + deviation
                lines.append(markdown_line([row.data, protocol, metric, value, str(row.seeds or "-")]).rstrip("\n"))
    return (
        f"## Results\n\nOf the encoder's features: {own_readout}. Pixels: {TRANSFORM}; large JPEGs are first shrunk by "
        "their decoder, to twice image_size or more. Accuracies and recalls in percent; ± is the deviation over "
        "seeds.\n\n" + "\n".join(lines) + "\n"
    )
