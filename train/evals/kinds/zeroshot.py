"""`train zeroshot`: classes by their names alone.

With a text tower (open_clip/zero_shot_classifier.py): every name in every template is embedded and normalised, their mean normalised again;
an image belongs to the class with the largest cosine. Without one: the pre-training head's logits of the names' tokens (token_logits.py).
C classes, T templates, N images, D width of the common space.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from labels.errors import UserError
from train.encoders.encoder import Encoder
from train.evals.data.classnames import class_names, templates, told
from train.evals.data.images import shorten
from train.evals.data.sets import DataSet
from train.evals.features import Extractor
from train.evals.protocol import Score, accuracies
from train.evals.protocols.token_logits import TokenLogits, Zeroshot


def class_embeddings(texts: Tensor, templates: int) -> Tensor:
    """Unit vectors [C, D] of unit vectors [C T, D], the T filled templates of each class one after another."""
    return functional.normalize(texts.unflatten(0, (-1, templates)).mean(1), dim=1)


def check_told_apart(names: Sequence[str], tokens: Tensor, encoder: str) -> None:
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
            mend="--classnames FILE with other words for them",
        )


class ZeroShot(TokenLogits):
    """See `Evaluation`."""

    def describe(self, settings: Zeroshot) -> str:
        names, forms = told(settings.classnames), told(settings.templates)
        return f"cosines of the text tower's class embeddings; without text tower: {super().describe(settings)}; {names}, {forms}"

    def unfit(self, encoder: Encoder) -> str | None:
        return None if encoder.text else super().unfit(encoder)

    def scores(self, encoder: Encoder, data: DataSet, settings: Zeroshot, extract: Extractor, seeds: Sequence[int]) -> list[Score]:
        if encoder.text is None:
            print(f"zeroshot: {encoder.name} has no text tower: its head's token logits are taken; `train lit` gives it one", flush=True)
            return super().scores(encoder, data, settings, extract, seeds)
        names, forms, side = class_names(settings.classnames, data), templates(settings.templates), encoder.text()
        texts = [form.replace("{}", name) for name in names for form in forms]
        tokens = side.tokens(texts, Path(settings.labels) if settings.labels else None)
        check_told_apart(names, tokens.unflatten(0, (-1, len(forms))), encoder.name)
        embedded = side.embedded(tokens, extract.device)
        cosines = side.images(extract(encoder, data.test), extract.device) @ class_embeddings(embedded, len(forms)).T  # [N, C]
        metrics = accuracies(cosines, torch.from_numpy(data.test.targets).to(extract.device))
        return [Score("zeroshot", seeds[0], metrics, {"names": names, "templates": forms})]


EVALUATION = ZeroShot()
