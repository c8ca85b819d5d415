"""The cache of programs: each set up once, whole or not at all.

A part is a folder named after its version. It is built aside, under `building-...`, stamped, and renamed into
place in one step, so a folder that has its final name is complete. One file lock covers all set-up: of two
processes at once the second waits, says so in one line, and then finds the work done. The lock is the
kernel's, so it goes with the process that held it, however that ended.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from crossfade.embedded.errors import OWN_MONGO, EmbeddedError
from crossfade.embedded.places import Account
from crossfade.embedded.progress import SetupProgress

STAMP = "complete.json"


def is_complete(folder: Path) -> bool:
    """Whether a part was built to its end, for exactly this folder name."""
    try:
        stamp = json.loads((folder / STAMP).read_text())
    except (OSError, ValueError):
        return False
    return bool(isinstance(stamp, dict) and stamp.get("name") == folder.name)


@contextmanager
def locked(root: Path, progress: SetupProgress) -> Iterator[None]:
    """Hold the cache's lock; waits as long as another process holds it, and says so once."""
    lock = FileLock(root / "setup.lock", mode=0o644)
    try:
        try:
            lock.acquire(timeout=0.1)
        except Timeout:
            progress.say(f"another process is setting up the embedded servers in {root}; waiting for it")
            lock.acquire()
    except OSError as error:
        raise EmbeddedError(
            f"cannot lock the cache {root} ({error.strerror}). Set XDG_CACHE_HOME to a local folder."
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def built_aside(folder: Path, account: Account) -> Iterator[Path]:
    """A fresh folder to build in, which becomes `folder` if the body ends well and goes away if not.

    The caller holds the lock, so any other `building-*` is what a killed set-up left, and is removed by
    `remove_half_built`. account: who must be able to enter it.
    """
    aside = folder.parent / f"building-{folder.name}-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(mode=0o711 if account.switches else 0o700)
    try:
        yield aside
        stamp = {"name": folder.name, "built": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        (aside / STAMP).write_text(json.dumps(stamp))
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_half_built(root: Path) -> None:
    """Remove what killed set-ups left behind. The caller holds the lock."""
    for left in root.glob("building-*"):
        shutil.rmtree(left, ignore_errors=True)


def require_space(root: Path, megabytes: int) -> None:
    """Raise EmbeddedError unless so much is free where the cache is."""
    free = shutil.disk_usage(root).free // 1_000_000
    if free < megabytes:
        raise EmbeddedError(
            f"no space to set up the embedded servers: {root} has {free} MB free, {megabytes} MB are needed. "
            f"Free some, or set XDG_CACHE_HOME to another disk. {OWN_MONGO}"
        )


#: What programs say when the disk is full, or a file may grow no further (a limit of the account).
_FULL = ("no space left on device", "disk quota exceeded", "file too large", "file size limit")


def says_disk_full(error: BaseException, output: str = "") -> bool:
    """Whether a failure's cause is a full disk."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return any(words in output.lower() for words in _FULL)
