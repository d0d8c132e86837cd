"""What depends on the kind of device: chips' speeds and sizes, and how exact a float32 matmul is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax

GPU_MEMORY_FRACTION = 0.9
"""Of a GPU's memory that programs may use, as `train` tells JAX; the rest is for NCCL and CUDA themselves."""


@dataclass(frozen=True, kw_only=True)
class Chip:
    """What is known of one accelerator chip; every rate is a peak that its maker publishes."""

    name: str
    """As the name of a topology begins with it: v5p, h100."""
    device_kinds: tuple[str, ...]
    """What JAX's `device_kind` starts with."""
    bf16_tflops: float
    """Dense matmuls of bfloat16 with float32 accumulation."""
    int8_tops: float | None
    """Dense matmuls of int8 with int32 accumulation; None where none is published."""
    fp8_tflops: float | None
    """Dense matmuls of float8 with float32 accumulation; None where it has none, and computes them in
    bfloat16."""
    hbm_gib: float
    """Memory that a program may use, less than is on the chip: for TPUs what the compiler allows, for GPUs
    `GPU_MEMORY_FRACTION` of it."""
    hbm_gb_per_s: float
    link_gb_per_s: float
    """One direction of one link to a neighbour (TPU), or of a GPU's NVLink to its node's switch."""
    network_gb_per_s: float
    """One direction of a chip's share of the network between slices (TPU) or nodes (GPU)."""
    network_taken_from: str | None = None
    """The chip whose number that is, where none is published of this one."""
    devices: int = 1
    """JAX devices that the chip is, each with an even part of all this."""
    torus_axes: int = 0
    """Directions in which a TPU has two links each; 0 for GPUs, which a switch joins."""
    ring_from: int = 0
    """A torus axis is closed into a ring where its length is a multiple of this, and a line elsewhere."""
    max_slice_chips: int | None = None
    """Of the largest slice of a TPU that one job can have."""
    max_side_chips: int | None = None
    """Along any direction of a slice, where that is bounded."""

    @property
    def hbm_bytes(self) -> float:
        """Bytes of memory that programs on the whole chip may use."""
        return self.hbm_gib * 2**30

    @property
    def flops_per_second(self) -> float:
        """Of the whole chip, in bfloat16."""
        return self.bf16_tflops * 1e12

    @property
    def eight_bits(self) -> dict[str, float]:
        """Operations a second of the whole chip in each kind of eight bits that it multiplies: int8, fp8."""
        rates = {"int8": self.int8_tops, "fp8": self.fp8_tflops}
        return {kind: rate * 1e12 for kind, rate in rates.items() if rate is not None}


# TPUs: FLOP/s, memory bandwidth and links from Google Cloud's pages on v4, v5e, v5p, v6e (Trillium) and TPU7x
# (Ironwood): docs.cloud.google.com/tpu/docs/<name>, "System architecture". They give the links' bandwidth per
# chip, once in one direction (v4 2400 Gb/s, v5e 1600, v6e 3200: 6, 4 and 4 links) and once in both (v5p and
# TPU7x 1200 GB/s: 6 links). Network: v5p 50 and TPU7x 100 Gb/s a chip from the page on TPU7x; v5e 6.4 and v6e
# 25.6 Tb/s for the 256 chips of a pod; of v4 nothing is published, and v5p's is taken. Memory: what libtpu
# 0.0.42 says is available when a program asks for too much; on the chip are 32, 16, 95, 32 and 192 GB. Rings:
# the pages on v4, v5p and TPU7x close axes of slices that are whole cubes of 4 x 4 x 4, those on v5e and v6e
# only axes of 16. Largest slices: the pods of these pages (16 x 16 chips of v5e and v6e), but of v5p's 8,960
# chips one job can have 6,144. Eight bits: the same pages (v4's int8 is no faster than bfloat16), but for
# v5p, whose 918 TOPS are from Google's announcement. The fp8 peaks that the page on TPU7x gives of v5p and
# v6e are those of bfloat16, in which they compute it; of TPU7x no int8 peak is published.
TPUS: tuple[Chip, ...] = (
    Chip(
        name="v4",
        device_kinds=("TPU v4",),
        bf16_tflops=275,
        int8_tops=275,
        fp8_tflops=None,
        hbm_gib=30.75,
        hbm_gb_per_s=1228,
        link_gb_per_s=50,
        network_gb_per_s=6.25,
        network_taken_from="v5p",
        torus_axes=3,
        ring_from=4,
        max_slice_chips=4096,
    ),
    Chip(
        name="v5e",
        device_kinds=("TPU v5 lite", "TPU v5e"),
        bf16_tflops=197,
        int8_tops=393,
        fp8_tflops=None,
        hbm_gib=15.75,
        hbm_gb_per_s=819,
        link_gb_per_s=50,
        network_gb_per_s=3.125,
        torus_axes=2,
        ring_from=16,
        max_slice_chips=256,
        max_side_chips=16,
    ),
    Chip(
        name="v5p",
        device_kinds=("TPU v5", "TPU v5p"),
        bf16_tflops=459,
        int8_tops=918,
        fp8_tflops=None,
        hbm_gib=95.74,
        hbm_gb_per_s=2765,
        link_gb_per_s=100,
        network_gb_per_s=6.25,
        torus_axes=3,
        ring_from=4,
        max_slice_chips=6144,
    ),
    Chip(
        name="v6e",
        device_kinds=("TPU v6 lite", "TPU v6e"),
        bf16_tflops=918,
        int8_tops=1836,
        fp8_tflops=None,
        hbm_gib=31.25,
        hbm_gb_per_s=1638,
        link_gb_per_s=100,
        network_gb_per_s=12.5,
        torus_axes=2,
        ring_from=16,
        max_slice_chips=256,
        max_side_chips=16,
    ),
    Chip(
        name="tpu7x",
        device_kinds=("TPU7x",),
        bf16_tflops=2307,
        int8_tops=None,
        fp8_tflops=4614,
        hbm_gib=2 * 94.75,
        hbm_gb_per_s=7380,
        link_gb_per_s=100,
        network_gb_per_s=12.5,
        devices=2,
        torus_axes=3,
        ring_from=4,
        max_slice_chips=9216,
    ),
)

# GPUs: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and of DGX B200 (an eighth of it), without
# sparsity; NVLink there counts both directions. Network: one adapter a GPU, as DGX A100 (200 Gb/s) and DGX
# H100, H200 and B200 (400 Gb/s) have it. Memory is a fraction of what is sold, in 10^9 bytes.
GPUS: tuple[Chip, ...] = (
    Chip(
        name="a100",
        device_kinds=("NVIDIA A100",),
        bf16_tflops=312,
        int8_tops=624,
        fp8_tflops=None,
        hbm_gib=GPU_MEMORY_FRACTION * 80e9 / 2**30,
        hbm_gb_per_s=2039,
        link_gb_per_s=300,
        network_gb_per_s=25,
    ),
    Chip(
        name="h100",
        device_kinds=("NVIDIA H100",),
        bf16_tflops=989,
        int8_tops=1979,
        fp8_tflops=1979,
        hbm_gib=GPU_MEMORY_FRACTION * 80e9 / 2**30,
        hbm_gb_per_s=3350,
        link_gb_per_s=450,
        network_gb_per_s=50,
    ),
    Chip(
        name="h200",
        device_kinds=("NVIDIA H200",),
        bf16_tflops=989,
        int8_tops=1979,
        fp8_tflops=1979,
        hbm_gib=GPU_MEMORY_FRACTION * 141e9 / 2**30,
        hbm_gb_per_s=4800,
        link_gb_per_s=450,
        network_gb_per_s=50,
    ),
    Chip(
        name="b200",
        device_kinds=("NVIDIA B200",),
        bf16_tflops=2250,
        int8_tops=4500,
        fp8_tflops=4500,
        hbm_gib=GPU_MEMORY_FRACTION * 180e9 / 2**30,
        hbm_gb_per_s=8000,
        link_gb_per_s=900,
        network_gb_per_s=50,
    ),
)


def chip_of_kind(device_kind: str, chips: Sequence[Chip] = (*TPUS, *GPUS)) -> Chip | None:
    """The chip whose devices are of this kind, by the longest match, or None where it is not known."""
    matching = [
        (len(kind), chip) for chip in chips for kind in chip.device_kinds if device_kind.startswith(kind)
    ]
    return max(matching, key=lambda match: match[0])[1] if matching else None


def peak_flops_per_second(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of one JAX device of this kind, or None where it is not known (a CPU, a new chip).

    A TPU7x chip is two devices.
    """
    chip = chip_of_kind(device_kind)
    return None if chip is None else chip.flops_per_second / chip.devices


def set_matmul_precision(dtype: str) -> None:
    """Has everything traced from now on multiply float32 matrices in float32, when that is the compute dtype.

    By itself JAX multiplies them as TF32 on NVIDIA's GPUs, and as bfloat16 on TPUs. It is set for the process
    and not around the model, because the backward rules of custom derivatives are traced after the model.
    With another compute dtype JAX's default is set back.
    """
    jax.config.update("jax_default_matmul_precision", "highest" if dtype == "float32" else None)
