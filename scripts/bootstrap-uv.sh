#!/bin/sh
# Print the path of a working `uv`; put one into .tools/ first if there is none. Needs no root and no pip.
#
# In this order: uv on PATH; .tools/uv of an earlier run; the pip of python3; a pip wheel that Debian ships apart
# from python3 (its python3 has neither pip nor ensurepip): the host's, or downloaded as a package and unpacked
# into a temporary folder, never installed.
#
# Standard output is the path alone; everything said to a person goes to standard error.
set -eu

# Older ones do not know dependency groups.
OLDEST_MINOR=5
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
tools=$root/.tools
python=${PYTHON:-python3}
# A variable of the caller's must not move what is installed here.
unset PIP_TARGET PIP_PREFIX PIP_USER PIP_REQUIRE_VIRTUALENV PYTHONPATH PYTHONHOME 2>/dev/null || true

say() { printf '%s\n' "$*" >&2; }

works() {
    # A shim of a version manager may be on PATH and run nothing.
    version=$("$1" --version 2>/dev/null) || return 1
    version=${version#uv }
    version=${version%% *}
    major=${version%%.*}
    minor=${version#*.}
    minor=${minor%%.*}
    case "$major$minor" in '' | *[!0-9]*) return 1 ;; esac
    [ "$major" -gt 0 ] || [ "$minor" -ge "$OLDEST_MINOR" ]
}

found() {
    printf '%s\n' "$1"
    exit 0
}

if command -v uv >/dev/null 2>&1 && works "$(command -v uv)"; then
    found "$(command -v uv)"
fi
if works "$tools/uv/bin/uv"; then
    found "$tools/uv/bin/uv"
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/crossfade-uv.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
log=$work/log
: >"$log"

give_up() {
    last=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 || true)
    say "error: cannot install uv: $1${last:+ ($last)}. Install uv yourself, or the packages python3-pip and" \
        "ca-certificates, and run make again."
    exit 1
}

# install PIP...: with this pip into a folder aside, then by renaming, so that an interrupted run leaves nothing half.
install() {
    mkdir -p "$tools"
    aside=$tools/uv.$$
    if "$@" install --quiet --disable-pip-version-check --no-input --no-compile --only-binary=:all: \
        --target "$aside" uv >>"$log" 2>&1 && works "$aside/bin/uv"; then
        # Two runs at once: the second finds the folder taken, and either one is good.
        rm -rf "$tools/uv"
        mv "$aside" "$tools/uv" 2>/dev/null || rm -rf "$aside"
        works "$tools/uv/bin/uv"
    else
        rm -rf "$aside"
        return 1
    fi
}

pip_of_wheel() {
    for wheel in "$1"/usr/share/python-wheels/pip-*.whl; do
        [ -f "$wheel" ] || continue
        export PYTHONPATH="$wheel"
        if install "$python" -m pip; then return 0; fi
        unset PYTHONPATH
    done
    return 1
}

# Debian's and Ubuntu's package of pip as a wheel, from the host's own package sources.
download_wheel() {
    cd "$work"
    apt-get -q download python3-pip-whl >>"$log" 2>&1 && return 0
    # A fresh machine or container has no package lists, and an ordinary user may not fetch them: private ones do.
    mkdir -p apt/state/lists/partial apt/cache/archives/partial apt/log
    cat >apt.conf <<END
Dir::State "$work/apt/state";
Dir::State::status "/var/lib/dpkg/status";
Dir::Cache "$work/apt/cache";
Dir::Log "$work/apt/log";
Acquire::Languages "none";
Acquire::Retries "2";
APT::Sandbox::User "";
END
    say "fetching package lists of our own, for pip"
    # One broken source of many is no reason to stop: the download tells.
    APT_CONFIG=$work/apt.conf apt-get -q update >>"$log" 2>&1 || true
    APT_CONFIG=$work/apt.conf apt-get -q download python3-pip-whl >>"$log" 2>&1
}

command -v "$python" >/dev/null 2>&1 || give_up "there is no $python"
say "installing uv into .tools/ (nothing outside this folder changes)"

if "$python" -m pip --version >/dev/null 2>&1; then
    if install "$python" -m pip; then found "$tools/uv/bin/uv"; fi
    give_up "pip could not fetch it"
fi
if pip_of_wheel ""; then found "$tools/uv/bin/uv"; fi

if ! command -v apt-get >/dev/null 2>&1 || ! command -v dpkg-deb >/dev/null 2>&1; then
    give_up "$python has no pip, and this is no Debian or Ubuntu to take one from"
fi
(download_wheel) || give_up "$python has no pip, and the package python3-pip-whl cannot be fetched"
for package in "$work"/python3-pip-whl_*.deb; do
    dpkg-deb -x "$package" "$work/unpacked" >>"$log" 2>&1 || give_up "python3-pip-whl cannot be unpacked"
done
if pip_of_wheel "$work/unpacked"; then found "$tools/uv/bin/uv"; fi
give_up "the pip of python3-pip-whl could not fetch it"
