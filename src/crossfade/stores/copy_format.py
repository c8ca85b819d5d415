"""PostgreSQL's binary COPY format, written row by row without a driver's help (pure).

A generic adapter looks up the type of every value again; a table's types do not change between two rows. So
one function per table is compiled from the types of its columns. That, and leaving the text format, is worth
nearly half of a backfill's time.

Source of the format: PostgreSQL documentation, "COPY", section Binary Format; of the values: each type's
``*recv`` function.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import psycopg
from psycopg import pq

#: What stands before the first row: signature, flags, length of the header's extension.
HEADER: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
#: What stands behind the last row.
TRAILER: Final = b"\xff\xff"

Row = tuple[Any, ...]

_POSTGRES_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)


def _microseconds(value: datetime) -> int:
    since = value - _POSTGRES_EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def _json_bytes(value: bytes | str) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


# Expressions of a value `@` that is not NULL: length and bytes, by the name of the type in pg_type.
_TEXT = "L(len(t := @.encode())) + t"
_EXPRESSIONS: Final[dict[str, str]] = {
    "text": _TEXT,
    "varchar": _TEXT,
    "citext": _TEXT,
    "int2": "I2(2, @)",
    "int4": "I4(4, @)",
    "int8": "I8(8, @)",
    "float8": "F8(8, @)",
    "bool": "(TRUE if @ else FALSE)",
    "bytea": "L(len(@)) + @",
    "uuid": "L(16) + @.bytes",
    "timestamptz": "I8(8, microseconds(@))",
    # 1 is the version of jsonb's binary form.
    "jsonb": "L(len(t := json_bytes(@)) + 1) + ONE + t",
}
_NAMES: Final[dict[str, Any]] = {
    "L": struct.Struct(">i").pack,
    "I2": struct.Struct(">ih").pack,
    "I4": struct.Struct(">ii").pack,
    "I8": struct.Struct(">iq").pack,
    "F8": struct.Struct(">id").pack,
    "TRUE": b"\0\0\0\1\1",
    "FALSE": b"\0\0\0\1\0",
    "ONE": b"\1",
    "NULL": b"\xff\xff\xff\xff",
    "microseconds": _microseconds,
    "json_bytes": _json_bytes,
}


class ColumnType:
    """A column's type as the catalogue has it.

    Attributes:
        name: of the type in ``pg_type``; of the base type for a domain.
        oid: its number.
        is_enum: its values travel as text.
    """

    __slots__ = ("is_enum", "name", "oid")

    def __init__(self, name: str, oid: int, is_enum: bool = False) -> None:
        self.name = name
        self.oid = oid
        self.is_enum = is_enum


def compile_row(types: Sequence[ColumnType]) -> Callable[[Row], bytes]:
    """A function that writes one row of these types; None is NULL."""
    names, parts = _expressions(types)
    variables = "".join(f"v{n}, " for n in range(len(types)))
    write: Callable[[Row], bytes] = _compile(
        ["def write(row):", f"    {variables} = row", f"    return {' + '.join(['HEAD', *parts])}"],
        names,
        len(parts),
    )
    return write


def compile_rows(
    types: Sequence[ColumnType], repeated: Sequence[int] = ()
) -> Callable[[Iterable[Row]], bytes]:
    """A function that writes all rows of one owner, whose first column is the same in all of them.

    Args:
        repeated: places of columns that are written a second time, behind the others.
    """
    names, parts = _expressions(types)
    for place in repeated:
        parts[place] = f"(r{place} := {parts[place]})"
        parts.append(f"r{place}")
    variables = "".join(f"v{n}, " for n in range(len(types)))
    write: Callable[[Iterable[Row]], bytes] = _compile(
        [
            "def write(rows):",
            "    if not rows: return b''",
            "    v0 = rows[0][0]",
            f"    h = HEAD + {parts[0]}",
            f"    return b''.join([{' + '.join(['h', *parts[1:]])} for {variables} in rows])",
        ],
        names,
        len(parts),
    )
    return write


def _expressions(types: Sequence[ColumnType]) -> tuple[dict[str, Any], list[str]]:
    names = dict(_NAMES)
    parts = []
    for n, column in enumerate(types):
        expression = _TEXT if column.is_enum else _EXPRESSIONS.get(column.name)
        if expression is None:
            names[f"dump{n}"] = _driver_dump(column)
            expression = f"dump{n}(@)"
        parts.append(f"(NULL if v{n} is None else {expression.replace('@', f'v{n}')})")
    return names, parts


def _driver_dump(column: ColumnType) -> Callable[[Any], bytes]:
    """The driver's own binary form of a type that is not in the table above (numeric, date ...)."""
    dumper = psycopg.adapters.get_dumper_by_oid(column.oid, pq.Format.BINARY)(object)

    def dump(value: Any) -> bytes:
        data = bytes(dumper.dump(value) or b"")
        return struct.pack(">i", len(data)) + data

    return dump


def _compile(lines: Sequence[str], names: dict[str, Any], fields: int) -> Any:
    names["HEAD"] = struct.pack(">h", fields)
    # Nothing but the expressions above is in the source.
    exec(compile("\n".join(lines), "<binary COPY>", "exec"), names)  # noqa: S102
    return names["write"]
