"""Names of users and players: how they are trimmed, measured, judged and compared (pure).

The old back end is JavaScript; where it and Python differ (what counts as a blank, how long an emoji is) its
answer is taken, so that both agree on every name while they run side by side.
"""

from __future__ import annotations

import unicodedata
from typing import Final

# ECMAScript's WhiteSpace and LineTerminator, which String.prototype.trim removes. Python's str.strip() also
# takes U+001C-U+001F and U+0085, and leaves U+FEFF.
_BLANKS: Final = (
    "\t\n\v\f\r\u0020\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005"
    "\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
)

#: Length of a new name, in UTF-16 units as JavaScript counts them (an emoji is two).
SHORTEST: Final = 3
LONGEST: Final = 20

#: Longest name that is looked for at all. Old accounts have names of 50 and more; this only bounds the work.
LONGEST_SOUGHT: Final = 256


def trimmed(name: str) -> str:
    """The name without the blanks around it that JavaScript's ``trim`` removes."""
    return name.strip(_BLANKS)


def normal_form(name: str) -> str:
    """What two names that differ only in letter case or in blanks around them have in common.

    The old back end's rule for ``normalizedName``: lower-cased and trimmed. Not case-folded: Strauß and
    Strauss are two people.
    """
    return trimmed(name.lower())


def length(name: str) -> int:
    """Length in UTF-16 units, for a name without lone surrogates."""
    return len(name) + sum(1 for character in name if character > "\uffff")


def fault(name: str) -> str | None:
    """Why a trimmed name cannot be anybody's, as a sentence for a person; None if it can.

    Holds for every name that comes in, those of old accounts too: no lone surrogates (they have no UTF-8), no
    NUL or other control characters, a bounded length.
    """
    if not is_unicode(name):
        return "The username is not valid Unicode text"
    if any(unicodedata.category(character) == "Cc" for character in name):
        return "The username must not contain control characters"
    if length(name) > LONGEST_SOUGHT:
        return "The username is too long"
    return None


def fault_of_new(name: str) -> str | None:
    """Why a trimmed name cannot be given to a new account; None if it can. Includes `fault`."""
    found = fault(name)
    if found is None and not SHORTEST <= length(name) <= LONGEST:
        found = f"The username must be {SHORTEST} to {LONGEST} characters long"
    return found


def is_unicode(text: str) -> bool:
    """Whether the text has a UTF-8 form (JSON's \\ud800 alone has none)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def without_nul(value: object) -> str | None:
    """A stand-in for text that PostgreSQL cannot hold: NUL becomes its symbol, U+2400; None for no text."""
    return value.replace("\0", "\u2400") if isinstance(value, str) else None
