#!/bin/sh
# Tests bootstrap-uv.sh in a folder of its own, with stand-ins for python3, apt-get and dpkg-deb: no network.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
top=$(mktemp -d "${TMPDIR:-/tmp}/crossfade-test.XXXXXX")
trap 'rm -rf "$top"' EXIT
passed=0

fail() {
    printf 'bootstrap-uv.sh: %s: %s\n' "$case" "$*" >&2
    sed 's/^/    /' "$top/out" "$top/err" >&2
    exit 1
}

# A fresh clone and a PATH that holds only what the script may count on.
fresh() {
    case=$1
    rm -rf "$top/clone" "$top/bin" "$top/tmp" "$top/wheels"
    mkdir -p "$top/clone/scripts" "$top/bin" "$top/tmp"
    cp "$here/bootstrap-uv.sh" "$top/clone/scripts/"
    for tool in sh dirname mktemp rm mkdir mv cat grep tail chmod touch; do
        ln -s "$(command -v $tool)" "$top/bin/$tool"
    done
}

program() {
    printf '#!/bin/sh\n' >"$top/bin/$1"
    cat >>"$top/bin/$1"
    chmod +x "$top/bin/$1"
}

# python3 [with-pip|with-wheel]: which pip it finds; it "installs" a uv of version 0.9.
python_stand_in() {
    program python3 <<END
case "$1:\${PYTHONPATH:-}" in with-pip:*) ;; with-wheel:*/pip-1.whl) ;; *) exit 1 ;; esac
[ "\$2" = pip ] || exit 1
[ "\$3" = install ] || exit 0
while [ "\$1" != --target ]; do shift; done
mkdir -p "\$2/bin"
printf '#!/bin/sh\necho uv 0.9.1\n' >"\$2/bin/uv"
chmod +x "\$2/bin/uv"
END
}

run() {
    status=0
    (cd "$top" && PATH="$top/bin" TMPDIR="$top/tmp" sh "$top/clone/scripts/bootstrap-uv.sh") \
        >"$top/out" 2>"$top/err" || status=$?
    [ -z "$(ls "$top/tmp")" ] || fail "leaves $(ls "$top/tmp") in the temporary folder"
}

gives() {
    [ "$status" = 0 ] || fail "status $status"
    [ "$(cat "$top/out")" = "$1" ] || fail "printed $(cat "$top/out"), not $1"
    passed=$((passed + 1))
}

refuses() {
    [ "$status" = 1 ] || fail "status $status"
    [ -z "$(cat "$top/out")" ] || fail "printed something"
    [ "$(grep -c '^error: ' "$top/err")" = 1 ] || fail "not one line of error"
    grep -q "$1.*Install uv yourself" "$top/err" || fail "does not say $1"
    [ -z "$(ls "$top/clone/.tools" 2>/dev/null)" ] || fail "leaves something in .tools"
    passed=$((passed + 1))
}

own=$top/clone/.tools/uv/bin/uv

fresh "uv on PATH is used"
echo 'echo uv 0.9.0' | program uv
run
gives "$top/bin/uv"

fresh "a shim that runs nothing is not"
echo 'exit 127' | program uv
python_stand_in with-pip
run
gives "$own"

case="the next run finds it"
program python3 <<'END'
exit 1
END
run
gives "$own"

fresh "neither is one that is too old"
echo 'echo "uv 0.4.30 (2024-11-04)"' | program uv
python_stand_in with-pip
run
gives "$own"

fresh "no pip: the wheel of Debian's package"
python_stand_in with-wheel
program apt-get <<'END'
case "$*" in *download*) touch python3-pip-whl_1_all.deb ;; esac
END
program dpkg-deb <<'END'
mkdir -p "$3/usr/share/python-wheels" && touch "$3/usr/share/python-wheels/pip-1.whl"
END
run
gives "$own"

fresh "no package lists: lists of our own"
python_stand_in with-wheel
program apt-get <<'END'
[ -n "${APT_CONFIG:-}" ] || { echo 'E: Unable to locate package python3-pip-whl'; exit 100; }
case "$*" in *update*) touch lists; exit 100 ;; *download*) [ -e lists ] && touch python3-pip-whl_1_all.deb ;; esac
END
program dpkg-deb <<'END'
mkdir -p "$3/usr/share/python-wheels" && touch "$3/usr/share/python-wheels/pip-1.whl"
END
run
gives "$own"

fresh "pip cannot fetch"
program python3 <<'END'
[ "$3" = --version ] && exit 0
echo 'ERROR: No matching distribution found for uv'
exit 1
END
run
refuses "No matching distribution"

fresh "no pip and no network"
python_stand_in with-wheel
program apt-get <<'END'
echo 'E: Could not resolve the mirror'
exit 100
END
program dpkg-deb <<'END'
exit 1
END
run
refuses "python3-pip-whl cannot be fetched"

fresh "no pip and no Debian"
python_stand_in with-wheel
run
refuses "no Debian or Ubuntu"

fresh "no python3"
run
refuses "there is no python3"

echo "bootstrap-uv.sh: $passed cases hold"
