"""What depends on the kind of device: peak matmul rates, and how exact a float32 matmul is."""

from __future__ import annotations

import jax

# Dense bf16 TFLOP/s of one JAX device, by the start of its `device_kind`, longest match first.
# Sources: Google Cloud TPU system architecture pages (v4, v5e, v5p, v6e, Ironwood per chip);
# NVIDIA data sheets of A100, H100 SXM, H200 SXM and B200, without sparsity.
PEAK_BF16_TFLOPS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "TPU7x": 2307.0,
    "NVIDIA A100": 312.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H200": 989.0,
    "NVIDIA B200": 2250.0,
}


def peak_flops_per_second(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of a device of this kind, or None where it is not known (a CPU, a new chip)."""
    matching = [kind for kind in PEAK_BF16_TFLOPS if device_kind.startswith(kind)]
    return PEAK_BF16_TFLOPS[max(matching, key=len)] * 1e12 if matching else None


def set_matmul_precision(dtype: str) -> None:
    """Has everything traced from now on multiply float32 matrices in float32, when that is the compute dtype.

    By itself JAX multiplies them as TF32 on NVIDIA's GPUs, and as bfloat16 on TPUs. It is set for the process
    and not around the model, because the backward rules of custom derivatives are traced after the model.
    With another compute dtype JAX's default is set back.
    """
    jax.config.update("jax_default_matmul_precision", "highest" if dtype == "float32" else None)
