"""Hugging Face -> ours -> Hugging Face gives every tensor bit for bit; a device reads only its shard."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from sealion_jax.checkpoint import hf_import
from sealion_jax.checkpoint.arrays import leaf_shapes, read_leaf
from sealion_jax.checkpoint.digests import check_digests
from sealion_jax.checkpoint.hf import HfWeights, export_hf, import_hf, load_hf_params, source_assets
from sealion_jax.checkpoint.layout import asset_paths
from sealion_jax.checkpoint.orbax import CheckpointConfig, Checkpointer
from sealion_jax.checkpoint.trees import load_params
from sealion_jax.errors import UserError
from sealion_jax.model.gemma3 import abstract_params, parameter_axes
from sealion_jax.sharding import MeshConfig, make_mesh, param_shardings, with_shardings
from tests.checkpoint.hf_models import (
    BF16,
    CONFIG,
    F32,
    TEXT_VERSION_4,
    TEXT_VERSION_5,
    D,
    H,
    K,
    N,
    assert_same_tensors,
    multimodal,
    random_tensors,
    read_directory,
    text_shapes,
    vision_shapes,
    write_directory,
)

CASES: dict[str, Callable[[Path], Path]] = {
    "text, bfloat16, version 4": lambda folder: write_directory(
        folder, TEXT_VERSION_4, random_tensors(text_shapes("model."))
    ),
    "text, float32, version 5, sharded": lambda folder: write_directory(
        folder,
        {**TEXT_VERSION_5, "dtype": "float32"},
        random_tensors(text_shapes("model."), F32),
        num_shards=3,
    ),
    "text, tied head stored": lambda folder: write_directory(
        folder, TEXT_VERSION_5, with_head(random_tensors(text_shapes("model.")))
    ),
    "text without a head": lambda folder: write_directory(
        folder, TEXT_VERSION_4, random_tensors(text_shapes(""))
    ),
    "multimodal, as version 4 saves it": lambda folder: write_directory(
        folder,
        multimodal(TEXT_VERSION_4),
        random_tensors(text_shapes("language_model.model.") | vision_shapes()),
        num_shards=2,
    ),
    "multimodal, as version 5 has it": lambda folder: write_directory(
        folder,
        multimodal(TEXT_VERSION_5),
        random_tensors(text_shapes("model.language_model.") | vision_shapes("model.", "vision_tower."), F32),
    ),
    "multimodal without a head": lambda folder: write_directory(
        folder,
        multimodal(TEXT_VERSION_5),
        random_tensors(text_shapes("language_model.") | vision_shapes("", "vision_tower.")),
    ),
    "mixed dtypes": lambda folder: write_directory(folder, multimodal(TEXT_VERSION_4), mixed_tensors()),
}
"""The kinds of checkpoint that are in the world."""


def with_head(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}


def mixed_tensors() -> dict[str, np.ndarray]:
    """Norms and one matrix in float32 among bfloat16, and a float16 vision tower."""
    prefix = "language_model.model."
    tensors = random_tensors(text_shapes(prefix))
    tensors = {name: array.astype(F32) if "norm" in name else array for name, array in tensors.items()}
    wide = f"{prefix}layers.1.mlp.up_proj.weight"
    tensors |= random_tensors({wide: tensors[wide].shape}, F32, seed=1)
    return tensors | random_tensors(vision_shapes(), np.dtype(np.float16))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Path, Path]]:
    """Every kind of source, and the step's directory made of it; made when first asked for."""
    root = tmp_path_factory.mktemp("converted")

    class Made(dict):
        def __missing__(self, case: str) -> tuple[Path, Path]:
            folder = root / str(len(self))
            source = CASES[case](folder / "hf")
            import_hf(source, folder / "step")
            self[case] = (source, folder / "step")
            return self[case]

    return Made()


@pytest.mark.parametrize("case", CASES)
def test_a_round_trip_changes_no_bit(case: str, converted: Mapping, tmp_path: Path) -> None:
    source, step = converted[case]
    assert check_digests(step) == []
    done = export_hf(step, tmp_path / "out", max_shard_bytes=20_000)
    expected = read_directory(source)
    assert_same_tensors(read_directory(tmp_path / "out"), expected)
    assert done.num_tensors == len(expected)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_leaves_are_what_the_layout_says(converted: Mapping) -> None:
    source, step = converted["multimodal, as version 4 saves it"]
    theirs = read_directory(source)
    layer_0, layer_3, layer_7 = (f"language_model.model.layers.{layer}." for layer in (0, 3, 7))
    shapes = leaf_shapes(step)
    assert {name: leaf.shape for name, leaf in shapes.items()} == flat_shapes(abstract_params(CONFIG))
    assert {leaf.dtype for leaf in shapes.values()} == {BF16}

    query = theirs[f"{layer_0}self_attn.q_proj.weight"]
    found = read_leaf(step, "blocks/layer_0/attention/query")[0]
    for head in range(N):
        np.testing.assert_array_equal(found[:, head], query[head * H : (head + 1) * H].T)
    output = theirs[f"{layer_7}self_attn.o_proj.weight"]
    found = read_leaf(step, "rest/layer_1/attention/output")
    for head in range(N):
        np.testing.assert_array_equal(found[head], output[:, head * H : (head + 1) * H].T)
    value = theirs[f"{layer_7}self_attn.v_proj.weight"]
    np.testing.assert_array_equal(
        read_leaf(step, "rest/layer_1/attention/value"), value.reshape(K, H, D).transpose(2, 0, 1)
    )
    for block, layer in ((0, layer_0), (1, layer_3)):
        matrix = theirs[f"{layer}mlp.down_proj.weight"]
        np.testing.assert_array_equal(read_leaf(step, "blocks/layer_0/mlp/down")[block], matrix.T)
    key = theirs[f"{layer_0}self_attn.k_proj.weight"]
    np.testing.assert_array_equal(
        read_leaf(step, "blocks/layer_0/attention/key")[0], key.reshape(K, H, D).transpose(2, 0, 1)
    )
    for ours, name in (("gate", "gate_proj"), ("up", "up_proj")):
        matrix = theirs[f"{layer_7}mlp.{name}.weight"]
        np.testing.assert_array_equal(read_leaf(step, f"rest/layer_1/mlp/{ours}"), matrix.T)
    for ours, name in (
        ("attention/query_norm", "self_attn.q_norm"),
        ("attention/key_norm", "self_attn.k_norm"),
        ("pre_attention_norm", "input_layernorm"),
        ("post_attention_norm", "post_attention_layernorm"),
        ("pre_mlp_norm", "pre_feedforward_layernorm"),
        ("post_mlp_norm", "post_feedforward_layernorm"),
    ):
        scale = theirs[f"{layer_7}{name}.weight"]
        np.testing.assert_array_equal(read_leaf(step, f"rest/layer_1/{ours}/scale"), scale)


def flat_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(entry.key for entry in path): leaf.shape for path, leaf in leaves}


def test_orbax_restores_what_was_converted(converted: Mapping) -> None:
    source, step = converted["mixed dtypes"]
    abstract = abstract_params(CONFIG, jnp.float32)
    restored, loaded = load_params(step, abstract), load_hf_params(source, abstract)
    jax.tree.map(np.testing.assert_array_equal, restored, loaded)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(), MeshConfig(fsdp=4, tensor=2), MeshConfig(data=2, fsdp=2, tensor=2)], ids=repr
)
def test_each_device_gets_its_shard_and_no_more_is_read(
    mesh: MeshConfig, converted: Mapping, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, step = converted["multimodal, as version 4 saves it"]
    abstract = abstract_params(CONFIG, jnp.float32)
    made = make_mesh(mesh)
    abstract = with_shardings(abstract, param_shardings(abstract, parameter_axes(CONFIG), made))
    read_elements = 0
    original = HfWeights.read

    def counted(self: HfWeights, leaf: str, index: Any = (), *, dtype: Any = None) -> np.ndarray:
        nonlocal read_elements
        part = original(self, leaf, index, dtype=dtype)
        read_elements += part.size
        return part

    monkeypatch.setattr(HfWeights, "read", counted)
    params = load_hf_params(source, abstract)
    assert jax.tree.structure(params) == jax.tree.structure(abstract)

    def check(path: Any, array: jax.Array, wanted: jax.ShapeDtypeStruct) -> None:
        assert array.dtype == jnp.float32 and array.sharding == wanted.sharding
        stored = read_leaf(step, "/".join(entry.key for entry in path))
        np.testing.assert_array_equal(np.asarray(array), stored.astype(np.float32))

    jax.tree_util.tree_map_with_path(check, params, abstract)
    # Splitting over all eight devices, or four of them in two copies, reads each element once or twice.
    shards = sum(array.addressable_shards[0].data.size * made.size for array in jax.tree.leaves(params))
    assert read_elements <= shards
    if mesh == MeshConfig():
        largest = params["embedder"]["embedding"]
        assert largest.addressable_shards[0].data.size == largest.size // 8


def test_a_leaf_can_be_read_in_any_part(converted: Mapping) -> None:
    weights = HfWeights.open(converted["text, float32, version 5, sharded"][0])
    rng = np.random.default_rng(0)
    for leaf, entry in weights.table.items():
        whole = weights.read(leaf)
        assert whole.shape == entry.shape
        for _ in range(4):
            index = tuple(
                slice(*sorted(rng.integers(0, size + 1, 2).tolist()))
                if rng.random() < 0.7
                else int(rng.integers(size))
                for size in entry.shape[: rng.integers(len(entry.shape) + 1)]
            )
            np.testing.assert_array_equal(weights.read(leaf, index), whole[index], err_msg=f"{leaf} {index}")


def test_parameters_of_another_model_are_refused(converted: Mapping) -> None:
    wider = dataclasses.replace(CONFIG, feed_forward_dim=64)
    with pytest.raises(
        UserError, match=r"blocks/layer_0/mlp/gate is \(2, 32, 48\) there, \(2, 32, 64\) here"
    ):
        load_hf_params(converted["text without a head"][0], abstract_params(wider))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_can_be_chosen(dtype: str, converted: Mapping, tmp_path: Path) -> None:
    source, step = converted["mixed dtypes"]
    export_hf(step, tmp_path / "out", dtype=dtype)
    wanted = {"float32": F32, "bfloat16": BF16}[dtype]
    expected = {
        name: array if name.startswith(("vision", "multi")) else array.astype(wanted)
        for name, array in read_directory(source).items()
    }
    assert_same_tensors(read_directory(tmp_path / "out"), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    before = json.loads((source / "config.json").read_text())
    assert config == {**before, "torch_dtype": dtype}


def test_a_hugging_face_directory_can_be_exported_too(converted: Mapping, tmp_path: Path) -> None:
    source, _ = converted["text, tied head stored"]
    export_hf(source, tmp_path / "out", dtype="float32")
    expected = {name: array.astype(F32) for name, array in read_directory(source).items()}
    assert_same_tensors(read_directory(tmp_path / "out"), expected)


@pytest.mark.parametrize("dtype", ["float16", "fp16", "int8", "float64"])
def test_other_dtypes_are_refused(dtype: str, converted: Mapping, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"--dtype {dtype} is not supported.*use bfloat16 or float32"):
        export_hf(converted["text without a head"][1], tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_a_training_checkpoint_goes_out_as_its_source_came(converted: Mapping, tmp_path: Path) -> None:
    """Float32 master weights, saved in shards by a run that started from it, leave rounded to bfloat16."""
    source, _ = converted["multimodal, as version 4 saves it"]
    abstract = abstract_params(CONFIG, jnp.float32)
    abstract = with_shardings(
        abstract, param_shardings(abstract, parameter_axes(CONFIG), make_mesh(MeshConfig()))
    )
    params = jax.tree.map(lambda leaf: leaf + 1e-3, load_hf_params(source, abstract))
    assets = {**source_assets(source, scratch=tmp_path), "model.json": hf_import.model_json(CONFIG)}
    with Checkpointer(tmp_path / "run", CheckpointConfig()) as checkpointer:
        checkpointer.save(3, params=params, optimizer={"count": jnp.zeros(())}, train={}, assets=assets)
    export_hf(tmp_path / "run" / "checkpoints" / "3", tmp_path / "out")
    expected = {
        name: array
        if name.startswith(("vision", "multi"))
        else (array.astype(np.float32) + np.float32(1e-3)).astype(ml_dtypes.bfloat16)
        for name, array in read_directory(source).items()
    }
    assert_same_tensors(read_directory(tmp_path / "out"), expected)
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_small_files_are_carried_byte_for_byte(tmp_path: Path) -> None:
    files = {
        "generation_config.json": b'{"temperature": 0.7,\n "eos_token_id": [1, 106]}',
        "chat_template.jinja": "{{ bos_token }} ค่ะ".encode(),
        "chat_template.json": b"{}",
        "additional_chat_templates/tools.jinja": b"tools",
        "preprocessor_config.json": b"{ }",
        "processor_config.json": b"{  }",
        "LICENSE": b"terms",
    }
    left_out = {"README.md": b"card", "optimizer.pt": b"pickle", "training_args.bin": b"pickle"}
    source = write_directory(
        tmp_path / "hf", TEXT_VERSION_4, random_tensors(text_shapes("model.")), files={**files, **left_out}
    )
    import_hf(source, tmp_path / "step")
    assert {name for name in asset_paths(tmp_path / "step") if name.startswith("source/")} == {
        "source/config.json",
        "source/tensors.json",
        *(f"source/{name}" for name in files),
    }
    assert {name: (tmp_path / "step/assets/source" / name).read_bytes() for name in files} == files
    export_hf(tmp_path / "step", tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        *(name.partition("/")[0] for name in files),
    }


def test_where_a_leaf_goes_without_a_sharding(converted: Mapping) -> None:
    abstract = abstract_params(CONFIG, jnp.bfloat16)
    params = load_hf_params(converted["text without a head"][0], abstract)
    assert params["final_norm"]["scale"].sharding == SingleDeviceSharding(jax.local_devices()[0])
    assert params["final_norm"]["scale"].dtype == jnp.bfloat16
