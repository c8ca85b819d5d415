"""How much of their time the workers of a run may work, by how the stores serve others meanwhile (pure).

Additive increase, multiplicative decrease, as for what shares a line: when a store answers later than it should, the
workers rest for a good part of their time at once; when it answers in time again, they come back little by little. So
it is when the secondary falls behind what the application writes, which is the depth of the debts.
"""

from __future__ import annotations

from collections.abc import Mapping

#: Least part of the time, so that a run ends however slow a store has become.
LEAST = 0.05
_DOWN, _UP = 0.7, 0.05
#: Weight of the latest answer: one slow answer is no trouble yet.
_LATEST = 0.4


class Throttle:
    """Decides from how long small reads took.

    Args:
        latency: seconds in which each store should answer, and a pool hand out a connection; 0: as long as it takes.
        lag: seconds that replicas may be behind; 0: however long.
        debts: records that may be in debt; 0: however many.

    Attributes:
        duty: part of the time that workers may work, from `LEAST` to 1.
        reason: why it is less than 1, for a person; "" when it is not.
    """

    def __init__(self, latency: float, lag: float, debts: int) -> None:
        self._latency, self._lag, self._debts = latency, lag, debts
        self._smoothed: dict[str, float] = {}
        self.duty = 1.0
        self.reason = ""

    def heard(
        self, took: Mapping[str, float], lag: float = 0.0, debts: int = 0, pool_wait: float = 0.0
    ) -> None:
        """Learn from one look at the stores.

        Args:
            took: seconds that each took to answer, by name.
            lag: seconds that the slowest replica is behind.
            debts: records in debt; beyond what is wanted the number need not be exact.
            pool_wait: seconds that the application's own work waits for a connection.
        """
        for name, seconds in took.items():
            before = self._smoothed.get(name, seconds)
            self._smoothed[name] = before + _LATEST * (seconds - before)
        reasons = [
            f"{name} answers in {seconds * 1000:.0f} ms, at most {self._latency * 1000:.0f} ms are wanted"
            for name, seconds in self._smoothed.items()
            if 0 < self._latency < seconds
        ]
        if 0 < self._latency < pool_wait:
            reasons.append(
                f"a connection is there in {pool_wait * 1000:.0f} ms, at most {self._latency * 1000:.0f} ms are wanted"
            )
        if 0 < self._lag < lag:
            reasons.append(f"a replica is {lag:.0f} s behind, at most {self._lag:.0f} s are wanted")
        if 0 < self._debts < debts:
            reasons.append(f"more than {self._debts:,} records are in debt")
        if reasons:
            self.duty = max(self.duty * _DOWN, LEAST)
            self.reason = "; ".join(reasons)
        else:
            self.duty = min(self.duty + _UP, 1.0)
            if self.duty == 1.0:
                self.reason = ""

    @property
    def enough_debts(self) -> int:
        """How far debts need to be counted."""
        return self._debts + 1 if self._debts else 0
