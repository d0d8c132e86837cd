"""The local launcher: every process is waited for, and the first error is the script's own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "launch" / "local" / "train.sh"

# In the place of `python -m sealion_jax.train`: process n does what MODE says, and notes that it has saved.
FAKE_PYTHON = """#!/usr/bin/env bash
[[ $1 == -c ]] && { echo 1234; exit; }
n=${@: -1}
save() { kill "$!" 2>/dev/null; sleep "0.$((3 * n + 1))"; echo saved >"$RESULTS/$n"; exit 75; }
trap save TERM
touch "$RESULTS/started-$n"
[[ $MODE == done ]] && exit 0
[[ $MODE == fails && $n == 1 ]] && { sleep 0.2; exit 2; }
sleep 60 & wait
"""


@pytest.fixture
def launched(tmp_path):
    """Starts the launcher with three processes over a python that is not one."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    started: list[subprocess.Popen[str]] = []

    def start(mode: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}", "MODE": mode}
        environment |= {"RESULTS": str(tmp_path), "LOG_DIR": str(tmp_path / "logs")}
        started.append(
            subprocess.Popen(
                [SCRIPT, "3", "cpt_tiny"], env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path
            )
        )
        return started[0]

    yield start
    for process in started:
        process.kill()


def _wait_for_all(folder: Path) -> None:
    deadline = time.monotonic() + 60
    while len(list(folder.glob("started-*"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _saved(folder: Path) -> list[str]:
    return [path.name for path in sorted(folder.glob("[0-9]")) if path.read_text() == "saved\n"]


def test_sigterm_reaches_every_process_and_the_last_save_is_waited_for(launched, tmp_path):
    process = launched("runs")
    _wait_for_all(tmp_path)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors, _saved(tmp_path)) == (75, "", ["0", "1", "2"])


def test_an_error_stops_the_others_and_is_the_status(launched, tmp_path):
    process = launched("fails")
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors, _saved(tmp_path)) == (2, "", ["0", "2"])


def test_all_done_is_done(launched):
    process = launched("done")
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
