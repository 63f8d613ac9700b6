"""The few structures of a Parquet file beside its pages, in Thrift's compact protocol: headers of pages, and the footer.

Field numbers and types: parquet-format's parquet.thrift. A value is its wire type and its bytes; a structure is made of numbered values.
"""

from collections.abc import Iterable, Mapping

Value = tuple[int, bytes]
"""Wire type, bytes."""

_TRUE, _FALSE, _I32, _I64, _BINARY, _LIST, _STRUCT = 1, 2, 5, 6, 8, 9, 12


def varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _zigzag(number: int) -> bytes:
    return varint(number << 1 if number >= 0 else (-number << 1) - 1)


def boolean(value: bool) -> Value:
    """A boolean field, which is told by its wire type alone."""
    return (_TRUE if value else _FALSE), b""


def i32(number: int) -> Value:
    """
    Raises:
        OverflowError: it has more bits.
    """
    if not -(1 << 31) <= number < 1 << 31:
        raise OverflowError(f"{number} does not fit into 32 bits")
    return _I32, _zigzag(number)


def i64(number: int) -> Value:
    return _I64, _zigzag(number)


def binary(data: bytes) -> Value:
    return _BINARY, varint(len(data)) + data


def text(string: str) -> Value:
    return binary(string.encode())


def many(values: Iterable[Value]) -> Value:
    """A list of values of the same type; an empty one counts as one of structures."""
    values = list(values)
    [kind] = {kind for kind, _ in values} or {_STRUCT}
    size = bytes([len(values) << 4 | kind]) if len(values) < 15 else bytes([0xF0 | kind]) + varint(len(values))
    return _LIST, size + b"".join(data for _, data in values)


def struct(fields: Mapping[int, Value]) -> Value:
    """A structure of fields by their numbers, which ascend by at most 15."""
    out, before = bytearray(), 0
    for number, (kind, data) in fields.items():
        assert 0 < number - before < 16
        out.append(number - before << 4 | kind)
        out += data
        before = number
    return _STRUCT, bytes(out) + b"\0"
