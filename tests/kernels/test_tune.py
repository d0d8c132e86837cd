"""The tuner writes what the table reads."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sealion_kernels import Target, block_table, tuned
from sealion_kernels.block_table import attention_blocks
from sealion_kernels.blocks import BlockSizes
from sealion_kernels.gpu_blocks import GpuBlockSizes
from sealion_kernels.tune import main, merged
from sealion_kernels.tuned import Tuned, best, from_json, to_json

CPU = Target(platform="cpu", kind="cpu")
ENTRY = Tuned(
    implementation="blockwise",
    kind="cpu",
    head_dim=64,
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
        **{"head_dim": 64, "window": None, "itemsize": 4, **options},
    )
    assert find(length=512) is ENTRY and find(length=2047) is ENTRY
    assert find(length=9999) is longer
    assert find(length=511) is None
    assert find(length=512, head_dim=128) is None
    assert find(length=512, itemsize=2) is None
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
    assert "T 128, H 64, window 64, backward" in printed and "times as fast as the table's" in printed
    table = from_json(output.read_text())
    assert [entry.window for entry in table] == [None, 64]
    monkeypatch.setattr(block_table, "best", lambda *a, **options: tuned.best(*a, table=table, **options))
    found = attention_blocks(
        "blockwise", CPU, num_queries=128, num_keys=128, window=64, head_dim=64, itemsize=4
    )
    assert (found.forward, found.backward) == (table[1].forward, table[1].backward)


@pytest.mark.parametrize("implementation", ["tpu", "gpu"])
def test_a_kernel_for_another_device_is_refused(implementation: str, capsys) -> None:
    assert main(["--implementation", implementation]) == 2
    assert f"{implementation} kernels run on a {implementation.upper()}" in capsys.readouterr().err
