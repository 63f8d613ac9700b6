"""Where images lie that were not copied into betons (`build-labels --no-images`): in the user's own uncompressed tars.

OUT/places/<nnnnn>.npy       PLACE [samples], takes the place of OUT/beton/<nnnnn>.beton: the same samples in the same order
OUT/places/sources.json      shard name -> path and bytes of its tar; edit the paths when the tars move
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from labels.errors import UserError
from labels.layout import Layout
from labels.storage import write_json

PLACE = np.dtype(
    [
        ("shard", "<u4"),
        ("bytes", "<u4"),
        ("offset", "<u8"),
        ("index", "<u8"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("pad", "<u4"),
    ]
)
"""One sample: number of its shard among the manifest's `shards`; length and offset of its JPEG in that shard's tar, in bytes;
position of its row among all label rows; pixels; zero."""


@dataclass(frozen=True)
class Source:
    """A tar: its absolute path, and its length in bytes when it was read."""

    path: str
    bytes: int


def write_sources(layout: Layout, sources: dict[str, Source]) -> None:
    """Write sources.json: shard name -> its tar."""
    write_json(layout.place_sources, {name: asdict(source) for name, source in sources.items()})


def read_sources(layout: Layout) -> dict[str, Source]:
    """Shard name -> its tar.

    Raises:
        UserError: sources.json is missing or damaged.
    """
    path = layout.place_sources
    try:
        return {name: Source(str(value["path"]), int(value["bytes"])) for name, value in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read: {error}",
            allowed='{"<shard>": {"path": "<tar>", "bytes": <its length>}, ...}',
            mend=f"run `preprocess build-labels DATA --out {layout.out} --no-images`",
        ) from None


def open_places(path: Path) -> np.ndarray:
    """One file of places, mapped read-only: PLACE [samples].

    Raises:
        UserError: it is missing, cut, or of another form.
    """
    try:
        places = np.load(path, mmap_mode="r", allow_pickle=False)
        whole = places.dtype == PLACE and places.ndim == 1 and places.offset + places.nbytes == path.stat().st_size
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}", mend="run `preprocess verify OUT`, then its build-labels command") from None
    if not whole:
        raise UserError(
            f"{path} holds {places.dtype} {list(places.shape)}, or is cut",
            allowed=f"places: {PLACE}",
            mend="run `preprocess verify OUT`, then its build-labels command",
        )
    return places
