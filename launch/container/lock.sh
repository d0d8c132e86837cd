#!/usr/bin/env bash
# Chooses new versions for the container: launch/container/lock.sh, which needs uv and writes versions*.txt.
#
# For Python 3.11 on x86-64 Linux. Read the difference, run the tests with it (make test in the container), commit.
set -euo pipefail
cd "$(dirname "$0")/../.."

choose() {
    uv pip compile pyproject.toml --quiet --upgrade --no-header --no-annotate \
        --python-version 3.11 --python-platform x86_64-manylinux_2_31 "$@"
}

# NVIDIA's libraries and what only they bring; PyTorch pins its own.
nvidia='^(nvidia-|cuda-|triton)'
{
    echo "# Written by lock.sh: every extra, without NVIDIA's libraries."
    {
        choose --all-extras | grep -vE "$nvidia"
        echo wheel | uv pip compile - --quiet --no-header --no-annotate --python-version 3.11
    } | sort -u
} >launch/container/versions.txt
{
    echo "# Written by lock.sh: NVIDIA's libraries for the extra cuda."
    choose --extra cuda --constraint launch/container/versions.txt | grep -E "$nvidia"
} >launch/container/versions-cuda.txt
