"""A full disk ends the run with a clear line, and the checkpoint before stays as it was."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from sealion_jax.checkpoint.digests import check_digests
from sealion_jax.checkpoint.layout import StepDirectories
from sealion_jax.checkpoint.space import no_room_error
from tests.commands import command_environment

ROOT = Path(__file__).resolve().parents[2]

# Saves a small state, then one that there is no room for; prints what the user would see.
SCRIPT = """
import resource, sys
import jax.numpy as jnp, numpy as np
from sealion_jax.checkpoint.arrays import Leaf, write_leaves
from sealion_jax.checkpoint.orbax import CheckpointConfig, Checkpointer
from sealion_jax.errors import UserError

run_dir, max_file_bytes = sys.argv[1], int(sys.argv[2])
small, large = {"a": jnp.ones((10, 10))}, {"a": jnp.ones((2000, 1000))}
with Checkpointer(run_dir, CheckpointConfig(keep_last=1)) as checkpointer:
    checkpointer.save(1, params=small, optimizer=small, train={}, assets={})
    checkpointer.wait()
    if max_file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    try:
        checkpointer.save(2, params=large, optimizer=small, train={}, assets={})
        checkpointer.wait()
    except UserError as error:
        print(error)
try:
    whole = np.ones((2000, 1000), np.float32)
    write_leaves(run_dir + "/converted", [Leaf("a", whole.shape, whole.dtype, [((), whole)])])
except UserError as error:
    print(error)
"""


def _fill(run_dir: Path, *, max_file_bytes: int) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(run_dir), str(max_file_bytes)],
        capture_output=True,
        text=True,
        env=command_environment() | {"PYTHONPATH": str(ROOT)},
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout.splitlines()


def _assert_told(lines: list[str], run_dir: Path, reason: str) -> None:
    assert len(lines) == 2, lines
    assert lines[0].startswith(f"saving checkpoint 2 failed: {reason} at {run_dir}/checkpoints/2 (")
    assert " GB free of " in lines[0]
    assert lines[0].endswith("; checkpoint 1 is good")
    assert lines[1].startswith(f"writing a checkpoint failed: {reason} at {run_dir}/converted/params (")
    assert list((run_dir / "converted").iterdir()) == []
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["1"]
    assert StepDirectories(run_dir).complete() == [1]
    assert check_digests(run_dir / "checkpoints" / "1") == []


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """The system refuses the writer's next bytes, as with a quota; needs no rights."""
    _assert_told(_fill(tmp_path, max_file_bytes=500_000), tmp_path, "File too large")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_file_system(tiny_disk: Path) -> None:
    _assert_told(_fill(tiny_disk, max_file_bytes=0), tiny_disk, "No space left on device")


def test_other_errors_are_not_called_a_full_disk(tmp_path: Path) -> None:
    assert no_room_error(PermissionError(13, "Permission denied"), tmp_path, doing="x") is None
    wrapped = RuntimeError("background write failed")
    wrapped.__cause__ = OSError(28, "No space left on device")
    told = no_room_error(wrapped, tmp_path / "not" / "there", doing="saving checkpoint 3")
    assert str(told).startswith("saving checkpoint 3 failed: No space left on device at ")
    assert "free space unknown" in str(no_room_error(wrapped, "gs://bucket/run", doing="x"))
