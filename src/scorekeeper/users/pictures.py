"""Profile pictures: is a text that claims to be an image one that a browser may be given? (pure)

A picture travels and is stored as a data URL, to the letter (but for white space, which the old back end removes too).
Its bytes are decoded once, by Pillow, as the one format that the text names, within a bound on pixels: a file of some
kilobytes can claim an image of gigabytes.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings
from typing import Final

from PIL import Image

from scorekeeper.errors import Problem, invalid

#: Characters of a data URL: fewer hold no image, more do not fit into a document beside everything else.
SHORTEST: Final = 100
LONGEST: Final = 10 * 1024 * 1024

#: Pixels of an image: a photograph of 24 megapixels passes, and takes 100 MB while it is decoded.
MOST_PIXELS: Final = 25_000_000

#: Subtype in the data URL -> Pillow's formats. A JPEG of a phone with a preview in it is an MPO to Pillow.
_FORMATS: Final = {
    "jpeg": ("JPEG", "MPO"),
    "jpg": ("JPEG", "MPO"),
    "png": ("PNG",),
    "gif": ("GIF",),
    "webp": ("WEBP",),
}
_BLANKS = re.compile(r"\s+")
_DATA_URL = re.compile(
    r"data:image/(jpeg|jpg|png|gif|webp);base64,([A-Za-z0-9+/]+={0,2})", re.ASCII | re.IGNORECASE
)


def checked(text: str) -> str:
    """The data URL without white space, once its content is known to be what it says. Takes a core for a while.

    Raises:
        Problem: 400, it is no data URL of these formats, its content is another format, broken, or too large an image;
            413, the text is too long.
    """
    url = _BLANKS.sub("", text)
    if len(url) > LONGEST:
        raise Problem(413, "picture-too-large", f"The picture is larger than {LONGEST} characters")
    if len(url) < SHORTEST:
        raise invalid("The picture is too small to be an image")
    match = _DATA_URL.fullmatch(url)
    if match is None:
        raise invalid("The picture must be a data URL of a JPEG, PNG, GIF or WebP image")
    try:
        content = base64.b64decode(match[2], validate=True)
    except binascii.Error:
        raise invalid("The picture is not valid base64") from None
    _decode(content, match[1].lower())
    return url


def _decode(content: bytes, subtype: str) -> None:
    formats = _FORMATS[subtype]
    try:
        with warnings.catch_warnings():
            # Pillow only warns of an image up to twice as large as its own limit.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=formats)
            too_large = image.width * image.height > MOST_PIXELS
            if not too_large:
                image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        too_large = True
    except Exception:  # a broken file makes Pillow's decoders raise whatever they stumble over
        raise invalid(f"The content of the picture is not a {subtype.upper()} image") from None
    if too_large:
        raise invalid(f"The picture has more than {MOST_PIXELS:,} pixels")
