"""The demo's figures: as a table for a person, and as one JSON object."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scorekeeper.demo.play import Outage, Play
from scorekeeper.demo.traffic import EXPECTED

#: The phases that are compared, with what the first one is without.
_BASE, _COMPARED = "mongo_only", ("dual_write", "postgres_read", "postgres_primary")
#: Fewer answers than this say nothing about a percentile.
_FEWEST = 5


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds; the 99th by nearest rank."""
    ordered = sorted(seconds)
    rank = max(0, -(-99 * len(ordered) // 100) - 1)
    return {
        "p50": round(statistics.median(ordered) * 1000, 1),
        "p99": round(ordered[rank] * 1000, 1),
        "count": len(ordered),
    }


def latencies(play: Play) -> dict[str, dict[str, dict[str, float]]]:
    """By kind of request and stage: p50 and p99 in milliseconds, of how many; all kinds but old log-ins in "all".

    Old log-ins are left out of "all": bcrypt at cost 12 takes a quarter of a second of a core, whatever is stored.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    whole: dict[str, list[float]] = {}
    for (stage, kind), seconds in play.traffic.latencies.items():
        if kind != "log in, old account":
            whole.setdefault(stage, []).extend(seconds)
        if len(seconds) >= _FEWEST:
            found.setdefault(kind, {})[stage] = _percentiles(seconds)
    ordered = {kind: found[kind] for kind in EXPECTED if kind in found}
    return {**ordered, "all": {s: _percentiles(v) for s, v in whole.items() if len(v) >= _FEWEST}}


def added(by_stage: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """By stage, the milliseconds that it adds to phase 0, at p50 and p99."""
    base = by_stage.get(_BASE)
    if base is None:
        return {}
    return {
        stage: {q: round(by_stage[stage][q] - base[q], 1) for q in ("p50", "p99")}
        for stage in _COMPARED
        if stage in by_stage
    }


def foreign_lags(play: Play) -> dict[str, dict[str, float]]:
    """By phase, seconds from a write of the old application until PostgreSQL had it: p50, max, of how many."""
    return {
        stage: {"p50": round(statistics.median(lags), 2), "max": round(max(lags), 2), "count": len(lags)}
        for stage, lags in play.old.lags.items()
        if stage in _COMPARED and lags
    }


def role_lags(play: Play) -> dict[str, float]:
    """Seconds from a role change by the old application until the service, reading PostgreSQL, said so."""
    seen = [
        change.seen
        for changes in play.traffic.roles.values()
        for change in changes
        if change.seen is not None and change.stage == "postgres_read"
    ]
    if not seen:
        return {}
    return {"p50": round(statistics.median(seen), 2), "max": round(max(seen), 2), "count": len(seen)}


def as_json(play: Play, seconds: float) -> dict[str, Any]:
    """Everything, for machines; times in seconds unless the name says otherwise."""
    figures, traffic = play.figures, play.traffic
    measured = latencies(play)
    return {
        "ok": not play.problems,
        "problems": play.problems,
        "requests": dict(traffic.requests),
        "requests_total": traffic.total,
        "failed": traffic.failed,
        "failures": [
            {"kind": kind, "what": what, "number": n} for (kind, what), n in traffic.failures.items()
        ],
        "answers_503": traffic.unavailable,
        "latency_ms": measured,
        "added_ms": {kind: added(by_stage) for kind, by_stage in measured.items()},
        "registered": len(traffic.accounts),
        "foreign_writes": dict(play.old.by_kind),
        "foreign_lag": foreign_lags(play),
        "foreign_role_lag": role_lags(play),
        "legacy": figures.legacy,
        "dirt": figures.dirt,
        "migrated": figures.rows,
        "quarantined": figures.quarantined,
        "backfill": figures.backfill,
        "outages": [
            {name: getattr(outage, name) for name in Outage.__dataclass_fields__}
            for outage in figures.outages
        ],
        "switches": [asdict(switched) for switched in figures.switches],
        "left_in_debt": figures.left_in_debt,
        "reads": [
            {"source": source, "reason": reason, "number": n} for (source, reason), n in figures.reads.items()
        ],
        "verify": figures.verify,
        "own_check": {
            "checked": figures.findings.checked, "lost": figures.findings.lost, "lines": figures.findings.lines,
        },
        "seconds": figures.seconds,
        "set_up_seconds": figures.set_up,
        "total_seconds": round(seconds, 1),
    }  # fmt: skip


def show(play: Play, seconds: float, out: Console) -> None:
    """The tables. ``seconds``: that all of it took, servers included."""
    out.print(_requests(play))
    out.print(_facts(play))
    out.print(_times(play, seconds))
    if play.problems:
        out.print(f"[bold red]FAILED:[/] {escape('; '.join(play.problems))}", highlight=False)
    else:
        out.print("[bold green]nothing was lost, and no request failed[/]", highlight=False)


def _requests(play: Play) -> Table:
    table = Table(
        "request", "sent", "failed", _BASE, *_COMPARED,
        box=box.SIMPLE_HEAD, title="requests; milliseconds p50 / p99: phase 0, and what a later phase adds",
    )  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    traffic = play.traffic
    failed: dict[str, int] = {}
    for (kind, _), number in traffic.failures.items():
        failed[kind] = failed.get(kind, 0) + number
    for kind, by_stage in latencies(play).items():
        base = by_stage.get(_BASE)
        more = added(by_stage)
        whole = kind == "all"
        table.add_row(
            "all but old log-ins" if whole else kind,
            f"{traffic.total if whole else traffic.requests[kind]:,}",
            str(traffic.failed if whole else failed.get(kind, 0)),
            f"{base['p50']:.1f} / {base['p99']:.0f}" if base else "",
            *(
                f"{more[s]['p50']:+.1f} / {more[s]['p99']:+.0f}" if s in more else ""
                for s in _COMPARED
            ),
            style="bold" if whole else "",
        )  # fmt: skip
    return table


def _facts(play: Play) -> Table:
    figures, traffic = play.figures, play.traffic
    table = Table(show_header=False, box=box.SIMPLE_HEAD, title="the migration")

    def add(name: str, text: str, *, bad: bool = False) -> None:
        table.add_row(name, f"[red]{escape(text)}[/]" if bad else escape(text))

    add(
        "requests",
        f"{traffic.total:,}, failed {traffic.failed} (answered 503: {traffic.unavailable}; refusals that the "
        "contract has are none)",
        bad=bool(traffic.failed),
    )
    for (kind, what), number in traffic.failures.most_common(8):
        add("", f"{number} x {kind}: {what}", bad=True)
    add("registered meanwhile", f"{len(traffic.accounts):,} by the service")
    by_kind = ", ".join(f"{kind} {number}" for kind, number in sorted(play.old.by_kind.items()))
    add("the old application wrote", f"{play.old.writes:,} ({by_kind})")
    for stage, lag in foreign_lags(play).items():
        add(
            f"  in PostgreSQL, {stage}",
            f"after p50 {lag['p50']} s, max {lag['max']} s, of {lag['count']:.0f} (swept for every 2 s)",
        )
    if roles := role_lags(play):
        add("  its roles hold, postgres_read", f"after p50 {roles['p50']} s, max {roles['max']} s")
    users: dict[str, Any] = next(
        (report["counts"] for report in figures.verify if report["entity"] == "users"), {}
    )
    add("users migrated", f"{figures.rows.get('users', 0):,} of {users.get('documents', 0):,}")
    add("identities migrated", f"{figures.rows.get('player_identities', 0):,}")
    games = sum(figures.rows.get(table, 0) for table in ("games", "wizard_games", "table_games"))
    add("games migrated", f"{games:,}")
    for reason, number in list(figures.quarantined.items())[:8] or [("nothing", 0)]:
        add("in quarantine", f"{number} x {reason[:100]}" if number else reason)
    for outage in figures.outages:
        add(
            f"PostgreSQL dead, {outage.phase}",
            f"{outage.seconds:.1f} s, {outage.requests} requests, {outage.failed} failed"
            + _while_dead(play, outage),
        )
        back = f"; read again after {outage.reads_back} s" if outage.reads_back is not None else ""
        add("  debt", f"at most {outage.deepest} records, drained {outage.drained} s after its return{back}")
    for switched in figures.switches:
        add(f"switched to {switched.phase}", str(switched), bad=bool(switched.failed))
    add("  in debt at the end", str(figures.left_in_debt), bad=bool(figures.left_in_debt))
    total = max(figures.reads.total(), 1)
    for (source, reason), number in figures.reads.most_common():
        if number:
            add("read in postgres_read", f"{source} {number * 100 / total:.1f} % ({number:,}; {reason})")
    for report in figures.verify:
        counts = report["counts"]
        add(
            f"verified: {report['entity']}",
            f"{counts['documents']:,} documents, {counts['rows']:,} rows, {counts['equal']:,} equal, "
            f"{counts['mismatches']} mismatches, {counts['quarantined']} in quarantine",
            bad=bool(counts["mismatches"]),
        )
    checked = ", ".join(f"{number:,} {what}" for what, number in figures.findings.checked.items())
    add("looked for in both stores", checked)
    add(
        "lost",
        str(figures.findings.lost) if figures.findings.lost else "nothing",
        bad=bool(figures.findings.lost),
    )
    for line in figures.findings.lines[:10]:
        add("", line, bad=True)
    return table


def _while_dead(play: Play, outage: Outage) -> str:
    found = latencies(play)["all"].get(f"{outage.phase}, PostgreSQL dead")
    return f"; p50 {found['p50']:.0f} ms, p99 {found['p99']:.0f} ms" if found else ""


def _times(play: Play, seconds: float) -> Table:
    table = Table("step", "seconds", box=box.SIMPLE_HEAD, title="time")
    table.columns[1].justify = "right"
    for step, took in play.figures.seconds.items():
        table.add_row(escape(step), f"{took:.1f}")
    table.add_row("in all", f"{seconds:.1f}", style="bold")
    return table
