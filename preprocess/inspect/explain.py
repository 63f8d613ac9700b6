"""`preprocess explain`: one sample with the caption as it was written, read from its shard, and the cleaned caption.

key or uid -> labels/show/explanation.py -> + caption of the shard, if that is unchanged -> + the cleaned caption
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from labels.config import load_pipeline
from labels.manifest import Manifest, read_manifest
from labels.settings import Pipeline
from labels.show.explanation import DECODED, Explanation, explain_row
from labels.storage import Layout, UserError, local_copy, printable
from labels.tokenizers.tokenizer import Tokenizer, make_tokenizer
from preprocess.readers import read_rows
from preprocess.readers.base import parse_caption_key
from preprocess.readers.shards import Shard, find_shards
from preprocess.stage import LabelMarker, read_inputs, read_marker


def explain(out: Path, name: str, *, shard: str | None = None) -> Explanation:
    """All that is known about one sample of a label dataset; `name`: its key or uid; `shard`: if several have it.

    Its caption is shown as it was read only if its shard is unchanged since the build; otherwise it is joined from its
    tokens, and `caption_from` says so.
    """
    explanation = explain_row(out, name, shard)
    manifest, layout, sample = read_manifest(out), Layout(out), explanation.sample
    notes = list(explanation.notes)
    tokenizer = _tokenizer(layout, manifest, notes)
    captions = source_captions(layout, sample.shard.name, {sample.key})
    caption = None if isinstance(captions, str) else captions.get(sample.key)
    if caption is None:
        reason = captions if isinstance(captions, str) else "the shard no longer holds the sample"
        return replace(explanation, caption_from=f"{DECODED}: {reason}", notes=tuple(notes))
    limit = manifest.options["labels"]["context"]
    if tokenizer and tokenizer.encode([caption], limit)[0].tolist() != sample.token_ids:
        notes.append("this caption does not give the tokens of the label row")
    if len(sample.token_ids) == limit:
        notes.append(f"the caption fills the limit of {limit} tokens: further tokens were cut off")
    cleaned = tokenizer.clean(caption) if tokenizer else None
    caption_from = f"from the shard {sample.shard.source}"
    return replace(explanation, caption=caption, caption_from=caption_from, cleaned=cleaned, notes=tuple(notes))


def _tokenizer(layout: Layout, manifest: Manifest, notes: list[str]) -> Tokenizer | None:
    """The tokenizer of the build; None, with a note, if it is missing or has changed."""
    try:
        tokenizer = make_tokenizer(read_config(layout).labels)
    except UserError as error:
        notes.append(f"no cleaned caption: {error.problem}")
        return None
    if tokenizer.fingerprint != manifest.tokenizer.fingerprint:
        notes.append("no cleaned caption: the tokenizer, or a library that it cleans with, has changed since the build")
        return None
    return tokenizer


def read_config(layout: Layout) -> Pipeline:
    """The configuration of the build."""
    with local_copy(layout.config) as file:
        return load_pipeline(file)


def source_shard(layout: Layout, name: str) -> Shard | str:
    """The shard that a label file was made from, or why it is not available."""
    marker = read_marker(layout.label_marker(name), LabelMarker)
    if marker is None:
        return "the path of the shard is not known any more"
    path = str(marker.source["path"])
    inputs = read_inputs(layout) if "\\x" in path else None  # escaped by `printable`: only inputs.json has the bytes
    if inputs:
        path = next((shard.path for shard in inputs.shards if shard.name == name), path)
    try:
        shards = [replace(shard, name=name) for shard in find_shards([path]).shards]
    except (UserError, OSError):
        return f"{printable(Path(path).name)} is no longer where it was"
    if len(shards) != 1 or shards[0].source != marker.source:
        return f"{printable(Path(path).name)} has changed since the build"
    return shards[0]


def source_captions(layout: Layout, name: str, keys: Collection[str]) -> dict[str, str] | str:
    """key -> caption as the build read it, from one shard; or why the captions are not available."""
    shard = source_shard(layout, name)
    if isinstance(shard, str):
        return shard
    choices = parse_caption_key(read_config(layout).build.caption_key)
    captions: dict[str, str] = {}
    for batch in read_rows(shard, choices):
        for key, caption in zip(batch.table["key"].to_pylist(), batch.table["caption"].to_pylist(), strict=True):
            if key in keys:
                captions.setdefault(key, caption)
        if len(captions) == len(keys):
            break
    return captions
