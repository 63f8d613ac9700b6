"""`run_stage` skips what its markers say is done; markers as earlier versions wrote them; the manifest goes before a
file changes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from labels.config import load_pipeline
from labels.storage import Layout
from preprocess.stage import (
    BuildContext,
    CorpusMarker,
    GroupMarker,
    LabelMarker,
    Stage,
    read_faults,
    read_marker,
    read_markers,
    run_stage,
    write_marker,
)

# As build-labels wrote them when they were plain dictionaries.
SOURCE = {"path": "/data/a.tar", "bytes": 10240, "modified": "1"}
LABELS = {
    "count_bytes": 8,
    "faults": [["k", "no caption", ""]],
    "keys_sha256": "c",
    "options": "o",
    "outside_subset": 0,
    "reasons": {"no caption": 1},
    "rows": 3,
    "sha256": "a",
    "shard": "a.b",
    "source": SOURCE,
    "tokens": 9,
}
FILE = {"bytes": 4, "number": 2, "quarantined": {}, "samples": 3, "sha256": "f", "shards": ["a.b"]}
GROUP = {
    "count": 1,
    "faults": [],
    "files": [FILE],
    "first": 2,
    "options": "i",
    "reasons": {},
    "shards": [["a.b", 0, "a", SOURCE]],
}
IDF = {"of": {"formula": "smooth", "shards": "0123"}, "sha256": "d"}
PAIRS = {"of": {"rows": "4567", "classes": 10, "min_count": 2}, "sha256": "e"}
FORMS = [(LABELS, LabelMarker), (GROUP, GroupMarker), (IDF, CorpusMarker), (PAIRS, CorpusMarker)]


@pytest.mark.parametrize(("content", "kind"), FORMS)
def test_a_marker_is_read_and_written_as_ever(tmp_path: Path, content: dict[str, Any], kind: type[Any]) -> None:
    path = tmp_path / "marker.json"
    path.write_text(json.dumps(content))
    marker = read_marker(path, kind)
    assert marker is not None and marker.model_dump(exclude_none=True) == {
        k: v for k, v in content.items() if k != "faults"
    }
    faults = read_faults(path)
    assert faults == content.get("faults", [])
    write_marker(path, marker, faults if "faults" in content else None)
    assert json.loads(path.read_text()) == content


def test_markers_without_what_was_added_later_are_read(tmp_path: Path) -> None:
    path = tmp_path / "marker.json"
    path.write_text(json.dumps({key: value for key, value in LABELS.items() if key != "tokens"}))
    marker = read_marker(path, LabelMarker)
    assert marker is not None and (marker.tokens, marker.pairs, marker.name, marker.samples) == (None, None, "a.b", 3)


@pytest.mark.parametrize(("content", "kind"), FORMS)
def test_a_damaged_or_unknown_marker_is_none(tmp_path: Path, content: dict[str, Any], kind: type[Any]) -> None:
    text = json.dumps(content)
    required = next(iter(content.keys() - {"faults", "tokens"}))
    lacking = json.dumps({key: value for key, value in content.items() if key != required})
    for damaged in (
        "",
        text[:-1],
        "[]",
        "null",
        "7",
        lacking,
        text.replace("{", "{{", 1),
        json.dumps({**content, required: None}),
    ):
        (tmp_path / "damaged.json").write_text(damaged)
        assert read_marker(tmp_path / "damaged.json", kind) is None, damaged
    (tmp_path / "damaged.json").write_bytes(b"\xff\x00")
    assert read_marker(tmp_path / "damaged.json", kind) is None
    assert read_marker(tmp_path / "none.json", kind) is None
    assert read_markers(tmp_path, ["damaged", "none"], kind) == {}


@dataclass(frozen=True)
class Task:
    """A task whose file holds its name; its marker fits if `options` does."""

    name: str
    options: str = "o"
    file_count: int = 1

    @property
    def shards(self) -> tuple[str, ...]:
        return (self.name,)

    def is_done(self, marker: LabelMarker, sizes: Mapping[str, int]) -> bool:
        return marker.options == self.options and f"labels/{self.name}" in sizes


@dataclass
class Bench:
    """A stage of tasks that note that they ran."""

    layout: Layout
    ran: list[str]

    def work(self, task: Task) -> LabelMarker:
        self.ran.append(task.name)
        self.layout.labels.mkdir(exist_ok=True)
        (self.layout.labels / task.name).touch()
        marker = LabelMarker.model_validate({**LABELS, "shard": task.name, "options": task.options})
        write_marker(self.layout.markers / "labels" / f"{task.name}.json", marker)
        return marker

    def run(self, tasks: list[Task], **options: Any) -> tuple[list[str], list[str]]:
        """Names that ran, and names that are done then."""
        self.ran.clear()
        settings: Any = SimpleNamespace()
        build = BuildContext(self.layout, load_pipeline(), settings, 1, (), None)
        stage = Stage("labels", self.work, LabelMarker, self.layout.markers / "labels", [self.layout.labels])
        done = run_stage(build, stage, tasks, **options)
        return list(self.ran), [marker.shard for marker in done]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    (tmp_path / "manifest.json").touch()
    return Bench(Layout(tmp_path), [])


def test_what_is_done_is_skipped(bench: Bench) -> None:
    tasks = [Task("a"), Task("b"), Task("c")]
    assert bench.run(tasks, mine={"a", "c"}) == (["a", "c"], ["a", "c"])
    assert bench.run(tasks) == (["b"], ["a", "b", "c"])
    assert bench.run(tasks) == ([], ["a", "b", "c"])
    (bench.layout.labels / "b").unlink()
    assert bench.run(tasks, mine=()) == ([], ["a", "c"])
    stale: list[str] = []
    assert bench.run([Task("a", "p"), *tasks[1:]], prepare=stale.extend) == (["a", "b"], ["a", "b", "c"])
    assert sorted(stale) == ["a", "b"]


def test_the_manifest_is_removed_before_a_file_that_it_lists_changes(bench: Bench) -> None:
    tasks, manifest = [Task("a"), Task("b")], bench.layout.manifest
    bench.run(tasks, fresh=frozenset("ab"))
    assert manifest.exists()
    bench.run([*tasks, Task("c")], mine=())
    assert manifest.exists()
    (bench.layout.labels / "a").unlink()
    seen: list[bool] = []
    bench.run(tasks, fresh=frozenset("b"), prepare=lambda _: seen.append(manifest.exists()))
    assert seen == [False] and not manifest.exists()
    manifest.touch()
    bench.run(tasks)
    assert manifest.exists(), "nothing had to be done"
