"""The story itself, step by step, and the figures that it leaves.

mongo_only -> dual_write -> backfill -> PostgreSQL dies and comes back -> verify -> shadow_read -> postgres_read ->
PostgreSQL dies and comes back -> the old application stops -> postgres_primary -> back to postgres_read -> the end:
writers stop, everything is settled, compared, and looked for.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC
from typing import Any

import httpx
import psycopg
import pymongo
from bson import BSON, ObjectId
from bson.codec_options import CodecOptions
from bson.errors import BSONError
from bson.raw_bson import RawBSONDocument
from pymongo.errors import OperationFailure

from scorekeeper.demo.checks import Findings, look_at_both
from scorekeeper.demo.old_application import OldApplication
from scorekeeper.demo.screen import Screen, Step
from scorekeeper.demo.stage import DemoFailed, Stage
from scorekeeper.demo.switched import Switched
from scorekeeper.demo.traffic import RoleChange, Traffic
from scorekeeper.demo.watching import (
    COLLECTIONS,
    Debts,
    quarantined_by_reason,
    read_sources,
    rows_by_table,
    run_progress,
    shadow_progress,
)
from scorekeeper.legacy import LegacySummary, generate

#: Legacy users who are signed in all the time; each costs one log-in at bcrypt's cost 12 beforehand.
_SIGNED_IN = 8
#: Users that only the old application writes to, and names that are only looked up.
_FOREIGN, _KNOWN = 300, 300
#: Verifies, at most, until one finds no write of the old application that is still on its way.
_LOOKS = 5
#: Seconds of PostgreSQL's absence.
_DOWN = 4.0
#: Seconds within which debts must be settled after PostgreSQL's return.
_PATIENCE = 60.0


@dataclass
class Outage:
    """One death of PostgreSQL.

    Attributes:
        phase: in which.
        seconds: from the kill until it answered again.
        deepest: most records in debt at one moment.
        drained: seconds from its return until nothing from before was owed any more.
        reads_back: seconds from its return until a worker read from it again; None where nobody reads it.
        requests, failed: sent between the kill and the return.
    """

    phase: str
    seconds: float = 0.0
    deepest: int = 0
    drained: float = 0.0
    reads_back: float | None = None
    requests: int = 0
    failed: int = 0


@dataclass
class Figures:
    """What the demo leaves.

    Attributes:
        seconds: by step, in order.
        set_up: of them, those before there was a service to speak of.
        legacy: documents by collection, as generated; dirt: users by kind of it.
        backfill: the command's report by entity.
        verify: the last one's, by entity, writers stopped.
        reads: in the measured stage of ``postgres_read``, by (store, why it was that one).
        quarantined: by reason.
        rows: in PostgreSQL at the end, by table.
        findings: of the demo's own look into both stores.
        left_in_debt: records in debt at the end, parked ones left out.
        dead_workers: ports of workers that ended.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    set_up: float = 0.0
    legacy: dict[str, int] = field(default_factory=dict)
    dirt: dict[str, int] = field(default_factory=dict)
    backfill: list[dict[str, Any]] = field(default_factory=list)
    verify: list[dict[str, Any]] = field(default_factory=list)
    reads: Counter[tuple[str, str]] = field(default_factory=Counter)
    quarantined: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    outages: list[Outage] = field(default_factory=list)
    switches: list[Switched] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)
    left_in_debt: int = 0
    dead_workers: list[int] = field(default_factory=list)

    @property
    def mismatches(self) -> int:
        """Records that differ at the end for no known reason."""
        return sum(int(report["counts"]["mismatches"]) for report in self.verify)


@dataclass
class Play:
    """One performance: on a stage, on a screen, with so many users.

    Attributes:
        users: legacy users.
        dwell: seconds for which each phase's latencies are measured.
    """

    stage: Stage
    screen: Screen
    users: int
    dwell: float
    figures: Figures = field(default_factory=Figures)
    traffic: Traffic = field(init=False)
    old: OldApplication = field(init=False)
    debts: Debts = field(init=False)
    _old_writes: asyncio.Task[None] = field(init=False)

    @property
    def problems(self) -> list[str]:
        """Why the demo did not show what it promises; empty: it did."""
        figures = self.figures
        found = {
            f"{self.traffic.failed} requests failed": self.traffic.failed,
            f"{figures.findings.lost} acknowledged things are not where they must be": figures.findings.lost,
            f"{figures.mismatches} records differ": figures.mismatches,
            f"{figures.left_in_debt} records are still in debt": figures.left_in_debt,
            f"workers ended: {figures.dead_workers}": len(figures.dead_workers),
            "writes that a switch held failed": sum(switched.failed for switched in figures.switches),
        }
        return [what for what, number in found.items() if number]

    async def run(self) -> None:
        """Play it through.

        Raises:
            DemoFailed: a step could not be done.
        """
        stage, step = self.stage, self.screen.step
        began = time.monotonic()
        with pymongo.MongoClient[dict[str, Any]](stage.mongo_uri, tz_aware=True) as client:
            stage.start_workers()
            with step(f"a legacy database of {self.users:,} users, with the dirt of real ones") as filling:
                summary = await self._fill(client, filling)
            with step("two workers of the service, in phase mongo_only") as starting:
                await stage.until_ready()
                self._cast(client, summary)
                await self.traffic.sign_in_old_accounts(_SIGNED_IN)
                self.old.signed_in = [
                    ObjectId(account.id)
                    for account in self.traffic.old_accounts
                    if ObjectId.is_valid(account.id)
                    and account.name not in {login.username for login in summary.admin_logins}
                ]
                starting.detail = " ".join(stage.addresses)
            self.figures.set_up = round(time.monotonic() - began, 2)
            try:
                await self._under_traffic()
            except BaseExceptionGroup as group:
                # Whichever came first; the others are what it set off.
                raise _first(group) from group
            await self._afterwards()

    # --- before --------------------------------------------------------------------------------------------

    async def _fill(self, client: pymongo.MongoClient[dict[str, Any]], step: Step) -> LegacySummary:
        stopping = threading.Event()

        def on_progress(collection: str, done: int, total: int) -> None:
            if stopping.is_set():
                raise DemoFailed("interrupted")
            step.detail = collection
            step.progress(done, total)

        # Of the rest a part will do: the users are what is shown.
        few = max(self.users // 40, 10)
        sizes = {**dict.fromkeys(("games", "wizard", "tablegames"), few), "playeridentities": self.users // 4}
        sizes["friendrequests"] = self.users // 10
        database = client.get_default_database()
        try:
            summary = await asyncio.to_thread(
                generate, database, users=self.users, sizes=sizes, on_progress=on_progress
            )
        finally:
            stopping.set()  # a thread cannot be cancelled
        # The embedded document engine's text index reads past a NUL: it then refuses any update of such a user.
        with suppress(OperationFailure):
            database["users"].drop_index("username_text")
        self.figures.legacy = {name: n for name, n in summary.counts.items() if name in COLLECTIONS}
        self.figures.dirt = summary.dirt["users"]
        step.detail = f"{sum(self.figures.dirt.values()):,} users with {len(self.figures.dirt)} kinds of dirt"
        return summary

    def _cast(self, client: pymongo.MongoClient[dict[str, Any]], summary: LegacySummary) -> None:
        """Who logs in, whom the old application writes to, and who is only looked up."""
        database = client.get_default_database()
        signing_in = {login.username for login in summary.logins}
        plain = database["users"].with_options(CodecOptions(document_class=RawBSONDocument))
        found = plain.find(
            {
                "username": {"$regex": "^[A-Za-z0-9]{3,20}$"},
                "role": "user",
                "importBackup": {"$exists": False},
            },
        ).limit(_FOREIGN + _KNOWN + len(signing_in))
        users: list[tuple[str, ObjectId]] = []
        for raw in found:
            with suppress(BSONError, UnicodeDecodeError):
                # As a whole: one with half a character in it goes to quarantine, and stays there.
                user = BSON(raw.raw).decode(CodecOptions(tz_aware=True, tzinfo=UTC, datetime_conversion=4))
                if isinstance(user["_id"], ObjectId) and user["username"] not in signing_in:
                    users.append((user["username"], user["_id"]))
        half = min(_FOREIGN, len(users) // 2)
        self.traffic = Traffic(
            self.stage.addresses,
            known=[(name, str(id_)) for name, id_ in users[half:]],
            logins=[login for login in summary.logins if login.username.isascii()],
        )
        self.old = OldApplication(
            database,
            [id_ for _, id_ in users[:half]],
            [],
            self.traffic.roles,
            lambda: self.traffic.stage,
        )
        self.debts = Debts(database)
        self.screen.status = self._status

    def _status(self) -> str:
        traffic = self.traffic
        return (
            f"requests {traffic.total:,}, failed {traffic.failed}   old application's writes {self.old.writes:,}"
            f"   in debt {self.debts.depth:,}"
        )

    # --- under traffic ---------------------------------------------------------------------------------------

    async def _under_traffic(self) -> None:
        async with asyncio.TaskGroup() as group:
            self._old_writes = group.create_task(self.old.run())
            writers = [group.create_task(self.traffic.run()), self._old_writes]
            watchers = [
                group.create_task(self.debts.run()),
                group.create_task(self.old.watch(self.stage.database_url)),
            ]
            await self._phases()
            with self.screen.step("writers stop; everything owed is settled") as step:
                self.traffic.stop()
                await asyncio.gather(*writers)
                done = await self.stage.crossfade("reconcile", "--full", may_find=True)
                await asyncio.sleep(0.5)
                await self.debts.look()
                self.figures.left_in_debt = self.debts.depth
                step.detail = f"settled {done.get('settled')}, adopted {done.get('adopted')}"
            for watcher in watchers:
                watcher.cancel()

    async def _phases(self) -> None:
        stage, step, traffic = self.stage, self.screen.step, self.traffic
        with step("clients and the old application begin"):
            await asyncio.sleep(min(3.0, self.dwell))
        with step("MongoDB alone, to compare with"), self._measured("mongo_only"):
            await asyncio.sleep(self.dwell)
        with step("crossfade init: normalised keys onto old documents") as preparing:
            found = await stage.crossfade("init", may_find=True)
            rivals = sum(len(ids) for ids in found.get("colliding", {}).values())
            preparing.detail = f"{rivals} names equal to an older one but for case or blanks: all are kept"
        with step("crossfade phase set dual_write, an old application declared"):
            await stage.crossfade("phase", "foreign-writers", "declared", as_json=False)
            await self._set_phase("dual_write")
        with step("every write goes to both stores") as doubling:
            with self._measured("dual_write"):
                await asyncio.sleep(self.dwell)
            doubling.detail = self._lag("dual_write")
        with step("crossfade backfill") as moving:
            await self._backfill(moving)
        await self._die_and_come_back("dual_write")
        with step("crossfade verify: every record, both ways") as verifying:
            await self._verify_until_clean(verifying)
        with step("crossfade phase set shadow_read: MongoDB serves, PostgreSQL is compared") as comparing:
            await self._set_phase("shadow_read")
            await self._compare_enough(comparing)
        with step("crossfade phase set postgres_read"):
            await self._read_postgres()
        with step("PostgreSQL is read") as reading:
            before = await read_sources(stage.addresses)
            with self._measured("postgres_read"):
                await asyncio.sleep(self.dwell)
            self.figures.reads = await read_sources(stage.addresses)
            self.figures.reads.subtract(before)
            total = max(self.figures.reads.total(), 1)
            by_postgres = sum(n for (source, _), n in self.figures.reads.items() if source == "postgres")
            reading.detail = f"{by_postgres * 100 // total} % of {total:,} reads"
        await self._die_and_come_back("postgres_read")
        await self._over_and_back()
        traffic.stage = "ending"

    @contextmanager
    def _measured(self, stage: str) -> Iterator[None]:
        self.traffic.stage = stage
        yield
        self.traffic.stage = f"after {stage}"

    async def _set_phase(self, phase: str) -> None:
        await self.stage.crossfade("phase", "set", phase)
        self.screen.phase = phase

    async def _backfill(self, step: Step) -> None:
        total = sum(self.figures.legacy.values()) + len(self.traffic.accounts)
        running = asyncio.create_task(self.stage.crossfade("backfill", may_find=True))
        try:
            async with await psycopg.AsyncConnection.connect(
                self.stage.database_url, autocommit=True
            ) as connection:
                while not running.done():
                    done = await run_progress(connection, "backfill")
                    step.progress(done, max(done, total))
                    await asyncio.wait([running], timeout=0.25)
            self.figures.backfill = (await running)["entities"]
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        counts = [report["counts"] for report in self.figures.backfill]
        read, seconds = sum(c["read"] for c in counts), sum(r["seconds"] for r in self.figures.backfill)
        quarantined = sum(c["quarantined"] for c in counts)
        step.detail = f"{read:,} documents in {seconds:.1f} s, {quarantined} to quarantine"

    async def _verify_until_clean(self, step: Step) -> None:
        """Verify; a write of the old application that no sweep has seen yet counts: sweep, and look again."""
        for _ in range(_LOOKS):
            reports = (await self.stage.crossfade("verify", may_find=True))["entities"]
            if not any(report["counts"]["mismatches"] for report in reports):
                step.detail = f"{sum(r['counts']['equal'] for r in reports):,} equal, no mismatch"
                return
            await self.stage.crossfade("reconcile", "--full", may_find=True)
        differing = [
            sample
            for report in reports
            for sample in report["samples"]
            if sample["finding"] not in ("quarantined", "in_debt")
        ]
        raise DemoFailed(f"verify: records differ: {differing[:5]}; {self._lag(self.traffic.stage)}")

    async def _compare_enough(self, step: Step) -> None:
        """Wait for the reads that the guard of ``postgres_read`` wants compared, and see to what differs."""
        until = time.monotonic() + _PATIENCE
        wanted = int(self.stage.environment["CROSSFADE_SHADOW_COMPARISONS"])
        async with await psycopg.AsyncConnection.connect(
            self.stage.database_url, autocommit=True
        ) as connection:
            while True:
                compared, differing = await shadow_progress(connection)
                step.progress(min(compared, wanted), wanted)
                if differing:
                    await self._adopt_what_differs()
                elif compared >= wanted:
                    step.detail = f"{compared:,} reads compared, no mismatch open"
                    return
                if time.monotonic() > until:
                    raise DemoFailed(
                        f"the reads did not become equal within {_PATIENCE:.0f} s: {compared} compared, {differing} "
                        "differ"
                    )
                await asyncio.sleep(0.25)

    async def _adopt_what_differs(self) -> None:
        """See to writes of the old application whose sweep came later than the last look of a comparison."""
        await self.stage.crossfade("reconcile", "--full", may_find=True)
        await self.stage.crossfade("mismatches", "resolve", may_find=True)

    async def _read_postgres(self) -> None:
        for _ in range(_LOOKS):
            try:
                await self._set_phase("postgres_read")
                return
            except DemoFailed as refused:
                if "[shadow]" not in str(refused):
                    raise
                await self._adopt_what_differs()
        await self._set_phase("postgres_read")

    async def _over_and_back(self) -> None:
        """Make PostgreSQL the primary, and MongoDB again."""
        with self.screen.step("the old application ends: it knows MongoDB alone"):
            self.old.stop()
            await self._old_writes
            await self.stage.crossfade("phase", "foreign-writers", "stopped", as_json=False)
        # What PostgreSQL cannot hold is in quarantine, and stays in MongoDB: said by name, and kept in the history.
        accepted = ("--force", "quarantine", "--force", "parked")
        with self.screen.step("crossfade switch: PostgreSQL becomes the primary") as over:
            await self._switch(over, "switch", *accepted)
        with self.screen.step("PostgreSQL decides, MongoDB follows"), self._measured("postgres_primary"):
            await asyncio.sleep(self.dwell)
        with self.screen.step("crossfade back: MongoDB is the primary again") as back:
            await self._switch(back, "back")

    async def _switch(self, step: Step, *words: str) -> None:
        began = time.monotonic()
        for attempt in range(1, _LOOKS + 1):
            try:
                report = await self.stage.crossfade(*words)
            except DemoFailed as refused:
                # It went back by itself: on a machine that is busy enough the pause passes its limit.
                if attempt == _LOOKS or "the limit" not in str(refused):
                    raise
                continue
            switched = Switched.from_report(report, seconds=time.monotonic() - began, attempts=attempt)
            self.figures.switches.append(switched)
            self.screen.phase = switched.phase
            step.detail = str(switched)
            return

    def _lag(self, stage: str) -> str:
        lags = sorted(self.old.lags.get(stage, ()))
        if not lags:
            return ""
        middle = lags[len(lags) // 2]
        return f"the old application's writes are in PostgreSQL after {middle:.1f} s, at most {lags[-1]:.1f}"

    async def _die_and_come_back(self, phase: str) -> None:
        server = self.stage.servers.postgres
        if not server.is_ours:
            self.screen.console.print("PostgreSQL is your own: it is not killed", highlight=False)
            return
        outage = Outage(phase)
        with self.screen.step(f"PostgreSQL is killed, and comes back (in {phase})") as step:
            traffic, debts = self.traffic, self.debts
            sent, failed = traffic.total, traffic.failed
            debts.mark()
            traffic.stage = f"{phase}, PostgreSQL dead"
            killed = time.monotonic()
            await asyncio.to_thread(server.kill)
            step.detail = "dead"
            await asyncio.sleep(_DOWN)
            await asyncio.to_thread(server.start)
            back = time.monotonic()
            outage.seconds = round(back - killed, 2)
            outage.requests, outage.failed = traffic.total - sent, traffic.failed - failed
            traffic.stage = f"{phase}, catching up"
            step.detail = "back; debts drain"
            reads_before = await self._reads_by_postgres()
            # Writes under way at its return still found it dead.
            await asyncio.sleep(0.75)
            await debts.look()
            owed = [note for note, seen in debts.last_seen.items() if seen >= back]
            while debts.any_left_of(owed) or (outage.reads_back is None and phase == "postgres_read"):
                if time.monotonic() - back > _PATIENCE:
                    raise DemoFailed(
                        f"debts were not drained within {_PATIENCE:.0f} s of PostgreSQL's return"
                    )
                if phase == "postgres_read" and outage.reads_back is None:
                    reads = await self._reads_by_postgres()
                    outage.reads_back = round(time.monotonic() - back, 1) if reads > reads_before else None
                await asyncio.sleep(0.2)
            outage.drained = round(max((debts.last_seen[note] for note in owed), default=back) - back, 2)
            outage.deepest = debts.deepest
            self.figures.outages.append(outage)
            step.detail = f"{outage.deepest} in debt, drained {outage.drained} s after its return"
            traffic.stage = f"after {phase}"

    async def _reads_by_postgres(self) -> int:
        found = await read_sources(self.stage.addresses)
        return sum(number for (source, _), number in found.items() if source == "postgres")

    # --- afterwards ------------------------------------------------------------------------------------------

    async def _afterwards(self) -> None:
        figures, stage = self.figures, self.stage
        with self.screen.step("crossfade verify, writers stopped") as step:
            figures.verify = (await stage.crossfade("verify", may_find=True))["entities"]
            step.detail = f"{figures.mismatches} mismatches"
        with self.screen.step("the demo's own look into both stores") as step:
            await self._roles_hold()
            figures.findings = await asyncio.to_thread(
                look_at_both, stage.mongo_uri, stage.database_url, self.traffic, self.old
            )
            figures.quarantined = await asyncio.to_thread(quarantined_by_reason, stage.database_url)
            figures.rows = await asyncio.to_thread(rows_by_table, stage.database_url)
            figures.dead_workers = stage.ended_workers()
            step.detail = f"{figures.findings.lost} lost"
        figures.seconds = self.screen.seconds

    async def _roles_hold(self) -> None:
        """Whoever was given a role by the old application has it, by every worker's word."""
        async with httpx.AsyncClient(timeout=20.0, trust_env=False) as http:
            for account in self.traffic.old_accounts:
                changes: list[RoleChange] = self.traffic.roles.get(account.id, [])
                for address in self.stage.addresses if changes else []:
                    answer = await http.get(
                        f"{address}/api/users/me", headers={"Authorization": f"Bearer {account.token}"}
                    )
                    if answer.status_code != 200 or answer.json()["user"]["role"] != changes[-1].role:
                        self.traffic.failures["role", "the old application's role does not hold"] += 1


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
