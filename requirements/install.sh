#!/bin/sh
# Installs the pinned packages into a virtual environment: sh requirements/install.sh VENV
# Compiled here once: where PYTHONDONTWRITEBYTECODE is set, each program would compile TensorFlow's source at its start.
# uv is fast; pip takes over where uv fails, because pip knows this machine's mirrors and proxies.
set -eu

venv=$1 here=$(dirname "$0")
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$venv/bin/python" -m pip install -q -r "$here/uv.txt"
"$venv/bin/uv" pip install -q --compile-bytecode --python "$venv/bin/python" -r "$here/lock.txt" || {
    echo "uv could not install the packages (its messages are above); trying pip, which is slower"
    "$venv/bin/python" -m pip install -q -r "$here/lock.txt" || {
        echo "error: the packages of $here/lock.txt could not be installed (pip's messages are above)" >&2
        exit 1
    }
}
