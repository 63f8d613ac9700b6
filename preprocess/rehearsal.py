"""The process in which `preprocess plan` builds some shards: it begins and ends as that of `build-labels` does, in the same time."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from preprocess.workers import start_server

if TYPE_CHECKING:
    from preprocess.measured import Measured


@dataclass(frozen=True)
class Rehearsal:
    """What to rehearse.

    Attributes:
        sources: what build-labels would get.
        settings: resolved configuration, as JSON: its classes are not to be imported before the server of workers is under way.
        folder: an empty one to build in.
        workers: processes of the build.
        samples: label rows of the build, None for those of `sources`.
        betons: whether there is a second pass.
    """

    sources: list[str]
    settings: str
    folder: str
    workers: int
    samples: int | None
    betons: bool


def rehearse(asked: Rehearsal) -> "Measured":
    """Build some shards, each part timed; in a process that has done nothing else.

    Raises:
        UserError: no shards, or those that were built gave no label row.
    """
    if asked.workers != 1:
        start_server()
    from preprocess.trial import measure  # what is large, as in `build-labels`

    return measure(asked)
