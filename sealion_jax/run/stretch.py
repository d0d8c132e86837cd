"""One stretch of training: from where the state is, to the last step or to a spike that is gone back from."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
from etils import epath

from sealion_jax.checkpoint.hf_assets import CHAT_TEMPLATE_FILE
from sealion_jax.checkpoint.hf_config import model_json
from sealion_jax.checkpoint.layout import Assets
from sealion_jax.checkpoint.lora import LORA_FILE
from sealion_jax.checkpoint.orbax import Checkpointer
from sealion_jax.checkpoint.weights import MODEL_FILE, TOKENIZER_FILE
from sealion_jax.cli import Progress
from sealion_jax.data.batches import GlobalBatches
from sealion_jax.data.chat.template import CHAT_TEMPLATE
from sealion_jax.data.plan import examples_table
from sealion_jax.generation.samples import SamplesLog
from sealion_jax.goodput import Ledger, account, goodput
from sealion_jax.goodput import table as goodput_table
from sealion_jax.metrics import MetricsLog, Row
from sealion_jax.mirror import Mirror
from sealion_jax.run.announcements import next_commands, opening
from sealion_jax.run.beginning import Beginning, kept_losses
from sealion_jax.run.hooks import assemble, batch_note
from sealion_jax.run.parts import Parts
from sealion_jax.sharding import batch_sharding, process_rows, to_device
from sealion_jax.stopping import StopRequest
from sealion_jax.training.hooks import Profile
from sealion_jax.training.loop import Hook, Run, Update
from sealion_jax.training.loop import train as run_loop
from sealion_jax.training.report import evaluation_table, summarise, write_summary
from sealion_jax.training.spikes import SpikeFound
from sealion_jax.training.state import TrainState
from sealion_jax.watching import Activity

Say = Callable[[str], None]


class Stretch:
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
            self._ledger.found_nothing_to_do()
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
            if run.step == 0 and (self._parts.sets or config.samples.prompts):
                first: Row = {"step": 0}
                for hook in listeners:
                    hook(run, first)
            run_loop(
                run,
                self._activity.stepping(self._update),
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
            save=self._activity.noted("saving", self._save),
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
