"""A circuit breaker per store: after failures in a row, spare callers the wait for a store that is down."""

from __future__ import annotations

from dataclasses import dataclass

from crossfade.board import boot_clock


@dataclass
class Breaker:
    """Closed (calls pass), open (none does), half open (one does, and decides).

    Attributes:
        failures_to_open: failures in a row that open it.
        rest: seconds that it stays open before one call may probe.
    """

    failures_to_open: int = 3
    rest: float = 1.0
    failures: int = 0
    opened: float | None = None
    probing: bool = False

    @property
    def state(self) -> str:
        """ "closed", "open" or "half open"."""
        if self.opened is None:
            return "closed"
        return "half open" if boot_clock() - self.opened >= self.rest else "open"

    def allows(self) -> bool:
        """Whether a call may go to the store now; a call that was allowed must report its end."""
        if self.state == "closed":
            return True
        if self.state == "half open" and not self.probing:
            self.probing = True
            return True
        return False

    def succeeded(self) -> None:
        """The store answered (a refusal by its rules is an answer)."""
        self.failures = 0
        self.opened = None
        self.probing = False

    def failed(self) -> None:
        """The store did not answer."""
        self.probing = False
        self.failures += 1
        if self.failures >= self.failures_to_open:
            self.opened = boot_clock()
