#!/bin/sh
# Builds dist/ and checks the wheel as a user gets it: in a new virtual environment, outside the checkout.
# Run by `make release` from the root of the checkout. Nothing is uploaded.
set -eu

checkout=$PWD
stop() { printf 'error: %s\n' "$*" >&2; exit 1; }
step() { printf '\n=== %s\n' "$*"; }

# 1. The version and its entry in the changelog. A development version is described under Unreleased.
version=$(.venv/bin/python -c 'import mllm_act; print(mllm_act.__version__)')
case $version in
    *.dev*)
        heading='## [Unreleased]'
        grep -qF "$heading" CHANGELOG.md || stop "CHANGELOG.md: expected a line '$heading' for version $version, found none"
        ;;
    *)
        heading="## [$version] - YYYY-MM-DD"
        grep -qE "^## \[$(printf %s "$version" | sed 's/\./\\./g')\] - [0-9]{4}-[0-9]{2}-[0-9]{2}$" CHANGELOG.md ||
            stop "CHANGELOG.md: expected a line '$heading', found none; rename the section Unreleased"
        [ -z "$(git status --porcelain)" ] ||
            stop "expected a checkout without uncommitted changes for version $version; commit them first"
        ;;
esac

# 2. The source distribution, and the wheel from it: what git ignores and an old build/ cannot slip in.
step "dist/: mllm_act $version"
rm -rf dist
.venv/bin/uv build -q --no-build-isolation --no-create-gitignore --python .venv/bin/python --out-dir dist .
ls dist

# 3. A new environment with the pinned packages and the wheel.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM
step "A new virtual environment in $work"
.venv/bin/python -m venv "$work/venv"
sh requirements/install.sh "$work/venv"
"$work/venv/bin/python" -m pip install -q --no-deps --no-index --disable-pip-version-check dist/*.whl
unset PYTHONPATH
cd "$work"
python=$work/venv/bin/python
case $("$python" -c 'import mllm_act; print(mllm_act.__file__)') in
    "$work"/*) ;;
    *) stop "the new environment imports mllm_act from elsewhere than the wheel" ;;
esac

# 4. The installed programs.
step "Versions"
"$work/venv/bin/mllm_act" --version | tee versions.txt
[ "$(head -n 1 versions.txt | cut -d ' ' -f 2)" = "$version" ] || stop "expected version $version"
step "Doctor"
"$python" -m mllm_act.doctor
step "Demonstrations"
"$python" -m data_pipelines.generate --env=metaworld --tasks=reach-v3,window-close-v3 --episodes=2 --out=data
step "Training"
"$python" -m mllm_act.train --config=configs/policy/metaworld.py:uniform --config.data.directory=data \
    --config.steps=3 --config.data.batch_size=4 --workdir=run
[ -e run/checkpoints/3 ] || stop "training left no checkpoint of step 3"

printf '\nThe wheel of mllm_act %s works: %s\n' "$version" "$checkout/dist"
case $version in
    *.dev*)
        echo "Next, to release ${version%.dev*}: set __version__ in mllm_act/__init__.py, and in CHANGELOG.md rename" \
            "the section Unreleased to [${version%.dev*}] with today's date; commit, and run make release again"
        ;;
    *) echo "Next: git tag v$version" ;;
esac
