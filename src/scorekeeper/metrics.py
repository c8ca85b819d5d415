"""Prometheus metrics of the service itself; Crossfade has its own for writes, reads and debt."""

from __future__ import annotations

import os

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, generate_latest, multiprocess

REQUESTS = Histogram(
    "scorekeeper_request_seconds",
    "Time to answer a request, by route template and status.",
    ["method", "route", "status"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
CACHE = Counter(
    "scorekeeper_user_cache_total",
    "Look-ups of authenticated users by result: hit, miss, waited, refreshed, bypass (Redis did not answer).",
    ["result"],
)
INVALIDATIONS = Counter(
    "scorekeeper_user_cache_invalidations_total",
    "Changes of users told to the cache: done, or waited_out (Redis did not answer).",
    ["outcome"],
)
AUTH = Counter(
    "scorekeeper_auth_total",
    "Decisions about who somebody is, by step (register, login, token) and outcome.",
    ["step", "outcome"],
)
AUDIT = Counter(
    "scorekeeper_audit_events_total", "Decisions about who somebody is or what they may do.", ["event"]
)
DEGRADED = Counter(
    "scorekeeper_degraded_total",
    "Requests answered without something that should have been done, by what was left out.",
    ["what"],
)
FORWARDED = Counter(
    "scorekeeper_forwarded_total",
    "Requests sent on to the old back end, by outcome: answered, timeout, unreachable, broken_off, abandoned.",
    ["outcome"],
)
STORE_ERRORS = Counter(
    "scorekeeper_store_errors_total", "Errors of the stores that reached a request, by class.", ["error"]
)


def exposition() -> bytes:
    """All metrics in Prometheus' text format; of all workers when there are several (see ``__main__``)."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return generate_latest(REGISTRY)
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)
