"""What a user means by CHECKPOINT: a run directory, one step's directory, or a Hugging Face directory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from etils import epath

from sealion_jax.checkpoint.digests import DIGESTS_FILE, check_digests
from sealion_jax.checkpoint.files import entry_names, is_there
from sealion_jax.checkpoint.layout import CHECKPOINTS, PARAMS, StepDirectories, absolute
from sealion_jax.checkpoint.processes import on_first_process
from sealion_jax.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CheckpointSource:
    """Where weights are read from."""

    kind: Literal["run", "step", "hf"]
    path: epath.Path
    """Of a run the directory of its newest good step; of the others the directory itself."""


def resolve(
    path: epath.PathLike, *, report: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
) -> CheckpointSource:
    """What `path` is and where its weights are; all processes of a run call this together.

    Steps are checked against their digests. Of a run the newest good step is taken, and what is wrong with
    newer ones is reported; a single step that is damaged is an error. Raises UserError if there is no
    checkpoint.
    """

    def look() -> list[str]:
        source = _resolve(absolute(path), report)
        return [source.kind, str(source.path)]

    kind, found = on_first_process(look)
    return CheckpointSource(kind=kind, path=epath.Path(found))


def _resolve(path: epath.Path, report: Callable[[str], None]) -> CheckpointSource:
    if not is_there(path):
        raise UserError(
            f"there is no checkpoint at {path}: give a run directory, a step's directory, or a downloaded "
            "Hugging Face directory"
        )
    if is_there(path / CHECKPOINTS):
        return CheckpointSource(kind="run", path=_newest_good(path, report))
    if is_there(path / PARAMS):
        _require_good(path)
        return CheckpointSource(kind="step", path=path)
    names = set(entry_names(path))
    has_tensors = any(name.endswith(".safetensors") for name in names)
    if "config.json" in names and has_tensors:
        return CheckpointSource(kind="hf", path=path)
    raise UserError(
        f"{path} is no checkpoint: it has neither {CHECKPOINTS}/ (a run), nor {PARAMS}/ (a step), nor "
        f"config.json with *.safetensors (Hugging Face{'; config.json is missing' if has_tensors else ''})"
    )


def _newest_good(run_dir: epath.Path, report: Callable[[str], None]) -> epath.Path:
    """The directory of the newest step that agrees with its digests; raises UserError if there is none."""
    directories = StepDirectories(run_dir)
    steps = directories.steps()
    for step in reversed(steps):
        if directories.is_unfinished(step):
            report(f"checkpoint {step} of {run_dir} is not finished; passing it over")
            continue
        problems = check_digests(directories[step])
        if not problems:
            return directories[step]
        for problem in problems:
            report(f"checkpoint {step} is damaged: {directories[step] / problem}")
    state = "none of its checkpoints is good (see above)" if steps else "it has no checkpoint yet"
    raise UserError(f"nothing to read in {run_dir}: {state}")


def _require_good(step_dir: epath.Path) -> None:
    """Raises UserError if a step's directory is not as it was written."""
    if not is_there(step_dir / DIGESTS_FILE):
        raise UserError(
            f"{step_dir} has no {DIGESTS_FILE}: it was not written to the end, or not copied whole; use "
            "another step"
        )
    problems = check_digests(step_dir)
    if problems:
        raise UserError(f"{step_dir} is damaged: {'; '.join(problems[:5])}; use another step")
