"""Profile pictures: a handful of real images as the data URLs that the old client stored."""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from random import Random

from PIL import Image, ImageDraw

#: Side of an avatar in pixels -> a data URL of 0.5 to 6 KiB.
_SIDES = (48, 64, 96)
#: How the old client named the format in the data URL; `jpg` is no registered type, but it was written.
_FORMATS = (("PNG", "png"), ("JPEG", "jpeg"), ("JPEG", "jpg"), ("WEBP", "webp"), ("GIF", "gif"))


def _data_url(image: Image.Image, pillow_format: str, name: str) -> str:
    file = io.BytesIO()
    image.save(file, pillow_format)
    return f"data:image/{name};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _avatar(random: Random, side: int) -> Image.Image:
    image = Image.new("RGB", (side, side), random.choice(("#244", "#853", "#269", "#a33", "#484", "#626")))
    draw = ImageDraw.Draw(image)
    for _ in range(24):
        x, y, r = (random.randrange(side) for _ in range(3))
        colour = (random.randrange(256), random.randrange(256), random.randrange(256))
        draw.ellipse((x - r // 3, y - r // 3, x + r // 3, y + r // 3), fill=colour)
    return image


def _noise(seed: int, side: int) -> Image.Image:
    # Noise cannot be compressed: the file is as large as the side says, whatever the version of zlib.
    return Image.frombytes("RGB", (side, side), Random(seed).randbytes(side * side * 3))


@lru_cache(maxsize=1)
def avatars() -> tuple[str, ...]:
    """Fifteen small pictures in every format that the application accepts, each 0.3 to 8 KiB of text."""
    random = Random(7)
    return tuple(
        _data_url(_avatar(random, side), pillow_format, name)
        for side in _SIDES
        for pillow_format, name in _FORMATS
    )


@lru_cache(maxsize=1)
def photographs() -> tuple[str, ...]:
    """Two unscaled uploads: a JPEG of some 300 KiB of text and a PNG of some 1 MiB."""
    return (_data_url(_noise(1, 500), "JPEG", "jpeg"), _data_url(_noise(2, 512), "PNG", "png"))


@lru_cache(maxsize=1)
def largest_picture() -> str:
    """A PNG just below 10 MiB of text, the most that the application lets through."""
    # 1615 * 1615 * 3 bytes * 4/3 for base64 = 10.43e6 of the allowed 10,485,760 characters.
    return _data_url(_noise(3, 1615), "PNG", "png")
