"""What the forward pass keeps for the backward pass, by the names of the tensors.

What is not kept is computed again. `ComputeConfig.remat` says of how many layers at a time only the input
stays; `keep` and `offload` name tensors inside them that stay all the same, on the device or in the host's
memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from sealion_jax.layout import GATHERED_WEIGHT
from sealion_jax.model.config import ATTENTION, ComputeConfig
from sealion_kernels.softmax import ATTENTION_RESIDUALS


def policy(compute: ComputeConfig) -> Callable[..., Any] | None:
    """The policy for `jax.checkpoint` around layers that are computed again together; None keeps nothing."""
    policies = jax.checkpoint_policies
    if compute.remat == "none":
        return policies.save_anything_except_these_names(GATHERED_WEIGHT)
    kept, offloaded = _tensors(compute.keep), _tensors(compute.offload)
    if offloaded:
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=kept,
            names_which_can_be_offloaded=offloaded,
            offload_src="device",
            offload_dst="pinned_host",
        )
    named = policies.save_only_these_names(*kept)
    if compute.remat == "dots":
        named = policies.save_only_these_names(*kept, *ATTENTION_RESIDUALS)
        return policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, named)
    return named if kept else None


def _tensors(names: tuple[str, ...]) -> list[str]:
    """The names as the tensors have them: attention's result goes with its log-sum-exp."""
    spread = [ATTENTION_RESIDUALS if name == ATTENTION else (name,) for name in names]
    return [name for some in spread for name in some]
