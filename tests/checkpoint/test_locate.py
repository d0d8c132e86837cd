"""All commands take a run, a step or a Hugging Face directory, and say clearly when it is none of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from sealion_jax.checkpoint.arrays import Leaf, write_leaves
from sealion_jax.checkpoint.digests import write_digests
from sealion_jax.checkpoint.layout import write_assets
from sealion_jax.checkpoint.locate import CheckpointSource, resolve
from sealion_jax.errors import UserError


def _step(directory: Path, *, digests: bool = True) -> Path:
    """A step's directory as a converter writes it."""
    array = np.arange(6, dtype=np.float32)
    write_leaves(directory, [Leaf("final_norm/scale", array.shape, array.dtype, [((), array)])])
    write_assets(directory, {"model.json": b"{}"})
    if digests:
        write_digests(directory)
    return directory


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with steps 9, 10 and 100: by number, not by name, 100 is the newest."""
    run = tmp_path / "run"
    first = _step(run / "checkpoints" / "9")
    for step in ("10", "100"):
        shutil.copytree(first, run / "checkpoints" / step)
    (run / "config.json").write_text("{}")
    return run


def test_a_run_is_its_newest_step(run_dir: Path) -> None:
    expected = CheckpointSource(kind="run", path=run_dir / "checkpoints" / "100")  # type: ignore[arg-type]
    assert resolve(run_dir) == expected


def test_a_run_whose_newest_steps_are_bad_is_the_one_before(run_dir: Path) -> None:
    lines: list[str] = []
    (run_dir / "checkpoints" / "100" / "digests.json").unlink()
    (run_dir / "checkpoints" / "100.unfinished").touch()
    (run_dir / "checkpoints" / "10" / "assets" / "model.json").write_text("[]")
    assert str(resolve(run_dir, report=lines.append).path) == str(run_dir / "checkpoints" / "9")
    assert lines == [
        f"checkpoint 100 of {run_dir} is not finished; passing it over",
        f"checkpoint 10 is damaged: {run_dir}/checkpoints/10/assets/model.json: "
        "content changed (sha256 differs)",
    ]


def test_a_run_without_a_good_step_is_an_error(run_dir: Path) -> None:
    for step in ("9", "10", "100"):
        (run_dir / "checkpoints" / step / "assets" / "model.json").unlink()
    with pytest.raises(UserError, match="none of its checkpoints is good"):
        resolve(run_dir, report=lambda line: None)
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").mkdir()
    with pytest.raises(UserError, match="it has no checkpoint yet"):
        resolve(run_dir)


def test_a_step_is_checked(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step_dir = run_dir / "checkpoints" / "10"
    source = resolve(step_dir)
    assert (source.kind, str(source.path)) == ("step", str(step_dir))
    monkeypatch.chdir(run_dir)
    assert str(resolve("checkpoints/10").path) == str(step_dir)
    (step_dir / "assets" / "model.json").unlink()
    with pytest.raises(UserError, match=r"10 is damaged: assets/model.json: missing; use another step"):
        resolve(step_dir)
    (step_dir / "digests.json").unlink()
    with pytest.raises(UserError, match=r"has no digests\.json: it was not written to the end"):
        resolve(step_dir)


def test_a_hugging_face_directory_has_a_configuration_and_tensors(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"neither checkpoints/ \(a run\), nor params/ \(a step\), nor"):
        resolve(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    source = resolve(tmp_path)
    assert (source.kind, str(source.path)) == ("hf", str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        resolve(tmp_path)


def test_nothing_there_and_a_file_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no checkpoint at .*google/gemma-3-1b-pt"):
        resolve("google/gemma-3-1b-pt")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="is no checkpoint"):
        resolve(tmp_path / "model.safetensors")
