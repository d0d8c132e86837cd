"""What we write Orbax reads, and what Orbax writes we read: bit for bit, and layer by layer."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from etils import epath

from sealion_jax.checkpoint.arrays import (
    CHUNK_BYTES,
    Index,
    Leaf,
    chunk_shape,
    leaf_shapes,
    read_leaf,
    write_leaves,
)
from sealion_jax.checkpoint.orbax import CheckpointConfig, Checkpointer
from sealion_jax.errors import UserError
from tests.checkpoint.states import abstract_state, make_state


def _flat(tree: Any) -> dict[str, np.ndarray]:
    return {
        "/".join(key.key for key in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _same_bits(ours: Any, theirs: Any) -> bool:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype) and ours.tobytes() == theirs.tobytes()


def _bytes_read() -> int:
    """What TensorStore has read from files so far, by its own count."""
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """Random bits, by name; NaNs among them."""
    return _flat(make_state("one device", seed=1)[0])


@pytest.fixture(scope="module")
def written(arrays: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step's directory written by write_leaves, with parts of three kinds."""

    def parts(name: str, array: np.ndarray) -> Iterator[tuple[Index, np.ndarray]]:
        if name.startswith("blocks/"):
            yield from (((block,), array[block]) for block in reversed(range(array.shape[0])))
        elif name.startswith("embedder/"):
            yield from (((slice(row, row + 10),), array[row : row + 10]) for row in range(0, 64, 10))
        else:
            yield (), array

    step_dir = tmp_path_factory.mktemp("written") / "0"
    write_leaves(step_dir, (Leaf(name, a.shape, a.dtype, parts(name, a)) for name, a in arrays.items()))
    return step_dir


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Any, Any]:
    """A step's directory saved by Orbax from eight devices, with its state."""
    run_dir = tmp_path_factory.mktemp("trained")
    params, optimizer = make_state("fsdp 4 x tensor 2", seed=2)
    with Checkpointer(run_dir, CheckpointConfig()) as checkpointer:
        checkpointer.save(5, params=params, optimizer=optimizer, train={}, assets={})
    return run_dir / "checkpoints" / "5", params, optimizer


def test_read_back_is_bit_equal(written: Path, arrays: dict[str, np.ndarray]) -> None:
    assert {name: (s.shape, s.dtype) for name, s in leaf_shapes(written).items()} == {
        name: (array.shape, array.dtype) for name, array in arrays.items()
    }
    assert {array.dtype for array in arrays.values()} == {np.dtype("float32"), np.dtype(ml_dtypes.bfloat16)}
    for name, array in arrays.items():
        assert _same_bits(read_leaf(written, name), array), name


@pytest.mark.parametrize("mesh_name", ["fsdp 8", "fsdp 4 x tensor 2", "one device"])
def test_orbax_restores_what_we_wrote(mesh_name: str, written: Path, arrays: dict[str, np.ndarray]) -> None:
    abstract, _ = abstract_state(mesh_name)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        restored = orbax.restore(
            epath.Path(written) / "params",
            args=ocp.args.PyTreeRestore(
                abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
            ),
        )
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(
        lambda leaf: leaf.sharding, abstract
    )
    for name, leaf in _flat(restored).items():
        assert _same_bits(leaf, arrays[name]), name


def test_we_read_what_orbax_wrote(trained: tuple[Path, Any, Any]) -> None:
    step_dir, params, optimizer = trained
    for name, array in _flat(params).items():
        assert _same_bits(read_leaf(step_dir, name), array), name
    mu = optimizer[1][0].mu["blocks"]["layer_0"]["mlp"]["gate"]
    assert _same_bits(read_leaf(step_dir, "1/0/mu/blocks/layer_0/mlp/gate", (2,), tree="optimizer"), mu[2])


def test_both_describe_the_tree_alike(written: Path, trained: tuple[Path, Any, Any]) -> None:
    ours, orbax = (
        json.loads((step_dir / "params" / "_METADATA").read_text()) for step_dir in (written, trained[0])
    )
    assert ours == orbax


@pytest.mark.parametrize(
    "index",
    [(1,), (-1,), (slice(1, 3),), (2, slice(3, 7), slice(-4, None)), (slice(None), 5), (slice(9, 4),)],
    ids=str,
)
def test_slices_are_numpys(index: Index, written: Path, arrays: dict[str, np.ndarray]) -> None:
    name = "blocks/layer_0/mlp/down"
    assert _same_bits(read_leaf(written, name, index), arrays[name][index])


@pytest.mark.parametrize("tree", ["params", "optimizer"])
def test_training_writes_stacked_arrays_in_chunks_of_one_block(
    tree: str, trained: tuple[Path, Any, Any]
) -> None:
    name = {"params": "", "optimizer": "1.0.mu."}[tree] + "blocks.layer_0.mlp.gate/"
    kvstore = {"driver": "ocdbt", "base": f"file://{trained[0]}/{tree}/", "path": name}
    store = ts.open({"driver": "zarr", "kvstore": kvstore}).result()
    assert store.shape == (3, 16, 32)
    assert store.chunk_layout.read_chunk.shape == (
        1,
        4,
        16,
    )  # one block; a device's share of fsdp 4, tensor 2


def test_one_block_is_read_alone(tmp_path: Path) -> None:
    blocks = np.random.default_rng(0).normal(size=(8, 256, 512)).astype(np.float32)
    leaf = Leaf("blocks/layer_0/mlp/gate", blocks.shape, blocks.dtype, [((), blocks)])
    write_leaves(tmp_path / "0", [leaf])
    before = _bytes_read()
    assert _same_bits(read_leaf(tmp_path / "0", leaf.name, (3,)), blocks[3])
    read = _bytes_read() - before
    assert blocks[3].nbytes <= read < 1.1 * blocks[3].nbytes


def test_chunks_are_one_block_and_not_too_large() -> None:
    assert chunk_shape("blocks/layer_0/mlp/gate", (10, 64, 128), np.float32) == (1, 64, 128)
    assert chunk_shape("rest/layer_0/mlp/gate", (64, 128), np.float32) == (64, 128)
    assert chunk_shape("final_norm/scale", (), np.float32) == ()
    assert chunk_shape("embedder/embedding", (262_208, 5376), ml_dtypes.bfloat16) == (4097, 2688)
    assert chunk_shape("blocks/layer_0/mlp/gate", (10, 5376, 21_504), np.float32) == (1, 2688, 2688)
    assert 2688 * 2688 * 4 <= CHUNK_BYTES  # noqa: SIM300


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([((0,), np.zeros(3, np.float32))], "the parts have 3 elements, the array of shape [2, 3] has 6"),
        ([((), np.zeros((3, 2), np.float32))], "must be float32[2, 3], not float32[3, 2]"),
        ([((), np.zeros((2, 3), np.float64))], "must be float32[2, 3], not float64[2, 3]"),
        ([((2,), np.zeros(3, np.float32))], "index 2 is outside an axis of 2"),
        ([((slice(None, None, 2),), np.zeros((1, 3), np.float32))], "slices must have step 1"),
        ([((0, 0, 0), np.zeros((), np.float32))], "3 indices for an array of 2 axes"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        write_leaves(tmp_path / "0", [Leaf("rest/layer_0/a", (2, 3), np.float32, parts)])
    assert message in str(error.value)
    assert not (tmp_path / "0" / "params").exists()


@pytest.mark.parametrize("names", [("a/b", "a/b"), ("a.b",), ("a//b",), ("",)])
def test_ambiguous_names_are_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    leaves = [Leaf(name, (1,), np.float32, [((), np.zeros(1, np.float32))]) for name in names]
    with pytest.raises(ValueError, match="unique, without dots"):
        write_leaves(tmp_path / "0", leaves)


def test_mistakes_are_told(written: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nearest name is 'blocks/layer_0/mlp/gate'"):
        read_leaf(written, "blocks/layer_0/mlp/gat")
    with pytest.raises(UserError, match="is not part of a checkpoint"):
        leaf_shapes(tmp_path)
    with pytest.raises(UserError, match="exists already"):
        write_leaves(written, [])


@pytest.mark.slow
def test_writing_takes_memory_for_some_parts_only(tmp_path: Path) -> None:
    """1.3 GB go to disk and a twentieth is read back while less than 0.4 GB of anonymous memory are added."""
    script = """
        import sys, threading, time
        import numpy as np
        from sealion_jax.checkpoint.arrays import Leaf, read_leaf, write_leaves

        def anonymous():
            return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) / 1e6

        part = np.random.default_rng(0).normal(size=(2560, 2560)).astype(np.float32)
        peak, start = 0.0, anonymous()

        def watch():
            global peak
            while True:
                peak = max(peak, anonymous() - start)
                time.sleep(0.005)

        threading.Thread(target=watch, daemon=True).start()
        parts = lambda: (((b,), part + np.float32(b)) for b in range(50))
        write_leaves(sys.argv[1], [Leaf("blocks/layer_0/mlp/gate", (50, 2560, 2560), np.float32, parts())])
        back = read_leaf(sys.argv[1], "blocks/layer_0/mlp/gate", (slice(48, 50),))
        assert np.array_equal(back[1], part + np.float32(49))
        print(peak)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "0")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < 0.4
