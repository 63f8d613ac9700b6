"""Opens what `train run` trains on: the set, checked and ready, and its loader.

--beton ..., --labels ..., --idf -> train/sources.py -> label arrays (train/relabel.py) -> BetonSet -> its part (train/subset.py)
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labels.arrays import Column
from labels.errors import UserError
from labels.manifest import read_manifest
from labels.settings import Data, Train
from labels.storage import is_remote
from train.data.cache import Cache
from train.data.dataset import BetonSet
from train.data.inputs import resamples
from train.data.loader import Loader
from train.distributed import World
from train.relabel import make_rows_once
from train.sources import parse_sources
from train.subset import find_part


@dataclass(frozen=True)
class Chosen:
    """What the user named: values of `--beton`, OUTs of `--labels` for each of them or none, and `--idf`."""

    betons: Sequence[str]
    labels: Sequence[Path] = ()
    idf: Path | None = None


def open_data(chosen: Chosen, settings: Data, world: World, stopping: Callable[[], bool], column: Column = "label_ids") -> BetonSet | None:
    """Open the set on every rank; None if somebody asked to stop while label arrays were made.

    Args:
        chosen: what the user named.
        settings: `train.data`.
        world: this process among all.
        stopping: asked now and then.
        column: what rows are of.

    Raises:
        UserError: whatever does not fit.
    """
    mixture = parse_sources(chosen.betons, chosen.labels)
    for source in mixture.sources if column == "token_ids" else ():
        _check_local(source.labels or source.out)
    for source in mixture.sources:
        # Betons hold their own label sets; images that stay in their tars, and captions in their order, have arrays.
        in_arrays = column == "token_ids" or read_manifest(source.out).places
        labels = source.labels or (source.out if in_arrays else None)
        if labels and not make_rows_once(source.out, labels, world, stopping, column):
            return None
    cache = Cache(Path(settings.cache).expanduser(), settings.cache_size)
    betons = BetonSet(mixture, idf=chosen.idf, cache=cache, column=column)
    _check_window(betons, settings)
    if settings.verify:
        betons.check_bytes(range(world.rank, len(betons.parts), world.size))
    if settings.subset:
        betons.restrict(*find_part(betons, settings.subset, settings.metadata))
    return betons


def _check_local(labels: Path) -> None:
    """Refuse label files of an object store as the source of arrays, which are written beside them."""
    if is_remote(labels):
        raise UserError(
            f"captions in their order are mapped from arrays beside the label files, and {labels} is not on this machine",
            mend="copy it to a local folder without its beton/, and give that as --labels",
        )


def make_loader(betons: BetonSet, settings: Train, first_step: int, last_step: int, world: World) -> Loader:
    """The loader of one rank for the steps [first_step, last_step)."""
    return Loader(
        betons, settings.data, image_size=settings.model.image_size, batch_size=settings.batch_size, seed=settings.runtime.seed,
        first_step=first_step, last_step=last_step, rank=world.rank, world=world.size,
        threads=loading_threads(settings.data), pinned=world.device.type == "cuda",
        device=resamples(settings.data, world.device),
    )  # fmt: skip


def loading_threads(settings: Data) -> int:
    """`train.data.threads`, or for 0 the number of cores this process may use."""
    return settings.threads or len(os.sched_getaffinity(0))


def data_facts(betons: BetonSet) -> dict[str, Any]:
    """What a run was trained on, for people and reports: written as data.json beside its configuration."""
    labels, several = betons.labels, len(betons.opened) > 1
    facts = {
        "beton": str(betons.out), "labels": str(betons.labels_out), "fingerprints": betons.identity, "samples": betons.samples,
        "vocabulary": betons.vocabulary, "label_limit": betons.label_limit, "captions": sum(one.labels.captions for one in betons.opened),
        "tokenizer": labels.tokenizer.name, "tokenizer_fingerprint": labels.tokenizer.fingerprint, "idf_formula": labels.idf_formula,
        "label_options": labels.options.get("labels", {}),
    }  # fmt: skip
    sources = [
        {"beton": str(one.source.out), "labels": str(one.labels_out), "group": one.source.group, "betons": len(one.parts)}
        for one in betons.opened
    ]
    return facts | ({"sources": sources, "samples_of_groups": betons.sizes, "shares": list(betons.quotas)} if several else {})


def _check_window(betons: BetonSet, settings: Data) -> None:
    """Refuse a shuffle window whose betons do not fit the cache of remote ones: each would be fetched many times."""
    remote = betons.staging.remote if betons.staging else frozenset()
    whole = sum(betons.parts[number].bytes for number in remote)
    if whole <= settings.cache_size:
        return
    bytes_each, samples_each = whole // len(remote), sum(betons.parts[number].samples for number in remote) / len(remote)
    touched = min(len(remote), 2 * settings.shuffle_window * (2 + int(settings.shuffle_block / samples_each)))
    if touched * bytes_each > settings.cache_size:
        window = max(1, settings.cache_size // (6 * bytes_each))
        raise UserError(
            f"two windows of {settings.shuffle_window} blocks of {settings.shuffle_block} samples lie in {touched} remote betons of "
            f"{bytes_each / 2**20:,.0f} MiB, train.data.cache_size is {settings.cache_size / 2**20:,.0f} MiB",
            allowed="windows whose betons fit the cache",
            mend=f"--set train.data.shuffle_block={int(samples_each)} --set train.data.shuffle_window={window}, or a larger cache",
        )
