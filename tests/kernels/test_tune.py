"""The tuner writes what the table reads."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Var

from sealion_kernels import AttentionMask, Target, block_table, tune, tuned
from sealion_kernels.block_table import attention_blocks
from sealion_kernels.blocks import BlockSizes
from sealion_kernels.gpu_blocks import GpuBlockSizes
from sealion_kernels.timing import calls_in_a_row, seconds_a_call
from sealion_kernels.tpu.geometry import Geometry
from sealion_kernels.tpu.vmem import fitted, forward_bytes
from sealion_kernels.tune import Shape, main, merged
from sealion_kernels.tuned import Tuned, best, from_json, to_json

CPU = Target(platform="cpu", kind="cpu")
ENTRY = Tuned(
    implementation="blockwise",
    kind="cpu",
    head_dim=64,
    group=4,
    window=None,
    length=512,
    itemsize=4,
    forward=BlockSizes(query=64, key=128),
    backward=BlockSizes(query=128, key=64),
)


def test_a_table_survives_json() -> None:
    gpu = replace(ENTRY, implementation="gpu", forward=GpuBlockSizes(query=64, key=32, num_warps=8), window=7)
    assert from_json(to_json([ENTRY, gpu])) == (ENTRY, gpu)
    assert from_json(to_json([])) == ()


def test_the_nearest_shorter_length_of_the_same_device_and_layer_counts() -> None:
    longer = replace(ENTRY, length=2048)
    find = lambda **options: best(  # noqa: E731
        "blockwise",
        options.pop("target", CPU),
        table=[ENTRY, longer],
        **{"head_dim": 64, "window": None, "group": 4, "itemsize": 4, **options},
    )
    assert find(length=512) is ENTRY and find(length=2047) is ENTRY
    assert find(length=9999) is longer
    assert find(length=511) is None
    assert find(length=512, head_dim=128) is None
    assert find(length=512, itemsize=2) is None
    assert find(length=512, group=2) is None
    assert find(length=512, window=512) is None
    assert find(length=512, target=Target(platform="gpu", kind="NVIDIA H100")) is None


def test_new_entries_replace_old_ones_of_the_same_shape() -> None:
    other = replace(ENTRY, length=1024)
    faster = replace(ENTRY, forward=BlockSizes(query=256, key=256))
    assert merged([other, ENTRY], [faster]) == [faster, other]


def test_the_command_times_and_the_table_takes_it(tmp_path, capsys, monkeypatch) -> None:
    output = tmp_path / "tuned.json"
    words = ["--lengths", "128", "--head-dims", "64", "--windows", "global", "64", "--repetitions", "2"]
    assert main([*words, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "T 128, H 64, G 4, window 64, backward" in printed and "times as fast as the table's" in printed
    table = from_json(output.read_text())
    assert [entry.window for entry in table] == [None, 64]
    monkeypatch.setattr(block_table, "best", lambda *a, **options: tuned.best(*a, table=table, **options))
    found = attention_blocks(
        "blockwise", CPU, num_queries=128, num_keys=128, window=64, head_dim=64, group=4, itemsize=4
    )
    assert (found.forward, found.backward) == (table[1].forward, table[1].backward)


@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
def test_a_kernel_for_another_device_is_refused(implementation: str, capsys) -> None:
    assert main(["--implementation", implementation]) == 2
    assert f"{implementation} kernels run on a {implementation.upper()}" in capsys.readouterr().err


def test_the_environment_names_a_table_that_comes_first(tmp_path: Path, monkeypatch) -> None:
    own = tmp_path / "own.json"
    own.write_text(to_json([ENTRY]))
    find = partial(
        attention_blocks, "blockwise", CPU, num_queries=512, num_keys=512, window=None, head_dim=64, group=4
    )
    monkeypatch.setenv(tuned.USERS, str(own))
    monkeypatch.setattr(tuned, "users", cache(tuned.users.__wrapped__))
    other = replace(ENTRY, forward=BlockSizes(query=512, key=512))
    monkeypatch.setattr(tuned, "shipped", lambda: (other,))
    assert find(itemsize=4).forward == ENTRY.forward
    for text in ("[{}]", "no json"):
        own.write_text(text)
        monkeypatch.setattr(tuned, "users", cache(tuned.users.__wrapped__))
        with pytest.raises(ValueError, match=f"SEALION_KERNELS_TUNED names {own}, which is no table"):
            find(itemsize=4)
    monkeypatch.delenv(tuned.USERS)
    monkeypatch.setattr(tuned, "users", cache(tuned.users.__wrapped__))
    assert find(itemsize=4).forward == other.forward


SHAPE = Shape(length=2048, head_dim=256, heads=(8, 1), window=None)


def test_sizes_that_a_tpu_kernel_halves_are_timed_and_recorded_halved(monkeypatch) -> None:
    """All of the candidates of 2,048 tokens; what is timed fits as it is."""
    timed = []

    def medians(runs: dict, *_: Any) -> Any:
        timed.append(set(runs))
        return [(1.0, sizes) for sizes in runs]

    monkeypatch.setattr(tune, "_medians", medians)
    v5e = Target(platform="tpu", kind="TPU v5 lite")
    small = replace(SHAPE, head_dim=512)
    found = tune.tune("tpu", small, v5e, repetitions=1, tell=lambda _: None)
    default = attention_blocks(
        "tpu", v5e, num_queries=2048, num_keys=2048, window=None, head_dim=512, group=8
    )
    q, k = (jax.ShapeDtypeStruct((1, 2048, n, 512), jnp.bfloat16) for n in small.heads)
    for sizes in timed[0]:
        of = Geometry.of(cast(Any, q), cast(Any, k), AttentionMask(), sizes, scale=1.0)
        assert fitted(of, default.vmem_bytes, forward_bytes).sizes == sizes
    assert BlockSizes(query=2048, key=2048) not in timed[0] and found.forward in timed[0]


def test_a_shape_that_the_device_cannot_run_is_an_error(monkeypatch) -> None:
    def refuse(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(tune, "_runner", lambda *_: refuse)
    monkeypatch.setattr(tune, "SECONDS_BETWEEN", 0.0)
    told: list[str] = []
    small = replace(SHAPE, length=128, head_dim=64)
    with pytest.raises(RuntimeError, match="for T 128, H 64, G 8, global with none of"):
        tune.tune("blockwise", small, CPU, repetitions=1, tell=told.append)
    assert told[0].startswith("T 128, H 64, G 8, global, forward: 1 of ")


@pytest.mark.parametrize(("which", "kernel"), [("backward", "keys"), ("backward_queries", "queries")])
def test_a_backward_pass_is_timed_alone(which: str, kernel: str) -> None:
    """Of the two GPU kernels one gives what is asked for, and nothing keeps the other one in the program."""
    small = replace(SHAPE, length=128, heads=(2, 1), head_dim=64)
    arrays, mask = tune._problem(small, CPU)
    h100 = Target(platform="gpu", kind="NVIDIA H100")
    blocks = attention_blocks("gpu", h100, num_queries=128, num_keys=128, window=None, head_dim=64, group=2)
    run = tune._runner("gpu", which, blocks, arrays, mask)
    program = run.func.trace(*run.args).jaxpr
    assert not program.effects
    needed, kernels = set(program.jaxpr.outvars), []
    for equation in reversed(program.jaxpr.eqns):
        if needed.intersection(equation.outvars):
            needed.update(x for x in equation.invars if isinstance(x, Var))
            kernels += [equation.params["name"]] if equation.primitive.name == "pallas_call" else []
    assert kernels == [f"attention_backward_{kernel}"]


def test_a_call_is_timed_over_so_many_that_starting_it_does_not_count() -> None:
    calls = 0

    def run() -> jax.Array:
        nonlocal calls
        calls += 1
        return jnp.zeros(())

    run()
    assert calls_in_a_row(run) > 1
    calls = 0
    assert seconds_a_call(run, 7) > 0 and calls == 7
    assert calls_in_a_row(lambda: time.sleep(0.1)) == 1
