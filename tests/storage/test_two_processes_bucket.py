"""Two processes save one checkpoint in a bucket, and agree on which one to restore."""

from __future__ import annotations

from pathlib import Path

import pytest

from sealion_jax.checkpoint.arrays import read_leaf
from sealion_jax.checkpoint.digests import DIGESTS_FILE, check_digests
from tests.checkpoint.test_two_processes import seen_by_two
from tests.checkpoint.two_processes import expected
from tests.storage.gcs import Faults, GcsServer
from tests.storage.test_run_in_bucket import downloaded


@pytest.mark.slow
def test_two_processes_save_and_restore_together_in_a_bucket(here: GcsServer, tmp_path: Path) -> None:
    with here.faulty(Faults()) as door:
        first, _ = seen_by_two(here.url("together"), **door.environment())
        written = [request.written for request in door.requests() if request.written is not None]
    assert "not shared" not in first
    copy = downloaded(here, "together", tmp_path / "run")
    assert check_digests(copy / "checkpoints" / "1") == []
    assert (read_leaf(copy / "checkpoints" / "2", "blocks") == expected(2)["blocks"]).all()
    made = {path.name for path in (copy / "checkpoints" / "2" / "params").iterdir()}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= made
    # The digests come when all that either process wrote is there, and end the step.
    names = [name for name in written if name.startswith("together/checkpoints/1/")]
    assert names[-1] == f"together/checkpoints/1/{DIGESTS_FILE}" and len(names) > 10
