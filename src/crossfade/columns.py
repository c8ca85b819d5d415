"""What a PostgreSQL column can hold of BSON, by its type: the one table that decides.

A `ColumnKind` says three things as Python expressions of a placeholder `@`: which BSON values the column
holds *exactly and reversibly*, how such a value is written, and how it is read. Expressions, because an
entity puts them into one function per direction (see entity.py): a call per value would double the cost of
converting a document, and a second, slower copy of the rules could disagree with the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

from bson import Binary, Decimal128, Int64, ObjectId
from sqlalchemy import (
    CHAR,
    REAL,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Double,
    Enum,
    Float,
    Integer,
    LargeBinary,
    Numeric,
    SmallInteger,
    String,
    Text,
    Uuid,
)
from sqlalchemy.dialects.postgresql import CITEXT, JSONB
from sqlalchemy.types import TypeDecorator

from crossfade.values import (
    Unmappable,
    dump_json,
    encode_document,
    id_to_text,
    is_unicode,
    load_json,
    text_to_id,
)


class DocumentId(TypeDecorator[str]):
    """A column that holds an id as text, as `crossfade.values.id_to_text` writes it, `COLLATE "C"`.

    A `str` bound to it is id text already; any other id (an ObjectId, an int ...) is turned into its text, so
    `table.c.id == object_id` works. Results are id text: `text_to_id` gives the id.

    The collation makes the order that of the bytes: the same on every server, and the cheapest.
    """

    impl = Text
    cache_ok = True

    def __init__(self) -> None:
        super().__init__(collation="C")

    def process_bind_param(self, value: Any, dialect: Any) -> str | None:  # noqa: ARG002
        """Id text for a bound value; raises `Unmappable` for what cannot be an id."""
        return value if value is None or type(value) is str else id_to_text(value)


def _no_nearest(_value: Any) -> Any:
    return None


@dataclass(frozen=True, slots=True)
class ColumnKind:
    """How one column type takes BSON values.

    Attributes:
        accepts: expression of `@`, true for the BSON values that the column holds exactly; never raises.
        store: expression of `@`, the value to write, for an accepted one.
        load: expression of `@`, the BSON value of what was read, never NULL.
        nearest: for a value that is not accepted: something of use to SQL, or None.
        storable: whether the column takes this value, one that `store` did not make (a stand-in, a key).
    """

    accepts: str
    store: str
    load: str
    storable: Callable[[Any], bool]
    nearest: Callable[[Any], Any] = _no_nearest


def kind_of(column: Column[Any]) -> ColumnKind | None:
    """The kind of a table's column, or None for a type that no BSON value is mapped to."""
    sql_type = column.type
    for supported, build in _BY_TYPE:
        if isinstance(sql_type, supported):
            return build(sql_type)
    return None


SUPPORTED: Final = (
    "Text, String, Enum, CITEXT, DateTime(timezone=True), SmallInteger, Integer, BigInteger, Double, "
    "Float (53 bits), Numeric, Boolean, LargeBinary, Uuid, JSONB, DocumentId"
)
"""The column types that `kind_of` knows, for messages."""


# -- the functions that the expressions call -------------------------------------------------------


def is_id(value: Any) -> bool:
    """Whether `id_to_text` takes a value."""
    try:
        id_to_text(value)
    except Unmappable:
        return False
    return True


def dump_checked(value: Any) -> bytes:
    """JSON text of a value; one that needed a wrapper is read back and compared before it is trusted.

    Raises:
        Unmappable: the value has no JSON form, or the form does not come back as it was.
    """
    text = dump_json(value)
    if b'"$' not in text:
        return text
    try:
        back = encode_document({"v": load_json(text)})
    except ValueError:
        back = b""
    if back != encode_document({"v": value}):
        raise Unmappable("a value cannot be carried to JSON and back unchanged")
    return text


def is_exact_numeric(value: Decimal128, precision: int | None, scale: int | None) -> bool:
    """Whether numeric(precision, scale) gives this decimal back bit for bit: digits, scale and sign."""
    decimal = value.to_decimal()
    if not decimal.is_finite() or (not decimal and decimal.is_signed()):
        return False
    _, digits, exponent = decimal.as_tuple()
    assert isinstance(exponent, int)
    # A number without a fixed scale keeps the digits after the point, but not the E of 1E+3. More than 34
    # digits are bits that no driver writes.
    if exponent > 0 or len(digits) > 34 or Decimal128(decimal).bid != value.bid:
        return False
    if precision is None:
        return True
    return -exponent == (scale or 0) and len(digits) <= precision


def load_decimal(number: Decimal) -> Decimal128 | None:
    """The decimal of a numeric column; None for more than 34 digits, which only a stand-in can have: the true
    value is then in `extra`."""
    try:
        return Decimal128(number)
    except ArithmeticError:
        return None


def is_id_text(value: Any) -> bool:
    """Whether a value is text that `text_to_id` reads."""
    return _is_good_text(value) and _reads(text_to_id, value)


def is_json_text(value: Any) -> bool:
    """Whether a value is JSON text that `load_json` reads."""
    return isinstance(value, bytes | str) and _reads(load_json, value)


def _reads(read: Callable[[Any], Any], value: Any) -> bool:
    try:
        read(value)
    except ValueError:
        return False
    return True


EXPRESSION_NAMES: Final[dict[str, Any]] = {
    "Binary": Binary,
    "Decimal128": Decimal128,
    "Int64": Int64,
    "ObjectId": ObjectId,
    "UTC": UTC,
    "UUID": UUID,
    "datetime": datetime,
    "dump_checked": dump_checked,
    "id_to_text": id_to_text,
    "is_exact_numeric": is_exact_numeric,
    "is_id": is_id,
    "is_unicode": is_unicode,
    "load_decimal": load_decimal,
    "load_json": load_json,
    "text_to_id": text_to_id,
}
"""What the expressions of a `ColumnKind` refer to."""


# -- nearest useful values -------------------------------------------------------------------------


def _as_number(value: Any) -> int | float | Decimal | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, Decimal128):
        decimal = value.to_decimal()
        return None if decimal.is_snan() else decimal
    return value if isinstance(value, int | float) else None


def _nearest_integer(low: int, high: int) -> Callable[[Any], int | None]:
    def nearest(value: Any) -> int | None:
        """The same number if it is a whole one in range; rounding would be a lie to whoever reads the
        column."""
        number = _as_number(value)
        if number is None or not math.isfinite(number) or number != int(number):
            return None
        return int(number) if low <= number <= high else None

    return nearest


def _nearest_float(value: Any) -> float | None:
    number = _as_number(value)
    if number is None:
        return None
    nearest = float(number)
    # A decimal past the range of doubles is not infinite.
    return None if math.isinf(nearest) and isinstance(number, Decimal) and number.is_finite() else nearest


def _nearest_date(value: Any) -> datetime | None:
    """A date that was stored as a string, if it says its offset."""
    if type(value) is not str:
        return None
    try:
        parsed = datetime.fromisoformat(value)
        return parsed.astimezone(UTC) if parsed.tzinfo is not None else None
    except (ValueError, OverflowError):
        return None


def _nearest_bytes(value: Any) -> bytes | None:
    return bytes(value) if isinstance(value, Binary) else None


def _nearest_numeric(precision: int | None, scale: int | None) -> Callable[[Any], Decimal | None]:
    def nearest(value: Any) -> Decimal | None:
        number = _as_number(value)
        if number is None or not math.isfinite(number):
            return None
        decimal = Decimal(repr(number)) if isinstance(number, float) else Decimal(number)
        # With a limit, the value must be below it after PostgreSQL rounded it to the scale.
        if precision is not None and abs(decimal) >= 10 ** (precision - (scale or 0)) - 1:
            return None
        return decimal

    return nearest


# -- the kinds -------------------------------------------------------------------------------------

_GOOD_TEXT = 'type(@) is str and "\\0" not in @ and (@.isascii() or is_unicode(@))'


def _is_good_text(value: Any) -> bool:
    return type(value) is str and "\0" not in value and is_unicode(value)


def _text(sql_type: Any) -> ColumnKind | None:
    if isinstance(sql_type, CHAR):
        return None  # char(n) is padded with blanks: what comes back is not what was written
    length = sql_type.length
    if length is None:
        return ColumnKind(_GOOD_TEXT, "@", "@", _is_good_text)
    return ColumnKind(
        f"{_GOOD_TEXT} and len(@) <= {length}",
        "@",
        "@",
        lambda value: _is_good_text(value) and len(value) <= length,
    )


def _enum(sql_type: Any) -> ColumnKind:
    names = frozenset(sql_type.enums)
    # A set of literals is compiled into a constant.
    literal = "{" + ", ".join(sorted(repr(str(name)) for name in names)) + "}"
    return ColumnKind(
        f"type(@) is str and @ in {literal}", "@", "@", lambda value: type(value) is str and value in names
    )


def _date(sql_type: Any) -> ColumnKind | None:
    if not sql_type.timezone:
        return None  # timestamp without time zone: its meaning would hang on the session's settings
    return ColumnKind(
        # BSON dates have milliseconds; a date of an application may have more, and is cut in the careful
        # path.
        "type(@) is datetime and @.tzinfo is UTC and not @.microsecond % 1000",
        "@",
        "(@ if @.tzinfo is UTC else @.astimezone(UTC))",
        lambda value: isinstance(value, datetime) and value.tzinfo is not None,
        _nearest_date,
    )


def _integer(low: int, high: int) -> ColumnKind:
    return ColumnKind(
        f"type(@) is int and {low} <= @ <= {high}",
        "@",
        "@",
        lambda value: type(value) is int and low <= value <= high,
        _nearest_integer(low, high),
    )


def _bigint(_sql_type: Any) -> ColumnKind:
    low, high = -(2**63), 2**63 - 1
    return ColumnKind(
        "type(@) is Int64",
        "int(@)",
        "Int64(@)",
        lambda value: type(value) is int and low <= value <= high,
        _nearest_integer(low, high),
    )


def _float(sql_type: Any) -> ColumnKind | None:
    if isinstance(sql_type, REAL) or (sql_type.precision is not None and sql_type.precision <= 24):
        return None  # float4 would round
    return ColumnKind(
        # NaN is kept whole elsewhere: its sign and payload are lost on the way.
        "type(@) is float and @ == @",
        "@",
        "@",
        lambda value: type(value) is float,
        _nearest_float,
    )


def _numeric(sql_type: Any) -> ColumnKind:
    limits = f"{sql_type.precision}, {sql_type.scale}"
    return ColumnKind(
        f"type(@) is Decimal128 and is_exact_numeric(@, {limits})",
        "@.to_decimal()",
        "load_decimal(@)",
        lambda value: isinstance(value, Decimal | int) and type(value) is not bool,
        _nearest_numeric(sql_type.precision, sql_type.scale),
    )


def _boolean(_sql_type: Any) -> ColumnKind:
    return ColumnKind("(@ is True or @ is False)", "@", "@", lambda value: type(value) is bool)


def _bytes(_sql_type: Any) -> ColumnKind:
    return ColumnKind("type(@) is bytes", "@", "bytes(@)", lambda value: type(value) is bytes, _nearest_bytes)


def _uuid(_sql_type: Any) -> ColumnKind:
    return ColumnKind(
        "type(@) is Binary and @.subtype == 4 and len(@) == 16",
        "UUID(bytes=bytes(@))",
        "Binary(@.bytes, 4)",
        lambda value: isinstance(value, UUID),
    )


def _json(_sql_type: Any) -> ColumnKind:
    return ColumnKind("@ is not None", "dump_checked(@)", "load_json(@)", is_json_text)


def _id(_sql_type: Any) -> ColumnKind:
    return ColumnKind(
        "(type(@) is ObjectId or @ is not None and is_id(@))",
        "(@.binary.hex() if type(@) is ObjectId else id_to_text(@))",
        "text_to_id(@)",
        is_id_text,
    )


# The first that matches wins: SmallInteger and BigInteger are Integers to SQLAlchemy, Enum is a String,
# Float a Numeric.
_BY_TYPE: Final[tuple[tuple[type[Any], Callable[[Any], ColumnKind | None]], ...]] = (
    (DocumentId, _id),
    (Enum, _enum),
    (CITEXT, _text),
    (String, _text),
    (DateTime, _date),
    (SmallInteger, lambda _: _integer(-(2**15), 2**15 - 1)),
    (BigInteger, _bigint),
    (Integer, lambda _: _integer(-(2**31), 2**31 - 1)),
    (Double, _float),
    (Float, _float),
    (Numeric, _numeric),
    (Boolean, _boolean),
    (LargeBinary, _bytes),
    (Uuid, _uuid),
    (JSONB, _json),
)
