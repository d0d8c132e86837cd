"""The reference's log-probabilities of all pairs of a source: computed once, in the rows of training."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sealion_jax.data.packing.examples import PackedExamples
from sealion_jax.data.store.references import Kept
from sealion_jax.model.gemma3 import Gemma3
from sealion_jax.objectives.base import Batch
from sealion_jax.objectives.preference import reference_log_probs
from sealion_jax.sharding import batch_sharding, process_rows, replicated, to_device

SECONDS_BETWEEN_KEEPS = 60.0


class ReferenceModel:
    """A model on a mesh that gives the log-probabilities of a batch's answers; compiled once.

    It does what the training step does to the policy, on the same rows: where the two models are the same,
    so are the numbers, but for what the compiler rounds differently in two programs.
    """

    def __init__(self, bind: Callable[[Any], Gemma3], params: Any, mesh: Mesh, *, batch_size: int) -> None:
        """
        Args:
            batch_size: rows of a forward pass, a multiple of the devices that the batch is split over.
        """
        self.batch_size = batch_size
        self._params = params
        self._sharding = batch_sharding(mesh)
        self._rows = process_rows(self._sharding, batch_size)

        def log_probs(params: Any, batch: Batch) -> dict[str, jax.Array]:
            return reference_log_probs(bind(params), batch)

        self._log_probs = jax.jit(log_probs, out_shardings=replicated(mesh))

    def __call__(self, rows: PackedExamples, windows: list[int]) -> Mapping[str, np.ndarray]:
        """`reference_chosen` and `reference_rejected` [batch_size, places], on every process."""
        mine = [rows.row(windows[k]) for k in self._rows]
        batch = {name: np.stack([row[name] for row in mine]) for name in mine[0]}
        return jax.device_get(
            self._log_probs(self._params, to_device(batch, self._rows, self._sharding, self.batch_size))
        )


def compute_references(
    model: ReferenceModel,
    rows: PackedExamples,
    kept: Kept | None,
    *,
    keep: Callable[[Kept], None],
    on_rows: Callable[[int], None],
    is_stopped: Callable[[], bool],
) -> np.ndarray | None:
    """The log-probability of each document of the store, float32, nan for those that no row has.

    None if it is stopped before the end.

    Args:
        kept: what was computed before.
        keep: called about once a minute, and at the end, with all that there is by then.
        on_rows: told how many more rows are done.
        is_stopped: asked after every batch; what there is by then is kept.
    """
    values = np.full(rows.store.num_documents, np.nan, np.float32) if kept is None else kept.values.copy()
    done = 0 if kept is None else kept.rows_done
    on_rows(done)
    kept_at = time.monotonic()
    while done < len(rows):
        stop = min(done + model.batch_size, len(rows))
        # The last batch is filled up with its last row.
        windows = [min(window, len(rows) - 1) for window in range(done, done + model.batch_size)]
        numbers = model(rows, windows)
        for k, window in enumerate(windows[: stop - done]):
            documents = rows.documents(window)
            pairs = len(documents) // 2
            values[documents[0::2]] = numbers["reference_chosen"][k, :pairs]
            values[documents[1::2]] = numbers["reference_rejected"][k, :pairs]
        on_rows(stop - done)
        done = stop
        # The question is not put in vain: several processes get a yes only once.
        stopped = done < len(rows) and is_stopped()
        if stopped or done == len(rows) or time.monotonic() - kept_at > SECONDS_BETWEEN_KEEPS:
            keep(Kept(values, done))
            kept_at = time.monotonic()
        if stopped:
            return None
    return values
