"""What a run's preferences are measured against: whose log-probabilities, found in a cache or computed."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath

from sealion_jax.checkpoint.hf_config import model_json
from sealion_jax.checkpoint.processes import on_first_process
from sealion_jax.checkpoint.weights import open_weights
from sealion_jax.cli import Progress
from sealion_jax.data import files
from sealion_jax.data.packing.examples import PackedExamples
from sealion_jax.data.store.references import REFERENCES, Kept, ReferenceCache
from sealion_jax.errors import Preempted, UserError
from sealion_jax.evaluation.pairs import PairReference
from sealion_jax.evaluation.perplexity import EvaluationSet, score_pairs
from sealion_jax.layout import layout_of
from sealion_jax.model.gemma3 import Gemma3, binder
from sealion_jax.recipe.inputs import store_fingerprint
from sealion_jax.run.beginning import Beginning
from sealion_jax.run.parts import Parts, make_scorer, open_reference
from sealion_jax.stopping import StopRequest
from sealion_jax.training.references import ReferenceModel, compute_references
from sealion_jax.training.state import abstract_weights, random_params

Say = Callable[[str], None]
Load = Callable[[], tuple[Callable[[Any], Gemma3], Any]]


def reference_fingerprint(parts: Parts, *, recorded: str | None) -> str | None:
    """What the reference's weights are known by; None where no loss has a use for a reference.

    Args:
        recorded: what a run that goes on began with: its weights need not be there any more.
    """
    if not parts.needs_reference:
        return None
    if recorded is not None:
        return recorded
    if parts.preferences.reference is not None:
        return open_reference(parts).fingerprint()
    if parts.adapters is not None:
        return parts.adapters.fingerprint
    if parts.weights is not None:
        # What the policy was read from: opened again, a run that trains on would have a newer step.
        return parts.weights.fingerprint()
    drawn = [parts.config.seed, model_json(parts.model).decode()]
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()


def with_references(
    parts: Parts,
    beginning: Beginning,
    *,
    run_dir: epath.Path,
    fingerprint: str,
    stop: StopRequest,
    say: Say,
    on_rows: Callable[[], None] = lambda: None,
) -> Parts:
    """The parts, with the reference's log-probabilities in every row.

    They are taken from beside the stores, or from the run directory where a store cannot be written. What is
    missing is computed now and kept there.

    Args:
        on_rows: called whenever more of them are computed.

    Raises:
        UserError: the reference is needed, and is not what the run began with.
        Preempted: the run was asked to stop; what is computed so far is kept.
    """
    load = functools.cache(lambda: _load(parts, beginning, fingerprint))
    model = functools.cache(
        lambda: ReferenceModel(
            *load(), parts.mesh, batch_size=parts.config.global_batch_size // parts.config.microbatches
        )
    )
    decides = {
        "weights": fingerprint,
        "tokenizer": parts.tokenizer.fingerprint,
        "sequence_length_tokens": str(parts.config.sequence_length_tokens),
        "compute_dtype": parts.config.compute.dtype,
    }
    sources = {
        name: rows
        for name, rows in zip(parts.mixture.names, parts.mixture.sources, strict=True)
        if isinstance(rows, PackedExamples)  # `build` refuses others
    }
    caches = {
        name: _caches(rows.store.path, run_dir, decides | _source_parts(rows))
        for name, rows in sources.items()
    }
    kept = {name: _read(caches[name], rows.store.num_documents) for name, rows in sources.items()}
    missing = [name for name, rows in sources.items() if _rows_done(kept[name]) < len(rows)]
    _tell_of_others({name: caches[name] for name in missing}, say)
    values = {name: found.values for name, found in kept.items() if found is not None}
    if missing:
        with contextlib.ExitStack() as ending:
            tell, show_rows = say, _nothing
            if jax.process_index() == 0:
                total = sum(len(sources[name]) for name in missing)
                progress = ending.enter_context(Progress(total, "reference log-probabilities", unit="row"))
                tell, show_rows = progress.say, progress.update
            moments = itertools.count()
            for name in missing:
                computed = compute_references(
                    model(),
                    sources[name],
                    kept[name],
                    keep=partial(_keep, caches[name], say=tell),
                    on_rows=partial(_note_rows, partial(show_rows, note=name), on_rows),
                    is_stopped=lambda: stop.requested(f"references {next(moments)}"),
                )
                if computed is None:
                    raise Preempted(
                        "asked to stop while the reference's log-probabilities were computed; run me again"
                    )
                values[name] = computed
    return dataclasses.replace(
        parts,
        mixture=parts.mixture.with_sources(
            [rows.with_pairs(references=values[name]) for name, rows in sources.items()]
        ),
        references={
            one.name: _of_held_out(parts, one, load, run_dir, decides)
            for one in parts.sets
            if one.kind == "pairs"
        },
    )


def _of_held_out(
    parts: Parts, one: EvaluationSet, load: Load, run_dir: epath.Path, decides: Mapping[str, str]
) -> PairReference:
    """What the reference gives a held-out set; kept in the run directory."""
    digest = hashlib.sha256()
    for document in one.documents:
        digest.update(np.asarray([len(document.tokens), *document.tokens], "<i8").tobytes())
    (cache,) = _caches(None, run_dir, {**decides, "held_out": digest.hexdigest()})
    kept = _read([cache], 2 * len(one.documents))
    if kept is None:
        bind, params = load()
        is_same = bind is parts.bind
        scorer = (
            parts.scorer
            if is_same
            else make_scorer(parts.config, bind, parts.mesh, eos_id=parts.tokenizer.eos_id)
        )
        scores = score_pairs(scorer, params, one)
        values = np.concatenate(
            [scores.chosen, scores.rejected, scores.chosen_tokens, scores.rejected_tokens]
        )
        kept = Kept(values.astype(np.float64), len(one.rows))
        if jax.process_index() == 0:
            cache.write(kept)
    chosen, rejected, chosen_tokens, rejected_tokens = np.split(kept.values, 4)
    return PairReference(
        chosen=chosen,
        rejected=rejected,
        chosen_tokens=chosen_tokens.astype(np.int64),
        rejected_tokens=rejected_tokens.astype(np.int64),
    )


def _load(parts: Parts, beginning: Beginning, fingerprint: str) -> tuple[Callable[[Any], Gemma3], Any]:
    """The reference, as the function that makes a model of its parameters, and those."""
    layout = layout_of(parts.mesh)
    path = parts.preferences.reference
    if path is None:
        if parts.config.lora is not None:
            # What the adapters stand on is the reference, at whatever step.
            bind = binder(parts.model, compute=parts.config.compute, layout=layout)
            return bind, beginning.run.state.frozen
        if beginning.run.step == 0:
            return parts.bind, beginning.run.state.params
        path = parts.config.init_from
        if path is None:
            return parts.bind, random_params(parts.model, parts.abstract.params, seed=parts.config.seed)
        weights = open_weights(path)
    else:
        weights = open_reference(parts)
    if weights.fingerprint() != fingerprint:
        raise UserError(
            f"the reference at {path} is not the one that this run began with, whose log-probabilities "
            "are not kept any more; put it back, or start a new run"
        )
    bind = binder(weights.config, compute=parts.config.compute, layout=layout)
    return bind, weights.load(abstract_weights(weights.config, parts.mesh))


def _note_rows(show: Callable[[int], None], on_rows: Callable[[], None], count: int) -> None:
    show(count)
    on_rows()


def _nothing(_count: int, *, note: str) -> None:
    """What processes but the first show of their progress."""


def _source_parts(rows: PackedExamples) -> dict[str, str]:
    """What of a source decides its numbers."""
    return {"store": store_fingerprint(rows.store.manifest), "too_long": rows.config.too_long}


def _caches(store: str | None, run_dir: epath.Path, decides: Mapping[str, str]) -> tuple[ReferenceCache, ...]:
    """Where numbers may be, the best place first: beside their store, and in the run directory."""
    folders = [str(run_dir)] if store is None else [store, str(run_dir)]
    return tuple(ReferenceCache(folder=files.join(folder, REFERENCES), parts=decides) for folder in folders)


def _read(caches: Sequence[ReferenceCache], count: int) -> Kept | None:
    """What is furthest of what the caches have, as the first process sees them."""

    def look() -> list[Any] | None:
        found = [kept for cache in caches if (kept := cache.read(count)) is not None]
        if not found:
            return None
        best = max(found, key=lambda kept: kept.rows_done)
        values = base64.b64encode(best.values.tobytes()).decode()
        return [best.rows_done, best.values.dtype.str, values]

    told = on_first_process(look)
    if told is None:
        return None
    rows_done, dtype, values = told
    return Kept(np.frombuffer(base64.b64decode(values), dtype), rows_done)


def _keep(caches: Sequence[ReferenceCache], kept: Kept, *, say: Say) -> None:
    """Keeps the numbers in the best place that can be written; says so if it is not beside the store."""
    if jax.process_index() != 0:
        return
    *others, last = caches
    for cache in others:
        try:
            cache.write(kept)
            return
        except Exception as error:  # a bucket's client raises errors of its own
            reason = getattr(error, "strerror", None) or error
            say(f"{cache.folder} cannot be written ({reason}); keeping them in {last.folder} instead")
    last.write(kept)


def _rows_done(kept: Kept | None) -> int:
    return 0 if kept is None else kept.rows_done


def _tell_of_others(missing: Mapping[str, Sequence[ReferenceCache]], say: Say) -> None:
    """Says of which sources numbers are kept that cannot be used, and what is different about them."""

    def look() -> dict[str, list[str]]:
        told = {}
        for name, caches in missing.items():
            different = [
                [part for part, value in cache.parts.items() if other.get(part) != value]
                for cache in caches
                for other in cache.others()
                if "held_out" not in other
                # The run directory has those of other sources too.
                and (cache is not caches[-1] or other.get("store") == cache.parts.get("store"))
            ]
            if different:
                told.setdefault(", ".join(min(different, key=len)).replace("_", " "), []).append(name)
        return told

    for different, names in on_first_process(look).items():
        say(
            f"the reference log-probabilities kept for {', '.join(names)} are of other {different}; "
            "computing them for this run"
        )
