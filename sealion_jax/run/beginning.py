"""Where a run goes on from: the recipe that its directory records, and its state, begun or restored."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from etils import epath

from sealion_jax import storage
from sealion_jax.checkpoint.digests import read_checked
from sealion_jax.checkpoint.hf_assets import SOURCE, UNTOUCHED_FILE
from sealion_jax.checkpoint.hf_config import read_model_json
from sealion_jax.checkpoint.layout import ASSETS, Assets, StepDirectories
from sealion_jax.checkpoint.orbax import Checkpointer, Restored
from sealion_jax.checkpoint.processes import all_lines
from sealion_jax.checkpoint.weights import MODEL_FILE, source_assets
from sealion_jax.config_tree import differences
from sealion_jax.data.batches import GlobalBatches
from sealion_jax.errors import UserError
from sealion_jax.model.config import Gemma3Config
from sealion_jax.objectives.preference_config import PreferenceConfig
from sealion_jax.recipe import (
    TrainConfig,
    check_resume,
    from_json,
    input_fingerprints,
    read_fingerprints,
    resolve_model,
    to_json,
)
from sealion_jax.run.parts import Parts, open_reference
from sealion_jax.training.loop import Run
from sealion_jax.training.spikes import SpikeFound, windowed
from sealion_jax.training.state import TrainState, init_optimizer, random_adapters, random_params

RECORD = "config.json"


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """Where a stretch of training begins."""

    run: Run
    skips: tuple[tuple[int, int], ...] = ()
    """(first, count) of the batches that the run has left out so far."""
    carried: Assets = field(default_factory=dict)
    """What every checkpoint carries along from the weights that the run once started from."""


def begin(parts: Parts, checkpointer: Checkpointer, say: Callable[[str], None]) -> Beginning:
    """The run at the step it goes on from: restored, or with fresh optimizer state."""
    abstract = parts.abstract
    return _begin(parts, checkpointer.restore_newest(abstract.params, abstract.optimizer), say)


def go_back(
    parts: Parts,
    beginning: Beginning,
    spike: SpikeFound,
    checkpointer: Checkpointer,
    say: Callable[[str], None],
) -> Beginning:
    """The run `spikes.back_steps` before the spike, or a bit further back, where it was saved.

    The batches from there to the spike's are left out: those of the last `back_steps` and its own.

    Args:
        beginning: of the stretch that led to the spike; its state is not needed any more.
    """
    abstract, config = parts.abstract, parts.config
    target = max(0, spike.step - 1 - config.spikes.back_steps)
    count = spike.step - target
    batches = GlobalBatches(
        parts.mixture, global_batch_size=config.global_batch_size, skips=beginning.skips
    ).with_skip(target, count)
    say(f"{spike}: going back {count - 1} steps and leaving out {count} batches, up to this one")
    times = beginning.run.counters["went_back"] + 1
    restored = checkpointer.go_back(abstract.params, abstract.optimizer, at_most=target)
    again = _begin(parts, restored, say)
    again.run.counters["went_back"] = times
    return dataclasses.replace(again, skips=batches.skips)


def _begin(parts: Parts, restored: Restored | None, say: Callable[[str], None]) -> Beginning:
    abstract, steps = parts.abstract, parts.config.steps
    if restored is not None:
        say(f"resuming after step {restored.step} ({restored.directory})")
        state = TrainState(
            params=restored.params,
            optimizer=restored.optimizer,
            frozen=_frozen(parts, say),
            losses=_losses(parts, restored.train.get("losses", [])),
        )
        run = Run(state=state, steps=steps, step=restored.step)
        run.counters |= {name: restored.train["counters"].get(name, 0) for name in run.counters}
        return Beginning(
            run=run,
            skips=tuple((first, count) for first, count in restored.train["skips"]),
            carried=source_assets(restored.directory),
        )
    frozen = _frozen(parts, say)
    if parts.config.lora is not None:
        params = random_adapters(parts.model, parts.config.lora, abstract.params, seed=parts.config.seed)
    elif parts.weights is not None:
        say(f"starting from the weights of {parts.weights.path}")
        params = parts.weights.load(abstract.params)
    else:
        params = random_params(parts.model, abstract.params, seed=parts.config.seed)
    optimizer = init_optimizer(parts.transform, params, abstract.optimizer)
    state = TrainState(params=params, optimizer=optimizer, frozen=frozen, losses=_losses(parts, []))
    return Beginning(run=Run(state=state, steps=steps), carried=_carried(parts))


def _losses(parts: Parts, losses: list[float]) -> Any:
    """The window of losses that spikes are told by, on the devices; None where none are looked for."""
    window = windowed(losses, parts.config.spikes)
    if window is None:
        return None
    return jax.make_array_from_callback(
        window.shape, parts.abstract.losses.sharding, lambda index: window[index]
    )


def kept_losses(state: TrainState) -> list[float]:
    """The losses that spikes are told by, oldest first, for a checkpoint."""
    if state.losses is None:
        return []
    return [loss for loss in np.asarray(state.losses).tolist() if not math.isnan(loss)]


def _frozen(parts: Parts, say: Callable[[str], None]) -> Any:
    """The weights that adapters stand on; None without LoRA."""
    if parts.config.lora is None or parts.weights is None:
        return None
    say(f"adapters stand on the weights of {parts.weights.path}")
    return parts.weights.load(parts.abstract.frozen)


def _carried(parts: Parts) -> Assets:
    """What of the weights that a run starts from goes into its checkpoints; only the first process writes."""
    if parts.weights is None or jax.process_index() != 0:
        return {}
    carried = parts.weights.assets()
    # A checkpoint of adapters is small, and needs its base anyway: what is large stays there.
    left = {f"{SOURCE}{UNTOUCHED_FILE}"} if parts.config.lora is not None else set()
    return {name: content for name, content in carried.items() if name not in left}


def recorded_model(run_dir: epath.Path) -> Gemma3Config | None:
    """The model of a run that has checkpoints: they hold all that is needed to go on."""
    directories = StepDirectories(run_dir)
    for step in reversed(directories.complete()):
        # One that is not as it was written is told when the run is restored.
        content = read_checked(directories[step], f"{ASSETS}/{MODEL_FILE}")
        if content is not None:
            return read_model_json(content)
    return None


def check_recorded(parts: Parts, run_dir: epath.Path, *, step: int | None) -> list[str]:
    """Refuses a run directory of another recipe; returns what of the recorded one is changed after `step`."""
    record = run_dir / RECORD
    if not record.exists():
        return []
    text = record.read_text()
    recorded = from_json(text)
    if recorded.model not in (None, parts.model):
        different = "; ".join(
            f"{path}: {theirs} in the checkpoints, {ours} in {RECORD}"
            for path, ours, theirs in differences(recorded.model, parts.model)
        )
        raise UserError(
            f"{record} was changed since the run began: its model is not that of the run's checkpoints "
            f"({different}). Put it back, or give another --run-dir to start anew"
        )
    return check_resume(
        resolve_model(recorded, parts.model),
        resolve_model(parts.config, parts.model),
        step=step,
        inputs=(
            read_fingerprints(text),
            _fingerprints(parts, reference=_moved_reference(recorded, parts)),
        ),
    )


def check_same_inputs(parts: Parts) -> None:
    """Refuses, on all processes alike, inputs that hold something else on one of them.

    Raises:
        UserError: names every such process and field.
    """
    own = json.dumps([jax.process_index(), _fingerprints(parts)])
    (_, usual), *others = [json.loads(line) for line in all_lines([own])]
    lines = [
        f"process {process} reads another {field} than process 0"
        for process, fingerprints in others
        for field in sorted({*usual, *fingerprints})
        if usual.get(field) != fingerprints.get(field)
    ]
    if lines:
        raise UserError(
            f"{'; '.join(lines)}. The paths are the same, so the files differ from machine to machine: copy "
            "them anew, or put them on storage that all machines share"
        )


def _moved_reference(recorded: TrainConfig, parts: Parts) -> str | None:
    """The fingerprint of a reference that has another path than the recorded one; None of the same one."""
    before, now = recorded.objective, parts.config.objective
    if not isinstance(before, PreferenceConfig) or not isinstance(now, PreferenceConfig):
        return None
    moved = None not in (before.reference, now.reference) and before.reference != now.reference
    return open_reference(parts).fingerprint() if moved else None


def _fingerprints(parts: Parts, *, reference: str | None = None) -> dict[str, str]:
    base = None if parts.adapters is None else parts.adapters.fingerprint
    return input_fingerprints(parts.tokenizer, parts.mixture, reference=reference, base=base)


def recorded_fingerprints(run_dir: epath.Path) -> dict[str, str]:
    """What the inputs of a run held when it began; nothing where it has not begun."""
    record = run_dir / RECORD
    return read_fingerprints(record.read_text()) if record.exists() else {}


def record(parts: Parts, run_dir: epath.Path, *, reference: str | None) -> None:
    """Writes the recipe that the run directory's steps are trained with from now on, and what it read.

    Args:
        reference: fingerprint of the weights that preferences are measured against.
    """
    text = to_json(
        resolve_model(parts.config, parts.model),
        fingerprints=_fingerprints(parts, reference=reference),
    )
    storage.write_whole(run_dir / RECORD, text.encode())
