"""What a rehearsal of a build has measured (rehearsal.py), for the forecast."""

from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple


class Work(NamedTuple):
    """Seconds that a task took, bytes of its shards' files."""

    seconds: float
    bytes: int


@dataclass(frozen=True)
class Ran:
    """One process of a pass.

    Attributes:
        began, ended: of its work, on the clock that all processes share.
        first: the task that it began with, which loads compiled code and meets every word.
        again: the tasks after it.
        peak_bytes: the most memory it had.
        compiled: whether code had to be compiled, here or in the server of worker processes.
    """

    began: float
    ended: float
    first: Work
    again: list[Work]
    peak_bytes: int
    compiled: bool


@dataclass(frozen=True)
class Pass:
    """One pass over some shards. `open_s`: seconds for which worker processes begin and end; 0 where the main process does the work."""

    ran: list[Ran]
    open_s: float

    @property
    def per_byte(self) -> float:
        """Seconds of a process for each byte of its shards, once it is warm."""
        return sum(work.seconds for work in self._warmed) / sum(work.bytes for work in self._warmed)

    @property
    def warm_s(self) -> float:
        """Seconds that the first task of a process takes beside its work."""
        return max(fmean(ran.first.seconds - ran.first.bytes * self.per_byte for ran in self.ran), 0.0)

    @property
    def spread(self) -> float:
        """Half the range of speed between the tasks, as a share."""
        speeds = [work.seconds / work.bytes for work in self._warmed]
        return (max(speeds) - min(speeds)) / (2 * fmean(speeds))

    @property
    def _warmed(self) -> list[Work]:
        return [work for ran in self.ran for work in ran.again]


@dataclass(frozen=True)
class Built:
    """What the shards that were labelled have become, all together."""

    names: list[str]
    source_bytes: int
    rows: int
    left_out: int
    label_bytes: int
    table_bytes: int


@dataclass(frozen=True)
class Written:
    """The betons of some groups, all together; `source_bytes`: of the groups' shards; `head_bytes`: what lies before the first image."""

    source_bytes: int
    samples: int
    left_out: int
    bytes: int
    head_bytes: int
    files: int


@dataclass(frozen=True)
class Measured:
    """A rehearsal.

    Attributes:
        shards: bytes of each shard of DATA.
        groups: bytes of the shards of each group that the second pass will have.
        built: what became of those that were measured.
        labels, betons: the two passes; `written`: what the second made. None for a build without it.
        idf_s: seconds of the IDF table of the measured shards; `summing_s`: more for each shard more.
        work_s: seconds of the rehearsal from its first task on, all but what the process took to begin and end.
    """

    shards: list[int]
    groups: list[int]
    built: Built
    labels: Pass
    betons: Pass | None
    written: Written | None
    idf_s: float
    summing_s: float
    work_s: float

    @property
    def passes(self) -> list[Pass]:
        return [self.labels] if self.betons is None else [self.labels, self.betons]

    @property
    def compiled(self) -> bool:
        """Whether code had to be compiled, which is kept: no build after this will take so long."""
        return any(ran.compiled for one in self.passes for ran in one.ran)
