"""A run: its state begun or restored, its hooks, and what it leaves behind."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
from etils import epath

from sealion_jax.checkpoint.hf_assets import CHAT_TEMPLATE_FILE
from sealion_jax.checkpoint.hf_config import model_json
from sealion_jax.checkpoint.layout import Assets, StepDirectories
from sealion_jax.checkpoint.lease import RunLease
from sealion_jax.checkpoint.lora import LORA_FILE
from sealion_jax.checkpoint.orbax import Checkpointer
from sealion_jax.checkpoint.space import no_room_error
from sealion_jax.checkpoint.weights import MODEL_FILE, TOKENIZER_FILE
from sealion_jax.cli import Progress
from sealion_jax.data.batches import GlobalBatches
from sealion_jax.data.chat.template import CHAT_TEMPLATE
from sealion_jax.data.plan import examples_table
from sealion_jax.errors import Preempted, UserError
from sealion_jax.generation.samples import SamplesLog
from sealion_jax.hardware import set_matmul_precision
from sealion_jax.metrics import MetricsLog, Row
from sealion_jax.recipe import TrainConfig
from sealion_jax.recipe.inputs import REFERENCE
from sealion_jax.run.announcements import next_commands, opening
from sealion_jax.run.beginning import (
    Beginning,
    begin,
    check_recorded,
    record,
    recorded_fingerprints,
    recorded_model,
)
from sealion_jax.run.hooks import assemble, batch_note
from sealion_jax.run.parts import Parts, build
from sealion_jax.run.references import reference_fingerprint, with_references
from sealion_jax.run.update import jitted_update
from sealion_jax.sharding import (
    batch_sharding,
    process_rows,
    to_device,
)
from sealion_jax.stopping import StopRequest
from sealion_jax.training.hooks import Profile
from sealion_jax.training.loop import Hook, Run
from sealion_jax.training.loop import train as run_loop
from sealion_jax.training.report import evaluation_table, summarise, write_summary

Say = Callable[[str], None]


def train(
    config: TrainConfig,
    run_dir: epath.Path,
    *,
    profile: bool = False,
    stop: StopRequest | None = None,
    command: Sequence[str] | None = None,
) -> None:
    """Trains to the recipe's last step, from the newest good checkpoint of the run directory if it has one.

    Args:
        profile: traces a few steps into the run directory.
        stop: tells when to stop; None listens to SIGTERM from now on.
        command: the recipe and its overrides as a command was given them, for commands that are suggested.

    Raises:
        UserError: a mistake in the recipe, a run directory of another recipe, or one that is in use.
        Preempted: SIGTERM came; the state is saved, if there was anything to save.
    """
    stop = stop or StopRequest()
    is_first = jax.process_index() == 0
    say: Say = print if is_first else lambda _line: None
    if "://" in str(run_dir):
        raise UserError(
            f"run directory {run_dir}: only local (or mounted) run directories work today; checkpoints and "
            "token stores to read may be on gs://"
        )
    _keep_compiled_steps(run_dir)
    set_matmul_precision(config.compute.dtype)
    parts = build(config, model=recorded_model(run_dir))
    _end_if_asked(stop, "built")
    with _told_when_full(run_dir), RunLease(run_dir) as lease:
        complete = StepDirectories(run_dir).complete()
        check_recorded(parts, run_dir, step=complete[-1] if complete else None)
        with Checkpointer(run_dir, config.checkpoints, lease=lease) as checkpointer:
            beginning = begin(parts, checkpointer, say)
            _end_if_asked(stop, "begun")
            recorded = recorded_fingerprints(run_dir).get(REFERENCE) if beginning.run.step else None
            reference = reference_fingerprint(parts, recorded=recorded)
            # Once more, of the step that is gone on from: the newest may have been damaged.
            for line in check_recorded(parts, run_dir, step=beginning.run.step or None):
                say(line)
            if is_first and beginning.run.step < config.steps:
                record(parts, run_dir, reference=reference)
            if reference is not None and beginning.run.step < config.steps:
                parts = with_references(
                    parts, beginning, run_dir=run_dir, fingerprint=reference, stop=stop, say=say
                )
            TrainingRun(
                parts,
                run_dir,
                beginning,
                checkpointer,
                stop=stop,
                command=(config.name,) if command is None else command,
                say=say,
                profile=profile,
            ).go()


def _end_if_asked(stop: StopRequest, moment: str) -> None:
    if stop.requested(moment):
        raise Preempted("asked to stop before training began; run me again")


@contextlib.contextmanager
def _told_when_full(run_dir: epath.Path) -> Iterator[None]:
    """Turns a full disk, whatever of the run met it, into the user's error."""
    try:
        yield
    except OSError as error:
        full = no_room_error(error, run_dir, doing="writing the run")
        if full is None:
            raise
        raise full from error


def _keep_compiled_steps(run_dir: epath.Path) -> None:
    """Has JAX keep what it compiles in the run directory, for quick restarts, unless told another place."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        jax.config.update("jax_compilation_cache_dir", str(run_dir / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


class TrainingRun:
    """One stretch of training in a run directory: from where the state is to the last step."""

    def __init__(
        self,
        parts: Parts,
        run_dir: epath.Path,
        beginning: Beginning,
        checkpointer: Checkpointer,
        *,
        stop: StopRequest,
        command: Sequence[str],
        say: Say,
        profile: bool,
    ) -> None:
        self._parts = parts
        self._config = parts.config
        self._run_dir = run_dir
        self._run = beginning.run
        self._skips = beginning.skips
        self._assets: Assets = {
            **beginning.carried,
            MODEL_FILE: model_json(parts.model),
            TOKENIZER_FILE: parts.tokenizer.model_bytes,
        }
        if parts.learns_chats:
            self._assets = {**self._assets, CHAT_TEMPLATE_FILE: CHAT_TEMPLATE.encode()}
        if parts.adapters is not None:
            self._assets = {**self._assets, LORA_FILE: parts.adapters.to_json()}
        self._checkpointer = checkpointer
        self._stop = stop
        self._command = command
        self._say = say
        self._profile = profile
        self._batches = GlobalBatches(
            parts.mixture, global_batch_size=parts.config.global_batch_size, skips=beginning.skips
        )
        self._sharding = batch_sharding(parts.mesh)
        self._log: MetricsLog | None = None
        self._started = time.time()

    def go(self) -> None:
        """Trains to the end, and says what came of it."""
        run, config = self._run, self._config
        for line in opening(self._parts, self._run_dir):
            self._say(line)
        if run.step >= config.steps:
            self._say(f"nothing to do: step {run.step} of {config.steps} is done; raise --steps to go on")
            return
        rows = process_rows(self._sharding, config.global_batch_size)
        with contextlib.ExitStack() as ending:
            listeners = self._hooks(ending)
            if run.step == 0 and (self._parts.sets or config.samples.prompts):
                first: Row = {"step": 0}
                for hook in listeners:
                    hook(run, first)
            run_loop(
                run,
                jitted_update(self._parts),
                batches=self._batches.iterate(run.step, rows),
                to_device=lambda batch: to_device(batch, rows, self._sharding, config.global_batch_size),
                summarise=lambda metrics: summarise(metrics, self._parts.mixture.names),
                hooks=listeners,
            )
        self._checkpointer.wait()
        self._finish()

    def _hooks(self, ending: contextlib.ExitStack) -> list[Hook]:
        """What happens beside training; what has to be closed after it is left with `ending`."""
        run, config = self._run, self._config
        output = None
        if jax.process_index() == 0:
            # Nothing of a run that is begun anew is kept, its evaluation before the first step neither.
            self._log = MetricsLog(self._run_dir, last_step=run.step or -1)
            ending.callback(self._log.close)
            samples = None
            if config.samples.prompts:
                samples = SamplesLog(self._run_dir, last_step=run.step or -1)
                ending.callback(samples.close)
            output = (
                self._log,
                ending.enter_context(Progress(config.steps, "train", unit="step", initial=run.step)),
                samples,
            )
        profile = None
        if self._profile:
            profile = ending.enter_context(
                Profile(self._run_dir / "profile", self._say, first_step=run.step + 2, last_step=config.steps)
            )
        return assemble(
            self._parts,
            run_dir=self._run_dir,
            output=output,
            save=self._save,
            checkpointer=self._checkpointer,
            stop=self._stop,
            show_batch=partial(batch_note, self._batches, command=self._command, run_dir=self._run_dir),
            profile=profile,
        )

    def _save(self, run: Run) -> None:
        self._checkpointer.save(
            run.step,
            params=run.state.params,
            optimizer=run.state.optimizer,
            train={"skips": [list(skip) for skip in self._skips], "counters": dict(run.counters)},
            assets=self._assets,
        )

    def _finish(self) -> None:
        """After training: the summary, the table of languages, and the next things to try."""
        if self._log is None:
            return
        rows, run_dir = self._log.rows, self._run_dir
        newest = run_dir / "checkpoints" / str(self._run.step)
        write_summary(
            run_dir,
            rows,
            {
                "recipe": self._config.name,
                "checkpoint": str(newest),
                "counters": self._run.counters,
                "examples": {
                    row.source: dataclasses.asdict(row) for row in examples_table(self._parts.mixture)
                },
                "seconds": time.time() - self._started,
            },
        )
        if table := evaluation_table(rows):
            self._say("\n" + table)
        self._say(f"\ncheckpoint  {newest}\nplots       {run_dir / 'plots'}\n\nnext:")
        for command in next_commands(
            self._config,
            run_dir,
            talks=self._parts.learns_chats,
            reference=self._parts.reference_path,
            pairs=[one.name for one in self._parts.sets if one.kind == "pairs"],
        ):
            self._say(f"  {command}")
