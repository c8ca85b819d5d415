"""Names of players: real in their mix of scripts, letter cases and blanks, and unique whatever the letter case."""

from __future__ import annotations

# Left in as they are found: letters that change length when lowered (İ, ß), names read from right to left, symbols.
_FIRST = """
Anna Bob Carla David Emma Finn Greta Hannes Ida Jonas Klara Leon Mia Noah Olga Paul Quirin Rosa Sven Tilda Uwe Vera
Willi Xenia Yannick Zora Jürgen Zoë Łukasz Øyvind Straßer Ñuño İpek Chloé Günther Mårten Ирина Борис Σοφία Νίκος
さくら 李小雷 محمد שרה 김민수 anna-lena peter_pan MAX kim tom lisa OLIVER ben_j jule Opa Oma Tante.Erna Mr.X le_roi
DonPepe ♠Ace♠ 🃏Joker x_x_x
""".split()  # noqa: SIM905
_SECOND = """
Wizard King Queen Ace Joker Trick Trump Cards Dealer Fool Knight Dragon Elf Giant Dwarf Bluff Poker Skat Tarot Rummy
Bridge Hearts Spades Clubs Meister Fuchs Wolf Bär Katze Eule Star Blitz Sonne Mond Nord Süd Pro Gamer Player Champ
Hero Lucky Shark Ninja Pirat Boss
""".split()  # noqa: SIM905
_BETWEEN = ("", "_", " ", "-", ".")

#: Every base name once: each first name alone, and each with each second one.
POOL: tuple[str, ...] = (
    *_FIRST,
    *(
        first + _BETWEEN[(i * 7 + j) % len(_BETWEEN)] + second
        for i, first in enumerate(_FIRST)
        for j, second in enumerate(_SECOND)
    ),
)

# Coprime to the size of the pool (a test holds it), so that stepping by it visits every base name once.
STRIDE = 1117


def name_of(index: int, shift: int) -> str:
    """The `index`-th name, 3 to 20 characters. Names of different indexes differ even without letter case.

    `shift` turns the order of the names, so that another seed gives other users other names.
    """
    lap, place = divmod(index, len(POOL))
    base = POOL[(place * STRIDE + shift) % len(POOL)]
    return base if lap == 0 else f"{base}{lap + 1}"


def case_variant(name: str, which: int) -> str | None:
    """`name` in another letter case; every `which` >= 1 gives another one. None if the name has too few letters."""
    places = [
        i
        for i, letter in enumerate(name)
        if letter != letter.swapcase()
        and len(letter.swapcase()) == 1
        and letter.swapcase().swapcase() == letter
        # Both cases must fall together under lower() and casefold() alike, else it is no collision everywhere.
        and letter.swapcase().lower() == letter.lower()
        and len(letter.lower()) == 1
    ]
    if which.bit_length() > len(places):
        return None
    letters = list(name)
    for bit, place in enumerate(places):
        if which >> bit & 1:
            letters[place] = letters[place].swapcase()
    return "".join(letters)
