"""A checkpoint's scores of held-out sets: its weights are loaded, and let go of when all is scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jax.sharding import Mesh

from sealion_jax.checkpoint.weights import Weights
from sealion_jax.evaluation.perplexity import EvaluationSet, Score, Scorer
from sealion_jax.layout import layout_of
from sealion_jax.model.config import ComputeConfig
from sealion_jax.model.gemma3 import abstract_params, binder, parameter_axes, with_matrices_in
from sealion_jax.sharding import param_shardings, with_shardings


def score_checkpoint(
    weights: Weights,
    sets: Sequence[EvaluationSet],
    mesh: Mesh,
    *,
    compute: ComputeConfig,
    batch_size: int,
    context: int,
    eos_id: int,
    on_rows: Callable[[int], None],
) -> dict[str, list[Score]]:
    """The score of each document of each set, by the set's name.

    Args:
        compute: its dtype is the matrices' too.
        batch_size: rows of `context` tokens in a forward pass.
        on_rows: told how many more rows are done.
    """
    abstract = with_matrices_in(abstract_params(weights.config), compute.dtype)
    shardings = param_shardings(abstract, parameter_axes(weights.config), mesh)
    params = weights.load(with_shardings(abstract, shardings))
    bind = binder(weights.config, compute=compute, layout=layout_of(mesh))
    scorer = Scorer(bind, mesh, batch_size=batch_size, row_length=context, eos_id=eos_id)
    return {one.name: scorer.score(params, one, on_rows=on_rows) for one in sets}
