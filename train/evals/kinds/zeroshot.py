"""`train zeroshot`: classes by their names alone.

With a text tower (as in open_clip/zero_shot_classifier.py), every name in every template is embedded and normalised,
and their mean normalised again; an image belongs to the class with the largest cosine. Without one, a name is a
caption: its labels have the target t of the loss (IDF weights, normed to 1; the mean over the templates), and with x
the pre-training head's logits of the image, class c scores the negated loss of its caption, up to a constant:

    s_c = sum_v t_cv x_v;   by linearity s = h T'W' + T b, with h the head's normed features

C classes, T templates, N images, L tokens, D width of the common space, V vocabulary, W feature width.
"""

import json
import re
from collections import Counter
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
from labels.manifest import read_manifest
from labels.settings import Section, Seeds
from labels.storage import Layout, UserError, local_path, read_text, sha256_file
from train.checkpoint import read_weights
from train.encoders.encoder import Encoder
from train.encoders.text import label_dataset, label_texts
from train.evals.data.images import shorten
from train.evals.data.sets import DataSet
from train.evals.features import Extractor
from train.evals.protocol import Evaluation, Score, accuracies, hits


class Zeroshot(Section):
    classnames: Annotated[str, Field(min_length=1)] = "auto"
    templates: Annotated[str, Field(min_length=1)] = "none"
    labels: str | None = None
    seeds: Seeds = [0]


_OTHER_NAMES = "--classnames FILE with other words for them"
_ESCAPED = re.compile(r"\\x[0-9a-f]{2}|\\ud[89a-f][0-9a-f]{2}")  # of `printable`: bytes that are no text


class ZeroShot(Evaluation):
    name, takes, section = "zeroshot", "classes", Zeroshot

    def describe(self, settings: Zeroshot) -> str:
        names, forms = source_name(settings.classnames), source_name(settings.templates)
        return (
            "cosines of the text tower's class embeddings; without text tower: token logits of the pre-training head, "
            f"no text tower; names: {names}, templates: {forms}; {names}, {forms}"
        )

    def check(self, data: DataSet, settings: Zeroshot) -> None:
        names = class_names(settings.classnames, data)
        if escaped := [name for name in names if settings.classnames == "auto" and _ESCAPED.search(name)]:
            problem = f"{len(escaped)} class names are not UTF-8: {shorten(escaped)}"
            raise UserError(problem, allowed="words", fix="--classnames FILE with lines class<TAB>name")
        repeated = sorted({name for name in names if names.count(name) > 1})
        # ImageNet's own names contain some twice, such as `crane`
        if repeated and settings.classnames != "imagenet" and data.kind != "imagenet":
            problem = f"{len(repeated)} names stand for several classes of {data.name}: {shorten(repeated)}"
            raise UserError(problem, allowed="one name per class", fix=_OTHER_NAMES)
        templates(settings.templates)

    def unfit(self, encoder: Encoder) -> str | None:
        if encoder.text is not None:
            return None
        if encoder.checkpoint is None:
            return "it has no text tower and no pre-training head; give a run (run:RUN), or add a text tower: train lit"
        if encoder.requested.layer is not None or encoder.requested.pool is not None:
            return "the pre-training head takes the run's own pooled features; omit --layer and --pool"
        return None

    def scores(
        self, encoder: Encoder, data: DataSet, settings: Zeroshot, extract: Extractor, seeds: Sequence[int]
    ) -> list[Score]:
        names, forms = class_names(settings.classnames, data), templates(settings.templates)
        texts = [form.replace("{}", name) for name in names for form in forms]
        labels = local_path(settings.labels) if settings.labels else None
        if encoder.text is None:
            notice = "has no text tower: its head's token logits are used; `train lit` adds one"
            print(f"zeroshot: {encoder.name} {notice}", flush=True)
            variant, targets, head = "zero-shot by token logits", *_token_targets(encoder, labels, names, texts)
            scores = class_scores(torch.from_numpy(extract(encoder, data.test)).double(), head, targets)
        else:
            variant, side = "zeroshot", encoder.text()
            tokens = side.tokens(texts, labels)
            check_distinct(names, tokens.unflatten(0, (-1, len(forms))), encoder.name)
            classes = class_embeddings(side.embedded(tokens, extract.device), len(forms))
            scores = side.images(extract(encoder, data.test), extract.device) @ classes.T
        y = torch.from_numpy(data.test.targets).to(scores.device)
        detail = {"names": names, "templates": forms}
        return [Score(variant, seeds[0], accuracies(scores, y), detail, correct=hits(scores, y))]


EVALUATION = ZeroShot()


# -- with a text tower


def class_embeddings(texts: Tensor, templates: int) -> Tensor:
    """Unit vectors [C, D] of unit vectors [C T, D], the T filled templates of each class one after another."""
    return functional.normalize(texts.unflatten(0, (-1, templates)).mean(1), dim=1)


def check_distinct(names: Sequence[str], tokens: Tensor, encoder: str) -> None:
    """Raise a UserError if different names have the same tokens [C, T, L]: the vocabulary does not know them."""
    first: dict[bytes, str] = {}
    same = [(name, first.setdefault(row.numpy().tobytes(), name)) for name, row in zip(names, tokens, strict=True)]
    confused = [f"{name} (as {earlier})" for name, earlier in same if name != earlier]
    if confused:
        raise UserError(
            f"{len(confused)} class names have the same tokens as others for {encoder!r}: {shorten(confused)}",
            allowed="names with tokens of their own: its tokenizer may not know these words",
            fix=_OTHER_NAMES,
        )


# -- without a text tower. Names are labelled by a call of labels.tokenizers, so that any tokenizer works.


def _token_targets(
    encoder: Encoder, labels: Path | None, names: list[str], texts: list[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Targets float64 [C, V] and the head's tensors, float64, of a run's encoder; `texts`: the T texts of each name."""
    assert encoder.checkpoint is not None
    dataset, idf = _labels_of(encoder.checkpoint.parent.parent, labels)
    text_labels, forms = label_texts(texts, dataset), len(texts) // len(names)
    targets = class_targets([text_labels[start : start + forms] for start in range(0, len(texts), forms)], idf)
    unlabelled = [name for name, row in zip(names, targets, strict=True) if not row.any()]
    if unlabelled:
        raise UserError(
            f"{len(unlabelled)} class names have no label in {dataset}: {shorten(unlabelled)}",
            allowed="names with a token that the vocabulary knows and that is no stop word",
            fix=_OTHER_NAMES,
        )
    file = encoder.weight_file("head")
    head = {key: tensor.double() for key, tensor in read_weights(file).items()}
    if (classes := len(head["1.bias"])) != len(idf):
        problem = f"{file} has {classes} classes, the IDF table of {dataset} {len(idf)} tokens"
        raise UserError(problem, allowed="the same number", fix="set zeroshot.labels to the dataset of the run")
    return torch.from_numpy(targets), head


def _labels_of(run: Path, labels: Path | None) -> tuple[Path, np.ndarray]:
    """A label dataset with the tokenizer of a run, and the weights [V] that the run's loss used."""
    dataset, facts = label_dataset(run, labels), json.loads((run / "data.json").read_bytes())
    if not load_pipeline(run / "config.yaml").train.loss.idf:
        return dataset, np.ones(read_manifest(dataset).tokenizer.vocabulary, np.float32)
    tables, expected = [Layout(dataset).idf_parquet, Path(facts.get("idf", ""))], facts["fingerprints"]["idf"]
    table = next((table for table in tables if table.is_file() and sha256_file(table) == expected), None)
    if table is None:
        raise UserError(
            f"{run} was trained with the IDF table of SHA-256 {expected[:16]}, {tables[0]} is another or missing",
            allowed="the output folder that the run was trained on, with its idf.parquet",
            fix=f"--set zeroshot.labels=OUT, if it has moved; after --idf TABLE: `idf` in {run}/data.json names TABLE",
        )
    return dataset, read_idf(table)


def class_targets(label_sets: Sequence[Sequence[np.ndarray]], idf: np.ndarray) -> np.ndarray:
    """The mean target of each class, from the label ids of each of its texts and the weights [V]: float64 [C, V].

    Rows sum to 1; a row without a weighted label is 0.
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


# -- class names and templates


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
    lines = _lines(local_path(source), "class names")
    if any("\t" in line for line in lines):
        return _by_class(local_path(source), lines, data)
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
    lines = _lines(local_path(source), "templates")
    without = [line for line in lines if "{}" not in line]
    if without:
        problem = f"{source}: {len(without)} templates have no {{}}, the first: {without[0]!r}"
        raise UserError(problem, allowed="a photo of a {}.")
    return lines


def source_name(source: str) -> str:
    """The source as results name it; a file with its fingerprint, since its content decides the scores."""
    file = local_path(source)
    return f"{source} ({sha256_file(file)[:16]})" if file.is_file() else source


def _by_class(file: Path, lines: list[str], data: DataSet) -> list[str]:
    pairs = [line.split("\t", 1) for line in lines]
    if repeated := sorted(label for label, count in Counter(label.strip() for label, *_ in pairs).items() if count > 1):
        problem = f"{file} has {len(repeated)} classes several times: {shorten(repeated)}"
        raise UserError(problem, allowed="one line for every class", fix="remove the other lines of these classes")
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
    lines = [line.strip() for line in read_text(file).split("\n") if line.strip()]
    if not lines:
        raise UserError(f"{file} is empty", allowed=f"a line for each of the {what}")
    return lines


def _metadata() -> Any:
    try:
        from open_clip import zero_shot_metadata
    except ImportError:
        problem = "ImageNet's class names and templates come with open_clip, which is not installed"
        raise UserError(problem, fix="pip install 'superclass-lean[evals]', or give a file") from None
    return zero_shot_metadata
