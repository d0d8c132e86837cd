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


def _local(tmp_path: Path, script: Path) -> tuple[int, str]:
    (tmp_path / "a_file").touch()
    done = subprocess.run(
        [script, "1", "cpt_tiny"],
        env={**os.environ, "LOG_DIR": "a_file/logs"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr.strip().split("\n")[-1]


def test_the_local_launcher_tells_a_folder_that_it_cannot_make(tmp_path):
    code, told = _local(tmp_path, LAUNCH / "local" / "train.sh")
    assert code == 2
    assert told.startswith("error: the folder a_file/logs could not be made")


@pytest.mark.parametrize(
    ("version", "new_enough"), [("3 2", False), ("4 4", False), ("5 0", False), ("5 1", True), ("6 0", True)]
)
def test_the_local_launcher_tells_a_bash_that_is_too_old(tmp_path, version, new_enough):
    """With another array in the place of BASH_VERSINFO, which cannot be set."""
    text = (LAUNCH / "local" / "train.sh").read_text().replace("BASH_VERSINFO", "VERSION")
    script = tmp_path / "train.sh"
    script.write_text(text.replace("set -euo pipefail", f"set -euo pipefail; VERSION=({version})", 1))
    script.chmod(0o755)
    code, told = _local(tmp_path, script)
    assert code == 2
    assert ("needs bash 5.1 or newer" in told) != new_enough
