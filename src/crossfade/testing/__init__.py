"""For tests: real servers as pytest fixtures (`plugin`), and a proxy that breaks connections (`proxy`)."""

from crossfade.testing.proxy import FaultProxy

__all__ = ["FaultProxy"]
