"""Steps that hold adapters alone, and what their adapters add to each tensor, in NumPy and float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from sealion_jax.checkpoint.arrays import Leaf, read_leaf, write_leaves
from sealion_jax.checkpoint.digests import write_digests
from sealion_jax.checkpoint.hf import model_json
from sealion_jax.checkpoint.layout import Assets, write_assets
from sealion_jax.checkpoint.lora import LoraRecord
from sealion_jax.checkpoint.weights import open_weights
from sealion_jax.model.gemma3 import abstract_params
from sealion_jax.model.lora import LoraConfig, parted
from tests.checkpoint.hf_models import F32, LAYERS, PATTERN, random_tensors

EVERYTHING = LoraConfig(rank=3, alpha=7.5)
SOME = LoraConfig(rank=2, alpha=4.0, targets=("key", "output", "down"))

MODULES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def write_adapters(
    step: Path, base: Path, lora: LoraConfig, *, assets: Assets | None = None, seed: int = 5
) -> Path:
    """A step's directory as a run with LoRA saves it that began with `base`; a and b drawn at random."""
    weights = open_weights(str(base))
    record = LoraRecord(lora=lora, base=str(weights.path), fingerprint=weights.fingerprint())
    _, adapters = parted(abstract_params(weights.config, lora=lora))
    leaves = jax.tree_util.tree_leaves_with_path(adapters)
    shapes = {"/".join(entry.key for entry in path): leaf.shape for path, leaf in leaves}
    arrays = random_tensors(shapes, F32, seed=seed)
    write_leaves(step, [Leaf(name, array.shape, F32, [((), array)]) for name, array in arrays.items()])
    carried = {name: file for name, file in weights.assets().items() if "untouched" not in name}
    own = {"model.json": model_json(weights.config), "lora.json": record.to_json()}
    write_assets(step, {**carried, **(assets or {}), **own})
    write_digests(step)
    return step


def adapter(step: Path, layer: int, target: str) -> tuple[np.ndarray, np.ndarray]:
    """a [*in, W] and b [W, *out] of one module, in float64."""
    group = "mlp" if target in ("gate", "up", "down") else "attention"
    block, position = divmod(layer, PATTERN)
    is_rest = block == LAYERS // PATTERN
    where = f"{'rest' if is_rest else 'blocks'}/layer_{position}/{group}/lora/{target}"
    pair = (read_leaf(step, f"{where}/{part}") for part in ("a", "b"))
    a, b = (leaf if is_rest else leaf[block] for leaf in pair)
    return a.astype(np.float64), b.astype(np.float64)


def changes(step: Path, lora: LoraConfig, *, prefix: str) -> dict[str, np.ndarray]:
    """Name of a tensor -> alpha / rank * (a b), [out, in] as it is stored there."""
    found = {}
    for layer in range(LAYERS):
        for target in lora.targets:
            a, b = adapter(step, layer, target)
            change = a.reshape(-1, lora.rank) @ b.reshape(lora.rank, -1)
            found[f"{prefix}layers.{layer}.{MODULES[target]}.weight"] = lora.alpha / lora.rank * change.T
    return found


def assert_merged(
    found: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray], change: Mapping[str, np.ndarray]
) -> None:
    """base + change, rounded to base's dtype but once; what has no change is equal bit for bit."""
    assert found.keys() == base.keys() and change.keys() <= base.keys()
    for name, before in base.items():
        assert found[name].dtype == before.dtype and found[name].shape == before.shape, name
        if name not in change:
            assert found[name].tobytes() == before.tobytes(), name
            continue
        exact = before.astype(np.float64) + change[name]
        assert np.abs(change[name]).max() > 0.1, name
        # Half a unit of the last of 8 bits, or of 24; and what the sum in float32 was off before.
        half_unit = 2.0 ** (np.frexp(exact)[1] - (25 if before.dtype == F32 else 9))
        off = np.abs(found[name].astype(np.float64) - exact)
        assert np.all(off <= half_unit + 1e-6), (name, off.max())
