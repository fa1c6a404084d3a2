#!/bin/sh
# Creates .venv with the pinned packages and installs the system libraries that headless rendering needs.
# Run by `make setup` from the root of the checkout. PYTHON names an interpreter; if it is empty, the newest supported
# one is used.
set -eu

oldest=11 newest=13  # 3.x; the newest for which the pinned TensorFlow has wheels
stop() { printf 'error: %s\n' "$*" >&2; exit 1; }
minor() { "$1" -c 'import sys; print(sys.version_info[1] if sys.version_info[0] == 3 else 0)' 2>/dev/null || echo 0; }
fits() { m=$(minor "$1"); [ "$m" -ge "$oldest" ] && [ "$m" -le "$newest" ]; }
may_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }
apt_install() {
    echo "installing system packages: $*"
    apt-get update -qq || stop "apt-get update failed (its messages are above); it is needed for: $*"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null ||
        stop "apt-get install $* failed (its messages are above)"
}

# 1. An interpreter. Candidates are run, not only looked up: a version manager's shim can exist without an interpreter.
python=${PYTHON:-}
if [ -n "$python" ]; then
    fits "$python" || stop "PYTHON=$python is not Python 3.$oldest to 3.$newest; name one that is: make setup PYTHON=python3.$oldest"
else
    for candidate in python3.13 python3.12 python3.11 python3; do
        if fits "$candidate"; then python=$candidate; break; fi
    done
    [ -n "$python" ] || stop "no Python 3.$oldest to 3.$newest found (python3 is $(python3 --version 2>/dev/null || echo missing));" \
        "install one (on Debian 12 or newer: apt-get install python3 python3-venv) or name one: make setup PYTHON=/path/to/python"
fi

# 2. The virtual environment. A working one of the right version is kept, so that a changed lock installs quickly.
if [ -x .venv/bin/python ] && fits .venv/bin/python &&
    { [ -z "${PYTHON:-}" ] || [ "$(minor .venv/bin/python)" = "$(minor "$python")" ]; }; then
    .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null
else
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        package="python3.$(minor "$python")-venv"
        may_install || stop "$python cannot make virtual environments; run: sudo apt-get install $package"
        apt_install "$package"
    fi
    echo "creating .venv with $("$python" --version) ($(command -v "$python"))"
    rm -rf .venv
    "$python" -m venv .venv
fi

# 3. The pinned packages and the checkout itself.
echo "installing the packages of requirements/lock.txt"
sh requirements/install.sh .venv || stop "fix the error above and run make setup again"
.venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e . ||
    stop "the checkout itself could not be installed into .venv (pip's messages are above)"

# 4. System libraries for rendering without a screen. A machine with its own EGL driver works without them, so a user
# who may not install them gets a note, not an error; `make doctor` renders a frame to check.
if [ "$(uname)" = Linux ] && command -v dpkg-query >/dev/null; then
    missing=
    for package in libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
    done
    if [ -n "$missing" ]; then
        if may_install; then
            # shellcheck disable=SC2086  # one word per package
            apt_install $missing
        else
            echo "note: rendering without a screen needs system packages that only root may install:" >&2
            echo "    sudo apt-get update && sudo apt-get install -y$missing" >&2
        fi
    fi
fi
