"""The one clock that a lease goes by (pure but for reading it)."""

from __future__ import annotations

import time


def boot_clock() -> float:
    """Seconds on a monotonic clock that runs through suspension of the machine."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
