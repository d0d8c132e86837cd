"""How long a collective takes on a torus, a chip of two devices, slices and nodes: by hand."""

from __future__ import annotations

import pytest

from sealion_jax.planning.network import Place, gpu_places, group_along, path_of, seconds
from sealion_jax.planning.topology import parse_topology

GB = 1e9


def torus(topology, *, devices=1):
    """Places of a TPU pod's devices, the last direction fastest."""
    x, y, *z = topology.shape
    return [
        Place(part, (i, j, k))
        for part in range(topology.num_slices)
        for i in range(x)
        for j in range(y)
        for k in range(*(z or [1]))
        for _ in range(devices)
    ]


def test_all_of_a_v5p_cube_is_three_rings():
    """A chip receives over two links in each of three directions: 6 x 100 GB/s."""
    pod = parse_topology("v5p:4x4x4")
    path = path_of(range(64), torus(pod), pod)
    assert (path.slices, path.inside, path.gb_per_s) == (1, 64, 600)
    assert seconds("all-gather", 64 * GB, path, pod) == pytest.approx((63 / 600, 0))
    assert seconds("reduce-scatter", 64 * GB, path, pod) == pytest.approx((63 / 600, 0))
    assert seconds("all-reduce", 64 * GB, path, pod) == pytest.approx((2 * 63 / 600, 0))


def test_a_line_of_the_torus():
    pod = parse_topology("v5p:4x4x4")
    assert path_of(range(4), torus(pod), pod).gb_per_s == 200  # along the last direction: a ring
    assert path_of([0, 1], torus(pod), pod).gb_per_s == 100  # half of it is none
    assert path_of(range(16), torus(pod), pod).gb_per_s == 400


def test_small_slices_have_no_rings():
    """A v5e axis is closed at 16 chips; v5p's close only in whole cubes."""
    assert parse_topology("v5e:4x4").rings == (False, False)
    assert parse_topology("v5e:8x16").rings == (False, True)
    assert parse_topology("v5p:2x4x4").rings == (False, False, False)
    assert parse_topology("v5p:4x4x8").rings == (True, True, True)
    pod = parse_topology("v5e:4x4")
    assert path_of(range(16), [Place(0, (i // 4, i % 4, 0)) for i in range(16)], pod).gb_per_s == 100


def test_two_devices_of_a_chip_share_its_links():
    """Over all of them what comes in is for both; where only one of each chip takes part, it comes twice."""
    pod = parse_topology("tpu7x:4x4x4")
    places = torus(pod, devices=2)
    together, alone = path_of(range(128), places, pod), path_of(range(0, 128, 2), places, pod)
    assert (together.gb_per_s, together.sharing) == (600, 1)
    assert (alone.gb_per_s, alone.sharing) == (600, 2)
    assert path_of([0, 1], places, pod).gb_per_s == 600  # on the chip itself


def test_slices_exchange_what_a_device_holds():
    """An all-reduce over two slices of 64: each device does a 64th of it on the network."""
    pod = parse_topology("v5p:4x4x4", num_slices=2)
    path = path_of(range(128), torus(pod), pod)
    assert (path.slices, path.inside) == (2, 64)
    links, network = seconds("all-reduce", 64 * GB, path, pod)
    assert links == pytest.approx(2 * 63 / 600)
    assert network == pytest.approx(2 * 1 * (1 / 2) / 6.25)
    assert seconds("all-reduce", GB, path_of([0, 64], torus(pod), pod), pod) == pytest.approx((0, 1 / 6.25))


def test_a_permute_takes_one_link():
    """Each device sends to one neighbour, in one direction, however many links the group has."""
    pod = parse_topology("v5p:4x4x4")
    path = path_of(range(64), torus(pod), pod)
    assert seconds("collective-permute", GB, path, pod) == pytest.approx((1 / 100, 0))
    nodes = parse_topology("h100:4x8")
    inside = path_of(range(8), gpu_places(nodes), nodes)
    assert seconds("collective-permute", GB, inside, nodes) == pytest.approx((1 / 450, 0))
    whole = parse_topology("tpu7x:4x4x4")
    places = torus(whole, devices=2)
    ring, alone, pair = (path_of(some, places, whole) for some in (range(128), range(0, 128, 2), [0, 1]))
    assert seconds("collective-permute", GB, ring, whole) == pytest.approx((1 / 100, 0))
    # Both devices of a chip send over the link to the next chip.
    assert seconds("collective-permute", GB, alone, whole) == pytest.approx((2 / 100, 0))
    assert seconds("collective-permute", GB, pair, whole) == pytest.approx((1 / 600, 0))  # on the chip


def test_a_permute_between_slices_takes_the_network():
    """Some pair is in two slices, and sends all of its array over one chip's share."""
    pod = parse_topology("v5p:4x4x4", num_slices=2)
    for group in (range(128), [0, 64]):
        path = path_of(group, torus(pod), pod)
        assert seconds("collective-permute", GB, path, pod) == pytest.approx((0, 1 / 6.25))
    pod = parse_topology("tpu7x:4x4x4", num_slices=2)
    path = path_of([0, 128], torus(pod, devices=2), pod)
    assert seconds("collective-permute", GB, path, pod) == pytest.approx((0, 2 / 12.5))


def test_gpus_by_nodes():
    pod = parse_topology("h100:4x8")
    places = gpu_places(pod)
    inside, across = path_of(range(8), places, pod), path_of(range(32), places, pod)
    assert (inside.slices, inside.inside, inside.gb_per_s) == (1, 8, 450)
    assert seconds("all-gather", 8 * GB, inside, pod) == pytest.approx((7 / 450, 0))
    # 32 GB: 7/8 of it over NVLink, and of a GPU's eighth three quarters come from other nodes.
    assert seconds("all-gather", 32 * GB, across, pod) == pytest.approx((28 / 450, 3 / 50))


def test_groups_along_axes():
    shape = {"data": 2, "fsdp": 3, "tensor": 2}
    assert group_along(("tensor",), shape) == [0, 1]
    assert group_along(("fsdp",), shape) == [0, 2, 4]
    assert group_along(("data", "tensor"), shape) == [0, 1, 6, 7]
