"""The header of a Parquet data page: where its values start, which no reader of pyarrow's tells.

Thrift compact protocol and PageHeader as in https://github.com/apache/parquet-format (Encodings.md, parquet.thrift) and
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_DATA_PAGE, _PLAIN = 0, 0
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_MAX_DEPTH = 4


@dataclass(frozen=True)
class PageHeader:
    """A plain, version 1 data page: bytes of its header, bytes of its values, and how many values it says it has."""

    header_bytes: int
    value_bytes: int
    num_values: int


def read_page_header(content: bytes) -> PageHeader | None:
    """Parse the page header that `content` starts with; None for any page but an uncompressed plain one of version 1.

    Bytes that are no header, or end within it, give None, too.
    """
    try:
        fields, end = _read_struct(content, 0, _MAX_DEPTH)
    except (IndexError, ValueError):
        return None
    page = fields.get(5)
    if fields.get(1) != _DATA_PAGE or not isinstance(page, dict) or page.get(2) != _PLAIN:
        return None
    value_bytes, num_values = fields.get(2), page.get(1)
    if not isinstance(value_bytes, int) or fields.get(3) != value_bytes or not isinstance(num_values, int):
        return None
    return PageHeader(header_bytes=end, value_bytes=value_bytes, num_values=num_values)


def _read_struct(content: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    if depth == 0:
        raise ValueError("nested too deeply")
    fields: dict[int, Any] = {}
    number = 0
    while content[at] != 0:
        delta, kind = content[at] >> 4, content[at] & 15
        at += 1
        if delta:
            number += delta
        else:
            number, at = _read_integer(content, at)
        fields[number], at = _read_value(content, at, kind, depth)
    return fields, at + 1


def _read_value(content: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (_TRUE, _FALSE):
        return kind == _TRUE, at
    if kind == _BYTE:
        return content[at], at + 1
    if kind in (_I16, _I32, _I64):
        return _read_integer(content, at)
    if kind == _BINARY:
        length, at = _read_varint(content, at)
        if at + length > len(content):
            raise ValueError("text beyond the end")
        return content[at : at + length], at + length
    if kind == _STRUCT:
        return _read_struct(content, at, depth - 1)
    raise ValueError(f"type {kind} has no place in a page header")


def _read_integer(content: bytes, at: int) -> tuple[int, int]:
    value, at = _read_varint(content, at)
    return (value >> 1) ^ -(value & 1), at


def _read_varint(content: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number of more than ten bytes")
