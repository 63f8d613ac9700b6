"""Where a sample's caption is: build.caption_key -> choices, tried in order; the first that a sample has counts.

txt  json:alt  parquet:text  csv:title    a tar's member, a field of its json, a column of its side Parquet or a table
txt+json:alt                              one choice of several captions, read as one text
auto                                      the choices of _AUTO
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from labels.storage import UserError
from preprocess.readers.base import IMAGE_SUFFIXES

ColumnKind = Literal["parquet", "csv"]
Kind = Literal["member", "json", ColumnKind]

_TABLE_COLUMNS = ("caption", "text", "txt", "title")
_SUFFIX = re.compile(r"[a-z0-9_][a-z0-9_.-]*")
_ALLOWED = (
    "auto, txt or another member suffix of the tars, json:FIELD, parquet:COLUMN, csv:COLUMN; several joined with + are"
    " one text (e.g. txt,json:alt or txt+json:alt)"
)


@dataclass(frozen=True)
class Item:
    """One source of a caption: kind `member` (name = suffix in a tar), `json` (field), `parquet` or `csv` (column)."""

    kind: Kind
    name: str

    def __str__(self) -> str:
        return self.name if self.kind == "member" else f"{self.kind}:{self.name}"


@dataclass(frozen=True)
class Choice:
    """Items that are read together; a sample has the choice if it has any of them."""

    items: tuple[Item, ...]

    def __str__(self) -> str:
        return "+".join(map(str, self.items))


# A kind of shard sees only the items that it can have: one list serves tars and tables.
_AUTO = (
    Item("parquet", "caption"),
    Item("member", "txt"),
    Item("json", "caption"),
    *(Item("parquet", name) for name in _TABLE_COLUMNS[1:]),
    *(Item("csv", name) for name in _TABLE_COLUMNS),
)


def parse_caption_key(keys: Sequence[str]) -> tuple[Choice, ...]:
    """The choices, in order, that build.caption_key names; `auto` becomes the choices that it stands for."""
    choices: list[Choice] = []
    for key in keys:
        if key.strip() == "auto":
            choices += [Choice((item,)) for item in _AUTO]
        else:
            choices.append(Choice(tuple(_item(part.strip(), key) for part in key.split("+"))))
    if not choices:
        raise UserError("build.caption_key is empty", allowed=_ALLOWED)
    return tuple(dict.fromkeys(choices))


def _item(text: str, key: str) -> Item:
    kind, colon, name = text.partition(":")
    if colon and name and kind in get_args(Kind)[1:]:
        return Item(kind, name)  # type: ignore[arg-type]  # just compared with the kinds
    suffix = text.lower()  # as suffixes are where tars are read
    if colon or not _SUFFIX.fullmatch(suffix) or suffix == "auto":
        problem = f"{text!r} names no caption"
    elif suffix == "json":
        problem = "'json' lacks the field: json:FIELD"
    elif suffix in IMAGE_SUFFIXES:
        problem = f"{text!r} is the suffix of an image"
    else:
        return Item("member", suffix)
    of_key = f" (in {key!r})" if key != text else ""
    raise UserError(f"build.caption_key: {problem}{of_key}", allowed=_ALLOWED)


def column_choices(choices: Iterable[Choice], kind: ColumnKind) -> tuple[Choice, ...]:
    """What of `choices` a table of this kind can answer: other items are dropped, then choices without any."""
    return narrow_choices(choices, lambda item: item.kind == kind)


def narrow_choices(choices: Iterable[Choice], keep: Callable[[Item], bool]) -> tuple[Choice, ...]:
    """The choices with only the items that are kept; choices without any, and repeated ones, are dropped."""
    narrowed = (Choice(tuple(filter(keep, choice.items))) for choice in choices)
    return tuple(dict.fromkeys(choice for choice in narrowed if choice.items))


def join_captions(texts: Sequence[str]) -> str:
    """Several captions of one sample as one text, a line each."""
    return "\n".join(texts)
