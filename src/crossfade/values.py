"""BSON values outside MongoDB: canonical bytes, digests, ids as text, any value as JSONB.

The promise: whatever leaves a document through this module comes back as the very same BSON, or
`Unmappable` says in one sentence why it cannot. Nothing here is approximate and nothing does I/O.

- *Canonical bytes* are the BSON of a document without `_cf`, `_id` first (every server stores it first). Two
  documents are equal when their canonical bytes are: types, values, order of fields, bits of a NaN.
- *Id text* is what stands for an `_id` in PostgreSQL: 24 hex digits for an ObjectId, a prefixed form for the
  rest. One id has one text and one text has one id.
- *JSON* is natural JSON where JSON says it all, and wrappers in the style of MongoDB's Extended JSON v2
  where it does not. It survives what PostgreSQL's `jsonb` does to a value: keys sorted by length and bytes,
  `1e16` written out, `-0.0` turned into `0.0`, NUL refused.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Context, Decimal
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Final

import bson
import orjson
from bson import (
    Binary,
    Code,
    DatetimeMS,
    DBRef,
    Decimal128,
    Int64,
    MaxKey,
    MinKey,
    ObjectId,
    Regex,
    Timestamp,
)
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.errors import InvalidId

Document = dict[str, Any]
Json = Any
"""A value that `json.dumps` accepts: None, bool, int, float, str, list, dict with str keys."""

CODEC_OPTIONS: Final[CodecOptions[dict[str, Any]]] = CodecOptions(
    document_class=dict,
    tz_aware=True,
    uuid_representation=UuidRepresentation.UNSPECIFIED,
    unicode_decode_error_handler="strict",
    tzinfo=UTC,
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,
)
"""How every document is decoded: nothing interpreted that would not be encoded back the same."""

DIGEST_SIZE: Final = 16
"""Bytes of a digest."""

BOOKKEEPING: Final = "_cf"
"""The field of a document that holds its revision, operation id and debt; never part of its content."""

_NOTES: Final = b"\x03" + BOOKKEEPING.encode() + b"\0"
"""How its element begins in BSON."""

MAX_DEPTH: Final = 200
"""Levels of documents and arrays in one another. MongoDB's own limit for a stored document is 180-200; three
JSON levels for each stay below the 1,024 that parsers accept."""

MAX_ID_BYTES: Final = 2000
"""Longest id text, in bytes of UTF-8: a PostgreSQL B-tree entry ends at 2,704 bytes and may hold a second
column."""

_INT32_MIN, _INT32_MAX = -(2**31), 2**31 - 1
_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
#: Room for every double and every decimal of BSON, digit by digit.
_EXACT = Context(prec=1_100, Emin=-9_999, Emax=9_999)


class Unmappable(Exception):
    """A value that cannot be carried to PostgreSQL and back unchanged.

    Attributes:
        reason: one sentence for a person, without the value itself (it may be a secret).
        field: path of the field in dotted form, None when the whole document is meant.
    """

    def __init__(self, reason: str, field: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.field = field


# -- canonical bytes and digests -------------------------------------------------------------------


def encode_document(document: Mapping[str, Any]) -> bytes:
    """Canonical bytes of a document: its BSON without `_cf`, `_id` first.

    Raises:
        Unmappable: a value has no BSON form (a lone surrogate, an integer past 64 bits, NUL in a key, a
            Python type that BSON does not know).
    """
    if BOOKKEEPING in document:
        document = {name: value for name, value in document.items() if name != BOOKKEEPING}
    return _encode(document)


def digest(document: Mapping[str, Any]) -> bytes:
    """Digest of a document: 16 bytes, of its canonical bytes. Raises as `encode_document` does."""
    return blake2b(encode_document(document), digest_size=DIGEST_SIZE).digest()


def fields_that_differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the top-level fields in which two documents differ; ``("(order)",)`` when only their order does.

    Raises:
        Unmappable: a value has no canonical bytes.
    """

    def element(document: Mapping[str, Any], name: str) -> bytes | None:
        return encode_document({"v": document[name]}) if name in document else None

    names = dict.fromkeys([*one, *other])
    found = tuple(name for name in names if element(one, name) != element(other, name))
    return found or (("(order)",) if list(one) != list(other) else ())


def equal(one: Any, other: Any) -> bool:
    """Whether two BSON values are equal to a filter of MongoDB: numbers by value, whatever their types; true is no
    number; a NaN equals another; fields of documents in their order.

    Raises:
        Unmappable: a value has no canonical bytes.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal, one, other))
    numbers = [number for value in (one, other) if (number := _number(value)) is not None]
    if len(numbers) == 2:
        return numbers[0] == numbers[1] or all(map(math.isnan, numbers))
    return encode_document({"v": one}) == encode_document({"v": other})


def _number(value: Any) -> int | float | Decimal | None:
    if isinstance(value, Decimal128):
        exact = value.to_decimal()
        return math.nan if exact.is_nan() else exact
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def digest_of_bytes(canonical: bytes) -> bytes:
    """Digest of canonical bytes that are at hand already: 16 bytes."""
    return blake2b(canonical, digest_size=DIGEST_SIZE).digest()


def decode_document(raw: bytes) -> Document:
    """Decode one stored document, `_cf` included, sure that encoding it again gives the same bytes.

    An `_id` that does not stand first is moved there, which is where every server puts it.

    Raises:
        Unmappable: the bytes are not BSON, or hold what Python's BSON types cannot give back: invalid UTF-8,
            a field twice, the deprecated types undefined, symbol and DBPointer, an unusual encoding of a
            value.
    """
    try:
        document = bson.decode(raw, CODEC_OPTIONS)
        if bson.encode(document, codec_options=CODEC_OPTIONS) == raw:
            return document
    except Exception:  # noqa: S110 - the walk below names what PyMongo trips over
        pass
    return _decode_by_walking(raw)


def decode_canonical(canonical: bytes) -> Document:
    """The document of which `encode_document` gave these bytes, if `decode_document` or `normal_form` gave that."""
    if b"$ref" in canonical:
        return decode_document(canonical)  # PyMongo may take for a `DBRef` what is none
    return bson.decode(canonical, CODEC_OPTIONS)


def notes_beside(canonical: bytes, raw: bytes) -> bytes | None:
    """The `_cf` of a stored document that holds these canonical bytes and `_cf` behind them; None: it does not."""
    end = len(canonical) - 1
    notes = raw[end + len(_NOTES) : -1]
    if raw[4:end] != canonical[4:end] or raw[end : end + len(_NOTES)] != _NOTES or raw[-1:] != b"\0":
        return None
    return notes if len(notes) >= 5 and _int32(notes, 0)[0] == len(notes) else None


def normal_form(document: Mapping[str, Any]) -> Document:
    """The document as MongoDB would give it back, without `_cf`: dates in UTC cut to milliseconds, tuples as
    lists, integers past 32 bits as `Int64`.

    Raises:
        Unmappable: as `encode_document` and `decode_document` do.
    """
    return decode_document(encode_document(document))


def _encode(document: Mapping[str, Any]) -> bytes:
    try:
        return bson.encode(document, codec_options=CODEC_OPTIONS)
    except Exception as error:  # PyMongo raises half a dozen kinds, all mean the same
        raise _not_encodable(document, error) from None


def _not_encodable(document: Mapping[str, Any], error: Exception) -> Unmappable:
    """Say which top-level field cannot be encoded and why, without quoting its value."""
    culprit: str | None = None
    for name, value in document.items():
        try:
            bson.encode({name: value}, codec_options=CODEC_OPTIONS)
        except Exception as one:
            culprit, error = name, one
            break
    where = "the document" if culprit is None else f"field {_shown(culprit)}"
    if isinstance(error, UnicodeError):
        return Unmappable(f"{where} holds text that is not valid Unicode (a lone surrogate)", culprit)
    if isinstance(error, RecursionError):
        return Unmappable(f"{where} is nested too deeply", culprit)
    if isinstance(error, OverflowError):
        return Unmappable(f"{where} holds an integer of more than 64 bits", culprit)
    if isinstance(culprit, str) and "\0" in culprit:
        return Unmappable(f"{where} has NUL in its name", culprit)
    return Unmappable(f"{where} holds a value that has no BSON form", culprit)


def _shown(name: object) -> str:
    """A field name that is safe in a log line and in PostgreSQL text."""
    return ascii(str(name)[:100]) if not str(name).isprintable() or name == "" else str(name)[:100]


# -- walking raw BSON ------------------------------------------------------------------------------

_TYPE_NAMES: Final = {
    0x01: "a double",
    0x02: "a string",
    0x03: "a document",
    0x04: "an array",
    0x05: "binary data",
    0x06: "a value of the deprecated BSON type undefined",
    0x07: "an ObjectId",
    0x08: "a boolean",
    0x09: "a date",
    0x0A: "null",
    0x0B: "a regular expression",
    0x0C: "a value of the deprecated BSON type DBPointer",
    0x0D: "JavaScript code",
    0x0E: "a value of the deprecated BSON type symbol",
    0x0F: "JavaScript code with scope",
    0x10: "a 32-bit integer",
    0x11: "a timestamp",
    0x12: "a 64-bit integer",
    0x13: "a Decimal128",
    0x7F: "a MaxKey",
    0xFF: "a MinKey",
}
_FIXED_SIZE: Final = {
    0x01: 8, 0x06: 0, 0x07: 12, 0x08: 1, 0x09: 8, 0x0A: 0, 0x10: 4, 0x11: 8, 0x12: 8, 0x13: 16, 0x7F: 0,
    0xFF: 0,
}  # fmt: skip
_int32: Final = struct.Struct("<i").unpack_from


class _Malformed(Exception):
    """The bytes end early or a length leads outside."""


def _decode_by_walking(raw: bytes) -> Document:
    """Decode element by element: slower, but it names the field that is at fault, and keeps as plain
    documents what PyMongo would turn into a `DBRef` whose fields come back in another order."""
    try:
        document = _walk(raw, 0, len(raw), "", 1)
        elements = [raw[start:end] for _, _, start, _, end in _elements(raw, 0, len(raw), "")]
    except (_Malformed, struct.error, IndexError):
        raise Unmappable("the document is not valid BSON: a length leads outside of it") from None
    first = [e for e in elements if e[1:5] == b"_id\0"]
    canonical = raw[:4] + b"".join(first + [e for e in elements if e[1:5] != b"_id\0"]) + b"\0"
    if _encode(document) != canonical:
        raise Unmappable("the document is encoded in a way that cannot be carried back unchanged")
    return document


def digest_of_stored(raw: bytes, *, id_alone: bool = False) -> bytes:
    """Digest of a stored document that may not decode: of what it holds but `_cf`, or of its `_id` alone.

    Of all its bytes where one element cannot be told from the next.
    """
    try:
        elements = [(name, raw[start:end]) for _, name, start, _, end in _elements(raw, 0, len(raw), "")]
    except (_Malformed, Unmappable, struct.error, IndexError):
        return digest_of_bytes(raw)
    kept = [one for name, one in elements if (name == "_id" if id_alone else name != BOOKKEEPING)]
    return digest_of_bytes(b"".join(kept))


def _elements(raw: bytes, start: int, end: int, path: str) -> Iterator[tuple[int, str, int, int, int]]:
    """Elements of the document in raw[start:end]: (type, name, element start, value start, element end)."""
    if end - start < 5 or _int32(raw, start)[0] != end - start or raw[end - 1] != 0:
        raise _Malformed
    at = start + 4
    while at < end - 1:
        kind, name_end = raw[at], raw.find(b"\0", at + 1, end)
        if name_end < 0:
            raise _Malformed
        try:
            name = raw[at + 1 : name_end].decode()
        except UnicodeDecodeError:
            shown = raw[at + 1 : name_end].decode(errors="backslashreplace")
            raise Unmappable(
                f"the field name {_shown(path + shown)} is not valid UTF-8", path + shown
            ) from None
        value = name_end + 1
        after = value + _size(raw, kind, value, end)
        if after > end - 1:
            raise _Malformed
        yield kind, name, at, value, after
        at = after


def _size(raw: bytes, kind: int, at: int, end: int) -> int:
    """Length in bytes of the value of a BSON type that begins at `at`."""
    fixed = _FIXED_SIZE.get(kind)
    if fixed is not None:
        return fixed
    if kind == 0x0B:
        pattern_end = raw.index(b"\0", at, end) if raw.find(b"\0", at, end) >= 0 else end
        return raw.find(b"\0", pattern_end + 1, end) + 1 - at if pattern_end < end else end
    length = int(_int32(raw, at)[0])
    if length < 0:
        raise _Malformed
    if kind in (0x03, 0x04, 0x0F):
        return length
    if kind == 0x05:
        return length + 5
    if kind in (0x02, 0x0D, 0x0E):
        return length + 4
    if kind == 0x0C:
        return length + 16
    raise Unmappable(f"the document holds a value of the unknown BSON type 0x{kind:02x}")


def _walk(raw: bytes, start: int, end: int, path: str, depth: int) -> Document:
    if depth > MAX_DEPTH:
        raise _too_deep(path[:-1])
    document: Document = {}
    for kind, name, _, value, after in _elements(raw, start, end, path):
        here = path + name
        if name in document:
            raise Unmappable(f"field {_shown(here)} is there twice in one document", here)
        if kind == 0x03:
            document[name] = _walk(raw, value, after, here + ".", depth + 1)
        elif kind == 0x04:
            items = _walk(raw, value, after, here + ".", depth + 1)
            if any(key != str(index) for index, key in enumerate(items)):
                raise Unmappable(
                    f"field {_shown(here)} is an array whose positions are not 0, 1, 2 ...", here
                )
            document[name] = list(items.values())
        else:
            document[name] = _scalar(raw, kind, here, value, after)
    return document


def _scalar(raw: bytes, kind: int, here: str, value: int, after: int) -> Any:
    """One value that is neither document nor array, checked to encode back to the same bytes."""
    element = bytes([kind]) + b"v\0" + raw[value:after]
    small = struct.pack("<i", len(element) + 5) + element + b"\0"
    what = _TYPE_NAMES.get(kind, f"a value of the unknown BSON type 0x{kind:02x}")
    try:
        decoded = bson.decode(small, CODEC_OPTIONS)["v"]
        if bson.encode({"v": decoded}, codec_options=CODEC_OPTIONS) == small:
            return decoded
    except UnicodeDecodeError:
        problem = "that is not valid UTF-8"
    except Exception as error:
        problem = "that is not valid UTF-8" if "utf-8" in str(error) else "that cannot be decoded"
    else:
        problem = "in a form that would change when written back"
    if kind in (0x06, 0x0C, 0x0E):
        problem = "which current drivers cannot write"
    raise Unmappable(f"field {_shown(here)} holds {what} {problem}", here)


def _too_deep(path: str | None = None) -> Unmappable:
    return Unmappable(f"documents are nested in one another more than {MAX_DEPTH} levels deep", path)


# -- ids as text -----------------------------------------------------------------------------------


def id_to_text(_id: Any) -> str:
    """The text that stands for an `_id` in PostgreSQL.

    An ObjectId gives its 24 lower-case hex digits, a string `s:` and the string, anything else `j:` and its
    JSON as `to_json` has it (so does a string with NUL). Different ids have different texts, also
    the string "65f0..." and the ObjectId of the same digits, also 5 as 32-bit, 64-bit integer and double
    (`id_texts` has them all).

    Raises:
        Unmappable: an array, regular expression or code (none of them can be an `_id`), a value without a
            BSON form, or a text of more than 2,000 bytes, which no index would take.
    """
    if type(_id) is ObjectId:
        return _id.binary.hex()
    if type(_id) is str and "\0" not in _id:
        text = "s:" + _id
    else:
        if isinstance(_id, list | tuple | Regex):
            raise Unmappable("an array or a regular expression cannot be an _id", "_id")
        text = "j:" + dump_json(_id).decode()
    try:
        size = len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError:
        raise Unmappable("the _id holds text that is not valid Unicode (a lone surrogate)", "_id") from None
    if size > MAX_ID_BYTES:
        raise Unmappable(
            f"the _id takes more than {MAX_ID_BYTES} bytes as text, too long for an index", "_id"
        )
    return text


def id_texts(_id: Any) -> tuple[str, ...]:
    """The texts of all ids that MongoDB takes for this one, its own first.

    MongoDB compares numbers by value: of 5, `Int64(5)`, 5.0 and `Decimal128("5.00")` a collection holds one, and finds
    it by any of them. Numbers inside a document that is an id are left as they are.

    Raises:
        Unmappable: as `id_to_text` does.
    """
    own = id_to_text(_id)
    return (own,) if _number(_id) is None else _texts_of_equal_numbers(own)


@lru_cache(maxsize=4096)
def _texts_of_equal_numbers(own: str) -> tuple[str, ...]:
    number = _number(load_json(own[2:]))
    assert number is not None
    value = Decimal(number)
    equal: list[Any] = []
    if value.is_nan():
        equal = [math.nan, Decimal128("NaN")]
    elif value.is_infinite():
        equal = [float(value), Decimal128(value)]
    else:
        if _INT64_MIN <= value <= _INT64_MAX and value == value.to_integral_value():
            whole = int(value)
            equal += [Int64(whole), *([whole] if _INT32_MIN <= whole <= _INT32_MAX else [])]
        near = float(value)
        if math.isfinite(near) and Decimal(near) == value:
            equal += [near, -near] if near == 0 else [near]
    texts = [id_to_text(one) for one in equal]
    if value.is_finite():
        texts += (f'j:{{"$numberDecimal":"{one}"}}' for one in _equal_decimals(value))
    return tuple(dict.fromkeys((own, *texts)))


def _equal_decimals(value: Decimal) -> Iterator[Decimal]:
    """All of 34 digits at most that equal ``value``: 5, 5.0, 5.00 ..."""
    sign, digits, exponent = value.normalize(_EXACT).as_tuple()
    assert isinstance(exponent, int)
    for either in (sign,) if value else (0, 1):
        for zeros in range(35 - len(digits)):
            yield Decimal((either, (*digits, *(0,) * zeros), exponent - zeros))


def can_be_id(value: Any) -> bool:
    """Whether a record may have this `_id`; a filter, or the server, would take other values for a condition on it."""
    if isinstance(value, str):
        return is_unicode(value)
    if isinstance(value, Mapping):
        return not any(isinstance(key, str) and key.startswith("$") for key in value)
    return not isinstance(value, list | tuple | Regex | re.Pattern | DBRef)


def is_unicode(text: str) -> bool:
    """Whether a string has a UTF-8 form (it holds no lone surrogate): no store can hold another."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def text_to_id(text: str) -> Any:
    """The `_id` that `id_to_text` turned into this text.

    Raises:
        ValueError: the text did not come from `id_to_text`.
    """
    if len(text) == 24 and text[1] != ":":
        try:
            return ObjectId(bytes.fromhex(text))
        except (ValueError, InvalidId):
            pass
    elif text[:2] == "s:":
        return text[2:]
    elif text[:2] == "j:":
        return load_json(text[2:])
    raise ValueError("not the text of an id: expected 24 hex digits, or a text that begins with s: or j:")


# -- any value as JSON -----------------------------------------------------------------------------


def to_json(value: Any) -> Json:
    """Any BSON value as a JSON value that survives PostgreSQL's `jsonb`.

    Strings, booleans, null and 32-bit integers are themselves; so are doubles between 1e-4 and 1e16 and 0.0.
    Others are wrapped (`{"$oid": ...}`, `{"$date": {"$numberLong": ...}}`, ...; `{"$utf8": base64}` for a
    string with NUL). A document is a JSON object; where its order is not that of `jsonb`, a sibling
    `"$keys"` lists it. A document with a key that begins with `$` becomes `{"$doc": [[key, value], ...]}`.

    Raises:
        Unmappable: a value without a BSON form, or more than 200 levels of nesting.
    """
    return _to_json(value, 1)


def from_json(value: Json) -> Any:
    """The BSON value of what `to_json` made, also after it went through `jsonb`.

    Raises:
        ValueError: the JSON did not come from `to_json`.
    """
    try:
        return _from_json(value)
    except (KeyError, TypeError, AttributeError, IndexError, struct.error, binascii.Error) as error:
        raise ValueError(f"not the JSON of a BSON value: {error}") from None


def dump_json(value: Any) -> bytes:
    """`to_json` as compact JSON text in UTF-8, for a `jsonb` column. Raises as `to_json` does."""
    tree = _to_json(value, 1)
    try:
        return orjson.dumps(tree)
    except orjson.JSONEncodeError:
        # orjson ends at 254 levels; the standard library goes on.
        try:
            return json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode()
        except RecursionError:
            raise _too_deep() from None


def load_json(text: bytes | str | memoryview) -> Any:
    """The BSON value of JSON text that a `jsonb` column (or `dump_json`) gave.

    Raises:
        ValueError: the text did not come from `dump_json`.
    """
    return from_json(orjson.loads(text))


def _to_json(value: Any, depth: int) -> Json:
    encoder = _TO_JSON.get(type(value))
    if encoder is not None:
        return encoder(value, depth)
    # Not a type that decoding gives (a tuple, SON, a compiled pattern, a subclass): see what MongoDB would
    # give.
    plain = decode_document(_encode({"v": value}))["v"]
    encoder = _TO_JSON.get(type(plain))
    if encoder is None:
        raise Unmappable(f"a value of the type {type(value).__name__} has no JSON form")
    return encoder(plain, depth)


def _self(value: Any, _depth: int) -> Json:
    return value


def _text(value: str, _depth: int) -> Json:
    if "\0" not in value and value.isascii():
        return value
    try:
        encoded = value.encode()
    except UnicodeEncodeError:
        raise Unmappable("the document holds text that is not valid Unicode (a lone surrogate)") from None
    return {"$utf8": base64.b64encode(encoded).decode()} if b"\0" in encoded else value


def _int(value: int, _depth: int) -> Json:
    if _INT32_MIN <= value <= _INT32_MAX:
        return value
    if _INT64_MIN <= value <= _INT64_MAX:
        return {"$numberLong": str(value)}
    raise Unmappable("the document holds an integer of more than 64 bits")


def _int64(value: Int64, _depth: int) -> Json:
    return {"$numberLong": str(int(value))}


_NAN_BITS = struct.pack(">d", math.nan)


def _float(value: float, _depth: int) -> Json:
    # Outside of this range jsonb writes a number without the point that tells a double from an integer.
    if 1e-4 <= value < 1e16 or -1e16 < value <= -1e-4:
        return value
    bits = struct.pack(">d", value)
    if not any(bits):
        return value
    if value != value and bits != _NAN_BITS:  # noqa: PLR0124 - a NaN with a sign or payload of its own
        return {"$numberDouble": {"bits": bits.hex()}}
    return {"$numberDouble": _DOUBLE_NAMES.get(repr(value), repr(value))}


_DOUBLE_NAMES = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}


def _decimal(value: Decimal128, _depth: int) -> Json:
    text = str(value)
    try:
        plain = Decimal128(text).bid == value.bid
    except ArithmeticError:
        plain = False  # more than 34 digits: bits that no driver writes
    return {"$numberDecimal": text if plain else {"bits": value.bid.hex()}}


def _date(value: datetime, _depth: int) -> Json:
    aware = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
    return {"$date": {"$numberLong": str((aware - _EPOCH) // _MILLISECOND)}}


def _date_ms(value: DatetimeMS, _depth: int) -> Json:
    return {"$date": {"$numberLong": str(int(value))}}


def _binary(value: bytes, _depth: int) -> Json:
    subtype = value.subtype if isinstance(value, Binary) else 0
    return {"$binary": {"base64": base64.b64encode(value).decode(), "subType": f"{subtype:02x}"}}


def _oid(value: ObjectId, _depth: int) -> Json:
    return {"$oid": value.binary.hex()}


_REGEX_LETTERS: Final = {"i": 2, "l": 4, "m": 8, "s": 16, "u": 32, "x": 64}
"""BSON's option letters with the values of Python's `re` flags."""


def _regex(value: Regex[Any], _depth: int) -> Json:
    pattern = value.pattern if isinstance(value.pattern, str) else value.pattern.decode()
    if "\0" in pattern:
        raise Unmappable("a regular expression has NUL in its pattern")
    options = "".join(letter for letter, flag in _REGEX_LETTERS.items() if value.flags & flag)
    return {"$regularExpression": {"pattern": pattern, "options": options}}


def _timestamp(value: Timestamp, _depth: int) -> Json:
    return {"$timestamp": {"t": value.time, "i": value.inc}}


def _code(value: Code, depth: int) -> Json:
    wrapped: Json = {"$code": _text(str(value), depth)}
    if value.scope is not None:
        wrapped["$scope"] = _to_json(value.scope, depth + 1)
    return wrapped


def _dbref(value: DBRef, depth: int) -> Json:
    return _document(dict(value.as_doc()), depth)


def _array(value: list[Any], depth: int) -> Json:
    if depth > MAX_DEPTH:
        raise _too_deep()
    return [_to_json(item, depth + 1) for item in value]


def _document(value: dict[str, Any], depth: int) -> Json:
    if depth > MAX_DEPTH:
        raise _too_deep()
    natural: dict[str, Json] = {}
    for name, item in value.items():
        if name[:1] == "$":
            return {"$doc": [[_name(key), _to_json(one, depth + 1)] for key, one in value.items()]}
        encoder = _TO_JSON.get(type(item))
        natural[name] = encoder(item, depth + 1) if encoder is not None else _to_json(item, depth + 1)
    names = list(value)
    joined = "".join(names)
    if "\0" in joined or not joined.isascii():
        for name in names:
            _name(name)
    if len(names) > 1 and names != sorted(names, key=_jsonb_order):
        natural["$keys"] = names
    return natural


def _name(name: str) -> str:
    if "\0" in name:
        raise Unmappable("a field has NUL in its name", name)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise Unmappable("the name of a field is not valid Unicode (a lone surrogate)") from None
    return name


def _jsonb_order(name: str) -> tuple[int, bytes]:
    encoded = name.encode()
    return len(encoded), encoded


_TO_JSON: Final[dict[type, Callable[[Any, int], Json]]] = {
    str: _text,
    bool: _self,
    type(None): _self,
    int: _int,
    Int64: _int64,
    float: _float,
    Decimal128: _decimal,
    datetime: _date,
    DatetimeMS: _date_ms,
    bytes: _binary,
    Binary: _binary,
    ObjectId: _oid,
    Regex: _regex,
    Timestamp: _timestamp,
    Code: _code,
    MinKey: lambda _value, _depth: {"$minKey": 1},
    MaxKey: lambda _value, _depth: {"$maxKey": 1},
    DBRef: _dbref,
    list: _array,
    dict: _document,
}


def _from_json(value: Json) -> Any:
    kind = type(value)
    if kind is dict:
        order = value.get("$keys")
        if order is not None:
            return {name: _from_json(value[name]) for name in order}
        if len(value) <= 2:
            for name in value:
                if name[:1] == "$":
                    return _FROM_JSON["$code" if name == "$scope" else name](value)
        return {name: _from_json(item) for name, item in value.items()}
    if kind is list:
        return [_from_json(item) for item in value]
    return value


def _from_double(value: Json) -> float:
    shown = value["$numberDouble"]
    if isinstance(shown, dict):
        return float(struct.unpack(">d", bytes.fromhex(shown["bits"]))[0])
    return float(shown)


def _from_decimal(value: Json) -> Decimal128:
    shown = value["$numberDecimal"]
    return Decimal128.from_bid(bytes.fromhex(shown["bits"])) if isinstance(shown, dict) else Decimal128(shown)


def _from_date(value: Json) -> datetime | DatetimeMS:
    stamp = int(value["$date"]["$numberLong"])
    try:
        return _EPOCH + stamp * _MILLISECOND
    except OverflowError:
        return DatetimeMS(stamp)


def _from_binary(value: Json) -> bytes:
    data, subtype = base64.b64decode(value["$binary"]["base64"]), int(value["$binary"]["subType"], 16)
    return data if subtype == 0 else Binary(data, subtype)


def _from_regex(value: Json) -> Regex[str]:
    shown = value["$regularExpression"]
    return Regex(shown["pattern"], sum(_REGEX_LETTERS[letter] for letter in shown["options"]))


def _from_code(value: Json) -> Code:
    scope = value.get("$scope")
    return Code(_from_json(value["$code"]), None if scope is None else _from_json(scope))


def _from_doc(value: Json) -> Any:
    document = {name: _from_json(item) for name, item in value["$doc"]}
    if "$ref" in document:
        # What PyMongo decodes as a DBRef comes back as one, as long as encoding it keeps the order of its
        # fields.
        rest = dict(document)
        try:
            reference = DBRef(rest.pop("$ref"), rest.pop("$id", None), rest.pop("$db", None), rest)
        except TypeError:
            return document
        if list(reference.as_doc()) == list(document):
            return reference
    return document


_FROM_JSON: Final[dict[str, Callable[[Json], Any]]] = {
    "$oid": lambda value: ObjectId(bytes.fromhex(value["$oid"])),
    "$date": _from_date,
    "$numberLong": lambda value: Int64(value["$numberLong"]),
    "$numberDouble": _from_double,
    "$numberDecimal": _from_decimal,
    "$binary": _from_binary,
    "$utf8": lambda value: base64.b64decode(value["$utf8"]).decode(),
    "$regularExpression": _from_regex,
    "$timestamp": lambda value: Timestamp(value["$timestamp"]["t"], value["$timestamp"]["i"]),
    "$code": _from_code,
    "$minKey": lambda _value: MinKey(),
    "$maxKey": lambda _value: MaxKey(),
    "$doc": _from_doc,
}
