"""Debian packages without root and without installing: the document engine's files.

`apt-get` with a private root resolves and downloads; signatures are checked against Debian's own keyring.
The packages are unpacked into a folder and never installed. What the engine does not need is left out.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from crossfade.embedded.commands import CommandFailed, Commands, last_line
from crossfade.embedded.errors import OWN_MONGO, EmbeddedError
from crossfade.embedded.progress import Step

#: The first Debian release that has the document engine.
RELEASE = "forky"
PACKAGE = "postgresql-18-documentdb"
#: Where Debian packages come from when the host's own apt sources name no Debian mirror (Ubuntu).
PUBLIC_MIRROR = "http://deb.debian.org/debian"
#: Overrides the mirror.
MIRROR_VARIABLE = "CROSSFADE_DEBIAN_MIRROR"
KEYRING_VARIABLE = "CROSSFADE_DEBIAN_KEYRING"
KEYRINGS = (
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
)

LIBRARIES = "usr/lib/x86_64-linux-gnu"
_DEBIAN_SUITES = re.compile(
    r"^(stable|oldstable|testing|unstable|sid|bullseye|bookworm|trixie|forky|duke)(-(updates|backports))?$"
)


def host_mirror(etc: Path = Path("/etc/apt")) -> str:
    """The Debian mirror of the host's own apt sources, both formats; the public one if there is none.

    An address of `CROSSFADE_DEBIAN_MIRROR` comes first.
    """
    named = os.environ.get(MIRROR_VARIABLE)
    if named:
        return named
    for address, suite, components in _sources(etc):
        fetchable = address.startswith(("http://", "https://", "mirror+", "tor+", "ftp://"))
        if fetchable and "main" in components and _DEBIAN_SUITES.match(suite):
            return address.rstrip("/")
    return PUBLIC_MIRROR


def _sources(etc: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Every (address, suite, components) of the binary package sources."""
    parts = etc / "sources.list.d"
    for path in [etc / "sources.list", *sorted(parts.glob("*.list")), *sorted(parts.glob("*.sources"))]:
        try:
            text = path.read_text(errors="replace")
        except OSError:
            continue
        yield from (_deb822(text) if path.suffix == ".sources" else _one_line(text))


def _one_line(text: str) -> Iterator[tuple[str, str, list[str]]]:
    for line in text.splitlines():
        words = re.sub(r"\[[^\]]*\]", " ", line.partition("#")[0]).split()
        if len(words) >= 3 and words[0] == "deb":
            yield words[1], words[2], words[3:]


def _deb822(text: str) -> Iterator[tuple[str, str, list[str]]]:
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        key = ""
        for line in stanza.splitlines():
            if line.startswith("#"):
                continue
            if line[:1] in (" ", "\t") and key:
                fields[key] += " " + line.strip()
            elif ":" in line:
                name, _, value = line.partition(":")
                key = name.strip().lower()
                fields[key] = value.strip()
        if fields.get("enabled", "yes").lower() in ("no", "false", "0"):
            continue
        if "deb" in fields.get("types", "").split():
            for address in fields.get("uris", "").split():
                for suite in fields.get("suites", "").split():
                    yield address, suite, fields.get("components", "").split()


class PrivateApt:
    """An `apt-get` that keeps everything in one folder and needs no rights.

    Only the host's settings of *how* to fetch (proxies, timeouts) are taken over.
    """

    def __init__(self, folder: Path, source_lines: str, commands: Commands) -> None:
        self._folder = folder
        self._commands = commands
        for part in ("etc/apt.conf.d", "etc/preferences.d", "etc/sources.list.d", "etc/trusted.gpg.d"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        for part in ("state/lists/partial", "cache/archives/partial", "log"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / "state/status").touch()
        (folder / "etc/sources.list").write_text(source_lines)
        (folder / "apt.conf").write_text(self._configuration())
        self.archives = folder / "cache/archives"

    def _configuration(self) -> str:
        fetching = [
            line
            for line in self._commands.run(["apt-config", "dump"]).splitlines()
            if line.startswith("Acquire::") and "::Languages" not in line and "IndexTargets" not in line
        ]
        settings = {
            "Dir::Etc": self._folder / "etc",
            "Dir::State": self._folder / "state",
            "Dir::State::status": self._folder / "state/status",
            "Dir::Cache": self._folder / "cache",
            "Dir::Log": self._folder / "log",
            "Acquire::Languages": "none",
            "Acquire::Check-Valid-Until": "false",
            "Acquire::Retries": "2",
            "Acquire::http::Timeout": "20",
            "Acquire::https::Timeout": "20",
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            "APT::Install-Recommends": "false",
            "APT::Get::AllowUnauthenticated": "false",
            # Root's apt would fetch as `_apt`, who may not enter this folder.
            "APT::Sandbox::User": "root",
        }
        return "\n".join([*fetching, *(f'{key} "{value}";' for key, value in settings.items())]) + "\n"

    def run(self, *words: str, cwd: Path | None = None) -> str:
        """`apt-get WORDS`. Raises CommandFailed."""
        environ = {"APT_CONFIG": str(self._folder / "apt.conf"), "LC_ALL": "C"}
        return self._commands.run(["apt-get", "-q", *words], environ=environ, cwd=cwd)


def find_keyring(work: Path, commands: Commands) -> Path:
    """Debian's archive keyring: the host's, else from the host's own package source (Ubuntu carries it as a
    package, signed by Ubuntu's key). Raises EmbeddedError when there is none."""
    named = os.environ.get(KEYRING_VARIABLE)
    for candidate in (named,) if named else KEYRINGS:
        if Path(candidate).is_file():
            return Path(candidate)
    problem = f"{named} is not a file" if named else "this system has none"
    if not named:
        try:
            return _keyring_from_host(work, commands)
        except (CommandFailed, OSError, EmbeddedError) as error:
            problem = f"this system has none, and its own package source did not give it: {error}"
    raise EmbeddedError(
        f"cannot check Debian's signatures: no Debian keyring ({problem}). Install the package "
        f"`debian-archive-keyring`. {OWN_MONGO}"
    )


def _keyring_from_host(work: Path, commands: Commands) -> Path:
    apt = PrivateApt(work / "host-apt", "", commands)
    # The host's sources and keys are read where they are; only lists and downloads are private.
    options: list[str] = []
    for name, place in (
        ("SourceList", "/etc/apt/sources.list"),
        ("SourceParts", "/etc/apt/sources.list.d"),
        ("Trusted", "/etc/apt/trusted.gpg"),
        ("TrustedParts", "/etc/apt/trusted.gpg.d"),
    ):
        options += ["-o", f"Dir::Etc::{name}={place}"]
    apt.run(*options, "update")
    apt.run(*options, "download", "debian-archive-keyring", cwd=apt.archives)
    package = next(apt.archives.glob("debian-archive-keyring_*.deb"))
    commands.run(["dpkg-deb", "-x", package, work / "keyring"])
    for candidate in KEYRINGS:
        # In newer packages one name is a link to the other.
        found = (work / "keyring" / candidate.lstrip("/")).resolve()
        if found.is_file():
            return found
    raise EmbeddedError("the package debian-archive-keyring holds no keyring")


def download_and_unpack(folder: Path, work: Path, commands: Commands, step: Step) -> list[str]:
    """Put the engine's files into `folder`; returns the names of the packages, with versions.

    work: a folder for what is not kept. Raises EmbeddedError, in one line, for whatever is missing.
    """
    for program in ("apt-get", "apt-config", "dpkg-deb", "tar"):
        if shutil.which(program) is None:
            raise EmbeddedError(
                f"cannot set up the MongoDB-compatible server: no `{program}` on PATH "
                f"(Debian or Ubuntu is needed). {OWN_MONGO}"
            )
    mirror = host_mirror()
    keyring = find_keyring(work, commands)
    step.at(0.02, "package lists")
    apt = PrivateApt(work / "apt", f"deb [signed-by={keyring}] {mirror} {RELEASE} main\n", commands)
    try:
        # Without this option a mirror that cannot be reached is a warning only.
        apt.run("-o", "APT::Update::Error-Mode=any", "update")
        step.at(0.12, "downloading 140 MB")
        apt.run("install", "-y", "--download-only", PACKAGE)
    except CommandFailed as error:
        raise _fetch_problem(error, mirror) from error
    step.at(0.5, "unpacking")
    packages = sorted(apt.archives.glob("*.deb"))
    _unpack(packages, folder, commands, step)
    return [package.stem for package in packages]


def _fetch_problem(error: CommandFailed, mirror: str) -> Exception:
    from crossfade.embedded.cache import says_disk_full

    if says_disk_full(error, error.output):
        return error
    cause = last_line(error.output)
    if "Unable to locate package" in error.output:
        cause = f"Debian {RELEASE} there has no {PACKAGE}"
    elif "is not signed" in error.output or "NO_PUBKEY" in error.output:
        cause = "its signature does not fit the Debian keyring; is debian-archive-keyring up to date?"
    return EmbeddedError(
        f"cannot fetch the MongoDB-compatible server from the Debian mirror {mirror}: {cause}. "
        f"Is the network up? {MIRROR_VARIABLE} names another mirror. {OWN_MONGO}"
    )


def _unpack(packages: list[Path], folder: Path, commands: Commands, step: Step) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    done = 0

    def unpack(package: Path) -> None:
        # `--wildcards` with no match is an error to tar, so what is unwanted is excluded instead.
        excluded = [f"--exclude={part}" for part in _EXCLUDED]
        script = (
            'dpkg-deb --fsys-tarfile "$1" | tar -x -C "$2" --no-same-owner --delay-directory-restore "${@:3}"'
        )
        commands.run(["bash", "-c", script, "unpack", package, folder, *excluded], environ={"LC_ALL": "C"})
        package.unlink()

    with concurrent.futures.ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for _ in pool.map(unpack, packages):
            done += 1
            step.at(0.5 + 0.4 * done / len(packages), "unpacking")


_EXCLUDED = (
    "./etc",
    "./var",
    "./usr/bin",
    "./usr/sbin",
    "./usr/libexec",
    "./usr/include",
    "./usr/lib/systemd",
    "./usr/lib/udev",
    "./usr/lib/python3*",
    "./usr/lib/tmpfiles.d",
    "./usr/lib/sysusers.d",
    "./usr/lib/locale",
    "./usr/lib/*/perl*",
    "./usr/lib/*/gconv",
    "./usr/lib/*/systemd",
    "./usr/lib/*/libgdal*",
    "./usr/lib/*/libSFCGAL*",
    "./usr/lib/*/libspatialite*",
    "./usr/lib/*/libpoppler*",
    "./usr/lib/*/libhdf5*",
    "./usr/lib/*/libSvtAv1*",
    "./usr/lib/*/libaom*",
    "./usr/lib/*/librav1e*",
    "./usr/lib/postgresql/*/lib/bitcode",
    "./usr/lib/postgresql/*/lib/pgxs",
    "./usr/lib/postgresql/*/lib/postgis_raster*",
    "./usr/lib/postgresql/*/lib/postgis_sfcgal*",
    "./usr/share/[!p]*",
    "./usr/share/p[!or]*",
    "./usr/share/po[!s]*",
    "./usr/share/postgresql-common",
    "./usr/share/postgresql/*/man",
    "./usr/share/postgresql/*/contrib",
    "./usr/share/postgresql/*/extension/postgis_tiger*",
    "./usr/share/postgresql/*/extension/postgis_raster*",
    "./usr/share/postgresql/*/extension/postgis_topology*",
    "./usr/share/postgresql/*/extension/address_standardizer*",
)
