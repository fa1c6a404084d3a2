#!/bin/sh
# Creates .venv-newest: the newest releases that pyproject.toml allows, on the newest Python that they install on.
# Run by `make test-newest` from the root of the checkout: sh requirements/newest.sh 'EXTRA EXTRA ...'
# PYTHON names an interpreter; if it is empty, those on PATH and those of pyenv are tried.
set -eu

extras=$(echo "$1" | tr ' ' ',') venv=.venv-newest
export PIP_DISABLE_PIP_VERSION_CHECK=1
usable() { "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
version() { "$1" -c 'import platform; print(platform.python_version())'; }
in_venv() { "$venv/bin/python" -m pip install -qq "$@"; }

# Candidates are run, not only looked up: a version manager's shim can exist without an interpreter.
candidates() {
    if [ -n "${PYTHON:-}" ]; then
        echo "$PYTHON"
    else
        for minor in 19 18 17 16 15 14 13 12 11; do
            echo "python3.$minor"
            ls -d "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor".*/bin/python 2>/dev/null || true
        done
    fi
}

tried=
for python in $(candidates); do
    usable "$python" || continue
    tried="$tried $(version "$python")"
    echo "$venv: the newest releases for Python $(version "$python")"
    if [ ! -x "$venv/bin/python" ] || [ "$(version "$venv/bin/python")" != "$(version "$python")" ]; then
        rm -rf "$venv"
        "$python" -m venv "$venv"
    fi
    # PyTorch only where pip is configured to know a CPU build, as in the Makefile.
    parity=
    in_venv --no-index --no-deps torch 2>/dev/null && parity=,parity
    # Without a wheel, most would be built from source for an hour, in vain. promise has none, and needs no compiler.
    if in_venv --upgrade --upgrade-strategy=eager --only-binary=:all: --no-binary=promise -e ".[$extras$parity]"; then
        [ -n "$parity" ] || echo "note: PyTorch is not installed, so tests against it are skipped"
        exit 0
    fi
    echo "note: not all packages install on Python $(version "$python") (pip's messages are above)"
done
echo "error: expected a Python of 3.11 or newer, with venv, that the newest releases install on, found" \
    "${tried:-none}; name one: make test-newest PYTHON=/path/to/python" >&2
exit 1
