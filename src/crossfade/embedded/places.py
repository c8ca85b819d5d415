"""Where the embedded servers keep their files, and as whom PostgreSQL runs.

PostgreSQL refuses to run as root. As root it therefore runs as `nobody`, and every folder it needs must be
one that `nobody` may enter. Root's home is closed to others, so for root the default folders are under
`/var`; a folder that the caller names is checked and refused with one clear line.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from crossfade.embedded.errors import EmbeddedError

#: Bytes of memory that a set of servers for tests may come to need.
_PLENTY = 4 << 30


@dataclass(frozen=True)
class Account:
    """The operating system account that PostgreSQL runs as.

    uid, gid: numbers of the account; `switches` says whether they differ from the caller's own.
    """

    uid: int
    gid: int
    switches: bool


def postgres_account() -> Account:
    """The caller's own account, or `nobody` when the caller is root."""
    if os.geteuid() != 0:
        return Account(os.geteuid(), os.getegid(), switches=False)
    import pwd

    try:
        entry = pwd.getpwnam("nobody")
    except KeyError:
        raise EmbeddedError(
            "PostgreSQL refuses to run as root, and this system has no account `nobody` to run it as. "
            "Run crossfade as an ordinary user, or set DATABASE_URL and MONGO_URI to servers of your own."
        ) from None
    return Account(entry.pw_uid, entry.pw_gid, switches=True)


def cache_root() -> Path:
    """The folder the programs are set up in, once: `$XDG_CACHE_HOME/crossfade`, `~/.cache/crossfade`;
    for root without XDG_CACHE_HOME, `/var/cache/crossfade`."""
    return _base("XDG_CACHE_HOME", ".cache", "/var/cache")


def state_root() -> Path:
    """The folder of long-lived data: `$XDG_STATE_HOME/crossfade`, `~/.local/state/crossfade`; for root
    without XDG_STATE_HOME, `/var/lib/crossfade`."""
    return _base("XDG_STATE_HOME", ".local/state", "/var/lib")


_MEMORY = Path("/dev/shm")  # noqa: S108 - the folders made in it are private


def scratch_roots() -> set[Path]:
    """Every folder that `scratch_root` may give, now or to another process."""
    return {_MEMORY, Path(tempfile.gettempdir())}


def scratch_root() -> Path:
    """The folder for data that nobody will miss: in memory where Linux has plenty, else the temporary one.

    Databases are made and dropped by the hundred files; in memory that takes half the time.
    """
    try:
        known = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(known["MemAvailable"].split()[0]) * 1024
        plenty = shutil.disk_usage(_MEMORY).free >= _PLENTY and free >= 2 * _PLENTY
    except (OSError, KeyError, ValueError):
        plenty = False
    named = "TMPDIR" in os.environ
    return _MEMORY if plenty and not named and os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir())


def _base(variable: str, in_home: str, for_root: str) -> Path:
    named = os.environ.get(variable, "")
    # The XDG specification says that a relative path is to be ignored.
    if named.startswith("/"):
        return Path(named) / "crossfade"
    if os.geteuid() == 0:
        return Path(for_root) / "crossfade"
    try:
        return Path.home() / in_home / "crossfade"
    except RuntimeError:
        raise EmbeddedError(
            f"cannot tell where to keep the embedded servers: no home directory. Set {variable}."
        ) from None


def may_enter(path: Path, account: Account) -> Path | None:
    """The first folder on the way to `path` (itself included) that `account` may not enter; None if it
    may reach it. A part that does not exist yet stops the walk."""
    absolute = path.resolve()
    for folder in [*reversed(absolute.parents), absolute]:
        try:
            status = folder.stat()
        except FileNotFoundError:
            return None
        except PermissionError:
            return folder
        if status.st_uid == account.uid:
            wanted = stat.S_IXUSR
        elif status.st_gid == account.gid:
            wanted = stat.S_IXGRP
        else:
            wanted = stat.S_IXOTH
        if not status.st_mode & wanted:
            return folder
    return None


def make_reachable(path: Path, account: Account, *, variable: str) -> Path:
    """Make the folder `path` and see that `account` can enter it.

    variable: the setting named in the error as the way to choose another folder.
    Raises EmbeddedError when the folder cannot be made, written or entered.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o711 if account.switches else 0o700)
        writable = os.access(path, os.W_OK | os.X_OK)
    except OSError as error:
        raise EmbeddedError(f"cannot make the folder {path} ({error.strerror}). Set {variable}.") from None
    if not writable:
        raise EmbeddedError(f"cannot write in the folder {path} (permission denied). Set {variable}.")
    if account.switches:
        closed = may_enter(path, account)
        if closed is not None:
            raise EmbeddedError(
                "PostgreSQL runs as `nobody` when crossfade runs as root, and `nobody` may not enter "
                f"{closed} on the way to {path}. Set {variable} to a folder open to others (or unset it), "
                "or run crossfade as an ordinary user."
            )
    return path
