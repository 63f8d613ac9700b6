"""Where everything lies below OUT, the folder that stage 1 writes and stage 2 reads."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """Paths below one OUT; `shard` is a shard's name, `number` a beton's ordinal."""

    out: Path

    @property
    def manifest(self) -> Path:
        return self.out / "manifest.json"

    @property
    def idf_parquet(self) -> Path:
        return self.out / "idf.parquet"

    @property
    def idf_duckdb(self) -> Path:
        return self.out / "idf.duckdb"

    @property
    def quarantine(self) -> Path:
        return self.out / "quarantine.parquet"

    @property
    def config(self) -> Path:
        return self.out / "config.yaml"

    @property
    def lock(self) -> Path:
        return self.out / ".lock"

    @property
    def labels(self) -> Path:
        return self.out / "labels"

    @property
    def betons(self) -> Path:
        return self.out / "beton"

    @property
    def markers(self) -> Path:
        """Completion markers, one JSON a finished unit of work: what makes a rerun skip it."""
        return self.out / "done"

    def label_file(self, shard: str) -> Path:
        return self.labels / f"{shard}.parquet"

    def label_marker(self, shard: str) -> Path:
        return self.markers / "labels" / f"{shard}.json"

    def beton_file(self, number: int) -> Path:
        return self.betons / f"{number:05d}.beton"

    def beton_marker(self, number: int) -> Path:
        return self.markers / "beton" / f"{number:05d}.json"
