"""The hooks of a run, put together from its recipe: what happens beside training, and in which order."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence

import jax
from etils import epath

from sealion_jax.checkpoint.orbax import Checkpointer
from sealion_jax.cli import Progress
from sealion_jax.data.batches import GlobalBatches
from sealion_jax.evaluation.perplexity import evaluate_sets
from sealion_jax.generation.samples import Sampler, SamplesLog, ShowSamples
from sealion_jax.goodput import Ledger
from sealion_jax.hardware import peak_flops_per_second
from sealion_jax.metrics import MetricsLog, Row
from sealion_jax.model.flops import flops_per_token
from sealion_jax.run.parts import Parts
from sealion_jax.stopping import StopRequest
from sealion_jax.training import hooks
from sealion_jax.training.loop import Hook, Run
from sealion_jax.training.plots import draw_plots
from sealion_jax.training.report import news, progress_note
from sealion_jax.watching import Activity

Output = tuple[MetricsLog, Progress, SamplesLog | None]
"""Where the first process writes and shows rows, and writes samples if the recipe has prompts."""


def assemble(
    parts: Parts,
    *,
    plots: epath.Path,
    output: Output | None,
    sync: Callable[[], None],
    save: Callable[[Run], None],
    checkpointer: Checkpointer,
    stop: StopRequest,
    show_batch: Callable[[int], str],
    profile: hooks.Profile | None,
    activity: Activity,
    ledger: Ledger,
) -> list[Hook]:
    """In the order of their calls.

    A row is complete before it is written, and written before the state is saved or the run is ended; nothing
    that may fail and is not needed to go on comes before the save.

    Args:
        plots: the folder to draw into.
        output: None in all processes but the first.
        sync: has all rows up to now in the run directory, before the state is saved.
        show_batch: what to say of the batch of a step, counted from 0, when its loss is not finite.
    """
    config = parts.config
    chosen: list[Hook] = [hooks.NoteStep(activity.finished_step)]
    if output is not None:
        chosen.append(hooks.Goodput(ledger))
    chosen += [_throughput(parts), hooks.CountSkipped()]
    if parts.sets:
        chosen.append(_evaluate(parts, activity))
    if config.samples.prompts:
        chosen.append(_samples(parts, None if output is None else output[2], activity))
    if output is not None:
        log, progress, _ = output
        chosen.append(
            hooks.Record(
                log,
                lambda row: _show(progress, row),
                interval_steps=config.logging.interval_steps,
                last_step=config.steps,
            )
        )
    if config.spikes.action == "go_back":
        chosen.append(hooks.GuardSpikes(config.spikes.most_times))
    chosen += [
        hooks.GuardNonFinite(config.logging.max_nonfinite_steps, show_batch),
        hooks.Save(
            save,
            checkpointer.check,
            sync=sync,
            stop=stop,
            interval_steps=config.checkpoints.interval_steps,
            last_step=config.steps,
        ),
    ]
    if profile is not None:
        chosen.append(profile)
    if output is not None:
        rows = output[0].rows
        chosen.append(hooks.Plot(lambda: draw_plots(rows, plots), last_step=config.steps))
    return [*chosen, hooks.Stop(stop, activity.noted("finishing the last save", checkpointer.wait))]


def batch_note(batches: GlobalBatches, step: int, *, command: Sequence[str], run_dir: epath.Path) -> str:
    """A step's batch in words, and the command that shows its text.

    Args:
        step: counted from 0.
        command: recipe and overrides, as `train` was given them.
    """
    words = ["python", "-m", "sealion_jax.preview", *command, "--step", str(step)]
    if batches.skips:
        words += ["--run-dir", str(run_dir)]
    return f"{batches.describe(step)}\n\n  {shlex.join(words)}"


def _throughput(parts: Parts) -> hooks.Throughput:
    devices = jax.devices()
    peak = peak_flops_per_second(devices[0].device_kind)
    return hooks.Throughput(
        flops_per_token=flops_per_token(
            parts.model, parts.config.sequence_length_tokens, frozen=parts.config.lora is not None
        ),
        peak_flops_per_second=peak and peak * len(devices),
    )


def _evaluate(parts: Parts, activity: Activity) -> hooks.Evaluate:
    config = parts.config
    return hooks.Evaluate(
        activity.noted(
            "evaluating", lambda params: evaluate_sets(parts.scorer, params, parts.sets, parts.references)
        ),
        interval_steps=config.evaluation.interval_steps,
        last_step=config.steps,
    )


def _samples(parts: Parts, log: SamplesLog | None, activity: Activity) -> ShowSamples:
    config = parts.config
    sampler = Sampler(
        parts.bind, parts.mesh, model=parts.model, tokenizer=parts.tokenizer, config=config.samples
    )
    return ShowSamples(
        activity.noted("sampling", sampler),
        (lambda step, samples: None) if log is None else log.append,
        interval_steps=config.samples.interval_steps,
        last_step=config.steps,
    )


def _show(progress: Progress, row: Row) -> None:
    if line := news(row):
        progress.say(line)
    if row["step"] > 0:
        progress.update(1, note=progress_note(row))
