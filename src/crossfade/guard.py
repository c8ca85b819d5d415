"""Evidence for the next phase: what each transition's guard wants, computed when asked.

A guard is a list of statements, each of which holds or does not, says why, and names the command that mends it.
phases.md is the source. Evidence counts only since dual writing began (`Control.dual_epoch`): leaving phase 0
voids everything older.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from crossfade import errors
from crossfade.control import Control
from crossfade.migration import Migration
from crossfade.phase import Phase
from crossfade.shadow import mapping_of
from crossfade.stores.mongo import Owed
from crossfade.stores.postgres import Delivery
from crossfade.values import id_to_text

#: A verify older than this says too little about today's data.
FRESH = timedelta(hours=24)
#: More debts than this and the secondary is not keeping up: the next phase would read or trust it.
DEBT_LIMIT = 1000


@dataclass(frozen=True, slots=True)
class Statement:
    """One thing that a guard wants.

    Attributes:
        name: short, for `--force`.
        holds: whether it does, now.
        why: what was found.
        mend: the command that mends it; "" where it holds.
    """

    name: str
    holds: bool
    why: str
    mend: str = ""


async def guard(migration: Migration, target: Phase) -> list[Statement]:
    """What entering ``target`` wants, each looked at now. A step back wants nothing.

    Raises:
        crossfade.errors.StoreUnavailable: a store that the evidence lives in cannot be reached.
    """
    look = await migration.board.refresh()
    if target.number < look.control.phase.number:
        return [await _both_reachable(migration)] if target is Phase.POSTGRES_READ else []
    wanted: dict[Phase, list[Callable[[Migration], Awaitable[Statement]]]] = {
        Phase.DUAL_WRITE: [_both_reachable, _schema_at_head, _keys_stamped],
        Phase.SHADOW_READ: [_both_reachable, _backfilled, _verified, _debt_small],
        Phase.POSTGRES_READ: [_both_reachable, _backfilled, _verified, _debt_small, _compared],
        Phase.POSTGRES_PRIMARY: [
            _both_reachable, _verified, _nothing_parked, _nothing_quarantined, _no_foreign_writers,
        ],
        Phase.POSTGRES_ONLY: [_both_reachable, _verified, _references_valid, _nothing_owed],
    }  # fmt: skip
    return [await check(migration) for check in wanted.get(target, [])]


async def _both_reachable(migration: Migration) -> Statement:
    down = []
    for name, store in (("MongoDB", migration.pair.mongo), ("PostgreSQL", migration.pair.postgres)):
        try:
            await store.ping(migration.pair.options.primary_deadline)
        except errors.StoreUnavailable as cause:
            down.append(f"{name}: {cause}")
    return Statement(
        "reachable", not down, "; ".join(down) or "both stores answer", "start it" if down else ""
    )


async def _schema_at_head(migration: Migration) -> Statement:
    timeout = migration.pair.options.primary_deadline
    entities = list(migration.entities.values())
    missing = await migration.pair.postgres.missing(entities, timeout=timeout)
    missing += await migration.pair.mongo.missing_indexes(entities, timeout=timeout)
    if missing:
        return Statement(
            "schema", False, "missing: " + "; ".join(missing), "alembic upgrade head; crossfade init"
        )
    return Statement("schema", True, "tables and indexes are there")


async def _keys_stamped(migration: Migration) -> Statement:
    for entity in migration.entities.values():
        for rule in entity.unique:
            async for documents in migration.pair.mongo.unstamped(
                entity, rule.field, rule.rule, batch=1000, timeout=migration.pair.options.bulk_deadline
            ):
                if any(rule.rule in entity.keys(document) for document in documents):
                    return Statement(
                        "keys",
                        False,
                        f"documents of {entity.collection} lack their key {rule.rule}",
                        "crossfade init",
                    )
    return Statement("keys", True, "every document has its normalised keys")


async def _runs(migration: Migration, kind: str) -> dict[str, dict[str, Any]]:
    """The newest run of this kind by entity, of those that count as evidence."""
    control = migration.control
    # With PostgreSQL deciding only what was compared since then says how MongoDB is.
    since = control.phase_epoch if control.phase.rules.primary == "postgres" else control.dual_epoch
    runs = await migration.pair.postgres.last_runs(
        migration.name, migration.entities, timeout=migration.pair.options.primary_deadline
    )
    return {r["entity"]: r for r in runs if r["kind"] == kind and r["epoch"] >= since}


async def _backfilled(migration: Migration) -> Statement:
    runs = await _runs(migration, "backfill")
    lacking = [name for name in migration.entities if runs.get(name, {}).get("state") != "complete"]
    if lacking:
        return Statement(
            "backfill",
            False,
            f"not backfilled since dual writing began: {', '.join(lacking)}",
            "crossfade backfill",
        )
    return Statement("backfill", True, "complete")


async def _verified(migration: Migration) -> Statement:
    runs = await _runs(migration, "verify")
    for name in migration.entities:
        run = runs.get(name)
        if run is None or run["state"] != "complete":
            return Statement(
                "verify", False, f"{name} was not verified since dual writing began", "crossfade verify"
            )
        if datetime.now(UTC) - run["finished_at"] > FRESH:
            return Statement("verify", False, f"the verify of {name} is older than a day", "crossfade verify")
        differences = int(run["counts"].get("mismatches", 0))
        if differences:
            return Statement(
                "verify",
                False,
                f"{differences} records of {name} differ",
                "crossfade repair",
            )
    return Statement("verify", True, "fresh and clean")


async def _compared(migration: Migration) -> Statement:
    options, control = migration.pair.options, migration.control
    found = await migration.pair.postgres.shadow.compared(
        migration.name, mapping_of(migration.entities.values()), control.phase_epoch, migration.entities,
        timeout=options.primary_deadline,
    )  # fmt: skip
    if found.open:
        return Statement(
            "shadow",
            False,
            f"{found.open} records were read otherwise from PostgreSQL",
            "crossfade mismatches list; crossfade repair; crossfade mismatches resolve",
        )
    wanted = options.shadow_comparisons
    why = f"{found.comparisons:,} of {wanted:,} reads compared in this phase, under this mapping"
    if found.comparisons < wanted:
        return Statement(
            "shadow",
            False,
            why,
            "let the application read on; CROSSFADE_SHADOW_SAMPLE sets how much is compared",
        )
    return Statement("shadow", True, why + ", no mismatch open")


async def _debt_small(migration: Migration) -> Statement:
    look = await migration.board.refresh()
    number = len(look.debts)
    holds = number <= DEBT_LIMIT
    return Statement("debt", holds, f"{number} records in debt", "" if holds else "crossfade reconcile")


async def _references_valid(migration: Migration) -> Statement:
    found = await migration.pair.postgres.unvalidated(
        migration.entities.values(), timeout=migration.pair.options.primary_deadline
    )
    names = ", ".join(found)
    return Statement(
        "references",
        not found,
        f"PostgreSQL has not checked the old rows of: {names}" if found else "every constraint is validated",
        "crossfade validate-constraints" if found else "",
    )


async def _nothing_owed(migration: Migration) -> Statement:
    look = await migration.board.refresh()
    number = len(look.debts)
    return Statement("debt", not number, f"{number} records in debt", "crossfade reconcile" if number else "")


async def debts_in_the_way(migration: Migration, debts: Sequence[Owed | Delivery]) -> list[Owed | Delivery]:
    """Of these debts, those that somebody still has to see to.

    A document that PostgreSQL cannot hold is parked with its debt, so that every reader goes on finding it in MongoDB;
    once a person has waived it as it is now, nothing is left to be done about it.
    """
    parked: dict[str, list[str]] = {}
    for debt in debts:
        if isinstance(debt, Owed) and debt.parked is not None:
            parked.setdefault(debt.entity, []).append(id_to_text(debt.id))
    waived = {
        (entity, text)
        for entity, texts in parked.items()
        for text in await migration.pair.postgres.waived_among(
            migration.entities[entity], texts, timeout=migration.pair.options.primary_deadline
        )
    }
    return [
        debt
        for debt in debts
        if not (isinstance(debt, Owed) and debt.parked and (debt.entity, id_to_text(debt.id)) in waived)
    ]


async def _nothing_parked(migration: Migration) -> Statement:
    look = await migration.board.refresh()
    parked = [debt for debt in look.debts if debt.parked is not None]
    number = len(await debts_in_the_way(migration, parked))
    return Statement("parked", not number, f"{number} parked debts", "crossfade debts" if number else "")


async def _nothing_quarantined(migration: Migration) -> Statement:
    number, _ = await migration.pair.postgres.counts(
        migration.entities, timeout=migration.pair.options.primary_deadline
    )
    return Statement(
        "quarantine",
        not number,
        f"{number} records in quarantine that nobody has waived",
        "crossfade quarantine list" if number else "",
    )


async def _no_foreign_writers(migration: Migration) -> Statement:
    declared = migration.control.foreign_writers
    return Statement(
        "foreign-writers",
        not declared,
        "an old application is declared to write to MongoDB" if declared else "none declared",
        "stop it, then: crossfade phase foreign-writers stopped" if declared else "",
    )


def refusals(statements: list[Statement], forced: tuple[str, ...]) -> list[Statement]:
    """What stands in the way: what does not hold and is not forced by name.

    Raises:
        crossfade.errors.ConfigurationError: a forced name is not one of the guard's.
    """
    names = {statement.name for statement in statements}
    for name in forced:
        if name not in names:
            known = ", ".join(sorted(names)) or "none"
            raise errors.ConfigurationError(f"--force {name}: not a guard of this step; there are: {known}")
    return [s for s in statements if not s.holds and s.name not in forced]


def began_before(control: Control) -> timedelta:
    """How long ago the phase was entered, by the clock of whoever changed it."""
    if not control.changed_at:
        return timedelta(0)
    return datetime.now(UTC) - datetime.fromisoformat(control.changed_at)
