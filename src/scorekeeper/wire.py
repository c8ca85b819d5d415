"""Values as they go over the wire: ids as hex, dates as JavaScript writes them (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from bson import DatetimeMS, Decimal128, Int64, ObjectId

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
# Days from 0000-03-01 to 1970-01-01, and in 400 years, of the proleptic Gregorian calendar.
_DAYS_TO_EPOCH = 719_468
_DAYS_PER_ERA = 146_097


def now() -> datetime:
    """This moment in UTC, in whole milliseconds: what BSON can hold, so that it reads back equal."""
    moment = datetime.now(UTC)
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def iso(value: datetime | DatetimeMS) -> str:
    """A date as ``toISOString`` writes it, ``2026-01-31T10:30:00.000Z``; beyond year 9999 with sign and six
    digits.
    """
    if isinstance(value, datetime):
        moment = value if value.tzinfo else value.replace(tzinfo=UTC)
        milliseconds = (moment - _EPOCH) // _MILLISECOND
    else:
        milliseconds = int(value)
    days, rest = divmod(milliseconds, 86_400_000)
    year, month, day = _civil(days)
    hours, rest = divmod(rest, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    seconds, fraction = divmod(rest, 1000)
    written = f"{year:04}" if 0 <= year <= 9999 else f"{'-' if year < 0 else '+'}{abs(year):06}"
    return f"{written}-{month:02}-{day:02}T{hours:02}:{minutes:02}:{seconds:02}.{fraction:03}Z"


def _civil(days: int) -> tuple[int, int, int]:
    """Year, month and day of a count of days since 1970. Howard Hinnant's ``civil_from_days``; any year."""
    days += _DAYS_TO_EPOCH
    era, day_of_era = divmod(days, _DAYS_PER_ERA)
    year_of_era = (day_of_era - day_of_era // 1460 + day_of_era // 36524 - day_of_era // 146_096) // 365
    day_of_year = day_of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    shifted = (5 * day_of_year + 2) // 153
    month = shifted + 3 if shifted < 10 else shifted - 9
    return year_of_era + era * 400 + (month <= 2), month, day_of_year - (153 * shifted + 2) // 5 + 1


def plain(value: Any) -> Any:
    """A BSON value as JSON that the client knows: ids as hex, dates as `iso`, numbers as numbers.

    What JSON cannot say (NaN, infinities) is null, as in JavaScript; what is left is written as text.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, ObjectId):
        return str(value)
    if isinstance(value, datetime | DatetimeMS):
        return iso(value)
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Int64 | int):
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Decimal128):
        return str(value)
    return str(value)


def document_id(text: str) -> Any:
    """The ``_id`` that a text on the wire means: 24 hex characters are an ObjectId, anything else is
    itself.
    """
    return ObjectId(text) if len(text) == 24 and ObjectId.is_valid(text) else text
