"""The three embedded recipes one after the other, a few steps of each: what the demo promises."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from sealion_jax import generate, train
from tests.commands import commands_in_this_process
from tests.tiny_run import rows_of

SHORT = ["--steps", "2", "--optimizer.schedule.warmup-steps", "1", "--checkpoints.interval-steps", "2"]
SHORT += ["--evaluation.max-documents", "2"]
STAGES = ("cpt_tiny", "sft_tiny", "dpo_tiny")


@pytest.fixture(autouse=True)
def left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs are in the folder that commands are started in; what these set for their process is set back."""
    monkeypatch.chdir(tmp_path)
    with commands_in_this_process():
        yield


@pytest.mark.slow
def test_each_stage_goes_on_from_the_one_before_and_all_are_asked(capsys: pytest.CaptureFixture[str]) -> None:
    for name in STAGES:
        train.main([name, *SHORT])
        assert rows_of(Path("runs") / name)[-1]["step"] == 2
    # In float32 and with references from the cache, the policy before its first update is the reference.
    first = rows_of(Path("runs/dpo_tiny"))[1]
    assert abs(first["loss"] - math.log(2)) < 1e-6
    assert first["loss"] == first["loss/sigmoid"]
    capsys.readouterr()
    runs = [f"runs/{name}" for name in STAGES]
    generate.main([*runs, "--format", "chat", "--prompt", "Apa kabar?", "--max-new-tokens", "3"])
    output = capsys.readouterr().out
    assert output.startswith("> Apa kabar?\n")
    assert [line.split(":")[0] for line in output.splitlines() if line.startswith("[")] == [
        f"[{run}" for run in runs
    ]
