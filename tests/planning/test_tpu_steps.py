"""The step of the 27B for 64 TPU v5p: kernels inside, only weights move, no array of all logits."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "tpu_steps.py"


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("libtpu") is None, reason="compiling for a TPU needs libtpu: pip install -e '.[tpu]'"
)
def test_the_27b_on_64_chips(tmp_path):
    """What moves is within a tenth of FSDP's least; nothing that moves has the shape of an activation."""
    command = [sys.executable, BENCHMARK, "--quick", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    row = json.loads((tmp_path / "tpu_steps.json").read_text())["table"][0]
    assert row["needed, GiB"] < 95
    # Each layer's weights have to move at all: the measure sees what it should.
    assert 0.9 < row["to the least"] < 1.1
    # Of the six layers of a block and the two that are left: forward, and one or more backward.
    assert row["attention kernels"] >= 8 * 2
