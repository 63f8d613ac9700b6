"""The batches of one epoch of the loader, and the order in which it has to give the rows."""

import numpy as np
import torch

from labels import beton
from labels.settings import Data
from train.data.dataset import BetonSet
from train.data.loader import Loader
from train.data.order import Order


def batches(betons: BetonSet, *, threads: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images and label ids of exactly one epoch, in batches of 4."""
    loader = Loader(
        betons,
        Data(crop_scale=[0.5, 1.0]),
        image_size=16,
        batch_size=4,
        seed=3,
        first_step=0,
        last_step=betons.samples // 4,
        threads=threads,
    )
    with loader:
        return [(batch.images.clone(), batch.label_ids.clone()) for batch in loader]


def order_of(betons: BetonSet) -> list[int]:
    """Row positions in the order of `batches`, from the betons themselves."""
    indices: list[int] = []
    for path in betons.paths:
        data = np.fromfile(path, np.uint8)
        count = int(data[: beton.HEADER.itemsize].view(beton.HEADER)[0]["num_samples"])
        indices += (
            data[beton.METADATA_OFFSET :][: count * beton.METADATA.itemsize].view(beton.METADATA)["index"].tolist()
        )
    order = Order([betons.samples], (1,), 64, 1024, 3)
    return [indices[sample] for step in range(betons.samples // 4) for sample in order.batch(step, 4, 0, 1)[0]]
