#!/bin/sh
# Makes .venv in the repository root, or reuses it.
#
#   scripts/setup_venv.sh demo     the package in editable form with the extra "demo"
#   scripts/setup_venv.sh tox      tox and tox-uv
#
# Needs Python 3.11 or newer with venv, and nothing else; PYTHON=/path/to/python chooses one. A stamp file
# a purpose remembers what was installed from (place, interpreter, pyproject.toml): when nothing of that
# changed, there is nothing to do.
set -eu

purpose=${1:?"usage: setup_venv.sh demo|tox"}
cd "$(dirname "$0")/.."
venv_python=.venv/bin/python
recent='import sys; sys.exit(sys.version_info < (3, 11))'

say() { printf '[ast-plugin] %s\n' "$*"; }

stop() {
    printf '[ast-plugin] %s\n' "$@" >&2
    exit 1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null 2>&1 || stop "PYTHON=$PYTHON cannot be run. Give the path of a Python 3.11 or newer."
        "$PYTHON" -c "$recent" || stop "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1), but 3.11 or newer is needed."
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
        if command -v "$candidate" >/dev/null 2>&1 && "$candidate" -c "$recent" >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    found=$(python3 --version 2>&1) || found="no python3"
    stop "Python 3.11 or newer is needed, found: $found." \
        "Install one, or name it: make demo PYTHON=/path/to/python3.12"
}

make_venv() {
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 || stop \
        "$("$python" --version) at $(command -v "$python") cannot make virtual environments: its venv or ensurepip module is missing." \
        "Debian and Ubuntu keep it in a package of its own: apt install python3-venv" \
        "Or name another Python: make demo PYTHON=/path/to/python3.12"
    say "Making .venv with $("$python" --version) ..."
    "$python" -m venv --clear .venv
}

moved() {
    for old in .venv/.ast-plugin-*; do
        if [ -f "$old" ] && [ "$(head -n 1 "$old")" != "$(pwd)" ]; then
            return 0
        fi
    done
    return 1
}

if [ ! -e .venv ]; then
    make_venv
elif ! "$venv_python" -c '' >/dev/null 2>&1; then
    say ".venv has no working Python any more: making it anew."
    make_venv
elif moved; then
    say "This folder was moved or copied, and paths inside .venv and .tox are those of the old place: making them anew."
    rm -rf .tox
    make_venv
elif ! "$venv_python" -c "$recent"; then
    stop ".venv holds $("$venv_python" --version), but 3.11 or newer is needed. Remove it with: make clean"
elif ! "$venv_python" -m pip --version >/dev/null 2>&1; then
    say ".venv is unfinished (it has no pip): making it anew."
    make_venv
fi

stamp=.venv/.ast-plugin-$purpose
state=$(
    pwd
    "$venv_python" --version
    cksum <pyproject.toml
)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ]; then
    say "Using .venv as it is ($purpose)."
    exit 0
fi
rm -f "$stamp"

if ! "$venv_python" -m uv --version >/dev/null 2>&1; then
    say "Installing uv into .venv ..."
    "$venv_python" -m pip install --quiet uv
fi
case $purpose in
demo)
    say "Installing ast-plugin and what the demo needs into .venv (the first time downloads PyTorch) ..."
    "$venv_python" -m uv pip install --python "$venv_python" --editable '.[demo]'
    ;;
tox)
    say "Installing tox into .venv ..."
    "$venv_python" -m uv pip install --python "$venv_python" 'tox>=4.24' 'tox-uv>=1.20'
    ;;
*)
    stop "unknown purpose '$purpose': demo or tox"
    ;;
esac
printf '%s\n' "$state" >"$stamp"
