"""Which fields of a recipe may change when a run goes on, as data, and the check.

The table of docs/recipes.md is checked against RESUME_RULES.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from sealion_jax.config_tree import differences
from sealion_jax.data.mixture import MixtureConfig, SourceConfig
from sealion_jax.errors import UserError
from sealion_jax.optimizer import learning_rate_schedule
from sealion_jax.recipe.config import TrainConfig

Inputs = tuple[Mapping[str, str], Mapping[str, str]]
"""Fingerprints (inputs.py) by field: those that were recorded, and those of now."""
NO_INPUTS: Inputs = ({}, {})


@dataclass(frozen=True, kw_only=True)
class ResumeRule:
    """What holds for a field of TrainConfig and all below it, unless a longer path has its own rule."""

    field: str
    may_change: bool
    why: str


RESUME_RULES = (
    ResumeRule(field="name", may_change=False, why="it says which run this is"),
    ResumeRule(
        field="tokenizer", may_change=False, why="token ids would mean other text; the same may lie elsewhere"
    ),
    ResumeRule(field="model", may_change=False, why="the saved weights have these shapes"),
    ResumeRule(
        field="init_from",
        may_change=False,
        why="the run began with these weights; with `lora` the same may lie elsewhere",
    ),
    ResumeRule(field="lora", may_change=False, why="the saved adapters are of this rank, scale and targets"),
    ResumeRule(field="objective", may_change=False, why="losses before and after would not compare"),
    ResumeRule(
        field="objective.reference",
        may_change=False,
        why="the run compares with these weights; the same may lie elsewhere",
    ),
    ResumeRule(field="seed", may_change=False, why="the run began with these weights"),
    ResumeRule(field="data", may_change=False, why="a global batch is a function of the recipe and its step"),
    ResumeRule(
        field="data.sources",
        may_change=False,
        why="only new ones may be added, after the others, for later stages: with weight 0 up to now; "
        "a store may lie elsewhere",
    ),
    ResumeRule(
        field="data.stages",
        may_change=True,
        why="from the current step on: a stage that has begun stays as it was",
    ),
    ResumeRule(field="data.cache", may_change=True, why="only where blocks are kept changes"),
    ResumeRule(
        field="sequence_length_tokens",
        may_change=False,
        why="windows are cut from the stores by their length",
    ),
    ResumeRule(
        field="global_batch_size", may_change=False, why="a step's place in the data is counted in rows"
    ),
    ResumeRule(
        field="steps",
        may_change=True,
        why="more steps, or fewer, but not fewer than are done; a schedule is read with the new number",
    ),
    ResumeRule(field="microbatches", may_change=True, why="the parts add up to the same global batch"),
    ResumeRule(field="rows_per_device", may_change=True, why="the parts add up to the same global batch"),
    ResumeRule(field="mesh", may_change=True, why="checkpoints are restored onto any mesh"),
    ResumeRule(field="compute", may_change=True, why="changes memory and speed only"),
    ResumeRule(field="compute.dtype", may_change=False, why="losses before and after would not compare"),
    ResumeRule(
        field="compute.quantization", may_change=True, why="from the current step on; losses move a bit"
    ),
    ResumeRule(field="compiler", may_change=True, why="changes speed only"),
    ResumeRule(
        field="optimizer", may_change=False, why="the saved moments were gathered with these constants"
    ),
    ResumeRule(
        field="optimizer.schedule",
        may_change=True,
        why="for a new cooldown, or another tail; told if steps already done had another learning rate",
    ),
    ResumeRule(field="spikes", may_change=True, why="from the current step on"),
    ResumeRule(field="checkpoints", may_change=True, why="only what is kept changes"),
    ResumeRule(field="evaluation", may_change=True, why="only what is measured changes"),
    ResumeRule(field="samples", may_change=True, why="only what is shown changes"),
    ResumeRule(field="logging", may_change=True, why="only what is written down changes"),
    ResumeRule(field="watch", may_change=True, why="only when a run is taken to be hung changes"),
    ResumeRule(field="run_dir", may_change=True, why="a run directory may be moved"),
)


def rule_of(path: str, rules: Sequence[ResumeRule] = RESUME_RULES) -> ResumeRule:
    """The rule for a dotted path: the one with the longest field that the path begins with."""
    fitting = [rule for rule in rules if f"{path}.".startswith(f"{rule.field}.")]
    if not fitting:
        raise LookupError(f"no rule says whether {path} may change on resume")
    return max(fitting, key=lambda rule: len(rule.field))


def check_resume(
    old: TrainConfig, new: TrainConfig, *, step: int | None = None, inputs: Inputs = NO_INPUTS
) -> list[str]:
    """Lines that tell what changes with this resume; empty when nothing does.

    Args:
        old: what the run directory's config.json has.
        new: what was asked for now.
        step: steps done so far; None where that is not known, and then no stage may change.
        inputs: what the inputs of `old` and of `new` hold: one that holds the same may lie elsewhere, and one
            that holds something else is refused although its path is the same.

    Raises:
        UserError: something changes that must not; lists every such field with its old and new value. Or more
            steps are done than are wanted now.
    """
    changes = list(differences(old, new))
    accepted, refused = [], _exchanged(inputs, {path for path, _, _ in changes})
    for path, before, after in changes:
        rule = rule_of(path)
        allowed = rule.may_change
        if rule.field == "data.stages":
            allowed = step is not None and _begun(old.data, step) == _begun(new.data, step)
        elif rule.field == "data.sources":
            allowed = isinstance(after, SourceConfig) and before is None and not _has_share(new.data, after)
        allowed = allowed or _holds_the_same(inputs, path)
        line = f"{path}: {_shown(before)} -> {_shown(after)}"
        (accepted if allowed else refused).append(line if allowed else f"{line} ({rule.why})")
    if refused:
        raise UserError(
            "this run directory belongs to another recipe; these fields must not change on resume:\n  "
            + "\n  ".join(refused)
            + "\nSet them back to go on with that run, or start a new one with another --run-dir"
        )
    if step is not None and new.steps < step:
        raise UserError(
            f"steps is {new.steps}, but this run has done {step} already; set --steps to {step} or more, or "
            "start a new run with another --run-dir"
        )
    return accepted + _other_rates(old, new, step=step or 0)


def _other_rates(old: TrainConfig, new: TrainConfig, *, step: int) -> list[str]:
    """A line if steps that are done would have had another learning rate."""
    if (old.optimizer.schedule, old.steps) == (new.optimizer.schedule, new.steps):
        return []
    numbers = jnp.arange(step)
    before, after = (
        np.asarray(learning_rate_schedule(config.optimizer.schedule, config.steps)(numbers))
        for config in (old, new)
    )
    different = np.flatnonzero(before != after)
    if not len(different):
        return []
    same = int(different[0])
    remedy = f"checkpoint {same} or one before it" if same else "none but the run's beginning"
    return [
        f"warning: with this schedule step {same + 1} would have had the learning rate {after[same]:.3g}, "
        f"and it was done with {before[same]:.3g}: what follows is not what an uninterrupted run would give. "
        f"That would be so from {remedy} only"
    ]


def _holds_the_same(inputs: Inputs, path: str) -> bool:
    """Whether the field names an input that has only been moved."""
    before, after = inputs
    return path in before and before[path] == after.get(path)


def _exchanged(inputs: Inputs, moved: Collection[str]) -> list[str]:
    """A line for each input that is where it was, and holds something else."""
    before, after = inputs
    return [
        f"{path}: what lies there is not what the run began with ({rule_of(path).why})"
        for path in before
        if path not in moved and before[path] != after.get(path, before[path])
    ]


def _begun(data: MixtureConfig, step: int) -> tuple[Any, ...]:
    """The stages that steps before `step` were drawn from."""
    return tuple(stage for stage in data.stages if stage.start_step < step)


def _has_share(data: MixtureConfig, source: SourceConfig) -> bool:
    """Whether the source gives anything before the first stage; stages that have begun are compared whole."""
    from_stages = bool(data.stages) and data.stages[0].start_step == 0
    return not from_stages and (source.weight != 0 and source.multiplier != 0)


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
