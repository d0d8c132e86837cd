"""A run: its directory claimed, its state begun or restored, and stretches of training until it is done."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator, Sequence

import jax
from etils import epath

from sealion_jax.checkpoint.layout import StepDirectories
from sealion_jax.checkpoint.lease import LeaseLostError, RunLease
from sealion_jax.checkpoint.lease_files import JobStart
from sealion_jax.checkpoint.orbax import Checkpointer
from sealion_jax.checkpoint.processes import on_first_process
from sealion_jax.checkpoint.space import no_room_error
from sealion_jax.errors import Preempted
from sealion_jax.generation.samples import SAMPLES_FILE
from sealion_jax.goodput import Ledger, read_sessions
from sealion_jax.hardware import set_matmul_precision
from sealion_jax.mirror import Mirror
from sealion_jax.recipe import TrainConfig
from sealion_jax.recipe.inputs import REFERENCE
from sealion_jax.run.accounting import kind_of
from sealion_jax.run.announcements import adapted
from sealion_jax.run.beginning import (
    Beginning,
    begin,
    check_recorded,
    check_same_inputs,
    go_back,
    record,
    recorded_fingerprints,
    recorded_model,
)
from sealion_jax.run.events import note_event
from sealion_jax.run.parts import Parts, build
from sealion_jax.run.probing import require_writable_by_all
from sealion_jax.run.references import reference_fingerprint, with_references
from sealion_jax.run.stretch import Stretch
from sealion_jax.run.update import jitted_update
from sealion_jax.stopping import StopRequest
from sealion_jax.storage import is_remote, prepare_clients
from sealion_jax.watching import Activity, Ends, Watch

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
    run_dir = run_dir.expanduser()
    prepare_clients()
    require_writable_by_all(str(run_dir))
    attempt = on_first_process(lambda: uuid.uuid4().hex[:12])
    watch = Watch(
        str(run_dir),
        config.watch,
        process=jax.process_index(),
        processes=jax.process_count(),
        attempt=attempt,
        ends=Ends(attempt),
    )
    ledger = Ledger(attempt, started_at=began_at)
    with watch as activity:
        activity.listener = lambda doing: ledger.turn_to(kind_of(doing))
        _train(
            config,
            run_dir,
            profile=profile,
            stop=stop,
            command=command,
            start=start,
            # What is being written at that moment is not to go on.
            on_lost=watch.end_run,
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
    on_lost: Callable[[LeaseLostError], None],
    activity: Activity,
    ledger: Ledger,
) -> None:
    """`train`, watched."""
    say: Say = print if jax.process_index() == 0 else lambda _line: None
    activity.begin("building")
    _keep_compiled_steps(run_dir)
    set_matmul_precision(config.compute.dtype)
    parts = build(config, model=recorded_model(run_dir))
    for line in adapted(config, parts):
        say(line)
    check_same_inputs(parts)
    _end_if_asked(stop, "built")
    with _told_when_full(run_dir), RunLease(run_dir, start=start, on_lost=on_lost) as lease:
        complete = StepDirectories(run_dir).complete()
        check_recorded(parts, run_dir, step=complete[-1] if complete else None)
        with (
            _grown_files(run_dir, lease) as grown,
            _kept_account(ledger, grown, run_dir),
            Checkpointer(
                run_dir, config.checkpoints, lease=lease, on_progress=activity.move_on
            ) as checkpointer,
        ):
            activity.lease = on_first_process(lambda: lease.token)
            parts, beginning = _begin_run(parts, run_dir, checkpointer, stop=stop, say=say, activity=activity)
            update = jitted_update(parts)
            while True:
                stretch = Stretch(
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


def _begin_run(
    parts: Parts,
    run_dir: epath.Path,
    checkpointer: Checkpointer,
    *,
    stop: StopRequest,
    say: Say,
    activity: Activity,
) -> tuple[Parts, Beginning]:
    """What the first stretch trains with, and where it begins: the state is begun, or restored and checked.

    If steps are left to train, their recipe is recorded, and rows get the log-probabilities of a reference
    where the loss needs them.
    """
    activity.begin("restoring")
    beginning = begin(parts, checkpointer, say)
    _end_if_asked(stop, "begun")
    step = beginning.run.step
    recorded = recorded_fingerprints(run_dir).get(REFERENCE) if step else None
    reference = reference_fingerprint(parts, recorded=recorded)
    # Once more, of the step that is gone on from: the newest may have been damaged.
    for line in check_recorded(parts, run_dir, step=step or None):
        say(line)
    if step >= parts.config.steps:
        return parts, beginning
    if jax.process_index() == 0:
        record(parts, run_dir, reference=reference)
    if reference is not None:
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
    return parts, beginning


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


def _kept_account(
    ledger: Ledger, grown: Mirror, run_dir: epath.Path
) -> contextlib.AbstractContextManager[None]:
    """While it is entered, the first process writes the account of the run's time."""
    if jax.process_index() != 0:
        return contextlib.nullcontext()
    return ledger.kept(grown.folder, earlier=read_sessions(run_dir))


def _keep_compiled_steps(run_dir: epath.Path) -> None:
    """Has JAX keep what it compiles in the run directory, for quick restarts, unless told another place."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        jax.config.update("jax_compilation_cache_dir", str(run_dir / "compiled"))
        if is_remote(run_dir):
            # XLA's own caches are files of a disk; compiled programs, which JAX keeps, have their results.
            jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
