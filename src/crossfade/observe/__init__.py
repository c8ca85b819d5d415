"""What an operator sees: log lines with the operation's name in front, and Prometheus metrics.

On a terminal: ``[User Registration] Writing to PostgreSQL...``; elsewhere one JSON object per line with the
same fields. Neither ever holds a document's values.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from functools import cache
from typing import Any, TextIO

import structlog
from prometheus_client import Counter, Gauge, Histogram

#: Writes by migration, entity, operation, strategy and outcome: "acknowledged", the name of the error, or "failed" (any
#: other: the caller went away, for one).
WRITES = Counter(
    "crossfade_writes_total",
    "Writes by outcome",
    ["migration", "entity", "operation", "strategy", "outcome"],
)
#: Reads by migration, entity, store that served them, and why it was that one.
READS = Counter("crossfade_reads_total", "Reads by source", ["migration", "entity", "source", "reason"])
WRITE_SECONDS = Histogram(
    "crossfade_write_seconds",
    "Seconds a caller waited for a write",
    ["migration", "operation"],
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
READ_SECONDS = Histogram(
    "crossfade_read_seconds",
    "Seconds a caller waited for a read",
    ["migration"],
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
DEBTS = Gauge("crossfade_debts", "Records that the secondary has not confirmed", ["migration"])
DEBT_AGE = Gauge(
    "crossfade_debt_age_seconds", "Seconds for which this worker has seen the oldest debt", ["migration"]
)
SETTLED = Counter("crossfade_debts_settled_total", "Debts that a reconciler settled", ["migration", "entity"])
#: Shadow reads by migration, entity and outcome (equal, mismatch, unsettled, dropped, failed).
SHADOW_READS = Counter(
    "crossfade_shadow_reads_total", "Reads compared in the background", ["migration", "entity", "outcome"]
)
PHASE = Gauge("crossfade_phase", "Phase of the migration, 0 to 5", ["migration"])


def _with_context(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Put the operation's name in front of a line meant for a person."""
    context = event.pop("context", None)
    if context:
        event["event"] = f"[{context}] {event['event']}"
    return event


def configure_logging(level: str = "INFO", *, stream: TextIO | None = None, json: bool | None = None) -> None:
    """Set up log lines: for people where ``stream`` (stderr) is a terminal, JSON elsewhere."""
    out = stream or sys.stderr
    machine = not out.isatty() if json is None else json
    threshold = logging.getLevelNamesMapping().get(level.upper(), logging.INFO)
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendering: list[Any] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if machine
        # Plain: a pretty traceback prints local variables, a password among them.
        else [
            _with_context,
            structlog.dev.ConsoleRenderer(colors=True, exception_formatter=structlog.dev.plain_traceback),
        ]
    )
    # The driver repeats what every failed call already says in an error of our own.
    for name in ("psycopg", "psycopg.pool"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    structlog.configure(
        processors=[*shared, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=False,
    )
    _logger.cache_clear()


@cache
def of(metric: Any, *labels: str) -> Any:
    """The series of a metric with these labels, looked up once: every read and every write counts."""
    return metric.labels(*labels)


def log() -> Any:
    """The logger; pass ``context="User Registration"`` for the name in front."""
    return _logger() if structlog.is_configured() else structlog.get_logger("crossfade")


@cache
def _logger() -> Any:
    # Put together once: a line below the threshold, of which every write has four, then costs next to nothing.
    return structlog.get_logger("crossfade").bind()
