"""Breaks the protocol on purpose and asks the tests: `python -m mutants.check [NAME ...]`.

Two kinds of mutants: those of `mutants.toml`, made by hand, among them the broken variants of the formal model; and
with ``--drawn N`` changes of an operator, a constant or a statement, N in each of the four files that carry the
protocol, drawn by ``--seed``. Each is a copy of the package with one change, and pytest runs upon it until a test
fails, alone as well; first the test that noticed it last time (``noticed.json``, which every run completes). Ends with
a table by file and a JSON line; the exit status is 1 if fewer than nine in ten were noticed, or one that is not known
to survive.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from crossfade.embedded import EmbeddedServers

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "crossfade"
#: The files whose every line carries the protocol.
PROTOCOL = (
    "write.py",
    "operation.py",
    "primary_mongo.py",
    "primary_postgres.py",
    "read.py",
    "debt.py",
    "delivery.py",
    "erasing.py",
    "reconcile.py",
)
_OF_A_WRITE = ("single_writes", "both_at_once", "unknown_outcomes", "rollback_both", "several_records")
#: The tests that are about a file, which are asked first; the others of the protocol follow.
CLOSEST = {
    "write.py": _OF_A_WRITE,
    "operation.py": _OF_A_WRITE,
    "primary_mongo.py": _OF_A_WRITE,
    "primary_postgres.py": _OF_A_WRITE,
    "debt.py": ("images", "rules_at_the_secondary", "foreign_writes", "rollback_both", "rules", "outages"),
    "delivery.py": ("outages", "rules_at_the_secondary", "several_records", "parts", "rollback_both"),
    "erasing.py": ("images", "outages", "both_at_once"),
    "read.py": ("reads",),
    "reconcile.py": ("outages", "foreign_writes", "rules_at_the_secondary", "rollback_both"),
    "part.py": ("parts",),
    "stores/rows.py": ("parts", "images"),
}
NOTED = ROOT / "mutants" / "noticed.json"
GOAL = 0.9
#: Seconds for one stage; a mutant that makes the tests hang is noticed by that.
PATIENCE = 900

#: Exit statuses of pytest.
_NOTHING_RUN = (4, 5)

NOTICED, SURVIVED = "noticed", "SURVIVED"


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change.

    Attributes:
        name: for people, and for the command line.
        file: under ``src/crossfade``.
        text: the whole file with the change.
        survives: why no test notices it; empty: one has to.
        hand: made by hand.
    """

    name: str
    file: str
    text: str
    survives: str = ""
    hand: bool = True


class Stale(Exception):
    """A mutant made by hand does not fit the code any more."""


def by_hand() -> list[Mutant]:
    """The mutants of ``mutants.toml``.

    Raises:
        Stale: what one of them changes is not in its file, or is there twice.
    """
    found = []
    for each in tomllib.loads((ROOT / "mutants" / "mutants.toml").read_text())["mutant"]:
        source = (PACKAGE / each["file"]).read_text()
        if source.count(each["before"]) != 1:
            raise Stale(
                f"{each['name']}: what it changes is in {each['file']} {source.count(each['before'])} times"
            )
        text = source.replace(each["before"], each["after"])
        ast.parse(text)
        found.append(Mutant(each["name"], each["file"], text, each.get("survives", "")))
    return found


# --- drawn ---------------------------------------------------------------------------------------------------

_OTHERS: dict[type[ast.AST], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
#: What only tells people what happens: nothing of the protocol hangs on it.
_TALK = ("_say", "log", "observe", "SETTLED", "_count", "labels")


def drawn(file: str, number: int, seed: int) -> list[Mutant]:
    """Changes of one file, by seed."""
    source = _Source((PACKAGE / file).read_bytes())
    every = sorted(set(_changes(source)))
    chosen = random.Random(f"{seed} {file}").sample(every, min(number, len(every)))
    made = []
    for begin, end, line, what in sorted(chosen):
        text = (source.raw[:begin] + what.encode() + source.raw[end:]).decode()
        ast.parse(text)
        was = " ".join(source.raw[begin:end].decode().split())
        made.append(Mutant(f"{file}:{line}: {was[:60]} -> {what}", file, text, hand=False))
    return made


class _Source:
    """A file, and where in it a node stands."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.tree = ast.parse(raw)
        self._starts = [0, *itertools.accumulate(map(len, raw.splitlines(keepends=True)))]

    def place(self, node: ast.expr | ast.stmt) -> tuple[int, int, int]:
        """First byte, the byte behind the last, line."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        begin, end = self._starts[node.lineno - 1], self._starts[node.end_lineno - 1]
        return begin + node.col_offset, end + node.end_col_offset, node.lineno

    def text(self, node: ast.expr) -> str:
        """The node as it is written."""
        begin, end, _ = self.place(node)
        return self.raw[begin:end].decode()


def _changes(source: _Source) -> Iterator[tuple[int, int, int, str]]:
    """(first byte, the byte behind the last, line, what stands there instead)."""
    for node in _of_consequence(source.tree):
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _OTHERS:
            left, right = source.text(node.left), source.text(node.comparators[0])
            yield *source.place(node), f"({left}) {_OTHERS[type(node.ops[0])]} ({right})"
        elif isinstance(node, ast.BoolOp):
            word = " or " if isinstance(node.op, ast.And) else " and "
            yield *source.place(node), f"({word.join(f'({source.text(value)})' for value in node.values)})"
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield *source.place(node), f"({source.text(node.operand)})"
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield *source.place(node), str(not node.value)
        elif isinstance(node, (ast.Continue, ast.Raise)) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Await)
        ):
            yield *source.place(node), "pass"


def _of_consequence(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.AnnAssign) or (isinstance(child, ast.Call) and _talks(child)):
            continue
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            # Defaults and annotations are the signature's; what is done is the body's.
            for statement in child.body:
                yield statement
                yield from _of_consequence(statement)
            continue
        yield child
        yield from _of_consequence(child)


def _talks(call: ast.Call) -> bool:
    return any(isinstance(node, ast.Attribute) and node.attr in _TALK for node in ast.walk(call.func))


# --- asking --------------------------------------------------------------------------------------------------


def _stages(file: str) -> tuple[list[str], list[str]]:
    """What is asked, the quickest to notice first."""
    first = [f"tests/protocol/test_{name}.py" for name in CLOSEST.get(file, ())]
    room = "bulk" if file.startswith("bulk/") else "protocol"
    every = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / room).glob("test_*.py"))
    return [*first, *(path for path in every if path not in first)], ["tests/faults", "tests/histories"]


def ask(mutant: Mutant, servers: EmbeddedServers, jobs: int, noted: str = "") -> tuple[str, str]:
    """Whether the tests notice it, and the first that does; ``noted`` is asked before all others."""
    with tempfile.TemporaryDirectory(prefix="crossfade-mutant-") as name:
        source = Path(name) / "src"
        shutil.copytree(PACKAGE.parent, source, ignore=shutil.ignore_patterns("__pycache__"))
        (source / "crossfade" / mutant.file).write_text(mutant.text)
        environment = os.environ | {
            "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1", "MONGO_URI": servers.mongo_uri,
            "DATABASE_URL": servers.database_url, "REDIS_URL": servers.redis_url,
        }  # fmt: skip

        def run(tests: Sequence[str], jobs: int) -> subprocess.CompletedProcess[str]:
            command = [
                sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider",
                "-n", str(jobs), *tests,
            ]  # fmt: skip
            return subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
            )  # fmt: skip

        try:
            # Or the noted one has another name by now.
            if noted and run([noted], 0).returncode not in (0, *_NOTHING_RUN):
                return NOTICED, noted
            for stage in _stages(mutant.file):
                by_chance: list[str] = []
                while (done := run([*stage, *by_chance], jobs)).returncode:
                    lines = done.stdout.splitlines()
                    failed = [line.split(" ", 1)[1] for line in lines if line.startswith(("FAILED", "ERROR"))]
                    if not failed:
                        return NOTICED, lines[-1] if lines else f"pytest ended with status {done.returncode}"
                    test = failed[0].split(" - ")[0]
                    if run([test], 0).returncode:
                        return NOTICED, test
                    # A test that failed beside others and passes alone says nothing of the mutant.
                    by_chance += ["--deselect", test]
        except subprocess.TimeoutExpired:
            return NOTICED, "the tests do not end"
    return SURVIVED, ""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m mutants.check", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these of mutants.toml")
    parser.add_argument(
        "--drawn", type=int, default=0, metavar="N", help="N more in each protocol file, by seed"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=3, help="pytest's workers")
    given = parser.parse_args(arguments)
    try:
        mutants = by_hand()
    except Stale as cause:
        print(cause, file=sys.stderr)
        return 2
    known = {mutant.name for mutant in mutants}
    if unknown := [name for name in given.names if name not in known]:
        parser.error(f"no mutant {unknown[0]}; there are: {', '.join(sorted(known))}")
    if given.names:
        mutants = [mutant for mutant in mutants if mutant.name in given.names]
    for file in PROTOCOL:
        mutants += drawn(file, given.drawn, given.seed)
    answers: list[tuple[Mutant, str]] = []
    noted: dict[str, str] = json.loads(NOTED.read_text()) if NOTED.exists() else {}
    with EmbeddedServers(environ={}, durable=False) as servers:
        for number, mutant in enumerate(mutants, 1):
            began = time.monotonic()
            answer, by = ask(mutant, servers, given.jobs, noted.get(mutant.name, ""))
            answers.append((mutant, answer))
            if mutant.hand and "::" in by:
                noted[mutant.name] = by
                NOTED.write_text(json.dumps({name: noted[name] for name in sorted(noted)}, indent=1) + "\n")
            expected = f" (known: {mutant.survives})" if mutant.survives and answer == SURVIVED else ""
            took = f"{number:3}/{len(mutants)} {time.monotonic() - began:5.0f} s"
            print(f"{took}  {answer:8} {mutant.name}  {by}{expected}", flush=True)
    return _report(answers)


def _report(answers: Sequence[tuple[Mutant, str]]) -> int:
    good = True
    for file in sorted({mutant.file for mutant, _ in answers}):
        of_file = [(mutant, answer) for mutant, answer in answers if mutant.file == file]
        noticed = sum(answer == NOTICED for _, answer in of_file)
        good &= noticed >= GOAL * len(of_file)
        print(f"{file:24} {noticed} of {len(of_file)} noticed ({noticed / len(of_file):.0%})")
    survivors = [mutant for mutant, answer in answers if answer == SURVIVED]
    good &= all(mutant.survives for mutant in survivors if mutant.hand)
    noticed = len(answers) - len(survivors)
    print(
        json.dumps(
            {
                "figure": "mutants noticed",
                "value": noticed,
                "of": len(answers),
                "goal": f">= {GOAL:.0%} in each file",
                "holds": good,
                "survivors": [mutant.name for mutant in survivors],
            }
        )
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
