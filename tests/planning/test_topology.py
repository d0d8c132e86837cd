"""Pods by name, and names that are none."""

from __future__ import annotations

import pytest

from sealion_jax.errors import UserError
from sealion_jax.hardware import chip_of_kind, peak_flops_per_second
from sealion_jax.planning.topology import check_slices, parse_topology
from sealion_jax.sharding import MeshConfig


@pytest.mark.parametrize(
    ("name", "slices", "chips", "devices"),
    [
        ("v5p:4x4x4", 1, 64, 64),
        ("v5e:16x16", 1, 256, 256),
        ("v6e:16x16", 2, 512, 512),
        ("tpu7x:4x4x4", 1, 64, 128),
        ("v5p:16x16x24", 1, 6144, 6144),
        ("v5e:16x16", 4, 1024, 1024),
        ("v4:2x2x1", 1, 4, 4),
        ("h200:4x8", 1, 32, 32),
    ],
)
def test_names_of_pods(name, slices, chips, devices):
    pod = parse_topology(name, num_slices=slices)
    assert (pod.num_chips, pod.num_devices) == (chips, devices)
    assert pod.is_tpu == (not name.startswith("h"))


@pytest.mark.parametrize(
    ("name", "slices", "message"),
    [
        ("v5x:4x4", 1, "unknown chip 'v5x'.*did you mean v5[pe].*Known: v4, v5e, v5p, v6e, tpu7x, a100"),
        ("v5p", 1, "expected the chip and its numbers"),
        ("v5p:4x0x4", 1, "expected the chip and its numbers"),
        ("v5p:4x4", 1, "joined in 3 directions.*v5p:4x4x4"),
        ("v5e:4x4x4", 1, "joined in 2 directions.*v5e:4x4"),
        ("v5e:32x32", 1, "1,024 chips.*largest of v5e.* 256;.*--num-slices 4 or more"),
        ("v5e:8x32", 1, "32 chips along one direction.*16;.*within v5e:16x16.*--num-slices"),
        ("v6e:16x32", 1, "512 chips.*largest of v6e.* 256;.*--num-slices 2"),
        ("v5p:32x32x32", 1, "32,768 chips.*largest of v5p.* 6,144;.*--num-slices 6"),
        ("v5p:16x20x28", 1, "8,960 chips.*largest of v5p.* 6,144"),
        ("v4:16x16x20", 1, "largest of v4.* 4,096"),
        ("tpu7x:16x16x40", 1, "largest of tpu7x.* 9,216"),
        ("h100:8", 1, "nodes x GPUs"),
        ("h100:8x8", 2, "--num-slices is for TPUs"),
        ("v5p:4x4x4", 0, "--num-slices is 0"),
    ],
)
def test_names_that_are_refused(name, slices, message):
    with pytest.raises(UserError, match=message):
        parse_topology(name, num_slices=slices)


def test_only_data_crosses_slices():
    pod = parse_topology("v5e:4x4", num_slices=2)
    check_slices(MeshConfig(data=2, fsdp=16), pod)
    check_slices(MeshConfig(data=4, fsdp=8), pod)
    with pytest.raises(UserError, match=r"multiple of the slices.*--mesh.data 2"):
        check_slices(MeshConfig(data=1, fsdp=32), pod)


def test_peaks_of_devices():
    """A TPU7x chip of 2,307 TFLOP/s is two devices; the longest name wins; a CPU has no peak."""
    assert peak_flops_per_second("TPU7x") == 2307e12 / 2
    assert peak_flops_per_second("TPU v5") == 459e12
    assert peak_flops_per_second("TPU v5 lite") == 197e12
    assert peak_flops_per_second("TPU v4") == 275e12
    assert peak_flops_per_second("NVIDIA H200") == 989e12
    assert peak_flops_per_second("cpu") is None
    chip = chip_of_kind("NVIDIA H100 80GB HBM3")
    assert chip is not None
    assert chip.name == "h100"
