"""What one switch of the primary did, as the command reports it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Switched:
    """One switch of the primary under traffic.

    Attributes:
        phase: that it led to.
        seconds: that the whole command took; most of it compares both stores while writes go on.
        held: seconds from the fence to the decision, in which new writes wait.
        writes, failed: how many waited, and how many of them in vain.
        p99, longest: seconds that they waited.
        drained, compared, adopted: debts settled and records compared in the pause; records made equal before it.
        attempts: how many it took; one that goes past its pause limit goes back to the old primary by itself.
    """

    phase: str
    seconds: float
    held: float
    writes: int
    failed: int
    p99: float
    longest: float
    drained: int
    compared: int
    adopted: int
    attempts: int = 1

    @classmethod
    def from_report(cls, report: Mapping[str, Any], *, seconds: float, attempts: int) -> Switched:
        """From what `crossfade switch --json` prints."""
        held = report["held"]
        return cls(
            report["phase"], round(seconds, 2), report["pause_seconds"], held["writes"], held["failed"],
            held["p99_seconds"], held["max_seconds"], report["drained"], report["compared"], report["adopted"],
            attempts,
        )  # fmt: skip

    def __str__(self) -> str:
        waited = f", {self.writes} waited at most {self.longest * 1000:.0f} ms" if self.writes else ""
        again = f", at the {self.attempts}. attempt" if self.attempts > 1 else ""
        return (
            f"writes held for {self.held * 1000:.0f} ms{waited}, {self.failed} failed; {self.drained} debts drained"
            f"{again}"
        )
