"""What a plan says beside its numbers: what is assumed, and what it does not know."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from sealion_jax.model.config import gemma3_27b
from sealion_jax.model.lora import LoraConfig
from sealion_jax.planning.analytical import estimate_analytically
from sealion_jax.planning.network import Place
from sealion_jax.planning.report import make_report
from sealion_jax.planning.speed import quantized_flops_per_token
from sealion_jax.planning.tables import render
from sealion_jax.planning.topology import parse_topology
from sealion_jax.recipe import TrainConfig, load_recipe
from sealion_jax.sharding import mesh_shape


def cpt_27b(**compute) -> TrainConfig:
    config = dataclasses.replace(load_recipe("cpt_27b"), microbatches=4, rows_per_device=None)
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, **compute))


def told(pod: str, **compute) -> tuple[dict, str]:
    """The report on the 27B by formulas, and its words."""
    config = cpt_27b(**compute)
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


def test_products_in_eight_bits_have_a_peak_of_their_own():
    """Forward, again and to the input at int8's peak; weights' gradients, attention and logits at bf16's."""
    plain, said = told("v5p:4x4x4", remat="layer")
    assert plain["quantization"] == "none"
    assert "quantization" not in said and "int8" not in said
    model = gemma3_27b()
    D, H = model.model_dim, model.head_dim
    weights = 62 * (2 * D * H * (model.num_heads + model.num_kv_heads) + 3 * D * model.feed_forward_dim)
    tokens = 1024 * 8192
    for keep, again in (((), 1.0), (("gate", "up"), 1 - 62 * 2 * D * model.feed_forward_dim / weights)):
        exact, _ = told("v5p:4x4x4", remat="layer", keep=keep)
        report, said = told("v5p:4x4x4", remat="layer", keep=keep, quantization="int8")
        quantized = 2 * weights * (2 + again)
        speed = report["speed"]
        assert speed["quantized_flops_per_token"] == pytest.approx(quantized)
        saved = exact["speed"]["matmul_seconds"] - speed["matmul_seconds"]
        assert saved == pytest.approx(tokens * quantized / 64 * (1 / 459e12 - 1 / 918e12))
        assert report["quantization"] == "int8"
        assert "; quantization int8; compiler flag sets" in said
        assert f"{quantized / 1e9:,.2f} G of both are in int8" in said
        assert "918 TOP/s" in said
        # The model's operations are what they were: MFU is by bf16's peak.
        assert speed["flops_per_token"] == exact["speed"]["flops_per_token"]
    fp8, said = told("tpu7x:4x4x4", remat="layer", quantization="fp8")
    exact, _ = told("tpu7x:4x4x4", remat="layer")
    assert "4,614 TFLOP/s" in said
    saved = exact["speed"]["matmul_seconds"] - fp8["speed"]["matmul_seconds"]
    assert saved == pytest.approx(tokens * 6 * weights / 64 * (1 / 2307e12 - 1 / 4614e12))


def test_frozen_weights_have_no_gradients_to_compute_exactly():
    config = dataclasses.replace(cpt_27b(remat="none", quantization="int8"), lora=LoraConfig(rank=16))
    assert config.model is not None
    plain = dataclasses.replace(config, lora=None)
    assert quantized_flops_per_token(config, config.model) == quantized_flops_per_token(plain, config.model)


def test_transfers_to_the_host_are_not_known():
    report, said = told("v5p:4x4x4", remat="layer", offload=("gate", "up"))
    assert "to the host's memory and back" in report["not_known"][-1]
    assert report["not_known"][-1] in said
    assert "to the host's memory" not in told("v5p:4x4x4", remat="layer")[1]
