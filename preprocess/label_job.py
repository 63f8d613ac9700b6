"""One shard of captions to one label file: the unit of work of the first pass.

shard -> rows of captions, in batches -> ids -> labels/<shard>.parquet -> counts/<shard>.parquet -> done/labels/<shard>.json
            left out: reason and detail ------------------------------------------------------------^
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labels.files import whole_file, write_json
from labels.layout import Layout
from labels.settings import Labels
from labels.tokenizers.tokenizer import make_tokenizer
from preprocess.counts import ShardCounts
from preprocess.inputs.captions import Choice
from preprocess.inputs.rows import read_rows
from preprocess.inputs.shards import Shard
from preprocess.inputs.subset import open_subset, select
from preprocess.inputs.tars import Fault
from preprocess.label_file import LabelFile


@dataclass(frozen=True)
class LabelTask:
    """Everything a worker needs. `options`: fingerprint of what decides the rows, written into the marker."""

    shard: Shard
    out: Path
    settings: Labels
    captions: tuple[Choice, ...]
    subset: bool
    options: str


def label_shard(task: LabelTask) -> dict[str, Any]:
    """Write one label file, its counts and its marker; return the marker less the list of faults.

    The marker is the JSON that says: these files are whole, made from this shard with these options.
    """
    layout = Layout(task.out)
    marker_path = layout.label_marker(task.shard.name)
    marker_path.unlink(missing_ok=True)  # an older marker must not vouch for the new files
    tokenizer = make_tokenizer(task.settings)
    subset = open_subset(layout.subset) if task.subset else None
    faults: list[Fault] = []
    outside = 0
    counts = ShardCounts()
    path = layout.label_file(task.shard.name)
    with whole_file(path) as partial:
        with LabelFile(partial) as file:
            for batch in read_rows(task.shard, task.captions):
                faults += batch.faults
                if subset is not None:
                    batch, left_out = select(batch, subset)
                    outside += left_out
                rows = tokenizer.encode_rows(batch.table["caption"], task.settings.context)
                file.write(batch.table, *rows)
                counts.add(rows[2])
        count_bytes = counts.write(layout.count_file(task.shard.name))
    marker = {
        "options": task.options,
        "source": task.shard.source,
        "shard": task.shard.name,
        "rows": file.rows,
        "tokens": file.tokens,
        "outside_subset": outside,
        "sha256": file.sha256,
        "count_bytes": count_bytes,
        "keys_sha256": file.keys_sha256,
        "reasons": dict(sorted(Counter(fault.reason for fault in faults).items())),
    }
    # The faults stay in the file: a billion samples may have more of them than the main process has memory.
    write_json(marker_path, {**marker, "faults": [[fault.key, fault.reason, fault.detail] for fault in faults]})
    return marker
