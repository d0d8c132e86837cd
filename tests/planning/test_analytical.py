"""The formulas' model of a step: the state exactly, traffic against the bound of split weights, knobs."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from sealion_jax.model.config import ComputeConfig, gemma3_27b
from sealion_jax.model.lora import LoraConfig
from sealion_jax.planning.advice import advise
from sealion_jax.planning.analytical import estimate_analytically, layer_activations
from sealion_jax.planning.collectives import collectives
from sealion_jax.planning.estimate import ACTIVATIONS
from sealion_jax.planning.network import Place, gpu_places
from sealion_jax.planning.speed import recomputed_flops_per_token, speed_of
from sealion_jax.planning.step import Compiled, compile_step, parse_refusal, parts_of
from sealion_jax.planning.topology import parse_topology
from sealion_jax.recipe import load_recipe
from sealion_jax.sharding import MeshConfig, make_mesh, mesh_shape
from tests.tiny_recipe import MODEL
from tests.tiny_recipe import config as tiny

POD = parse_topology("h100:8x8")


def cpt_27b():
    """The recipe with the microbatches that it takes on 64 devices."""
    return dataclasses.replace(load_recipe("cpt_27b"), microbatches=4, rows_per_device=None)


def of(config, pod=POD):
    model = config.model
    shape = mesh_shape(config.mesh, pod.num_devices)
    return estimate_analytically(config, model, shape, pod, gpu_places(pod))


def parameters(model) -> tuple[int, int]:
    """(of one layer's matrices, of its norms), by hand."""
    D, H = model.model_dim, model.head_dim
    matrices = 2 * D * H * (model.num_heads + model.num_kv_heads) + 3 * D * model.feed_forward_dim
    return matrices, 4 * D + 2 * H


def test_state_of_27b_over_64_devices():
    """Float32 weights, two moments and gradients of 27.0B parameters, all but the norms split over 64."""
    model = gemma3_27b()
    matrices, norms = parameters(model)
    embedding = model.vocab_size * model.model_dim
    estimate = of(cpt_27b())
    split = (62 * matrices + embedding) / 64
    assert estimate.memory["weights"] == pytest.approx(4 * (split + 62 * norms + model.model_dim), rel=1e-3)
    assert estimate.memory["gradients"] == estimate.memory["weights"]
    assert estimate.memory["optimizer"] == pytest.approx(2 * estimate.memory["weights"], rel=1e-6)
    # Five int32 or float32 fields of 1024 rows of 8192 tokens, and the source of each row.
    assert estimate.memory["batch"] == 1024 * (5 * 8192 + 1) * 4 / 64


def test_traffic_is_the_bound_of_split_weights():
    """Each of four microbatches gathers a layer's bfloat16 weights twice, and scatters a float32 gradient."""
    model = gemma3_27b()
    matrices, _ = parameters(model)
    embedding = model.vocab_size * model.model_dim
    traffic = {row.kind: row for row in of(cpt_27b()).traffic}
    gathered = 4 * 2 * (62 * matrices * 2 + embedding * 2)
    scattered = 4 * (62 * matrices * 4 + 2 * embedding * 4)
    assert traffic["all-gather"].received_bytes == pytest.approx(gathered * 63 / 64)
    assert traffic["reduce-scatter"].received_bytes == pytest.approx(scattered * 63 / 64)
    assert set(traffic) == {"all-gather", "reduce-scatter"}


def test_copies_of_the_model_are_reduced_over_data():
    config = dataclasses.replace(cpt_27b(), mesh=MeshConfig(data=2, fsdp=32))
    (row,) = (row for row in of(config).traffic if row.kind == "all-reduce")
    everything = sum(leaf for leaf in [62 * parameters(gemma3_27b())[0], 262_208 * 5376])
    assert row.axes == ("data",)
    assert row.received_bytes == pytest.approx(4 * 2 * (everything / 32 * 4) / 2, rel=1e-3)
    assert row.seconds.network > 0  # the copies are on different nodes


def test_adapters_have_the_smaller_state():
    """Of rank 16 beside every weight; what is as wide as the model is split, the rest is copied."""
    config = dataclasses.replace(cpt_27b(), lora=LoraConfig(rank=16))
    whole, adapted = of(cpt_27b()), of(config)
    split = 7 * 5376 / 64
    copied = 2 * 32 * 128 + 2 * 16 * 128 + 3 * 21_504
    assert adapted.memory["gradients"] == pytest.approx(62 * 16 * (split + copied) * 4)
    frozen = adapted.memory["weights"] - adapted.memory["gradients"]
    assert frozen == pytest.approx(whole.memory["weights"] / 2, rel=0.01)  # in bfloat16


@pytest.mark.parametrize("remat", ["none", "dots", "layer", "block"])
def test_what_is_computed_again(remat):
    config = cpt_27b()
    config = dataclasses.replace(config, compute=ComputeConfig(remat=remat))
    model = gemma3_27b()
    logits = 2 * model.vocab_size * model.model_dim
    again = recomputed_flops_per_token(config, model)
    keys = (52 * (1024 * 1025 / 2 + 7168 * 1024) + 10 * 8192 * 8193 / 2) / 8192
    forward = 2 * 62 * parameters(model)[0] + 4 * 32 * 128 * keys
    assert again == pytest.approx(logits + (forward if remat in ("layer", "block") else 0))


def test_kept_tensors_are_not_computed_again():
    model, config = gemma3_27b(), cpt_27b()
    keep = ("gate", "up", "attention")
    kept = dataclasses.replace(config, compute=ComputeConfig(remat="layer", keep=keep))
    plain = dataclasses.replace(config, compute=ComputeConfig(remat="layer"))
    saved = recomputed_flops_per_token(plain, model) - recomputed_flops_per_token(kept, model)
    keys = (52 * (1024 * 1025 / 2 + 7168 * 1024) + 10 * 8192 * 8193 / 2) / 8192
    assert saved == pytest.approx(62 * 2 * 2 * 5376 * 21_504 + 4 * 32 * 128 * keys)
    tokens = 256 * 8192 / 64
    more = of(kept).memory["activations and temporaries"] - of(plain).memory["activations and temporaries"]
    assert more == pytest.approx(tokens * 2 * 62 * (2 * 21_504 + 32 * 128))


@pytest.mark.parametrize(("devices", "remat"), [(4, "none"), (8, "block")])
def test_traffic_over_context_is_that_of_the_compiled_step(devices, remat):
    """Two global layers and two local ones; nothing but attention sends anything from device to device."""
    model = dataclasses.replace(
        MODEL, num_layers=4, layers_per_block=2, sliding_window_tokens=20, num_kv_heads=2
    )
    compute = ComputeConfig(dtype="float32", remat=remat, attention="blockwise")
    config = tiny(model=model, compute=compute, mesh=MeshConfig(fsdp=1, context=devices), global_batch_size=2)
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    step = compile_step(parts_of(config, model, mesh), tell=lambda line: None)
    assert isinstance(step, Compiled)
    shape = dict(mesh.shape)
    sent = [one for one in collectives(step.text, shape) if one.kind == "collective-permute"]
    node = parse_topology(f"h100:1x{devices}")
    estimate = estimate_analytically(config, model, shape, node, gpu_places(node))
    formulas = [one for one in estimate.traffic if one.kind == "collective-permute"]
    assert sum(one.step_bytes for one in sent) == pytest.approx(
        sum(one.received_bytes for one in formulas), rel=0.05
    )


def with_logits(config, logits_bytes):
    compute = dataclasses.replace(config.compute, logits_bytes_per_device=logits_bytes)
    return dataclasses.replace(config, compute=compute)


def test_with_room_for_their_logits_losses_but_preferences_compute_them_once():
    model, config = gemma3_27b(), with_logits(cpt_27b(), 128 * 2**20)
    logits = 2 * model.vocab_size * model.model_dim
    # Of 1,024 tokens, where the vocabulary is split over four.
    roomy = with_logits(config, 1024 * model.vocab_size)
    twice = recomputed_flops_per_token(config, model)
    assert recomputed_flops_per_token(roomy, model, tensor=4) == pytest.approx(twice - logits)
    assert recomputed_flops_per_token(roomy, model, tensor=2) == twice
    pairs = dataclasses.replace(load_recipe("dpo_27b"), compute=roomy.compute, sequence_length_tokens=8192)
    assert recomputed_flops_per_token(pairs, model, tensor=4) == pytest.approx(twice)


@pytest.mark.parametrize(("name", "elements"), [("gate", 21_504 / 2), ("down", 5376), ("output", 5376)])
def test_what_a_layer_adds_is_kept_whole_by_devices_that_share_it(name, elements):
    config = dataclasses.replace(cpt_27b(), mesh=MeshConfig(fsdp=32, tensor=2))
    kept, plain = (
        of(dataclasses.replace(config, compute=ComputeConfig(remat="layer", keep=keep)))
        for keep in ((name,), ())
    )
    more = kept.memory["activations and temporaries"] - plain.memory["activations and temporaries"]
    assert more == pytest.approx(256 * 8192 / 32 * 2 * 62 * elements)


@pytest.mark.parametrize(
    ("remat", "keep", "times"),
    [("none", (), 4), ("dots", (), 4), ("layer", (), 6), ("block", (), 6), ("block", ("output", "gate"), 5)],
)
def test_products_that_are_computed_again_are_summed_up_over_tensor_again(remat, keep, times):
    """Attention's and the feed-forward's, forward and backward; the compiled 4B repeats the forward's two."""
    compute = ComputeConfig(remat=remat, keep=keep)
    config = dataclasses.replace(cpt_27b(), mesh=MeshConfig(fsdp=16, tensor=4), compute=compute)
    (row,) = (row for row in of(config).traffic if row.axes == ("tensor",))
    assert (row.kind, row.count) == ("all-reduce", times * 62 * 4)
    assert row.received_bytes == row.count * 2 * (256 * 8192 / 16) * 5376 * 2 * 3 / 4


def test_dots_keep_every_product():
    """Of each layer its input, seven products and attention's result; and one layer at work."""
    D, F, N, K, H = 5376, 21_504, 32, 16, 128
    none, dots = (
        of(dataclasses.replace(cpt_27b(), compute=ComputeConfig(remat=remat))).memory[ACTIVATIONS]
        for remat in ("none", "dots")
    )
    products = N * H + 2 * K * H + D + 2 * F + D
    a_layer = layer_activations(gemma3_27b(), 1)
    fewer = 62 * a_layer - (62 * (D + products + N * H) + a_layer)
    assert none - dots == pytest.approx(256 * 8192 / 64 * 2 * fewer)


def test_mfu_is_the_models_operations_over_the_peak():
    config = cpt_27b()
    speed = speed_of(config, config.model, POD, of(config))
    assert speed is not None
    assert speed.flops_per_token == pytest.approx(166.5e9, rel=1e-3)
    step = speed.step_in_turn
    assert speed.mfu(step) == pytest.approx(166.5e9 * 1024 * 8192 / step / (64 * 989e12), rel=1e-3)
    assert (
        speed.step_overlapped
        == speed.matmul
        == pytest.approx(
            (speed.flops_per_token + speed.recomputed_flops_per_token) * 1024 * 8192 / (64 * 989e12)
        )
    )


def test_what_does_not_fit_says_which_knobs_free_enough():
    config = dataclasses.replace(cpt_27b(), microbatches=1)
    estimate = of(config)
    assert not estimate.fits
    shape = mesh_shape(config.mesh, 64)
    lines = advise(config, gemma3_27b(), shape, POD, gpu_places(POD), estimate)
    assert "most is activations and temporaries" in lines[0]
    advised = next(line for line in lines if line.startswith("--microbatches"))
    assert advised.endswith("enough")
    batches = int(advised.split()[1])
    assert of(dataclasses.replace(config, microbatches=batches)).fits
    assert not of(dataclasses.replace(config, microbatches=batches // 2)).fits


def test_weights_that_do_not_fit_ask_for_more_splitting():
    config = dataclasses.replace(cpt_27b(), mesh=MeshConfig(data=16, fsdp=4), microbatches=16)
    estimate = of(config)
    shape = mesh_shape(config.mesh, 64)
    lines = advise(config, gemma3_27b(), shape, POD, gpu_places(POD), estimate)
    assert "most is optimizer" in lines[0]
    assert any(line.startswith("--mesh.data") and line.endswith("enough") for line in lines)


def test_advice_counts_the_microbatches_that_a_run_takes_on_the_changed_mesh():
    """With at most a row on a device, half as many groups of devices take twice the microbatches."""
    pod = parse_topology("v5e:16x16")
    places = [Place(0, chip) for chip in np.ndindex(16, 16)]
    config = dataclasses.replace(with_logits(load_recipe("cpt_27b"), 128 * 2**20), rows_per_device=1)
    model = gemma3_27b()

    def needed(fsdp, microbatches):
        mesh = MeshConfig(fsdp=fsdp, tensor=256 // fsdp)
        changed = dataclasses.replace(config, mesh=mesh, microbatches=microbatches)
        return estimate_analytically(changed, model, mesh_shape(mesh, 256), pod, places)

    before = needed(256, 4)
    assert not before.fits
    assert needed(128, 8).fits
    assert not needed(128, 4).fits
    lines = advise(config, model, mesh_shape(config.mesh, 256), pod, places, before)
    advised = next(line for line in lines if "--mesh.tensor" in line)
    assert advised.startswith("--mesh.fsdp 128 --mesh.tensor 2 (each row over more devices; microbatches 8)")
    assert advised.endswith("a chip, enough")


@pytest.mark.parametrize(
    ("remat", "words"),
    [
        ("none", {"layer": "more is computed again", "block": "more is computed again"}),
        ("block", {"layer": "a layer at a time, more inputs kept"}),
    ],
)
def test_advice_says_what_another_remat_policy_costs(remat, words):
    """From block to layer nothing more is computed again."""
    config = cpt_27b()
    compute = dataclasses.replace(config.compute, remat=remat)
    config = dataclasses.replace(config, compute=compute)
    estimate = dataclasses.replace(of(config), available=2**30)
    shape = mesh_shape(config.mesh, 64)
    lines = advise(config, gemma3_27b(), shape, POD, gpu_places(POD), estimate)
    told = [
        line.split(" (")[0] + " (" + line.split(" (")[1].split(")")[0] for line in lines if "remat" in line
    ]
    assert told
    assert set(told) <= {f"--compute.remat {policy} ({cost}" for policy, cost in words.items()}


def test_a_small_model_on_one_gpu_moves_nothing():
    pod = parse_topology("h200:1x1")
    config = tiny()
    assert of(config, pod).traffic == ()


@pytest.mark.parametrize(
    ("message", "needed", "available", "alone"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 110.50G of 95.74G hbm. Exceeded "
            "hbm capacity by 14.76G.",
            110.5,
            95.74,
            False,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(74.68G) exceeds available HBM (15.75G).",
            74.68,
            15.75,
            True,
        ),
    ],
)
def test_refusals_of_the_compiler(message, needed, available, alone):
    refusal = parse_refusal(message)
    assert refusal is not None
    assert refusal.needed == pytest.approx(needed * 2**30)
    assert refusal.available == pytest.approx(available * 2**30)
    assert refusal.temporaries_alone == alone


def test_another_error_is_no_refusal():
    assert parse_refusal("INTERNAL: Mosaic failed to compile TPU kernel") is None


def test_how_parameters_are_split_is_told():
    config = dataclasses.replace(cpt_27b(), mesh=MeshConfig(fsdp=32, tensor=2))
    split = dict(of(config).split)
    assert split["blocks/*/mlp/down"] == "[10, 21504 / tensor, 5376 / fsdp]"
    assert split["rest/*/attention/query"] == "[5376 / fsdp, 32 / tensor, 128]"
    assert split["embedder/embedding"] == "[262208 / tensor, 5376 / fsdp]"
    assert split["final_norm/scale"] == "[5376]"
