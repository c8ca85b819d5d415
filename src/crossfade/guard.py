"""Evidence for the next phase: what each transition's guard wants, computed when asked.

A guard is a list of statements, each of which holds or does not, says why, and names the command that mends it.
phases.md is the source. Evidence counts only since dual writing began (`Control.dual_epoch`): leaving phase 0
voids everything older. So does another mapping: nobody has seen the rows that it makes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from crossfade import errors
from crossfade.board import Look
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


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the statements of one guard are made from.

    Attributes:
        look: one look at the control record and the debts, shared by all of them.
        control: the record that the step starts from: evidence counts by its epochs.
    """

    migration: Migration
    look: Look
    control: Control

    @property
    def timeout(self) -> float:
        """Seconds for each question to a store."""
        return self.migration.pair.options.primary_deadline

    async def runs(self, kind: str) -> dict[str, dict[str, Any]]:
        """The newest run of this kind by entity, if it counts: begun since dual writing did, under this mapping."""
        entities, control = self.migration.entities, self.control
        runs = await self.migration.pair.postgres.last_runs(
            self.migration.name, entities, timeout=self.timeout
        )
        # With PostgreSQL deciding only what was compared since then says how MongoDB is.
        since = control.phase_epoch if control.phase.rules.primary == "postgres" else control.dual_epoch
        return {
            r["entity"]: r
            for r in runs
            if r["kind"] == kind
            and r["epoch"] >= since
            and r["mapping"] == entities[r["entity"]].mapping_version
        }


Check = Callable[[Evidence], Awaitable[Statement]]


async def guard(migration: Migration, target: Phase, *, before: Control | None = None) -> list[Statement]:
    """What entering ``target`` wants, each looked at now; ``before``: the record that a step already made started from.

    Raises:
        crossfade.errors.StoreUnavailable: a store that the evidence lives in cannot be reached.
    """
    look = await migration.board.refresh()
    evidence = Evidence(migration, look, before or look.control)
    # At once: the switch asks while writes wait.
    return list(await asyncio.gather(*(check(evidence) for check in _wanted(evidence.control.phase, target))))


def _wanted(here: Phase, target: Phase) -> list[Check]:
    if target.number < here.number:
        # A step back is always open, but across the switch it moves the primary: nothing may be left behind.
        return [_both_reachable, _nothing_parked] if target.rules.primary != here.rules.primary else []
    forward: dict[Phase, list[Check]] = {
        Phase.DUAL_WRITE: [_both_reachable, _schema_at_head, _keys_stamped],
        Phase.SHADOW_READ: [_both_reachable, _backfilled, _verified, _debt_small],
        Phase.POSTGRES_READ: [_both_reachable, _backfilled, _verified, _debt_small, _compared],
        Phase.POSTGRES_PRIMARY: [
            _both_reachable, _verified, _nothing_parked, _nothing_quarantined, _no_foreign_writers,
        ],
        # What is under way is delivered still: MongoDB is fed on.
        Phase.POSTGRES_ONLY: [_both_reachable, _verified, _references_valid, _debt_small, _nothing_parked],
    }  # fmt: skip
    return forward.get(target, [])


async def _both_reachable(evidence: Evidence) -> Statement:
    migration = evidence.migration
    down = []
    for name, store in (("MongoDB", migration.pair.mongo), ("PostgreSQL", migration.pair.postgres)):
        try:
            await store.ping(evidence.timeout)
        except errors.StoreUnavailable as cause:
            down.append(f"{name}: {cause}")
    return Statement(
        "reachable", not down, "; ".join(down) or "both stores answer", "start it" if down else ""
    )


async def _schema_at_head(evidence: Evidence) -> Statement:
    migration, timeout = evidence.migration, evidence.timeout
    entities = list(migration.entities.values())
    missing = await migration.pair.postgres.missing(entities, timeout=timeout)
    missing += await migration.pair.mongo.missing_indexes(entities, timeout=timeout)
    if missing:
        return Statement(
            "schema", False, "missing: " + "; ".join(missing), "alembic upgrade head; crossfade init"
        )
    return Statement("schema", True, "tables and indexes are there")


async def _keys_stamped(evidence: Evidence) -> Statement:
    migration = evidence.migration
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
                        "crossfade init, which names those that have no room for one",
                    )
    return Statement("keys", True, "every document has its normalised keys")


async def _backfilled(evidence: Evidence) -> Statement:
    runs = await evidence.runs("backfill")
    lacking = [name for name in evidence.migration.entities if runs.get(name, {}).get("state") != "complete"]
    if lacking:
        return Statement(
            "backfill",
            False,
            f"not backfilled under this mapping since dual writing began: {', '.join(lacking)}",
            "crossfade backfill",
        )
    return Statement("backfill", True, "complete")


async def _verified(evidence: Evidence) -> Statement:
    runs = await evidence.runs("verify")
    for name in evidence.migration.entities:
        run = runs.get(name)
        if run is None or run["state"] != "complete":
            return Statement(
                "verify",
                False,
                f"{name} was not verified under this mapping since dual writing began",
                "crossfade verify",
            )
        # From its begin: one that was interrupted has compared the first records then.
        if datetime.now(UTC) - run["started_at"] > FRESH:
            return Statement(
                "verify",
                False,
                f"the verify of {name} began more than a day ago",
                "crossfade verify --restart",
            )
        differences = int(run["counts"].get("mismatches", 0))
        if differences:
            return Statement(
                "verify",
                False,
                f"{differences} records of {name} differ",
                "crossfade repair",
            )
    return Statement("verify", True, "fresh and clean")


async def _compared(evidence: Evidence) -> Statement:
    migration = evidence.migration
    found = await migration.pair.postgres.shadow.compared(
        migration.name, mapping_of(migration.entities.values()), evidence.control.phase_epoch, migration.entities,
        timeout=evidence.timeout,
    )  # fmt: skip
    if found.open:
        return Statement(
            "shadow",
            False,
            f"{found.open} records were read otherwise from PostgreSQL",
            "crossfade mismatches list; crossfade repair; crossfade mismatches resolve",
        )
    wanted = migration.pair.options.shadow_comparisons
    why = f"{found.comparisons:,} of {wanted:,} reads compared in this phase, under this mapping"
    if found.comparisons < wanted:
        return Statement(
            "shadow",
            False,
            why,
            "let the application read on; CROSSFADE_SHADOW_SAMPLE sets how much is compared",
        )
    return Statement("shadow", True, why + ", no mismatch open")


async def _debt_small(evidence: Evidence) -> Statement:
    number = len(evidence.look.debts)
    holds = number <= DEBT_LIMIT
    return Statement("debt", holds, f"{number} records in debt", "" if holds else "crossfade reconcile")


async def _references_valid(evidence: Evidence) -> Statement:
    migration = evidence.migration
    found = await migration.pair.postgres.unvalidated(migration.entities.values(), timeout=evidence.timeout)
    names = ", ".join(found)
    return Statement(
        "references",
        not found,
        f"PostgreSQL has not checked the old rows of: {names}" if found else "every constraint is validated",
        "crossfade validate-constraints" if found else "",
    )


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


async def _nothing_parked(evidence: Evidence) -> Statement:
    parked = [debt for debt in evidence.look.debts if debt.parked is not None]
    number = len(await debts_in_the_way(evidence.migration, parked))
    return Statement("parked", not number, f"{number} parked debts", "crossfade debts" if number else "")


async def _nothing_quarantined(evidence: Evidence) -> Statement:
    migration = evidence.migration
    number, _ = await migration.pair.postgres.counts(migration.entities, timeout=evidence.timeout)
    return Statement(
        "quarantine",
        not number,
        f"{number} records in quarantine that nobody has waived",
        "crossfade quarantine list" if number else "",
    )


async def _no_foreign_writers(evidence: Evidence) -> Statement:
    declared = evidence.look.control.foreign_writers
    return Statement(
        "foreign-writers",
        not declared,
        "an old application is declared to write to MongoDB" if declared else "none declared",
        "stop it, then: crossfade phase foreign-writers stopped" if declared else "",
    )


def refusals(statements: Sequence[Statement], forced: tuple[str, ...]) -> list[Statement]:
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


def told(statements: Iterable[Statement]) -> str:
    """What does not hold, in one line."""
    return "; ".join(f"[{s.name}] {s.why}" + (f" (mend: {s.mend})" if s.mend else "") for s in statements)
