"""The programs that the checker is made of: spin, and a C compiler for what spin writes.

Neither is asked of the machine, and nothing is installed on it. The compiler is a wheel (`ziglang`, in the `dev`
dependency group). spin is on PATH, or is fetched once from the machine's own Debian or Ubuntu package sources into
the user's cache, as the embedded servers are.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

from crossfade.embedded.commands import CommandFailed, Commands, last_line
from crossfade.embedded.debian import PrivateApt
from crossfade.embedded.places import cache_root


class NotToBeHad(Exception):
    """spin is not on PATH, and cannot be fetched; says why, and what to do."""


def compiler() -> list[str]:
    """The words that a call of the C compiler begins with.

    For a C library as old as any that is still in use, whose interface the wheel brings along: the machine need
    not have its headers.
    """
    return [
        sys.executable, "-m", "ziglang", "cc", "-target", f"{platform.machine()}-linux-gnu.2.28",
        # zig adds debug information and checks for undefined behaviour, which cost more than the search.
        "-g0", "-fno-sanitize=undefined", "-w",
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """The environment to run these programs in: the compiler keeps its cache beside ours."""
    return {
        **os.environ,
        "LC_ALL": "C",
        "ZIG_GLOBAL_CACHE_DIR": str(cache_root() / "zig"),
        "ZIG_LOCAL_CACHE_DIR": str(cache_root() / "zig"),
    }


def spin() -> Path:
    """The path of spin, fetched first if need be.

    Raises:
        NotToBeHad: it is not there and cannot be fetched.
    """
    installed = shutil.which("spin")
    if installed:
        return Path(installed)
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    fetched = root / "spin" / "spin"
    with FileLock(root / "spin.lock"):
        if not fetched.is_file():
            with tempfile.TemporaryDirectory(dir=root, prefix="building-spin-") as aside:
                found = _fetch(Path(aside))
                fetched.parent.mkdir(exist_ok=True)
                # By renaming, so that a run that is killed leaves nothing half.
                found.replace(fetched)
    return fetched


def _fetch(folder: Path) -> Path:
    for program in ("apt-get", "apt-config", "dpkg-deb"):
        if shutil.which(program) is None:
            raise NotToBeHad(f"spin is not on PATH, and without {program} it cannot be fetched: install spin")
    commands = Commands()
    apt = PrivateApt(folder / "apt", "", commands)
    # The machine's sources and keys are read where they are; only lists and downloads are private.
    sources: list[str] = []
    for name, place in (
        ("SourceList", "/etc/apt/sources.list"),
        ("SourceParts", "/etc/apt/sources.list.d"),
        ("Trusted", "/etc/apt/trusted.gpg"),
        ("TrustedParts", "/etc/apt/trusted.gpg.d"),
    ):
        sources += ["-o", f"Dir::Etc::{name}={place}"]
    try:
        apt.run(*sources, "update")
        apt.run(*sources, "download", "spin", cwd=apt.archives)
        package = next(apt.archives.glob("spin_*.deb"))
        commands.run(["dpkg-deb", "-x", package, folder / "unpacked"])
    except (CommandFailed, StopIteration) as error:
        said = last_line(error.output) if isinstance(error, CommandFailed) else "no package arrived"
        raise NotToBeHad(f"spin is not on PATH, and cannot be fetched ({said}): install spin") from error
    return folder / "unpacked/usr/bin/spin"
