#!/bin/sh
# Prints the path of a `uv` to use; fetches one into .tools/ where there is none. Needs no root.
#
# A fresh Debian or Ubuntu has python3 without pip and without venv, so the last resort takes pip itself from the
# distribution's package python3-pip-whl, unpacked into a temporary folder: nothing is installed on the machine.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
tools="$root/.tools"

if command -v uv >/dev/null 2>&1; then
    command -v uv
    exit 0
fi
if [ -x "$tools/bin/uv" ]; then
    echo "$tools/bin/uv"
    exit 0
fi

say() { echo "$*" >&2; }
command -v python3 >/dev/null 2>&1 || { say "error: python3 is missing; install it (3.11 or newer) and run make again."; exit 1; }

say "uv is not installed: fetching it into .tools/ ..."
fetch() { # $1: PYTHONPATH for pip
    PYTHONPATH="$1" python3 -m pip install --quiet --disable-pip-version-check --no-input \
        --target "$tools" --upgrade uv >&2
}
if python3 -m pip --version >/dev/null 2>&1 && fetch ""; then
    echo "$tools/bin/uv"
    exit 0
fi

if command -v apt-get >/dev/null 2>&1 && command -v dpkg-deb >/dev/null 2>&1; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    # Package lists of our own: the machine's may be empty, and an ordinary user may not write there.
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
    apt="-o Dir::State::Lists=$work/lists -o Dir::Cache=$work/cache -o Acquire::Check-Valid-Until=false"
    apt="$apt -o APT::Sandbox::User=root -o Debug::NoLocking=true"
    if (cd "$work" && apt-get $apt -qq update && apt-get $apt -qq download python3-pip-whl) >"$work/log" 2>&1 \
        || (cd "$work" && apt-get $apt -qq download python3-pip-whl) >>"$work/log" 2>&1; then
        dpkg-deb -x "$work"/python3-pip-whl_*.deb "$work/pip"
        wheel=$(ls "$work"/pip/usr/share/python-wheels/pip-*.whl | head -n 1)
        if fetch "$wheel"; then
            echo "$tools/bin/uv"
            exit 0
        fi
    fi
fi
say "error: uv could not be fetched (no pip, and no python3-pip-whl from apt). Install uv or python3-pip by hand and run make again."
exit 1
