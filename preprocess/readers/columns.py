"""Columns of a table as keys, uids, sizes and captions: Arrow arrays in, Arrow arrays out, no Python object for a row.

Only cells that are not UTF-8 are decoded one by one (`_decoded`). A caption that is not UTF-8 is null in
`row_captions`, with the reason in `Invalid`; table.py makes a Fault of it. A key or uid gets escapes instead. N rows of
a batch.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions when it is imported)

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from labels.storage import UserError
from preprocess.readers.base import MAX_SIDE, WHITE_SPACE, Choice, join_captions

KEY_COLUMNS = ("key", "uid")
SIZE_COLUMNS = (("width", "height"), ("original_width", "original_height"))
STATUS_COLUMN = "status"
_SUCCESS, _FAILURE = "success", "failed_to_"  # failed_to_download, failed_to_resize
_KEY_DIGITS = 12

Invalid = dict[int, str]
"""Row -> why its bytes are not UTF-8."""


def downloaded_rows(batch: pa.RecordBatch, path: str, statuses: dict[str, str]) -> pa.BooleanArray | None:
    """Which rows img2dataset did not fail to download or resize, by the text column `status`; None if no row failed.

    `statuses`: one for all batches of a table: its first failure, and its first status that img2dataset does not write.

    Raises:
        UserError: a table has both, so that the rows with a failure may be rows of another program.
    """
    column = batch.column(STATUS_COLUMN) if STATUS_COLUMN in batch.schema.names else None
    if column is None or not _is_text(column.type):
        return None
    texts = _texts(column)[0]
    other = texts.filter(pc.not_equal(texts, _SUCCESS))  # none of nulls
    if not len(other):
        return None
    failed = pc.starts_with(other, _FAILURE)
    for name, rows in (("failure", failed), ("foreign", pc.invert(failed))):
        if name not in statuses and pc.any(rows).as_py():
            statuses[name] = other.filter(rows)[0].as_py()
    if len(statuses) > 1:
        raise UserError(
            f"{path}: the column {STATUS_COLUMN!r} holds {statuses['failure']!r}, as img2dataset writes it for rows to"
            f" skip, and {statuses['foreign']!r}, which it does not write",
            allowed=f"{_SUCCESS!r} and {_FAILURE + '...'!r}, or other statuses, with which every row is used",
            fix="rename the column, or remove the rows that are not to be used",
        )
    return pc.fill_null(pc.invert(pc.starts_with(texts, _FAILURE)), True) if "failure" in statuses else None


def row_keys(batch: pa.RecordBatch, first: int, path: str) -> pa.StringArray:
    """The key of every row: `key`, else `uid`, else the number of the row in the table as 12 digits."""
    keys = pa.nulls(len(batch), pa.string())
    for name in KEY_COLUMNS:
        if keys.null_count and name in batch.schema.names:
            keys = _first_of(keys, _identifiers(batch, name, path))
    if keys.null_count:
        numbers = pc.cast(pa.array(np.arange(first, first + len(batch))), pa.string())
        keys = pc.coalesce(keys, pc.utf8_lpad(numbers, _KEY_DIGITS, "0"))
    return keys


def row_uids(batch: pa.RecordBatch, path: str) -> pa.StringArray:
    """The column `uid`, null where there is none."""
    return _identifiers(batch, "uid", path) if "uid" in batch.schema.names else pa.nulls(len(batch), pa.string())


def row_sizes(batch: pa.RecordBatch) -> tuple[pa.Int32Array, pa.Int32Array]:
    """Width and height in pixels: the first pair of SIZE_COLUMNS with whole numbers from 1 on in both, else null."""
    width = height = pa.nulls(len(batch), pa.int32())
    for names in SIZE_COLUMNS:
        if not width.null_count or not set(names) <= set(batch.schema.names):
            continue
        new_width, new_height = (_sides(batch.column(name)) for name in names)
        both = pc.and_(pc.is_valid(new_width), pc.is_valid(new_height))
        width = pc.coalesce(width, pc.if_else(both, new_width, None))
        height = pc.coalesce(height, pc.if_else(both, new_height, None))
    return width, height


def row_captions(
    batch: pa.RecordBatch, choices: Sequence[Choice], path: str, schema: pa.Schema
) -> tuple[pa.StringArray, Invalid]:
    """The caption by the first of `choices` that a row has, null where it has none; and the rows that are not UTF-8.

    The columns of `choices` are in the batch; `path` and `schema` of the table are for messages.
    """
    captions, faults = pa.nulls(len(batch), pa.string()), Invalid()
    for choice in choices:
        if captions.null_count == len(faults):
            break
        texts, invalid = _chosen(batch, choice, path, schema)
        undecided = pc.is_null(captions)
        faults |= {row: reason for row, reason in invalid.items() if row not in faults and undecided[row].as_py()}
        captions = _first_of(captions, texts)
        if faults:  # an unreadable caption decides its row
            unreadable = np.zeros(len(batch), bool)
            unreadable[list(faults)] = True
            captions = pc.if_else(pa.array(unreadable), None, captions)
    return captions, faults


def blank_rows(captions: pa.StringArray) -> np.ndarray:
    """Numbers of the rows that hold nothing but white space, int64; nulls are no such rows."""
    offsets, text = offsets_and_bytes(captions)
    first = np.zeros(len(captions), np.uint8)
    filled = offsets[1:] > offsets[:-1]
    first[filled] = text[offsets[:-1][filled]]
    # Nearly all rows begin with a visible ASCII character.
    unsure = np.flatnonzero((first <= 0x20) | (first >= 0x7F))
    trimmed = pc.utf8_ltrim(captions.take(pa.array(unsure)), characters=WHITE_SPACE)
    return unsure[pc.fill_null(pc.equal(pc.binary_length(trimmed), 0), False).to_numpy(zero_copy_only=False)]


def offsets_and_bytes(strings: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
    """Where each string begins and ends, int32 [N + 1], in the bytes, uint8 [B]."""
    if not len(strings):
        return np.zeros(1, np.int32), np.empty(0, np.uint8)
    _, offset_bytes, text = strings.buffers()
    offsets = np.frombuffer(offset_bytes, np.int32, len(strings) + 1, strings.offset * 4)
    return offsets, np.frombuffer(text, np.uint8) if text else np.empty(0, np.uint8)


def _first_of(texts: pa.StringArray, fallback: pa.StringArray) -> pa.StringArray:
    """`texts`, and where they are null `fallback`; not copied where all of them are."""
    return fallback if texts.null_count == len(texts) else pc.coalesce(texts, fallback)


def _chosen(batch: pa.RecordBatch, choice: Choice, path: str, schema: pa.Schema) -> tuple[pa.StringArray, Invalid]:
    """What a choice gives: the texts of its columns that are not null, a line each; null where all are."""
    parts, invalid = [], Invalid()
    for item in choice.items:
        column = batch.column(item.name)
        if not _is_caption(column.type):
            texts = [repr(field.name) for field in schema if _is_caption(field.type)]
            raise UserError(
                f"{path}: the column {item.name!r} of build.caption_key holds {column.type}",
                allowed=f"a column of strings or of lists of strings: here {', '.join(texts) or 'none'}",
                fix=f"add `--caption-key {item.kind}:COLUMN` with one of them",
            )
        texts, wrong = _lines(column) if _is_list(column.type) else _texts(column)
        parts.append(texts)
        invalid |= wrong
    text = parts[0]
    for part in parts[1:]:  # joined is null where either is
        text = pc.coalesce(pc.binary_join_element_wise(text, part, join_captions(["", ""])), text, part)
    return text, invalid


def _lines(column: pa.ListArray) -> tuple[pa.StringArray, Invalid]:
    """The texts of every list as one, a line each; null for a list without any."""
    if column.type.value_type.id == pa.null().id:
        return pa.nulls(len(column), pa.string()), Invalid()
    texts, wrong = _texts(pc.list_flatten(column))
    parents = pc.list_parent_indices(column).to_numpy()
    invalid = {int(parents[cell]): reason for cell, reason in wrong.items()}
    kept = texts.is_valid()
    parents, texts = parents[kept.to_numpy(zero_copy_only=False)], texts.filter(kept)
    offsets = np.searchsorted(parents, np.arange(len(column) + 1)).astype(np.int32)
    joined = pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets), texts), join_captions(["", ""]))
    return pc.if_else(pa.array(np.diff(offsets) > 0), joined, None), invalid


def _texts(column: pa.Array) -> tuple[pa.StringArray, Invalid]:
    """A column of text in any of Arrow's forms as plain strings; cells that are not UTF-8 become null."""
    if column.type.id == pa.null().id:
        return pa.nulls(len(column), pa.string()), Invalid()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()  # type: ignore[attr-defined]
    # By way of bytes: Parquet's strings are not checked when they are read.
    raw = column.cast(pa.binary())
    try:
        return raw.cast(pa.string()), Invalid()
    except pa.ArrowInvalid:
        return _decoded(raw)


def _decoded(raw: pa.BinaryArray) -> tuple[pa.StringArray, Invalid]:
    """The cells one by one: null, with the reason, where one is not UTF-8."""
    texts, invalid = [], Invalid()
    for row, value in enumerate(raw.to_pylist()):
        try:
            texts.append(value if value is None else value.decode("utf8"))
        except UnicodeDecodeError as error:
            invalid[row] = str(error)
            texts.append(None)
    return pa.array(texts, pa.string()), invalid


def _identifiers(batch: pa.RecordBatch, name: str, path: str) -> pa.StringArray:
    """A column of keys or uids as strings: bytes that are not UTF-8 become escapes, empty cells null."""
    column = batch.column(name)
    if pa.types.is_integer(column.type):
        return pc.cast(column, pa.string())
    if not _is_text(column.type):
        problem = f"{path}: the column {name!r} holds {column.type}"
        raise UserError(problem, allowed="strings or whole numbers", fix="convert or rename the column")
    texts, invalid = _texts(column)
    if invalid:
        raw = column.cast(pa.binary()).to_pylist()
        texts = pa.array(
            [None if value is None else value.decode("utf8", "backslashreplace") for value in raw], pa.string()
        )
    offsets, _ = offsets_and_bytes(texts)
    if texts.null_count == 0 and (offsets[1:] > offsets[:-1]).all():
        return texts  # a new array would be a copy
    return pc.if_else(pc.equal(texts, ""), None, texts)


def _sides(column: pa.Array) -> pa.Int32Array:
    """Whole numbers from 1 to 2^31 - 1, else null. A float column is what pandas makes of gaps."""
    if _is_text(column.type):
        texts = _texts(column)[0]
        number = pc.fill_null(pc.match_substring_regex(texts, r"^[0-9]{1,10}$"), False)
        column = pc.if_else(number, texts, None)
    elif not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        return pa.nulls(len(column), pa.int32())
    numbers = column.cast(pa.float64(), safe=False)
    in_range = pc.and_(pc.greater_equal(numbers, 1), pc.less_equal(numbers, MAX_SIDE))
    whole = pc.equal(pc.floor(numbers), numbers)
    return pc.cast(pc.if_else(pc.and_(in_range, whole), numbers, None), pa.int32())


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    forms = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    forms += (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(form(kind) for form in forms)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_caption(kind: pa.DataType) -> bool:
    return _is_text(kind.value_type if _is_list(kind) else kind)
