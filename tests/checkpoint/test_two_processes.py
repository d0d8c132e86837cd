"""Two processes save one checkpoint, and agree on which one to restore."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sealion_jax.checkpoint.arrays import read_leaf
from sealion_jax.checkpoint.digests import check_digests
from tests.checkpoint.two_processes import expected
from tests.commands import command_environment, free_port

ROOT = Path(__file__).resolve().parents[2]


def seen_by_two(run_dir: object, **environment: str) -> list[dict[str, Any]]:
    """What two processes say that save and restore together, and what is the same in any storage."""
    coordinator = f"localhost:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoint.two_processes", coordinator, str(number), str(run_dir)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=command_environment(devices=4) | {"PYTHONPATH": str(ROOT)} | environment,
        )
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    lines = first.pop("lines")
    assert len(lines) == 1 and "checkpoint 2 is damaged" in lines[0]
    assert second.pop("lines") == []  # told once
    assert first == second
    assert first["devices"] == 8
    assert first["refused"] == "told to all"
    assert first["all lines"] == ["both", "line of 0", "line of 1"]
    assert "is in use by pid" in first["second lease"]
    assert first["new"] and first["step"] == 1 and first["right"]
    assert first["source"] == f"{run_dir}/checkpoints/1"
    return [first, second]


@pytest.mark.slow
def test_two_processes_save_and_restore_together(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first, _ = seen_by_two(run_dir)
    assert "is not there for process 1: give a --run-dir on storage" in first["not shared"]

    # What the two wrote together is whole, and readable by one.
    assert check_digests(run_dir / "checkpoints" / "1") == []
    assert (read_leaf(run_dir / "checkpoints" / "2", "blocks") == expected(2)["blocks"]).all()
    written = [path.name for path in (run_dir / "checkpoints" / "2" / "params").iterdir()]
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= set(written)
