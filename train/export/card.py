"""The model card (README.md) beside an export: what it is, how it is loaded, which pool, how it was trained, what was measured."""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from labels import __version__
from train.encoders.encoder import Encoder
from train.evals.pixels import TRANSFORM
from train.evals.protocol import format_metric
from train.export.check import TOLERANCE
from train.export.format import Format, Written
from train.export.recipe import Training
from train.report.results import Row, readout_of

_OPEN = "from PIL import Image\n\nfolder = {folder!r}\nimage = Image.open({image!r})\n\n"


def card(name: str, encoder: Encoder, form: Format, written: Written, difference: float, training: Training, results: Sequence[Row]) -> str:
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
        "architecture": f"`{about['architecture']}`" + (f" with `{about['architecture_args']}`" if about["architecture_args"] else ""),
        "checkpoint": f"`{Path(about['checkpoint']).name}`",
        "features": f"{written.projected or encoder.width}, {readout_of(about)}" + (", projected" if written.projected else ""),
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
    lines, own = ["| data | protocol | metric | value | seeds |", "|---|---|---|---:|---:|"], readout_of(encoder.describe())
    for row in results:
        other = f" (of {row.readout})" if row.readout not in (None, own) else ""  # not the features that this export gives
        for metric, (mean, spread) in row.metrics.items():
            if mean is None:  # top-5 of three classes
                continue
            value = format_metric(metric, mean) + (f" ± {format_metric(metric, spread)}" if spread is not None else "")
            lines.append(f"| {row.data} | {row.variant}: {row.protocol}{other} | {metric} | {value} | {row.seeds or '-'} |")
    return (
        f"## Results\n\nOf the encoder's features: {own}. Pixels: {TRANSFORM}; large JPEGs are first shrunk by their decoder, to "
        "twice image_size or more. Accuracies and recalls in percent; ± is the deviation over seeds.\n\n" + "\n".join(lines) + "\n"
    )
