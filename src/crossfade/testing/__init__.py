"""For tests: real servers as pytest fixtures (`plugin`), and a proxy that breaks connections (`proxy`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crossfade.testing.proxy import FaultProxy

__all__ = ["FaultProxy"]


def __getattr__(name: str) -> object:
    # Imported on first use: pytest loads this package, for its plugin, in every run.
    if name == "FaultProxy":
        from crossfade.testing.proxy import FaultProxy

        return FaultProxy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
