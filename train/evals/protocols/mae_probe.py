"""The linear probe by MAE's recipe (arXiv 2111.06377, appendix A; main_linprobe.py): LARS and a BatchNorm head, trained by epochs.

head: BatchNorm1d(W, affine=False, eps=1e-6) -> Linear(W, C), weight drawn from N(0, 0.01), bias 0
rate: base_lr * batch / 256, linear over the warm-up, then cosine to 0, set at every step; LARS momentum 0.9, trust 0.001, no weight decay
The head of the last epoch is tested, once. N samples, B batch of the head, W feature width, C classes.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from timm.optim.lars import Lars
from torch import Tensor, nn
from torch.nn import functional

from labels.settings import Positive, Section
from train.encoders.encoder import Encoder
from train.evals.data.images import LabelledImages
from train.evals.features import Extractor
from train.evals.pixels import decode_crop
from train.evals.protocol import accuracies


class MaeProbe(Section):
    epochs: Positive = 90
    batch_size: Positive = 16_384
    base_lr: Annotated[float, Field(gt=0)] = 0.1
    warmup_epochs: Annotated[int, Field(ge=0)] = 10
    augment: bool = True

    @model_validator(mode="after")
    def _warmup(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs is {self.warmup_epochs}, epochs {self.epochs}; allowed: less than epochs")
        return self


_TEST_ROWS = 16_384
Epoch = Callable[[int, np.ndarray], Iterable[Tensor]]
"""Number of an epoch, rows int [R] in their order -> features float32 of these rows, in pieces [*, W] on the device."""


def learning_rate(settings: MaeProbe, batch: int, epoch: float) -> float:
    """The rate at a fractional epoch."""
    peak = settings.base_lr * batch / 256
    if epoch < settings.warmup_epochs:
        return peak * epoch / settings.warmup_epochs
    done = (epoch - settings.warmup_epochs) / (settings.epochs - settings.warmup_epochs)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(linear: nn.Linear) -> Lars:
    """LARS as MAE has it: the trust ratio for matrices alone, a bias takes plain steps with momentum."""
    groups = [{"params": [linear.weight], "always_adapt": True}, {"params": [linear.bias], "always_adapt": False}]
    options: dict[str, Any] = {"lr": 0.0, "momentum": 0.9, "weight_decay": 0.0, "trust_coeff": 0.001}
    return Lars(groups, **options)


def mae_probe(
    epoch_features: Epoch, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, *, classes: int, settings: MaeProbe, seed: int,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Train the head and test it.

    Args:
        epoch_features: the training part's features, anew for every epoch.
        train_y, test_y: classes [N], int64. test_x: features [N, W].
        seed: of the head's weights and of the order.

    Returns:
        top1, top5 (None with 5 classes or fewer), batch_size (of the head, at most N), learning_rate (the peak), final_loss.
    """
    batch = min(settings.batch_size, len(train_y))
    steps = len(train_y) // batch  # what is left over sits out this epoch, as in MAE's loader
    targets = torch.from_numpy(train_y).to(device)
    norm, linear = _head(test_x.shape[1], classes, seed, device)
    optimizer = make_optimizer(linear)
    loss = torch.full((), math.nan)
    for epoch in range(settings.epochs):
        rows = np.random.default_rng([seed, epoch]).permutation(len(train_y))[: steps * batch]
        for step, x in enumerate(_regrouped(epoch_features(epoch, rows), batch)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, batch, epoch + step / steps)
            y = targets[torch.from_numpy(rows[step * batch : (step + 1) * batch]).to(device)]
            loss = functional.cross_entropy(linear(norm(x)), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    norm.eval()
    with torch.inference_mode():
        parts = torch.from_numpy(test_x).split(_TEST_ROWS)
        logits = torch.cat([linear(norm(part.to(device))).cpu() for part in parts])
    rates = {"batch_size": batch, "learning_rate": settings.base_lr * batch / 256, "final_loss": float(loss.detach())}
    return {**accuracies(logits, torch.from_numpy(test_y)), **rates}


def cached_epochs(train_x: np.ndarray, device: torch.device) -> Epoch:
    """The same features [N, W] in every epoch."""
    held = torch.from_numpy(train_x).to(device)
    return lambda epoch, rows: [held[torch.from_numpy(rows).to(device)]]


def augmented_epochs(encoder: Encoder, train: LabelledImages, extract: Extractor, seed: int) -> Epoch:
    """Random resized crops and flips of the images, through the encoder in every epoch."""

    def features(epoch: int, rows: np.ndarray) -> Iterator[Tensor]:
        return extract.stream(encoder, train, rows, lambda encoded, side, row: decode_crop(encoded, side, seed, epoch, row))

    return features


def _head(width: int, classes: int, seed: int, device: torch.device) -> tuple[nn.BatchNorm1d, nn.Linear]:
    linear = nn.Linear(width, classes)
    with torch.no_grad():
        nn.init.trunc_normal_(linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        linear.bias.zero_()
    return nn.BatchNorm1d(width, affine=False, eps=1e-6).to(device), linear.to(device)


def _regrouped(pieces: Iterable[Tensor], batch: int) -> Iterator[Tensor]:
    """Pieces of any length -> batches of `batch` rows; a shorter rest is not given out."""
    held: list[Tensor] = []
    count = 0
    for piece in pieces:
        held.append(piece.clone() if piece.is_inference() else piece)  # the head's backward needs plain tensors
        count += len(piece)
        if count >= batch:
            joined = torch.cat(held)
            whole = count // batch * batch
            yield from joined[:whole].split(batch)
            held, count = [joined[whole:]], count - whole
