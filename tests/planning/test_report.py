"""What a plan says beside its numbers: what is assumed, and what it does not know."""

from __future__ import annotations

import dataclasses
import itertools

from sealion_jax.planning.analytical import estimate_analytically
from sealion_jax.planning.network import Place
from sealion_jax.planning.report import make_report
from sealion_jax.planning.tables import render
from sealion_jax.planning.topology import parse_topology
from sealion_jax.recipe import load_recipe
from sealion_jax.sharding import mesh_shape


def told(pod: str, **compute) -> tuple[dict, str]:
    """The report on the 27B by formulas, and its words."""
    config = dataclasses.replace(load_recipe("cpt_27b"), microbatches=4, rows_per_device=None)
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, **compute))
    topology = parse_topology(pod)
    assert config.model is not None
    shape = mesh_shape(config.mesh, topology.num_devices)
    chips = itertools.product(*map(range, topology.shape))
    places = [Place(0, chip) for chip in chips for _ in range(topology.chip.devices)]
    estimate = estimate_analytically(config, config.model, shape, topology, places)
    report = make_report(config, config.model, topology, shape, estimate)
    return report, render(report)


def test_a_number_that_is_another_chips_is_marked():
    report, said = told("v4:4x4x4")
    assert report["assumptions"]["network_taken_from"] == "v5p"
    assert "network between slices, one way (as v5p's: none is published)" in said
    report, said = told("v5p:4x4x4")
    assert report["assumptions"]["network_taken_from"] is None
    assert "none is published" not in said
