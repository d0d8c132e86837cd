"""The directories of a run's checkpoints: which steps there are, which are complete, and removing them.

    <run>/checkpoints/<step>/params/       Orbax PyTree
                             optimizer/    Orbax PyTree; not in converted weights
                             train.json    step, skips, counters
                             assets/...    model configuration, tokenizer, what came from the source
                             digests.json  written last: the step is complete
    <run>/checkpoints/<step>.unfinished    there while <step> is being written or removed

A step without digests beside an `.unfinished` mark is the remains of a run that was killed: nothing is lost,
and it is passed over and removed. A step without digests and without the mark has been damaged since.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from etils import epath

from sealion_jax.checkpoint.digests import DIGESTS_FILE
from sealion_jax.checkpoint.files import entry_names, file_sizes, is_there, remove_tree
from sealion_jax.errors import UserError
from sealion_jax.storage import remove, write_whole

Assets = Mapping[str, bytes | epath.Path]
"""Files by name ("tokenizer.model", "source/config.json"): their content, or the path of a file to copy."""

CHECKPOINTS = "checkpoints"
PARAMS = "params"
OPTIMIZER = "optimizer"
TRAIN_FILE = "train.json"
ASSETS = "assets"

_UNFINISHED = ".unfinished"
_ORBAX_TEMPORARY = ".orbax-checkpoint-tmp"
_MARK_TEXT = b"being written or removed; not a checkpoint\n"
_COPY_BYTES = 16 * 2**20


def absolute(path: epath.PathLike) -> epath.Path:
    """`path` made absolute, with ~ expanded; paths such as gs://bucket/run are absolute already."""
    path = epath.Path(path)
    return path if "://" in str(path) else path.expanduser().resolve()


class StepDirectories:
    """The steps below one run's `checkpoints/`. Steps are ints; nothing else there is ever touched."""

    def __init__(self, run_dir: epath.PathLike) -> None:
        self.root = absolute(run_dir) / CHECKPOINTS

    def __getitem__(self, step: int) -> epath.Path:
        """The directory of a step, which need not exist."""
        return self.root / str(step)

    def steps(self) -> list[int]:
        """All steps that have a directory, ascending, in whatever state they are."""
        return sorted(int(name) for name in self._names() if name.isdecimal())

    def complete(self) -> list[int]:
        """The steps that were saved to the end, ascending; their content is not checked."""
        return [step for step in self.steps() if is_there(self[step] / DIGESTS_FILE)]

    def is_unfinished(self, step: int) -> bool:
        """Whether the run was killed while it wrote or removed this step."""
        return is_there(self._mark(step)) and not is_there(self[step] / DIGESTS_FILE)

    def begin(self, step: int) -> None:
        """Makes room for a step that is about to be written: whatever is there under its number goes."""
        self.remove(step)
        write_whole(self._mark(step), _MARK_TEXT)

    def finish(self, step: int) -> None:
        """Takes away the mark of a step that has its digests now."""
        remove(self._mark(step))

    def remove(self, step: int) -> None:
        """Removes a step's directory and whatever Orbax left of it; at no moment does a part look whole."""
        directory = self[step]
        if is_there(directory):
            with contextlib.suppress(OSError):  # the disk may be full
                write_whole(self._mark(step), _MARK_TEXT)
            remove(directory / DIGESTS_FILE)
            remove_tree(directory)
        for name in self._names():
            if name.startswith(f"{step}{_ORBAX_TEMPORARY}"):
                remove_tree(self.root / name)
        self.finish(step)

    def remove_unfinished(self) -> list[int]:
        """Removes what killed runs left behind and returns the steps."""
        heads = {
            name.partition(".")[0]
            for name in self._names()
            if _UNFINISHED in name or _ORBAX_TEMPORARY in name
        }
        removed = []
        for step in sorted(int(head) for head in heads if head.isdecimal()):
            if is_there(self[step] / DIGESTS_FILE):  # killed between the digests and taking the mark away
                self.finish(step)
            else:
                self.remove(step)
                removed.append(step)
        return removed

    def _mark(self, step: int) -> epath.Path:
        return self.root / f"{step}{_UNFINISHED}"

    def _names(self) -> list[str]:
        return entry_names(self.root)


def write_assets(step_dir: epath.PathLike, assets: Assets, *, fallback: epath.Path | None = None) -> None:
    """Writes `step_dir`/assets.

    A path to copy that is gone by now (its own checkpoint was removed) is taken from `fallback`/assets.
    """
    for name, content in assets.items():
        parts = name.split("/")
        if not all(parts) or ".." in parts:
            raise ValueError(f"an asset's name must be a relative path without '..': {name!r}")
        target = (epath.Path(step_dir) / ASSETS).joinpath(*parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            write_whole(target, content)
        elif fallback is not None and not content.exists():
            copy_file((fallback / ASSETS).joinpath(*parts), target)
        else:
            copy_file(content, target)


def asset_paths(step_dir: epath.PathLike) -> dict[str, epath.Path]:
    """The files under a step's assets/, by name ("source/config.json")."""
    directory = epath.Path(step_dir) / ASSETS
    return {name: directory / name for name in file_sizes(directory)}


def read_assets(step_dir: epath.PathLike) -> dict[str, bytes]:
    """The contents of a step's assets, by name, but for safetensors.

    Those hold tensors that are carried through untouched, maybe gigabytes: take them from `asset_paths`.
    """
    return {
        name: path.read_bytes()
        for name, path in asset_paths(step_dir).items()
        if not name.endswith(".safetensors")
    }


def copy_file(source: epath.Path, target: epath.Path) -> None:
    """Copies a file of any size, between local disks and gs:// too."""
    if not source.exists():
        raise UserError(
            f"{source} is gone, and is needed for {target}; put it back or start from another one"
        )
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(_COPY_BYTES):
            writer.write(block)
