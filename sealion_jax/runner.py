"""A run: its state begun or restored, its hooks, and what it leaves behind."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
from etils import epath

from sealion_jax.checkpoint.hf_config import model_json, read_model_json
from sealion_jax.checkpoint.layout import Assets, StepDirectories, asset_paths
from sealion_jax.checkpoint.lease import RunLease
from sealion_jax.checkpoint.orbax import Checkpointer
from sealion_jax.checkpoint.space import no_room_error
from sealion_jax.checkpoint.weights import MODEL_FILE, TOKENIZER_FILE, source_assets
from sealion_jax.cli import Progress
from sealion_jax.data.batches import GlobalBatches
from sealion_jax.data.plan import format_plan, plan_table
from sealion_jax.distributed import StopRequest
from sealion_jax.errors import UserError
from sealion_jax.evaluation.perplexity import Scorer, evaluate_sets
from sealion_jax.hardware import peak_flops_per_second
from sealion_jax.metrics import MetricsLog, Row
from sealion_jax.model.config import Gemma3Config
from sealion_jax.model.flops import flops_per_token
from sealion_jax.objectives.base import LOGITS_BYTES_PER_DEVICE
from sealion_jax.objectives.causal_lm import CausalLM
from sealion_jax.optimizer import learning_rate_schedule
from sealion_jax.parts import Parts, build
from sealion_jax.recipe import TrainConfig, check_resume, from_json, to_json
from sealion_jax.sharding import (
    batch_devices,
    batch_sharding,
    process_rows,
    to_device,
)
from sealion_jax.training import hooks
from sealion_jax.training.loop import Hook, Run
from sealion_jax.training.loop import train as run_loop
from sealion_jax.training.plots import draw_plots
from sealion_jax.training.report import evaluation_table, news, progress_note, summarise, write_summary
from sealion_jax.training.state import (
    TrainState,
    init_optimizer,
    random_params,
    state_shardings,
)
from sealion_jax.training.step import make_update

Say = Callable[[str], None]

RECORD = "config.json"


def train(config: TrainConfig, run_dir: epath.Path, *, profile: bool = False) -> None:
    """Trains to the recipe's last step, from the newest good checkpoint of the run directory if it has one.

    Raises:
        UserError: a mistake in the recipe, a run directory of another recipe, or one that is in use.
        Preempted: SIGTERM came; the state is saved.
    """
    is_first = jax.process_index() == 0
    say: Say = print if is_first else lambda _line: None
    if "://" in str(run_dir):
        raise UserError(
            f"run directory {run_dir}: only local (or mounted) run directories work today; checkpoints and "
            "token stores to read may be on gs://"
        )
    _keep_compiled_steps(run_dir)
    parts = build(config, model=_recorded_model(run_dir))
    with _told_when_full(run_dir), RunLease(run_dir) as lease:
        complete = StepDirectories(run_dir).complete()
        _check_recorded(config, run_dir, step=complete[-1] if complete else None)
        with Checkpointer(run_dir, config.checkpoints, lease=lease) as checkpointer:
            beginning = _begin(parts, checkpointer, say)
            # Once more, of the step that is gone on from: the newest may have been damaged.
            for line in _check_recorded(config, run_dir, step=beginning.run.step or None):
                say(line)
            if is_first:
                _replace_text(run_dir / RECORD, to_json(config))
            TrainingRun(parts, run_dir, beginning, checkpointer, say=say, profile=profile).go()


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


def _check_recorded(config: TrainConfig, run_dir: epath.Path, *, step: int | None) -> list[str]:
    """Refuses a run directory of another recipe; returns what of the recorded one is changed after `step`."""
    record = run_dir / RECORD
    return check_resume(from_json(record.read_text()), config, step=step) if record.exists() else []


def _replace_text(path: epath.Path, text: str) -> None:
    new = path.parent / f"{path.name}.new"
    new.write_text(text)
    new.replace(path)


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """Where a stretch of training begins."""

    run: Run
    skips: tuple[tuple[int, int], ...] = ()
    """(first, count) of the batches that the run has left out so far."""
    carried: Assets = field(default_factory=dict)
    """What every checkpoint carries along from the weights that the run once started from."""


def _recorded_model(run_dir: epath.Path) -> Gemma3Config | None:
    """The model of a run that has checkpoints: they hold all that is needed to go on."""
    directories = StepDirectories(run_dir)
    for step in reversed(directories.complete()):
        # What cannot be read is damaged, and is told when the run is restored.
        with contextlib.suppress(UserError, KeyError, FileNotFoundError):
            return read_model_json(asset_paths(directories[step])[MODEL_FILE].read_bytes())
    return None


def _begin(parts: Parts, checkpointer: Checkpointer, say: Say) -> Beginning:
    """The run at the step it goes on from: restored, or with fresh optimizer state."""
    abstract, steps = parts.abstract, parts.config.steps
    restored = checkpointer.restore_newest(abstract.params, abstract.optimizer)
    if restored is not None:
        say(f"resuming after step {restored.step} ({restored.directory})")
        state = TrainState(params=restored.params, optimizer=restored.optimizer)
        return Beginning(
            run=Run(state=state, steps=steps, step=restored.step, counters=restored.train["counters"]),
            skips=tuple((first, count) for first, count in restored.train["skips"]),
            carried=source_assets(restored.directory),
        )
    carried: Assets = {}
    if parts.weights is not None:
        say(f"starting from the weights of {parts.weights.path}")
        params = parts.weights.load(abstract.params)
        # Only the first process writes them.
        carried = parts.weights.assets() if jax.process_index() == 0 else {}
    else:
        params = random_params(parts.model, abstract.params, seed=parts.config.seed)
    optimizer = init_optimizer(parts.transform, params, abstract.optimizer)
    return Beginning(
        run=Run(state=TrainState(params=params, optimizer=optimizer), steps=steps), carried=carried
    )


class TrainingRun:
    """One stretch of training in a run directory: from where the state is to the last step."""

    def __init__(
        self,
        parts: Parts,
        run_dir: epath.Path,
        beginning: Beginning,
        checkpointer: Checkpointer,
        *,
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
        self._checkpointer = checkpointer
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
        self._announce()
        if run.step >= config.steps:
            self._say(f"nothing to do: step {run.step} of {config.steps} is done; raise --steps to go on")
            return
        rows = process_rows(self._sharding, config.global_batch_size)
        shown: Any = contextlib.nullcontext()
        if jax.process_index() == 0:
            # Nothing of a run that is begun anew is kept, its evaluation before the first step neither.
            self._log = MetricsLog(self._run_dir, last_step=run.step or -1)
            shown = Progress(config.steps, "train", unit="step", initial=run.step)
        try:
            with shown as progress:
                listeners = self._hooks(progress)
                if run.step == 0 and self._parts.sets:
                    first: Row = {"step": 0}
                    for hook in listeners:
                        hook(run, first)
                run_loop(
                    run,
                    self._update(),
                    batches=self._batches.iterate(run.step, rows),
                    to_device=lambda batch: to_device(batch, rows, self._sharding, config.global_batch_size),
                    summarise=lambda metrics: summarise(metrics, self._parts.mixture.names),
                    hooks=listeners,
                )
            self._checkpointer.wait()
            self._finish()
        finally:
            if self._log is not None:
                self._log.close()

    def _update(self) -> Callable:
        """The jitted step: state sharded in and out in the same way, and donated."""
        config, parts = self._config, self._parts
        update = make_update(
            CausalLM(
                num_sources=len(parts.mixture.names),
                logits_bytes=LOGITS_BYTES_PER_DEVICE * batch_devices(parts.mesh),
            ),
            parts.bind,
            parts.transform,
            schedule=learning_rate_schedule(config.optimizer.schedule, config.steps),
            max_grad_norm=config.optimizer.max_grad_norm,
            microbatches=config.microbatches,
        )
        shardings = state_shardings(parts.abstract)
        return jax.jit(
            update,
            in_shardings=(shardings, None, self._sharding),
            out_shardings=(shardings, None),
            donate_argnums=0,
        )

    def _hooks(self, progress: Progress | None) -> list[Hook]:
        """In the order of their calls: a row is complete before it is written, and written before a save."""
        config, parts, run = self._config, self._parts, self._run
        stop = StopRequest()
        peak = peak_flops_per_second(jax.devices()[0].device_kind)
        chosen: list[Hook] = [
            hooks.Throughput(
                flops_per_token=flops_per_token(parts.model, config.sequence_length_tokens),
                peak_flops_per_second=peak and peak * len(jax.devices()),
            ),
            hooks.GuardNonFinite(config.logging.max_nonfinite_steps, self._batches.describe),
        ]
        if parts.sets:
            scorer = Scorer(
                parts.bind,
                parts.mesh,
                batch_size=config.evaluation.batch_size,
                row_length=config.sequence_length_tokens,
                eos_id=parts.tokenizer.eos_id,
            )
            chosen.append(
                hooks.Evaluate(
                    lambda params: evaluate_sets(scorer, params, parts.sets),
                    interval_steps=config.evaluation.interval_steps,
                    last_step=config.steps,
                )
            )
        if self._log is not None and progress is not None:
            log = self._log
            chosen += [
                hooks.Record(
                    log,
                    lambda row: self._show(progress, row),
                    interval_steps=config.logging.interval_steps,
                    last_step=config.steps,
                ),
                hooks.Plot(lambda: draw_plots(log.rows, self._run_dir / "plots"), last_step=config.steps),
            ]
        if self._profile:
            chosen.append(hooks.Profile(self._run_dir / "profile", first_step=run.step + 2))
        chosen += [
            hooks.Save(
                self._save,
                self._checkpointer.check,
                stop,
                interval_steps=config.checkpoints.interval_steps,
                last_step=config.steps,
            ),
            hooks.Stop(stop, self._checkpointer.wait),
        ]
        return chosen

    def _show(self, progress: Progress, row: Row) -> None:
        if line := news(row):
            progress.say(line)
        if row["step"] > 0:
            progress.update(1, note=progress_note(row))

    def _save(self, run: Run) -> None:
        self._checkpointer.save(
            run.step,
            params=run.state.params,
            optimizer=run.state.optimizer,
            train={"skips": [list(skip) for skip in self._skips], "counters": dict(run.counters)},
            assets=self._assets,
        )

    def _announce(self) -> None:
        """Before training: what will be trained, on what, from what."""
        config, parts = self._config, self._parts
        devices = jax.devices()
        shape = " x ".join(f"{axis} {size}" for axis, size in parts.mesh.shape.items())
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parts.abstract.params))
        tokens = config.global_batch_size * config.sequence_length_tokens
        self._say(
            f"{config.name}: {count:,} parameters on {len(devices)} {devices[0].device_kind} ({shape}), "
            f"{config.steps} steps of {tokens:,} tokens; run directory {self._run_dir}"
        )
        self._say(format_plan(plan_table(parts.mixture, steps=config.steps)))

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
                "seconds": time.time() - self._started,
            },
        )
        if table := evaluation_table(rows):
            self._say("\n" + table)
        self._say(f"\ncheckpoint  {newest}\nplots       {run_dir / 'plots'}\n\nnext:")
        if self._parts.sets:
            file = next(iter(self._config.evaluation.sets.values()))
            self._say(f"  python -m sealion_jax.evaluate {run_dir} --data {file} --output scores.json")
        self._say(f"  python -m sealion_jax.convert to-hf {run_dir} {run_dir / 'hf'}")
