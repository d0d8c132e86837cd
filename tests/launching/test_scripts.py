"""Every shell script that users start: parsed by bash, and read by shellcheck."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"


def _is_script(path: Path) -> bool:
    return path.is_file() and path.suffix not in (".py", ".md", ".pyc") and path.read_text().startswith("#!")


SCRIPTS = sorted(path for path in LAUNCH.rglob("*") if _is_script(path))


def test_there_is_a_script_for_each_way_of_launching():
    assert {"local", "tpu_vm", "container"} <= {path.parent.name for path in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(LAUNCH)))
def test_scripts_are_sound(script):
    text = script.read_text()
    # One that looks at its commands' exit codes itself goes without -e.
    assert re.search(r"^set -e?uo pipefail$", text, flags=re.MULTILINE)
    assert "eval " not in text
    assert os.access(script, os.X_OK) or script.suffix == ".sbatch"
    subprocess.run(["bash", "-n", script], check=True, timeout=30)
    shellcheck = Path(sys.executable).parent / "shellcheck"
    found = subprocess.run([shellcheck, script], capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("hyphens", [(), ("--",)])
def test_the_local_launcher_passes_words_on(tmp_path, hyphens):
    python = tmp_path / "python"
    python.write_text(
        '#!/usr/bin/env bash\n[[ $1 == -c ]] && { echo 1234; exit; }\nprintf "%s\\0" "$@" >words\n'
    )
    python.chmod(0o755)
    given = ("cpt_tiny", "--name", "two  words $HOME", "--empty", "")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [LAUNCH / "local" / "train.sh", "1", *hyphens, *given]
    subprocess.run(command, env=environment, cwd=tmp_path, timeout=60, check=True)
    words = (tmp_path / "words").read_text().split("\0")
    assert words[: 2 + len(given)] == ["-m", "sealion_jax.train", *given]
