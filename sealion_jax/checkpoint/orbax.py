"""Saving a run's state while it trains on, and going back to the newest good one.

Orbax's AsyncCheckpointer copies the arrays off the devices and writes them in the background; around it stand
our own step directories (layout.py). Orbax's CheckpointManager would do some of the same, but it counts a
step as complete before the digests exist, keeps its own list of steps and deletes by its own rules. What
happens at each kind of failure is the point here, so it is in our hands, and short.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from sealion_jax.checkpoint.digests import check_digests
from sealion_jax.checkpoint.layout import PARAMS, TRAIN_FILE, Assets, StepDirectories, write_assets
from sealion_jax.checkpoint.lease import RunLease
from sealion_jax.checkpoint.processes import all_lines, on_first_process
from sealion_jax.checkpoint.sealing import Sealing
from sealion_jax.checkpoint.space import no_room_error
from sealion_jax.checkpoint.trees import (
    load_optimizer,
    load_tree,
    quiet_orbax,
    read_train,
    save_args,
    tree_writer,
)
from sealion_jax.checks import check_number
from sealion_jax.errors import UserError
from sealion_jax.storage import write_whole

PyTree = Any

_TIMEOUT_SECONDS = 3600


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When state is saved and which of the saved steps stay."""

    interval_steps: int = 500
    """Save after every so many steps, and at the end."""
    keep_last: int = 3
    """The newest so many complete steps stay. With 1 there is none to go back to when that one is damaged."""
    keep_every_steps: int | None = None
    """Steps that are a multiple of this stay forever."""

    def __post_init__(self) -> None:
        for name in ("interval_steps", "keep_last", "keep_every_steps"):
            value = getattr(self, name)
            if value is not None:
                check_number(f"checkpoints.{name}", value, least=1, whole=True)

    def is_due(self, step: int) -> bool:
        """Whether state is saved after `step` steps."""
        return step > 0 and step % self.interval_steps == 0

    def to_remove(self, complete: list[int]) -> list[int]:
        """Which of the complete steps (ascending) go."""
        return [
            step
            for step in complete[: -self.keep_last]
            if self.keep_every_steps is None or step % self.keep_every_steps
        ]


@dataclass(frozen=True, kw_only=True)
class Restored:
    """State as it was saved."""

    step: int
    params: PyTree
    optimizer: PyTree
    train: dict[str, Any]
    directory: epath.Path


class Checkpointer:
    """Saves to and restores from one run directory; used as a context manager, by every process alike.

    One save is under way at a time. An error in the background is raised by the next call of `save`, `check`,
    `wait` or `close`. A full disk is a UserError that names the path; steps saved before stay as they are.
    `report` is given lines for the user, on process 0. `on_progress` is called as restoring moves on.
    """

    def __init__(
        self,
        run_dir: epath.PathLike,
        config: CheckpointConfig,
        *,
        lease: RunLease | None = None,
        on_progress: Callable[[], None] = lambda: None,
        report: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    ) -> None:
        quiet_orbax()
        self._directories = StepDirectories(run_dir)
        self._config = config
        self._lease = lease
        self._on_progress = on_progress
        self._is_first = jax.process_index() == 0
        self._report = report if self._is_first else lambda line: None
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(params=tree_writer(), optimizer=tree_writer()),
            timeout_secs=_TIMEOUT_SECONDS,
        )
        self._damaged: set[int] = set()
        self._cleaned = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._newest: int | None = None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        try:  # an error is on its way already: finish the save, but do not hide the error behind another
            self.close()
        except Exception as error:
            self._report(f"the last checkpoint was not saved: {error}")

    @property
    def newest(self) -> int | None:
        """The newest step that this process knows to be complete."""
        return self._newest

    def save(
        self, step: int, *, params: PyTree, optimizer: PyTree, train: Mapping[str, Any], assets: Assets
    ) -> None:
        """Begins to save the state after `step` steps; `params` and `optimizer` are trees of jax.Array.

        When this returns the caller may donate the arrays: they are copied, or (on CPUs, where the copy is
        the array itself) held, which keeps JAX from using their memory again. Waits for the save before this
        one. A step that is complete already is left alone.
        """
        self.wait()
        if step == self._newest:
            return
        target = self._directories[step]
        try:
            if self._is_first:
                self._check_lease()
                if not self._cleaned:
                    self._directories.remove_unfinished()
                    self._cleaned = True
                self._directories.begin(step)
            self._orbax.save(
                target,
                args=ocp.args.Composite(params=save_args(params), optimizer=save_args(optimizer)),
            )
        except Exception as error:
            shown = self._failure(step, error)
            if shown is error:
                raise
            raise shown from error
        sealing = Sealing.next(target, limit_seconds=_TIMEOUT_SECONDS)
        self._thread = threading.Thread(
            target=self._complete,
            args=(step, dict(train) | {"step": step}, dict(assets), sealing),
            name=f"save-{step}",
        )
        self._thread.start()

    def check(self) -> None:
        """Raises the error of a save in the background, if there is one; never waits."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Waits for the save under way, and raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Waits for the save under way and ends Orbax's threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def go_back(self, params: PyTree, optimizer: PyTree, *, at_most: int) -> Restored | None:
        """The state of the newest good step up to `at_most`, of which all later ones are then removed.

        None if `at_most` lies before the first save: the run is to begin anew. Arguments, and what it raises,
        are those of `restore_newest`, and UserError if all steps that there are were saved later.
        """
        self.wait()
        restored = self.restore_newest(params, optimizer, at_most=at_most)
        complete = on_first_process(self._directories.complete)
        # Before the first save there was nothing that could have been removed: the run begins anew.
        if restored is None and complete and at_most >= self._config.interval_steps:
            raise UserError(
                f"no checkpoint of step {at_most} or before is left in {self._directories.root}, only "
                f"{', '.join(map(str, complete))}; raise checkpoints.keep_last or lower spikes.back_steps"
            )
        if self._is_first:
            self._check_lease()
            for step in self._directories.steps():
                if step > at_most:
                    self._directories.remove(step)
        return restored

    def restore_newest(
        self, params: PyTree, optimizer: PyTree, *, at_most: int | None = None
    ) -> Restored | None:
        """The state of the newest good step; None if no step was ever saved to the end.

        `params` and `optimizer` are trees of ShapeDtypeStruct with the shardings wanted, of any mesh. Each
        step is checked against its digests first. What is wrong is reported, file by file, and the step
        before is used. Raises UserError if steps exist and none is good, or if the good one is of another
        model.

        Args:
            at_most: later steps are not looked at.
        """
        self._check_shared()
        damaged: list[int] = []
        for step in reversed(on_first_process(self._directories.steps)):
            if at_most is not None and step > at_most:
                continue
            if on_first_process(lambda step=step: self._directories.is_unfinished(step)):
                self._report(f"checkpoint {step} was not finished when its run ended; passing it over")
                continue
            directory = self._directories[step]
            share = (jax.process_index(), jax.process_count())
            problems = all_lines(check_digests(directory, share=share, on_file=self._on_progress))
            if not problems:
                self._damaged = set(damaged)
                return self._load(step, params, optimizer)
            damaged.append(step)
            for problem in problems:
                self._report(f"checkpoint {step} is damaged: {directory / problem}")
        if damaged:
            raise UserError(
                f"none of the checkpoints in {self._directories.root} is good (see above for "
                f"{', '.join(map(str, damaged))}). Put back a copy of one of them, or give another --run-dir "
                "to start anew"
            )
        return None

    def _load(self, step: int, params: PyTree, optimizer: PyTree) -> Restored:
        directory = self._directories[step]
        self._on_progress()
        loaded = load_tree(directory, PARAMS, params, same_dtype=True)
        self._on_progress()
        restored = Restored(
            step=step,
            params=loaded,
            optimizer=load_optimizer(directory, optimizer),
            train=read_train(directory),
            directory=directory,
        )
        self._newest = step
        return restored

    def _complete(self, step: int, train: dict[str, Any], assets: Assets, sealing: Sealing) -> None:
        """In the background: waits for the arrays to be on disk, adds the small files, then the digests."""
        try:
            self._orbax.wait_until_finished()
            if self._is_first:
                directory = self._directories[step]
                write_whole(directory / TRAIN_FILE, json.dumps(train, indent=1).encode())
                newest = None if self._newest is None else self._directories[self._newest]
                write_assets(directory, assets, fallback=newest)
                sealing.lead(may_write=self._check_lease)
                self._check_lease()
                self._directories.finish(step)
                self._newest = step
                self._remove_old(step)
            else:
                sealing.follow()
                self._newest = step
        except BaseException as error:
            self._error = error  # whatever is met while it is explained
            self._error = self._failure(step, error)
            sealing.give_up(self._error)

    def _remove_old(self, step: int) -> None:
        """Applies the keep policy, now that `step` is complete; damaged steps go as well."""
        complete = [other for other in self._directories.complete() if other not in self._damaged]
        try:
            for old in [*self._config.to_remove(complete), *self._damaged]:
                if old != step:
                    self._directories.remove(old)
        except Exception as error:  # a bucket's client raises errors of its own
            self._report(f"old checkpoints in {self._directories.root} could not be removed: {error}")
        self._damaged = set()

    def _failure(self, step: int, error: BaseException) -> BaseException:
        """What to raise for a save that failed; removes what there is of it, if it is ours to remove."""
        if self._newest == step or not self._is_first or not self._still_ours():
            return error
        target = self._directories[step]
        full = no_room_error(error, target, doing=f"saving checkpoint {step}")
        try:
            self._directories.remove(step)
        except Exception as left:
            self._report(f"the unfinished {target} could not be removed: {left}")
        if full is None:
            return error
        complete = self._directories.complete()
        kept = f"; checkpoint {complete[-1]} is good" if complete else ""
        shown = UserError(f"{full}{kept}")
        shown.__cause__ = error
        return shown

    def _check_shared(self) -> None:
        """Raises UserError if some process does not see process 0's run directory; makes it if need be."""
        root = self._directories.root
        if "://" in str(root):  # buckets are seen by all, and have no empty directories
            return
        on_first_process(lambda: root.mkdir(parents=True, exist_ok=True))
        blind = all_lines([] if root.exists() else [str(jax.process_index())])
        if blind:
            raise UserError(
                f"{root}, made by process 0, is not there for process {', '.join(blind)}: give a --run-dir "
                "on storage that all processes share"
            )

    def _check_lease(self) -> None:
        if self._lease is not None:
            self._lease.check()

    def _still_ours(self) -> bool:
        try:
            self._check_lease()
        except Exception:  # taken over, or not to be told while the storage does not answer
            return False
        return True
