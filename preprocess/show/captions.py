"""Captions as they came, which OUT does not keep: read from the shard itself if it is still there and unchanged, or told from tokens."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from labels.config import load_pipeline
from labels.errors import UserError
from labels.files import local_copy
from labels.layout import Layout
from labels.settings import Pipeline
from preprocess.inputs.captions import parse_caption_key
from preprocess.inputs.rows import read_rows
from preprocess.inputs.shards import Shard, find_shards
from preprocess.plan import read_summary

DECODED = "put together from the tokens"


def read_config(layout: Layout) -> Pipeline:
    """The configuration that OUT was built with."""
    with local_copy(layout.config) as file:
        return load_pipeline(file)


def source_shard(layout: Layout, name: str) -> Shard | str:
    """The shard that a label file was made from, or why it is not at hand."""
    marker = read_summary(layout.label_marker(name))
    if marker is None:
        return "OUT no longer says where the shard was"
    path = marker["source"]["path"]
    try:
        shards = [replace(shard, name=name) for shard in find_shards([path]).shards]
    except (UserError, OSError):
        return f"{Path(path).name} is no longer where it was"
    if len(shards) != 1 or shards[0].source != marker["source"]:
        return f"{Path(path).name} has changed since the build"
    return shards[0]


def source_captions(layout: Layout, name: str, keys: Collection[str]) -> dict[str, str] | str:
    """The captions of these keys of one shard, as the build read them; or why they cannot be had."""
    shard = source_shard(layout, name)
    if isinstance(shard, str):
        return shard
    choices = parse_caption_key(read_config(layout).build.caption_key)
    found: dict[str, str] = {}
    for batch in read_rows(shard, choices):
        for key, caption in zip(batch.table["key"].to_pylist(), batch.table["caption"].to_pylist(), strict=True):
            if key in keys:
                found.setdefault(key, caption)
        if len(found) == len(keys):
            break
    return found
