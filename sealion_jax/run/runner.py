"""A run: its state begun or restored, its hooks, and what it leaves behind."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
from etils import epath

from sealion_jax.checkpoint.hf_assets import CHAT_TEMPLATE_FILE
from sealion_jax.checkpoint.hf_config import model_json
from sealion_jax.checkpoint.layout import Assets, StepDirectories
from sealion_jax.checkpoint.lease import RunLease
from sealion_jax.checkpoint.lease_files import JobStart
from sealion_jax.checkpoint.lora import LORA_FILE
from sealion_jax.checkpoint.orbax import Checkpointer
from sealion_jax.checkpoint.processes import on_first_process
from sealion_jax.checkpoint.space import no_room_error
from sealion_jax.checkpoint.weights import MODEL_FILE, TOKENIZER_FILE
from sealion_jax.cli import Progress
from sealion_jax.data.batches import GlobalBatches
from sealion_jax.data.chat.template import CHAT_TEMPLATE
from sealion_jax.data.plan import examples_table
from sealion_jax.errors import Preempted
from sealion_jax.generation.samples import SAMPLES_FILE, SamplesLog
from sealion_jax.goodput import FOLDER as GOODPUT
from sealion_jax.goodput import STEPS, Ledger, account, goodput, read_sessions
from sealion_jax.goodput import table as goodput_table
from sealion_jax.hardware import set_matmul_precision
from sealion_jax.metrics import MetricsLog, Row
from sealion_jax.mirror import Mirror
from sealion_jax.recipe import TrainConfig
from sealion_jax.recipe.inputs import REFERENCE
from sealion_jax.run.announcements import next_commands, opening
from sealion_jax.run.beginning import (
    Beginning,
    begin,
    check_recorded,
    go_back,
    kept_losses,
    record,
    recorded_fingerprints,
    recorded_model,
)
from sealion_jax.run.events import note_event
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
from sealion_jax.storage import is_remote, prepare_clients, require_writable
from sealion_jax.training.hooks import Profile
from sealion_jax.training.loop import Hook, Run, Update
from sealion_jax.training.loop import train as run_loop
from sealion_jax.training.report import evaluation_table, summarise, write_summary
from sealion_jax.training.spikes import SpikeFound
from sealion_jax.training.state import TrainState
from sealion_jax.watching import READING, Activity, Doing, Watch

_KINDS = {
    "starting": "start",
    "building": "start",
    "restoring": "restore",
    "going back": "restore",
    "compiling": "compile",
    "evaluating": "evaluation",
    "sampling": "evaluation",
    "saving": "save",
    "finishing the last save": "save",
}
"""Goodput's kind of what a run does, as it tells its watch."""

Say = Callable[[str], None]


def train(
    config: TrainConfig,
    run_dir: epath.Path,
    *,
    profile: bool = False,
    stop: StopRequest | None = None,
    command: Sequence[str] | None = None,
    began_at: float | None = None,
    start: JobStart | None = None,
) -> None:
    """Trains to the recipe's last step, from the newest good checkpoint of the run directory if it has one.

    Args:
        profile: traces a few steps into the run directory.
        stop: tells when to stop; None listens to SIGTERM from now on.
        command: the recipe and its overrides as a command was given them, for commands that are suggested.
        began_at: when the command began, in seconds since 1970; None for now.
        start: which start of a scheduler's job this is; it takes the run directory over from earlier ones.

    Raises:
        UserError: a mistake in the recipe, a run directory of another recipe, or one that is in use.
        Preempted: SIGTERM came; the state is saved, if there was anything to save.
    """
    stop = stop or StopRequest()
    prepare_clients()
    on_first_process(lambda: require_writable(str(run_dir)))
    watch = Watch(
        str(run_dir),
        config.watch,
        process=jax.process_index(),
        processes=jax.process_count(),
        attempt=on_first_process(lambda: uuid.uuid4().hex[:12]),
    )
    ledger = Ledger(started_at=began_at)
    with watch as activity:
        activity.listener = lambda doing: ledger.turn_to(kind_of(doing))
        _train(
            config,
            run_dir,
            profile=profile,
            stop=stop,
            command=command,
            start=start,
            activity=activity,
            ledger=ledger,
        )


def _train(
    config: TrainConfig,
    run_dir: epath.Path,
    *,
    profile: bool,
    stop: StopRequest,
    command: Sequence[str] | None,
    start: JobStart | None,
    activity: Activity,
    ledger: Ledger,
) -> None:
    """`train`, watched."""
    is_first = jax.process_index() == 0
    say: Say = print if is_first else lambda _line: None
    activity.begin("building")
    _keep_compiled_steps(run_dir)
    set_matmul_precision(config.compute.dtype)
    parts = build(config, model=recorded_model(run_dir))
    _end_if_asked(stop, "built")
    with _told_when_full(run_dir), RunLease(run_dir, start=start) as lease:
        complete = StepDirectories(run_dir).complete()
        check_recorded(parts, run_dir, step=complete[-1] if complete else None)
        with (
            _grown_files(run_dir, lease) as grown,
            Checkpointer(run_dir, config.checkpoints, lease=lease) as checkpointer,
        ):
            activity.holds_run_dir = True
            if is_first:
                ledger.keep(grown.folder / GOODPUT / f"{uuid.uuid4().hex[:12]}.json", read_sessions(run_dir))
            activity.begin("restoring")
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
                activity.begin("computing the reference's log-probabilities")
                parts = with_references(
                    parts,
                    beginning,
                    run_dir=run_dir,
                    fingerprint=reference,
                    stop=stop,
                    say=say,
                    on_rows=activity.move_on,
                )
            update = jitted_update(parts)
            while True:
                stretch = TrainingRun(
                    parts,
                    run_dir,
                    beginning,
                    checkpointer,
                    update,
                    stop=stop,
                    command=(config.name,) if command is None else command,
                    say=say,
                    profile=profile,
                    activity=activity,
                    ledger=ledger,
                    grown=grown,
                )
                spike = stretch.go()
                if spike is None:
                    return
                activity.begin("going back")
                beginning = go_back(parts, beginning, spike, checkpointer, say)
                note_event(
                    run_dir,
                    "went back",
                    spike=str(spike),
                    step=spike.step,
                    to_step=beginning.run.step,
                    skipped_batches=[list(skip) for skip in beginning.skips],
                )


def kind_of(doing: Doing) -> str:
    """Under which of goodput's kinds the time is booked that something takes."""
    if doing.what.endswith(READING):
        return "data"
    return STEPS if doing.is_step else _KINDS.get(doing.what, "other")


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


def _grown_files(run_dir: epath.Path, lease: RunLease) -> Mirror:
    """The run directory as a place for files that are appended to, which those of a bucket cannot be."""
    is_first = jax.process_index() == 0
    return Mirror(
        str(run_dir),
        carried=("metrics.jsonl", SAMPLES_FILE) if is_first else (),
        renewed=("tensorboard",) if is_first else (),
        may_write=lease.check,
    )


def _keep_compiled_steps(run_dir: epath.Path) -> None:
    """Has JAX keep what it compiles in the run directory, for quick restarts, unless told another place."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        jax.config.update("jax_compilation_cache_dir", str(run_dir / "compiled"))
        if is_remote(run_dir):
            # XLA's own caches are files of a disk; compiled programs, which JAX keeps, have their results.
            jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


class TrainingRun:
    """One stretch of training in a run directory: from where the state is to the last step."""

    def __init__(
        self,
        parts: Parts,
        run_dir: epath.Path,
        beginning: Beginning,
        checkpointer: Checkpointer,
        update: Update,
        *,
        stop: StopRequest,
        command: Sequence[str],
        say: Say,
        profile: bool,
        activity: Activity,
        ledger: Ledger,
        grown: Mirror,
    ) -> None:
        self._activity = activity
        self._ledger = ledger
        self._grown = grown
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
        self._update = update
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

    def go(self) -> SpikeFound | None:
        """Trains to the end, and says what came of it; or returns the spike from which the run goes back."""
        run, config = self._run, self._config
        for line in opening(self._parts, self._run_dir):
            self._say(line)
        if run.step >= config.steps:
            self._say(f"nothing to do: step {run.step} of {config.steps} is done; raise --steps to go on")
            return None
        rows = process_rows(self._sharding, config.global_batch_size)
        try:
            self._train(rows)
        except SpikeFound as spike:
            run.state = TrainState(None, None)  # there must be room for the state that is gone back to
            return spike.with_traceback(None)
        self._activity.begin("finishing the last save")
        self._checkpointer.wait()
        self._finish()
        return None

    def _train(self, rows: Sequence[int]) -> None:
        """From the step that the run is at to the last; `rows` of each batch are read by this process."""
        run, config = self._run, self._config
        with contextlib.ExitStack() as ending:
            listeners = self._hooks(ending)
            self._activity.begin("compiling", step=run.step)
            self._ledger.begin(run.step)
            ending.callback(self._ledger.write)
            if run.step == 0 and (self._parts.sets or config.samples.prompts):
                first: Row = {"step": 0}
                for hook in listeners:
                    hook(run, first)
            run_loop(
                run,
                self._update,
                batches=self._activity.reading(self._batches.iterate(run.step, rows)),
                to_device=lambda batch: to_device(batch, rows, self._sharding, config.global_batch_size),
                summarise=lambda metrics: summarise(metrics, self._parts.mixture.names),
                hooks=listeners,
            )

    def _hooks(self, ending: contextlib.ExitStack) -> list[Hook]:
        """What happens beside training; what has to be closed after it is left with `ending`."""
        run, config = self._run, self._config
        output = None
        folder = epath.Path(self._grown.folder)
        if jax.process_index() == 0:
            # Nothing of a run that is begun anew is kept, its evaluation before the first step neither.
            self._log = MetricsLog(folder, last_step=run.step or -1)
            ending.callback(self._log.close)
            samples = None
            if config.samples.prompts:
                samples = SamplesLog(folder, last_step=run.step or -1)
                ending.callback(samples.close)
            output = (
                self._log,
                ending.enter_context(Progress(config.steps, "train", unit="step", initial=run.step)),
                samples,
            )
        profile = None
        if self._profile:
            profile = ending.enter_context(
                Profile(
                    folder / "profile",
                    # Where it ends up, not where it is before it is copied.
                    lambda line: self._say(line.replace(str(folder), str(self._run_dir))),
                    first_step=run.step + 2,
                    last_step=config.steps,
                )
            )
        return assemble(
            self._parts,
            plots=folder / "plots",
            output=output,
            sync=self._sync,
            save=self._save,
            checkpointer=self._checkpointer,
            stop=self._stop,
            show_batch=partial(batch_note, self._batches, command=self._command, run_dir=self._run_dir),
            profile=profile,
            activity=self._activity,
            ledger=self._ledger,
        )

    def _sync(self) -> None:
        """Has the rows of all steps up to here in the run directory, whatever happens to this machine."""
        if self._log is not None:
            self._log.sync()
        self._grown.sync()

    def _save(self, run: Run) -> None:
        with self._activity.during("saving"):
            self._save_now(run)

    def _save_now(self, run: Run) -> None:
        self._checkpointer.save(
            run.step,
            params=run.state.params,
            optimizer=run.state.optimizer,
            train={
                "skips": [list(skip) for skip in self._skips],
                "counters": dict(run.counters),
                "losses": kept_losses(run.state),
            },
            assets=self._assets,
        )

    def _finish(self) -> None:
        """After training: the summary, the table of languages, and the next things to try."""
        if self._log is None:
            return
        rows, run_dir = self._log.rows, self._run_dir
        self._ledger.write()
        spent = account(self._ledger.sessions)
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
                "goodput": {"share": goodput(spent), "seconds": spent},
            },
        )
        if table := evaluation_table(rows):
            self._say("\n" + table)
        self._say(f"\n{goodput_table(spent)}")
        self._say(f"\ncheckpoint  {newest}\nplots       {run_dir / 'plots'}\n\nnext:")
        for command in next_commands(
            self._config,
            run_dir,
            talks=self._parts.learns_chats,
            reference=self._parts.reference_path,
            pairs=[one.name for one in self._parts.sets if one.kind == "pairs"],
        ):
            self._say(f"  {command}")
