"""`train zeroshot`: classes by their names alone.

With a text tower (open_clip/zero_shot_classifier.py): every name in every template is embedded and normalised, their
mean normalised again; an image belongs to the class with the largest cosine. Without one: the pre-training head's
logits of the names' tokens (token_logits.py). C classes, T templates, N images, D width of the common space.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from labels.config import load_pipeline
from labels.idf import read_idf
from labels.settings import Section, Seeds
from labels.storage import Layout, UserError, sha256_file
from train.checkpoint import read_weights
from train.encoders.encoder import Encoder
from train.encoders.text import label_texts
from train.evals.data.images import shorten
from train.evals.data.sets import DataSet
from train.evals.features import Extractor
from train.evals.protocol import Evaluation, Score, accuracies

# ---- token_logits: `train zeroshot` of an encoder without text tower: the pre-training head's own logits of the tokens of each class' name.
#
# A name is a caption: its labels have the target t of the loss (IDF weights, normed to 1), and the score of a class is
#
#     s_c = sum_v t_cv x_v      x the logits of the image: the loss of the caption, less a constant of the image, negated
#
# With templates, t_c is the mean over the filled templates. By linearity s = h T'W' + T b, h the head's normed features.
# V vocabulary, C classes, W feature width.


class Zeroshot(Section):
    classnames: Annotated[str, Field(min_length=1)] = "auto"
    templates: Annotated[str, Field(min_length=1)] = "none"
    labels: str | None = None
    seeds: Seeds = [0]


VARIANT = "zero-shot by token logits"


def class_targets(label_sets: Sequence[Sequence[np.ndarray]], idf: np.ndarray) -> np.ndarray:
    """The mean target of each class.

    Args:
        label_sets: of each class, the label ids of each of its texts.
        idf: weights [V].

    Returns:
        float64 [C, V], rows summing to 1; a row without a weighted label is 0.
    """
    targets = np.zeros((len(label_sets), len(idf)))
    for row, texts in zip(targets, label_sets, strict=True):
        for ids in texts:
            weights = idf[ids].astype(np.float64)
            row[ids] += weights / max(weights.sum(), 1e-12)
        row /= max(row.sum(), 1e-12)
    return targets


def class_scores(features: Tensor, head: dict[str, Tensor], targets: Tensor) -> Tensor:
    """Scores [N, C] of features [N, W], by the head's tensors (`0.*` LayerNorm, `1.*` Linear) and targets [C, V]."""
    normed = functional.layer_norm(features, features.shape[1:], head["0.weight"], head["0.bias"])
    weight, bias = targets @ head["1.weight"], targets @ head["1.bias"]  # [C, W], [C]
    return normed @ weight.T + bias


class TokenLogits(Evaluation):
    name, takes, section = "zeroshot", "classes", Zeroshot

    def describe(self, settings: Zeroshot) -> str:
        names, forms = source_name(settings.classnames), source_name(settings.templates)
        return f"token logits of the pre-training head, no text tower; names: {names}, templates: {forms}"

    def check(self, data: DataSet, settings: Zeroshot) -> None:
        names = class_names(settings.classnames, data)
        twice = sorted({name for name in names if names.count(name) > 1})
        if (
            twice and settings.classnames != "imagenet" and data.kind != "imagenet"
        ):  # ImageNet's own names hold `crane` twice and such
            raise UserError(
                f"{len(twice)} names stand for several classes of {data.name}: {shorten(twice)}",
                allowed="a name a class",
                fix="--classnames FILE with other words for them",
            )
        templates(settings.templates)

    def unfit(self, encoder: Encoder) -> str | None:
        if encoder.checkpoint is None:
            return "it has no text tower and no pre-training head; measure a run (run:RUN), or give it a text tower: train lit"
        if encoder.requested.layer is not None or encoder.requested.pool is not None:
            return "the pre-training head takes the run's own pooled features; leave --layer and --pool out"
        return None

    def scores(
        self, encoder: Encoder, data: DataSet, settings: Zeroshot, extract: Extractor, seeds: Sequence[int]
    ) -> list[Score]:
        assert encoder.checkpoint is not None
        names, forms = class_names(settings.classnames, data), templates(settings.templates)
        built, idf = _labels_of(encoder.checkpoint.parent.parent, settings)
        found = label_texts([form.replace("{}", name) for name in names for form in forms], built)
        texts = [found[start : start + len(forms)] for start in range(0, len(found), len(forms))]
        targets = class_targets(texts, idf)
        without = [name for name, row in zip(names, targets, strict=True) if not row.any()]
        if without:
            raise UserError(
                f"{len(without)} class names have no label in {built}: {shorten(without)}",
                allowed="names with a token that the vocabulary knows and the stop words leave",
                fix="--classnames FILE with other words for them",
            )
        file = encoder.checkpoint / "head.safetensors"
        head = {key: tensor.double() for key, tensor in read_weights(file).items()}
        if len(head["1.bias"]) != len(idf):
            raise UserError(
                f"{file} has {len(head['1.bias'])} classes, the IDF table of {built} {len(idf)} tokens",
                allowed="the same number",
            )
        logits = class_scores(torch.from_numpy(extract(encoder, data.test)).double(), head, torch.from_numpy(targets))
        metrics = accuracies(logits, torch.from_numpy(data.test.targets))
        return [Score(VARIANT, seeds[0], metrics, {"names": names, "templates": forms})]


def _labels_of(run: Path, settings: Zeroshot) -> tuple[Path, np.ndarray]:
    """The OUT whose labels a run was trained on, and its weights [V] as the loss took them."""
    built = Path(settings.labels or json.loads((run / "data.json").read_bytes())["labels"])
    if not Layout(built).idf_parquet.is_file():
        raise UserError(
            f"{run} was trained on the labels of {built}, and no IDF table is there",
            allowed="the OUT of its build-labels",
            fix="--set zeroshot.labels=OUT, if it has moved",
        )
    idf = read_idf(Layout(built).idf_parquet)
    return built, idf if load_pipeline(run / "config.yaml").train.loss.idf else np.ones_like(idf)


def class_embeddings(texts: Tensor, templates: int) -> Tensor:
    """Unit vectors [C, D] of unit vectors [C T, D], the T filled templates of each class one after another."""
    return functional.normalize(texts.unflatten(0, (-1, templates)).mean(1), dim=1)


def check_distinct(names: Sequence[str], tokens: Tensor, encoder: str) -> None:
    """Raises:
    UserError: different names have the same tokens [C, T, L], as where a vocabulary knows neither.
    """
    first: dict[bytes, str] = {}
    alike = [(name, first.setdefault(row.numpy().tobytes(), name)) for name, row in zip(names, tokens, strict=True)]
    found = [f"{name} (as {other})" for name, other in alike if name != other]
    if found:
        raise UserError(
            f"{len(found)} class names have the same tokens as others for {encoder!r}: {shorten(found)}",
            allowed="names with tokens of their own: its tokenizer may not know these words",
            fix="--classnames FILE with other words for them",
        )


class ZeroShot(TokenLogits):
    """See `Evaluation`."""

    def describe(self, settings: Zeroshot) -> str:
        names, forms = source_name(settings.classnames), source_name(settings.templates)
        return f"cosines of the text tower's class embeddings; without text tower: {super().describe(settings)}; {names}, {forms}"

    def unfit(self, encoder: Encoder) -> str | None:
        return None if encoder.text else super().unfit(encoder)

    def scores(
        self, encoder: Encoder, data: DataSet, settings: Zeroshot, extract: Extractor, seeds: Sequence[int]
    ) -> list[Score]:
        if encoder.text is None:
            print(
                f"zeroshot: {encoder.name} has no text tower: its head's token logits are taken; `train lit` gives it one",
                flush=True,
            )
            return super().scores(encoder, data, settings, extract, seeds)
        names, forms, side = class_names(settings.classnames, data), templates(settings.templates), encoder.text()
        texts = [form.replace("{}", name) for name in names for form in forms]
        tokens = side.tokens(texts, Path(settings.labels) if settings.labels else None)
        check_distinct(names, tokens.unflatten(0, (-1, len(forms))), encoder.name)
        embedded = side.embedded(tokens, extract.device)
        cosines = (
            side.images(extract(encoder, data.test), extract.device) @ class_embeddings(embedded, len(forms)).T
        )  # [N, C]
        metrics = accuracies(cosines, torch.from_numpy(data.test.targets).to(extract.device))
        return [Score("zeroshot", seeds[0], metrics, {"names": names, "templates": forms})]


# Class names and templates


def class_names(source: str, data: DataSet) -> list[str]:
    """One name for every class of `data`, in class order.

    `source`: `auto` (the data's own names; ImageNet's for `imagenet:` data), `imagenet`, or the path of a file with one
    line per class in class order, or with lines of `class<TAB>name` in any order.
    """
    if source == "imagenet" or (source == "auto" and data.kind == "imagenet"):
        names = list(_metadata().IMAGENET_CLASSNAMES)
        if len(names) != len(data.classes):
            raise UserError(
                f"{data.name} has {len(data.classes)} classes, ImageNet's names are {len(names)}",
                allowed="ImageNet-1k's classes, numbered by their sorted wnids",
                fix="--classnames FILE with a line for every class",
            )
        return names
    if source == "auto":
        return list(data.names)
    lines = _lines(Path(source), "class names")
    if any("\t" in line for line in lines):
        return _by_class(Path(source), lines, data)
    if len(lines) != len(data.classes):
        raise UserError(
            f"{source} has {len(lines)} names, {data.name} has {len(data.classes)} classes: {shorten(data.classes)}",
            allowed="a line for every class, in the order of their numbers; or lines of class<TAB>name",
            fix="write one name for every class",
        )
    return lines


def templates(source: str) -> list[str]:
    """Templates with `{}` for the name: `none` (the bare name), `openai` (the 80 for ImageNet), or a file's lines."""
    if source == "none":
        return ["{}"]
    if source == "openai":
        makers: list[Callable[[str], str]] = list(_metadata().OPENAI_IMAGENET_TEMPLATES)
        return [make("{}") for make in makers]
    lines = _lines(Path(source), "templates")
    without = [line for line in lines if "{}" not in line]
    if without:
        raise UserError(
            f"{source}: {len(without)} templates have no {{}}, the first: {without[0]!r}", allowed="a photo of a {}."
        )
    return lines


def source_name(source: str) -> str:
    """The source as results name it; a file with its fingerprint, since its content decides the scores."""
    return f"{source} ({sha256_file(Path(source))[:16]})" if Path(source).is_file() else source


def _by_class(file: Path, lines: list[str], data: DataSet) -> list[str]:
    pairs = [line.split("\t", 1) for line in lines]
    names = {label.strip(): rest[0].strip() for label, *rest in pairs if rest and rest[0].strip()}
    missing, unknown = [label for label in data.classes if label not in names], sorted(set(names) - set(data.classes))
    if missing or unknown:
        parts = {"classes have no name": missing, "names are of no class": unknown}
        faults = "; ".join(f"{len(labels)} {what}: {shorten(labels)}" for what, labels in parts.items() if labels)
        raise UserError(
            f"{file} does not match the classes of {data.name}: {faults}",
            allowed=f"the classes {shorten(data.classes)}",
            fix="write a line class<TAB>name for every class, spelt as the data spell it",
        )
    return [names[label] for label in data.classes]


def _lines(file: Path, what: str) -> list[str]:
    if not file.is_file():
        raise UserError(f"no file of {what} at {file}", fix="fix the path")
    lines = [line.strip() for line in file.read_text(encoding="utf8").splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{file} is empty", allowed=f"a line for each of the {what}")
    return lines


def _metadata() -> Any:
    try:
        from open_clip import zero_shot_metadata
    except ImportError:
        fix = "pip install 'superclass-lean[evals]', or give a file"
        raise UserError(
            "ImageNet's class names and templates come with open_clip, which is not installed", fix=fix
        ) from None
    return zero_shot_metadata


EVALUATION = ZeroShot()
