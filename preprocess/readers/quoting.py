"""Whether the quotes (`"`) of a CSV enclose fields or are text: decided for a whole file, in one pass over its bytes.

    a,"b, c"<line break>    fields are quoted, as csv.writer writes them: separators and line breaks in quotes are text
    a<tab>"b<line break>    nothing is quoted: every line is a row, and a quote at the start of a field is text

Read as quoted, a table of the second kind loses rows without an error: the field goes on until the next quote. `Quotes`
therefore reads the file both ways. A row with a quote at the start of a field is one of

    quoted    only right with quotes: as lines it has the wrong number of fields, or a quote in it is doubled
    broken    not right with quotes: text follows a closing quote, or it has the wrong number of fields
    unsure    right with quotes, but it has several lines, each of which could be a row, too
    either    the same row either way

`decide` compares their numbers. Few broken rows of a quoted table are rejected, and cut out by `WithoutRows`; a table
of both kinds is refused.
"""

import io
import shlex
from pathlib import PurePosixPath
from typing import BinaryIO

import numpy as np

from labels.native import njit
from labels.storage import UserError
from labels.tokenizers.kernels.table import Scalar, load

_COUNTS = (
    *("place", "line", "lines", "quoted_lines"),  # in the file: number of the line; lines that are not empty so far
    *("line_width", "line_fields", "line_filled", "line_quoted", "in_field"),  # the line as a row; width: the header's
    *("width", "begin", "first", "fields", "row_lines"),  # the row, read with quotes; begin: offset; first: its line
    *("has_quotes", "has_doubled", "is_broken"),
    *("all_lines", "short_line"),  # of the row: all its lines are as wide as the header, one is less wide
    *("header_quoted", "header_broken", "quoted", "broken", "broken_lines", "unsure", "either"),
    *("first_quoted", "first_unsure", "last_unsure"),
)
_STATE = np.dtype([(name, np.int64) for name in _COUNTS])
_START, _PLAIN, _QUOTED, _CLOSED = range(4)  # of a field; in it, without or with quotes; after a quote in quotes
_QUOTE, _LINE_FEED, _RETURN = b'"\n\r'
_LOW_BITS, _HIGH_BITS = np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)
_QUOTES, _LINE_FEEDS, _RETURNS = (np.uint64(byte) * _LOW_BITS for byte in (_QUOTE, _LINE_FEED, _RETURN))
_EVIDENCE = 10  # times more rows have to be of one kind than of the other
_MOST_BROKEN = 1000  # rows of a quoted table
_ALLOWED = (
    "a table whose quotes enclose fields, at least those with a quote, separator or line break in them, and in which"
    " quotes within fields are doubled; or a table in which nothing is quoted"
)
_REWRITE = (
    "PYTHONIOENCODING=latin1 python3 -c \"import csv, sys; csv.writer(sys.stdout, delimiter='{}', lineterminator='\\n')"
    ".writerows(line.rstrip('\\n').split('{}') for line in sys.stdin)\" < {} > {}"
)


class Quotes:
    """Add all bytes of a CSV from its header on, in parts of any length; then `decide`.

    `broken`: after `decide`, the rows of a quoted table to cut out, int64 [N, 4]: offsets of begin and end, counted
    from the first byte that was added, and numbers of the first and last line.
    """

    def __init__(self, delimiter: str) -> None:
        self._delimiter = delimiter
        self._special = np.zeros(256, bool)
        self._special[[ord(delimiter), _QUOTE, _LINE_FEED, _RETURN]] = True
        self._states = np.zeros(1, _STATE)
        for name in ("line", "first", "line_fields", "fields", "all_lines"):
            self._states[name] = 1
        self._state = self._states.view(np.recarray)[0]
        self._broken_rows = np.zeros((_MOST_BROKEN, 4), np.int64)
        self.broken = self._broken_rows[:0]
        self._bytes, self._scanned = 0, False
        # Not scanned yet: lines without a quote are the same rows either way. The first one, which may be the header or
        # the end of a row, and the last, which goes on in the next part, are enough.
        self._head, self._head_offset, self._skipped_lines, self._tail = b"", 0, 0, b""

    def add(self, part: bytes) -> None:
        self._bytes += len(part)
        text = self._tail + part
        if b'"' in part or self._state.place == _QUOTED:
            self._scan(text)
            return
        begin = 0
        if not self._head:
            begin = text.find(b"\n") + 1
            self._head, self._head_offset = text[:begin], self._bytes - len(text)
        end = max(begin, text.rfind(b"\n") + 1)
        self._skipped_lines += int(np.count_nonzero(np.frombuffer(text, np.uint8)[begin:end] == _LINE_FEED))
        self._tail = text[end:]

    def decide(self, path: str) -> bool:
        """Whether fields are quoted. UserError: that cannot be decided; `path` is for the message."""
        if not self._scanned:
            return False
        state = self._state
        self._scan(self._tail)
        if state.place == _QUOTED:
            state.place, state.is_broken = _PLAIN, 1
        self._scan(b"\n")
        enclosing = state.quoted + state.header_quoted
        if state.broken > 0 and state.broken >= _EVIDENCE * enclosing and 2 * state.quoted_lines <= state.lines:
            return False
        few = state.quoted + state.either >= _EVIDENCE * state.broken_lines and state.broken <= _MOST_BROKEN
        if state.header_broken or not few:
            raise self._refuse_broken(path)
        # In a table without quoting, few rows in succession would be right with quotes by chance.
        sure = state.quoted >= _EVIDENCE * state.unsure or state.unsure >= _EVIDENCE * max(1, state.broken)
        if not (sure or state.header_quoted):
            raise self._refuse_unsure(path)
        self.broken = self._broken_rows[: state.broken]
        return True

    def _scan(self, text: bytes) -> None:
        """Scan the head, then `text`, which begins with the tail and ends where the file was added to."""
        state, begin = self._state, self._bytes - len(text)
        for part, offset in ((self._head, self._head_offset), (text, begin)):
            if offset == begin and self._skipped_lines:
                state.line += self._skipped_lines
                state.lines += self._skipped_lines
                state.begin, state.first = begin, state.line
            _scan(
                np.frombuffer(part, np.uint8),
                offset,
                self._special,
                ord(self._delimiter),
                self._states,
                self._broken_rows,
            )
        self._head, self._skipped_lines, self._tail, self._scanned = b"", 0, b"", True

    def _refuse_broken(self, path: str) -> UserError:
        state, line = self._state, self._broken_rows[0, 2]
        problem = f'{path}: the quote (") that begins a field in line {line} does not end with the field'
        if state.quoted:
            problem += f", but line {state.first_quoted} is only right if quotes enclose fields"
        elif state.header_quoted:
            problem += ", but quotes enclose the names in the first line"
        elif state.broken < state.quoted_lines:
            problem += ", but fields of most lines begin with a quote"
        fix = f"correct line {line}; if quotes are text in this table, write it again: {self._rewrite(path)}"
        return UserError(problem, allowed=_ALLOWED, fix=fix)

    def _refuse_unsure(self, path: str) -> UserError:
        first, last = self._state.first_unsure, self._state.last_unsure
        return UserError(
            f'{path}: lines {first} to {last} are one row if quotes (") enclose fields, and several if they are text',
            allowed=_ALLOWED,
            fix='if they enclose fields, enclose the names in the first line, too (e.g. "caption"); if they are text, '
            f"write the table again: {self._rewrite(path)}",
        )

    def _rewrite(self, path: str) -> str:
        delimiter = "\\t" if self._delimiter == "\t" else self._delimiter
        return _REWRITE.format(delimiter, delimiter, shlex.quote(path), "quoted" + PurePosixPath(path).suffix)


@njit(nogil=True, cache=True)
def _scan(
    text: np.ndarray, offset: int, special: np.ndarray, delimiter: int, states: np.ndarray, broken: np.ndarray
) -> None:
    """Go on with `text`, uint8 [B]. `special`: bool [256], quote, delimiter, line breaks; `broken`: rows to cut out."""
    state, at = states[0], 0
    delimiters = np.uint64(delimiter) * _LOW_BITS
    while at < len(text):
        byte = text[at]
        at += 1
        if byte in (_LINE_FEED, _RETURN):
            if state.line_filled:
                _end_line(state)
            state.line += byte == _LINE_FEED
            state.in_field = 0
            if state.place != _QUOTED:
                _end_row(state, offset + at, broken)
            continue
        state.line_filled = 1
        if byte == delimiter:
            state.line_fields += 1
            state.in_field = 0
            if state.place != _QUOTED:
                state.fields += 1
                state.place = _START
        elif byte == _QUOTE:
            state.line_quoted |= state.in_field == 0
            state.in_field = 1
            if state.place == _START:
                state.place = _QUOTED
                state.has_quotes = 1
            elif state.place == _QUOTED:
                state.place = _CLOSED
            elif state.place == _CLOSED:
                state.place = _QUOTED
                state.has_doubled = 1
        else:
            state.in_field = 1
            if state.place == _CLOSED:
                state.is_broken = 1
            if state.place != _QUOTED:
                state.place = _PLAIN
            while at + 8 <= len(text) and not _any_special(load(text, at), delimiters):  # pyright: ignore[reportCallIssue]
                at += 8
            while at < len(text) and not special[text[at]]:
                at += 1


@njit(nogil=True, forceinline=True)
def _any_special(word: Scalar, delimiters: Scalar) -> bool:
    """Whether any of eight bytes is special. Of a byte that is zero, after xor, `x - 1 & ~x` has the highest bit."""
    quotes, feeds, returns = word ^ _QUOTES, word ^ _LINE_FEEDS, word ^ _RETURNS
    fields = word ^ delimiters
    zero = ((quotes - _LOW_BITS) & ~quotes) | ((feeds - _LOW_BITS) & ~feeds)
    zero |= ((returns - _LOW_BITS) & ~returns) | ((fields - _LOW_BITS) & ~fields)
    return zero & _HIGH_BITS != 0


@njit(nogil=True)
def _end_line(state: np.record) -> None:
    """A line that is not empty, as a row of a table in which nothing is quoted."""
    if state.line_width == 0:
        state.line_width = state.line_fields
    state.all_lines &= state.line_fields == state.line_width
    state.short_line |= state.line_fields < state.line_width
    state.row_lines += 1
    state.lines += 1
    state.quoted_lines += state.line_quoted
    state.line_fields, state.line_filled, state.line_quoted = 1, 0, 0


@njit(nogil=True)
def _end_row(state: np.record, end: int, broken: np.ndarray) -> None:
    """A row of a table whose fields are quoted; without a line it is none."""
    several = state.row_lines > 1
    if state.row_lines and state.width == 0:
        state.width = state.fields
        state.header_broken = state.is_broken
        state.header_quoted = state.has_quotes and not state.is_broken and not several
    if state.has_quotes:
        right, last = state.fields == state.width, state.first + state.row_lines - 1
        if state.is_broken or (not right and (several or state.all_lines)):
            if state.broken < len(broken):
                row = broken[state.broken]
                row[0], row[1], row[2], row[3] = state.begin, end, state.first, last
            state.broken += 1
            state.broken_lines += state.row_lines
        elif right and several and not state.short_line:
            if state.unsure == 0:
                state.first_unsure, state.last_unsure = state.first, last
            state.unsure += 1
        elif right and (several or state.has_doubled or not state.all_lines):
            if state.quoted == 0:
                state.first_quoted = state.first
            state.quoted += 1
        elif right:
            state.either += 1
    state.place, state.fields, state.row_lines, state.begin, state.first = _START, 1, 0, end, state.line
    state.has_quotes, state.has_doubled, state.is_broken, state.all_lines, state.short_line = 0, 0, 0, 1, 0


class WithoutRows(io.RawIOBase):
    """A file from `begin` on without the rows that `Quotes.broken` names."""

    def __init__(self, file: BinaryIO, begin: int, broken: np.ndarray) -> None:
        self._file = file
        self._at = begin
        self._gaps = [(begin + int(row[0]), begin + int(row[1])) for row in broken]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while self._gaps and self._at == self._gaps[0][0]:
            self._at = self._gaps.pop(0)[1]
        self._file.seek(self._at)
        size = min(len(buffer), self._gaps[0][0] - self._at) if self._gaps else len(buffer)
        data = self._file.read(size)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
