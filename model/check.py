"""Checks the model: `python -m model.check [--deep] [NAME ...]`.

Every scope must be accepted, every broken variant rejected. A rejection is shown as a table: who did what, and both
stores afterwards. The exit status is 0 if all is as it must be, 1 if not, 2 if the checker could not be run.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.programs import NotToBeHad, compiler, environment, spin

HERE = Path(__file__).parent

_DELETES = ("UPDATES", "INSERTS", "DELETES", "THERE", "ABSENT")
_FOREIGN = ("UPDATES", "THERE", "FOREIGN", "RESETS")
_TWO = ("TWO_COORDINATORS",)


@dataclass(frozen=True, slots=True)
class Case:
    """What is given to the checker.

    Attributes:
        name: as on the command line and in the tests.
        model: file name.
        defines: the scope, and in a broken variant the one line that is changed.
        breaks: a broken variant only: the property that must be found violated.
        deep: takes minutes, so it is checked by hand and not in CI.
    """

    name: str
    model: str
    defines: tuple[str, ...]
    breaks: str = ""
    deep: bool = False


DEBT = "debt is atomic with data"
KEPT = "no lost write"
STRATEGY = "strategy honoured"
CONVERGENCE = "convergence"
READS = "no older read"

CASES = (
    Case("updates", "record.pml", ("UPDATES", "THERE", "ROLLBACK", "SLOW=2", "CRASH")),
    Case("deletes", "record.pml", (*_DELETES, "ROLLBACK", "CRASH")),
    Case("backfill", "record.pml", ("UPDATES", "DELETES", "THERE", "BACKFILL", "CRASH")),
    Case("backfill_and_inserts", "record.pml", (*_DELETES, "BACKFILL"), deep=True),
    Case("foreign_writer", "record.pml", (*_FOREIGN, "ROLLBACK")),
    Case("foreign_writer_and_slow_secondary", "record.pml", (*_FOREIGN, "SLOW=1", "CRASH")),
    Case(
        "all_writes_and_slow_secondary", "record.pml", (*_DELETES, "ROLLBACK", "SLOW=1", "CRASH"), deep=True
    ),
    Case("backfill_and_slow_secondary", "record.pml", (*_DELETES, "BACKFILL", "SLOW=1"), deep=True),
    Case("foreign_writer_and_deletes", "record.pml", (*_DELETES, "FOREIGN", "RESETS"), deep=True),
    Case("behind_confirms", "record.pml", (*_FOREIGN, "BEHIND_CONFIRMS"), DEBT),
    Case("settle_without_operation", "record.pml", (*_FOREIGN, "SETTLE_WITHOUT_OPERATION"), DEBT),
    Case("no_second_look", "record.pml", (*_DELETES, "NO_SECOND_LOOK"), DEBT),
    Case("delete_not_decided", "record.pml", (*_DELETES, "DELETE_NOT_DECIDED"), KEPT),
    Case("debt_after_data", "record.pml", ("UPDATES", "THERE", "DEBT_AFTER_DATA"), DEBT),
    Case("undo_by_key", "record.pml", ("UPDATES", "THERE", "ROLLBACK", "UNDO_BY_KEY"), KEPT),
    Case("reads", "reads.pml", ("FAILURES=1",)),
    Case("reads_and_deletes", "reads.pml", ("DELETES", "FAILURES=1"), deep=True),
    Case("age_from_the_end_of_a_look", "reads.pml", ("FAILURES=1", "AGE_FROM_THE_END_OF_A_LOOK"), READS),
    Case("acknowledged_at_once", "reads.pml", ("FAILURES=1", "ACKNOWLEDGED_AT_ONCE"), READS),
    Case("lifted_in_one_step", "reads.pml", ("FAILURES=1", "LIFTED_IN_ONE_STEP"), READS),
    Case("switch", "switch.pml", ("MOST_WRITES=2",)),
    Case("switch_by_two", "switch.pml", (*_TWO, "MOST_WRITES=2")),
    Case("drain_before_fence", "switch.pml", ("MOST_WRITES=1", "DRAIN_BEFORE_FENCE"), KEPT),
    Case("acknowledged_without_lease", "switch.pml", ("MOST_WRITES=1", "ACKNOWLEDGED_WITHOUT_LEASE"), KEPT),
    Case("lease_of_any_epoch", "switch.pml", ("MOST_WRITES=1", "LEASE_OF_ANY_EPOCH"), KEPT),
    Case(
        "signed_with_writes_under_way", "switch.pml", ("MOST_WRITES=1", "SIGNED_WITH_WRITES_UNDER_WAY"), KEPT
    ),
    Case("decided_without_attempt", "switch.pml", (*_TWO, "MOST_WRITES=1", "DECIDED_WITHOUT_ATTEMPT"), KEPT),
    Case("image_of_any_epoch", "switch.pml", ("MOST_WRITES=2", "IMAGE_OF_ANY_EPOCH"), KEPT),
    Case("no_look_after_commit", "record.pml", (*_DELETES, "BACKFILL", "NO_LOOK_AFTER_COMMIT"), DEBT),
)

#: What an assertion is about, by a word of it. The first that is found counts.
_PROPERTIES = (
    ("acknowledged&", KEPT),
    ("acknowledged", READS),
    ("touched", DEBT),
    ("took", KEPT),
    ("latest", KEPT),
    ("told", STRATEGY),
    ("mine", STRATEGY),
    ("rounds", CONVERGENCE),
    ("invalid end state", CONVERGENCE),
)
#: By model: who writes a line of a counterexample, and what stands above its columns.
_PROCESSES = {
    "record.pml": ("at first", "worker 1", "worker 2", "reconciler", "foreign writer", "network", "backfill"),
    "switch.pml": ("at first", "worker 1", "worker 2", "anybody", "coordinator 1", "coordinator 2"),
    "reads.pml": (
        "at first", "worker 1", "worker 2", "looks of 1", "looks of 2", "reconciler 1", "reconciler 2"
    ),
}  # fmt: skip
_HEADS = {
    "switch.pml": ("control", "mongo", "row", "copy", "seen by 1", "seen by 2", "acknowledged"),
    "record.pml": ("document: revision", "notes", "tombstone", "row: revision", "tombstone"),
    "reads.pml": (
        "document", "tombstone", "row", "buried", "flag", "board of 1", "board of 2", "acknowledged"
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the checker found.

    Attributes:
        states: distinct states that it visited.
        seconds: of the search, without the compiler.
        violated: the property, or "" if every state is good.
        trace: a shortest way there, as lines of a table.
    """

    states: int
    seconds: float
    violated: str
    trace: tuple[str, ...]


class CheckerFailed(Exception):
    """A program of the checker did not do its work; its output."""


def check(case: Case) -> Verdict:
    """Search every state of a case.

    Raises:
        model.programs.NotToBeHad, CheckerFailed: it could not be searched to its end.
    """
    with tempfile.TemporaryDirectory(prefix="crossfade-model-") as name:
        folder = Path(name)
        defines = [f"-D{define}" for define in case.defines]
        source = folder / case.model
        # The preprocessor that spin looks for by itself is a C compiler's, which the machine need not have.
        flat = _run([*compiler(), "-E", "-x", "c", "-P", *defines, str(HERE / case.model)], folder)
        source.write_text(flat)
        _run([str(spin()), "-a", source.name], folder)
        # Breadth first finds a shortest counterexample; depth first is faster where there is none.
        search = ["-O1", "-DBFS"] if case.breaks else ["-O2"]
        _run([*compiler(), *search, "-DSAFETY", "-DNOFAIR", "-DCOLLAPSE", "-o", "pan", "pan.c"], folder)
        began = time.monotonic()
        said = _run(["./pan", "-m200000", "-w22", "-n"], folder)
        seconds = time.monotonic() - began
        stored = re.search(r"(\d+) states, stored", said)
        unfinished = stored is None or "Search not completed" in said or "search depth too small" in said
        if unfinished and "errors: 1" not in said:
            raise CheckerFailed(said)
        states = int(stored.group(1)) if stored else 0
        wrong = re.search(r"^pan:1: (.*)$", said, re.MULTILINE)
        if wrong is None:
            return Verdict(states, seconds, "", ())
        found = next((name for word, name in _PROPERTIES if word in wrong.group(1)), wrong.group(1))
        trail = _run([str(spin()), "-t", "-T", source.name], folder)
        return Verdict(states, seconds, found, tuple(_table(case.model, trail)))


def _run(words: Sequence[str], folder: Path) -> str:
    done = subprocess.run(
        words, cwd=folder, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )  # fmt: skip
    # pan's status for a violation is 0 or 1, by version: its output is what counts.
    if done.returncode != 0 and words[0] != "./pan":
        raise CheckerFailed(f"{' '.join(words)}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def _table(model: str, trail: str) -> list[str]:
    """The model's own lines of a trail, in columns."""
    lines = [line.split("|")[1:] for line in trail.splitlines() if line.startswith("|")]
    if not lines:
        return ["(the model printed nothing)"]
    rows = [["", "does", "next", *_HEADS[model]]]
    rows += [[_PROCESSES[model][int(who)], *rest] for who, *rest in lines]
    rows[1][1:3] = ["", ""]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m model.check", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="only these: " + ", ".join(c.name for c in CASES)
    )
    parser.add_argument("--deep", action="store_true", help="the scopes that take minutes, too")
    given = parser.parse_args(arguments)
    known = {case.name: case for case in CASES}
    if unknown := [name for name in given.names if name not in known]:
        parser.error(f"no case {unknown[0]}; there are: {', '.join(known)}")
    chosen = [known[name] for name in given.names] or [case for case in CASES if given.deep or not case.deep]
    good = True
    for case in chosen:
        try:
            verdict = check(case)
        except (NotToBeHad, CheckerFailed) as cause:
            print(f"{case.name}: {cause}", file=sys.stderr)
            return 2
        good &= verdict.violated == case.breaks
        _report(case, verdict)
    return 0 if good else 1


def _report(case: Case, verdict: Verdict) -> None:
    outcome = f"REJECTED, {verdict.violated}" if verdict.violated else "accepted"
    unexpected = "" if verdict.violated == case.breaks else f"   <- should be {case.breaks or 'accepted'}"
    print(
        f"{case.name:36} {verdict.states:>10,} states {verdict.seconds:6.1f} s  {outcome}{unexpected}",
        flush=True,
    )
    for line in verdict.trace:
        print(f"    {line}")


if __name__ == "__main__":
    sys.exit(main())
