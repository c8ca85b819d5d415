"""What can be wrong with one document, whatever its collection: the stains, and the pen that makes them.

Every writer of a collection asks the same `Pen` about each kind in a fixed order; a kind that strikes is noted on the
document's label. The pen draws from a stream apart from the document's own, and draws for each kind whether its rate is
zero or not, so raising one rate never changes which documents another kind strikes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

from bson import CodecOptions, Decimal128, Int64, encode
from bson.codec_options import DatetimeConversion
from bson.datetime_ms import DatetimeMS
from bson.raw_bson import RawBSONDocument

from scorekeeper.legacy.population import SURROGATE_STAND_IN, Population
from scorekeeper.legacy.rates import DirtRates

#: A document as Mongoose wrote it: a dict, or a `RawBSONDocument` where Python cannot encode what is in it.
Document = Mapping[str, Any]

_LONE_SURROGATE = b"\xed\xa0\x80"

#: Reads anything the generator writes: lone surrogates become `"\\ud800"`, dates out of range `DatetimeMS`.
RAW_OPTIONS: CodecOptions[RawBSONDocument] = CodecOptions(
    document_class=RawBSONDocument,
    tz_aware=True,
    unicode_decode_error_handler="surrogatepass",
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,
)

_BEFORE_1970 = (
    datetime(1969, 12, 31, 23, 59, 59, 999000, tzinfo=UTC),
    datetime(1899, 12, 30, tzinfo=UTC),  # day 0 of spreadsheets
    datetime(1, 1, 1, tzinfo=UTC),  # the zero value of Go and .NET
    DatetimeMS(-62_198_755_200_000),  # a day of the year 2 BC
)
_AFTER_9999 = (
    DatetimeMS(253_402_300_800_000),  # the first millisecond of the year 10000
    DatetimeMS(1_735_689_600_000_000),  # microseconds taken for milliseconds
    DatetimeMS(8_640_000_000_000_000),  # the last date of JavaScript
)
_DECIMALS = tuple(
    Decimal128(text) for text in ("12.50", "0.1", "-0", "1E+6111", "0E-6176", "NaN", "-Infinity")
)
_BIG = (2**53 + 1, -(2**53) - 1, 2**63 - 1, 9_007_199_254_740_995)


@dataclass(frozen=True, slots=True)
class Labelled:
    """A document together with what is wrong with it.

    Attributes:
        document: what is stored.
        kinds: the kinds of dirt in it, each once; empty for a clean document.
    """

    document: Document
    kinds: tuple[str, ...]


@dataclass(slots=True)
class Pen:
    """Decides, kind by kind, what befalls one document, and notes it."""

    rates: DirtRates
    random: Random
    kinds: list[str] = field(default_factory=list)

    def strikes(self, kind: str) -> bool:
        """Whether `kind` befalls the document; if so it is noted."""
        rate: float = getattr(self.rates, kind)
        struck = self.random.random() < rate
        if struck:
            self.note(kind)
        return struck

    def note(self, kind: str) -> None:
        """Note a kind that was decided elsewhere."""
        if kind not in self.kinds:
            self.kinds.append(kind)


#: A place in a document: the (sub-)document and the key in it.
Place = tuple[dict[str, Any], str]


def stain(
    document: dict[str, Any],
    pen: Pen,
    *,
    dates: Sequence[Place],
    free: Callable[[], dict[str, Any]],
    numbers: Sequence[Place] = (),
    shape: Callable[[dict[str, Any], Random], None] | None = None,
) -> None:
    """Let everything befall `document` that can befall any document.

    Args:
        document: changed in place.
        pen: decides.
        dates: where dates are, besides `createdAt` and `updatedAt`.
        free: gives the document's free-form part, making it if there is none yet; for strange keys and values.
        numbers: where whole numbers are that another tool may have stored in another type, besides `__v`.
        shape: gives a field of the document's own schema another shape; without it only `settings` has two.
    """
    random = pen.random
    for kind, name in (("missing_created_at", "createdAt"), ("missing_updated_at", "updatedAt")):
        if pen.strikes(kind):
            document.pop(name, None)
    if pen.strikes("unknown_field"):
        document["appVersion"] = random.choice(("1.4.2", "1.9.0", "2.0.0-beta"))
        document["settings"] = {
            "theme": random.choice(("dark", "light")),
            "notifications": random.random() < 0.5,
        }
    if pen.strikes("string_or_object"):
        settings = {"theme": "dark", "notifications": True}
        if shape is not None and random.random() < 0.6:
            shape(document, random)
        else:
            document["settings"] = json.dumps(settings) if random.random() < 0.5 else settings
    _stain_dates(document, pen, dates)
    _stain_numbers(document, pen, free, numbers)
    _stain_keys(document, pen, free)


def _stain_dates(document: dict[str, Any], pen: Pen, dates: Sequence[Place]) -> None:
    stained: set[tuple[int, str]] = set()
    for kind in ("date_before_1970", "date_after_9999", "date_as_string"):
        if not pen.strikes(kind):
            continue
        places = [
            (holder, key)
            for holder, key in (*dates, (document, "createdAt"), (document, "updatedAt"))
            if isinstance(holder.get(key), datetime) and (id(holder), key) not in stained
        ]
        holder, key = pen.random.choice(places) if places else (document, f"importedAt{len(stained) or ''}")
        stained.add((id(holder), key))
        holder[key] = _odd_date(kind, pen.random, holder.get(key))


def _odd_date(kind: str, random: Random, was: datetime | None) -> object:
    if kind == "date_before_1970":
        return random.choice(_BEFORE_1970)
    if kind == "date_after_9999":
        return random.choice(_AFTER_9999)
    at = was or datetime(2023, 5, 17, 8, 30, tzinfo=UTC)
    return random.choice(
        (
            at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            at.strftime("%a %b %d %Y %H:%M:%S GMT+0000 (Coordinated Universal Time)"),
            (at + timedelta(hours=1)).isoformat(timespec="seconds").replace("+00:00", "+01:00"),
            f"{at.day}.{at.month}.{at.year}",
        )
    )


def _stain_numbers(
    document: dict[str, Any], pen: Pen, free: Callable[[], dict[str, Any]], numbers: Sequence[Place]
) -> None:
    random = pen.random
    if pen.strikes("mixed_number"):
        holder, key = random.choice((*numbers, (document, "__v")))
        number = holder.get(key, 0)
        holder[key] = Int64(number) if random.random() < 0.5 else float(number)
    if pen.strikes("big_integer"):
        document["externalId"] = Int64(random.choice(_BIG))
    if pen.strikes("not_a_number"):
        free()["winRate"] = random.choice((float("nan"), float("nan"), float("inf"), float("-inf")))
    if pen.strikes("decimal128"):
        free()["balance"] = random.choice(_DECIMALS)


def _stain_keys(document: dict[str, Any], pen: Pen, free: Callable[[], dict[str, Any]]) -> None:
    random = pen.random
    if pen.strikes("empty_key"):
        free()[""] = random.choice((1, "", {"": None}))
    if pen.strikes("dotted_key"):
        free()[random.choice(("theme.color", "a.b.c", ".", "v1.0"))] = random.choice((True, "x", {"x.y": 1}))
    if pen.strikes("dollar_key"):
        free()[random.choice(("$set", "$where", "$1", "$"))] = random.choice((1, "x", {"$inc": {"n": 1}}))
    if pen.strikes("top_level_key"):
        document[random.choice(("", "theme.color", "$legacy"))] = "left by an old version"


def other_id(document: dict[str, Any], pen: Pen) -> None:
    """Let the `_id` be the string of the ObjectId that it should be."""
    if pen.strikes("string_id"):
        document["_id"] = str(document["_id"])


def odd_name(name: str, pen: Pen) -> str:
    """`name`, perhaps with a NUL or a stand-in for a lone surrogate in it."""
    for kind, odd in (("nul_in_name", "\0"), ("lone_surrogate", SURROGATE_STAND_IN)):
        if pen.strikes(kind):
            name = f"{name[:2]}{odd}{name[2:]}"
    return name


def finish(document: dict[str, Any], pen: Pen) -> Labelled:
    """The document as it is stored, with its label. Lone surrogates are put in here, past Python's UTF-8."""
    if "lone_surrogate" not in pen.kinds:
        return Labelled(document, tuple(pen.kinds))
    bson = encode(document).replace(SURROGATE_STAND_IN.encode(), _LONE_SURROGATE)
    return Labelled(RawBSONDocument(bson, RAW_OPTIONS), tuple(pen.kinds))


def pen_for(population: Population, collection: str, index: int) -> Pen:
    """The pen of the `index`-th document of `collection`."""
    return Pen(population.rates, population.random(f"dirt of {collection}", index))


def documents(labelled: Iterable[Labelled]) -> Iterator[Document]:
    """The documents without their labels."""
    return (one.document for one in labelled)
