#!/usr/bin/env bash
# Installs the package and what it needs into .venv, every version as versions.txt has it:
#
#   launch/container/install.sh [EXTRA ...]       tpu | cuda | dev hf peers (for the tests)
#
# PYTHON=... is the interpreter (3.11; the versions were chosen for it), VENV=... the environment.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${VENV:-.venv}
extras=$(IFS=,; echo "$*")
versions=(--constraint launch/container/versions.txt)
if [[ ",$extras," == *,cuda,* ]]; then
    # Apart, because PyTorch insists on other versions of NVIDIA's libraries.
    versions+=(--constraint launch/container/versions-cuda.txt)
fi

"${PYTHON:-python3}" -m venv "$venv"
install=("$venv/bin/python" -m pip --disable-pip-version-check install --prefer-binary --no-compile "${versions[@]}")
# What builds packages is installed like all else: an environment that pip makes for a build knows no constraints.
"${install[@]}" setuptools wheel
"${install[@]}" --no-build-isolation --editable ".${extras:+[$extras]}"
# make finds what it would have installed.
touch "$venv/installed"
if [[ ",$extras," == *,dev,* ]]; then touch "$venv/installed-dev"; fi
