"""What is set before JAX starts: the compiler's flags by name, for each kind of device, and a GPU's memory.

What XLA does by itself is right for one chip. Over many, collectives should run while something else
computes, and move no more than they have to; the sets say so to the compilers. Nothing here changes what is
computed, but for `deterministic`, which makes GPUs add up in one order.

Sources of the flags: the XLA repository's `xla/xla.proto`, JAX's "GPU performance tips" page, and libtpu's
own list. A name that a compiler does not know ends the process before it begins, so a test tries every flag.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from sealion_jax.config_tree import nearest
from sealion_jax.errors import UserError

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class FlagSet:
    """Flags that belong together."""

    purpose: str
    tpu: Mapping[str, str]
    """For LIBTPU_INIT_ARGS."""
    gpu: Mapping[str, str]
    """For XLA_FLAGS."""


FLAG_SETS: Mapping[str, FlagSet] = {
    "latency_hiding": FlagSet(
        purpose="starts collectives early and waits for them late, with computation in between",
        tpu={"xla_tpu_enable_latency_hiding_scheduler": "true"},
        gpu={"xla_gpu_enable_latency_hiding_scheduler": "true"},
    ),
    "async_collectives": FlagSet(
        purpose="lets gathers and reductions of weights run beside products, also across a loop's turns",
        tpu={
            "xla_tpu_enable_async_collective_fusion": "true",
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
            "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
            "xla_tpu_overlap_compute_collective_tc": "true",
            "xla_enable_async_all_gather": "true",
        },
        gpu={
            "xla_gpu_enable_pipelined_all_gather": "true",
            "xla_gpu_enable_pipelined_reduce_scatter": "true",
            "xla_gpu_enable_pipelined_all_reduce": "true",
            "xla_gpu_enable_while_loop_double_buffering": "true",
        },
    ),
    "no_collective_matmul": FlagSet(
        purpose="scatters a gradient after its product, instead of a ring of permutes that move it twice",
        tpu={"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
        gpu={},  # XLA has no such rings there by itself
    ),
    "large_collectives": FlagSet(
        purpose="joins the gathers of a layer into one message, for networks on which small ones are slow",
        tpu={},
        gpu={
            "xla_gpu_all_gather_combine_threshold_bytes": str(1024 * MIB),
            "xla_gpu_reduce_scatter_combine_threshold_bytes": str(512 * MIB),
            "xla_gpu_all_reduce_combine_threshold_bytes": str(512 * MIB),
        },
    ),
    "slices": FlagSet(
        purpose="overlaps the reduction of gradients between slices, over the data centre's network",
        tpu={
            "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
            "xla_tpu_data_parallel_opt_different_sized_ops": "true",
        },
        gpu={},
    ),
    "scoped_vmem": FlagSet(
        purpose="gives fusions 96 MiB of a TPU core's vector memory (a v6e has 128) instead of 16 or 32",
        tpu={"xla_tpu_scoped_vmem_limit_kib": "98304"},
        gpu={},
    ),
    "deterministic": FlagSet(
        purpose="lets GPUs use no operation that adds up in another order every time; TPUs never do",
        tpu={},
        gpu={"xla_gpu_exclude_nondeterministic_ops": "true"},
    ),
}

CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
GPU_MEMORY_VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
"""The part of a GPU's memory that JAX takes; 0.75 by itself."""
_SAME_AS_THAT = "XLA_CLIENT_MEM_FRACTION"
"""Its newer name; JAX refuses both together."""


@dataclass(frozen=True, kw_only=True)
class CompilerConfig:
    """Which sets of compiler flags a run has, see `compiler.FLAG_SETS`; on a CPU there are none."""

    flag_sets: tuple[str, ...] = ("latency_hiding", "no_collective_matmul", "deterministic")

    def __post_init__(self) -> None:
        for name in self.flag_sets:
            if name not in FLAG_SETS:
                close = nearest(name, list(FLAG_SETS))
                hint = f"did you mean {close[0]}? " if close else ""
                raise UserError(f"compiler.flag_sets: unknown {name!r}; {hint}known: {', '.join(FLAG_SETS)}")


def set_flags(config: CompilerConfig, environment: MutableMapping[str, str]) -> list[str]:
    """Adds the sets' flags to the environment, and gives those added; before JAX starts.

    A flag that the user has set there stays as it is.
    """
    added = []
    if find_spec("libtpu") is not None:
        added += _add(environment, "LIBTPU_INIT_ARGS", [FLAG_SETS[name].tpu for name in config.flag_sets])
    if _has_cuda():
        added += _add(environment, "XLA_FLAGS", [FLAG_SETS[name].gpu for name in config.flag_sets])
    return added


def set_gpu_memory(fraction: float, environment: MutableMapping[str, str]) -> None:
    """Has JAX take this part of a GPU's memory, where it can use one; before JAX starts.

    What the user has set stays as it is.
    """
    if _has_cuda() and not any(environment.get(name) for name in (GPU_MEMORY_VARIABLE, _SAME_AS_THAT)):
        environment[GPU_MEMORY_VARIABLE] = str(fraction)


def _has_cuda() -> bool:
    return any(find_spec(name) is not None for name in CUDA_PLUGINS)


def _add(
    environment: MutableMapping[str, str], variable: str, flags: Sequence[Mapping[str, str]]
) -> list[str]:
    there = environment.get(variable, "")
    known = {word.partition("=")[0] for word in there.split()}
    new = [f"--{name}={value}" for some in flags for name, value in some.items() if f"--{name}" not in known]
    environment[variable] = " ".join([*new, there]).strip()
    return new
