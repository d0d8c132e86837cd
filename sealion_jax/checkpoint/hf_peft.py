"""Adapters written as PEFT keeps them: two matrices a module, beside the settings that say which modules.

    adapter_config.json          rank, alpha, which modules, where the base is
    adapter_model.safetensors    base_model.model.model.layers.7.mlp.up_proj.lora_A.weight    [W, in]
                                 base_model.model.model.layers.7.mlp.up_proj.lora_B.weight    [out, W]

and the tokenizer's files and chat template, as an export of the whole model has them. Source of the format:
peft, utils/save_and_load.py and tuners/tuners_utils.py (`check_target_module_exists`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from sealion_jax.checkpoint.arrays import leaf_shapes, read_leaf
from sealion_jax.checkpoint.hf_assets import GENERATION_FILE, OnBytes
from sealion_jax.checkpoint.hf_config import CONFIG_FILE, MULTIMODAL_TYPE, parse_json_object
from sealion_jax.checkpoint.hf_export import small_files, write_files
from sealion_jax.checkpoint.hf_exportable import (
    STORED_NAMES,
    TEXT_PREFIX,
    Exportable,
    by_layer,
    check_leaves,
    new_tensor,
)
from sealion_jax.checkpoint.hf_import import Conversion
from sealion_jax.checkpoint.hf_names import LAYER_TABLE, Layout, LeafTensors, name_table
from sealion_jax.checkpoint.hf_tokenizer import json_bytes, stop_ids
from sealion_jax.checkpoint.layout import absolute
from sealion_jax.checkpoint.safetensors_write import NewTensor, write_file
from sealion_jax.checkpoint.staging import new_directory
from sealion_jax.checkpoint.weights import Weights
from sealion_jax.errors import UserError
from sealion_jax.model.config import Gemma3Config
from sealion_jax.model.lora import INPUT_AXES, LORA, LoraConfig
from sealion_jax.tokenizer import Tokenizer

ADAPTER_SETTINGS = "adapter_config.json"
ADAPTER_TENSORS = "adapter_model.safetensors"
MULTIMODAL_PREFIX = "model.language_model."
"""Of the language model's modules where there is a vision tower, in memory; those on disk may differ."""
PEFT_PREFIX = "base_model.model."
"""Of the base's modules in a model that PEFT has wrapped."""


def export_peft(
    weights: Weights,
    target: epath.PathLike,
    *,
    base_name: str | None = None,
    on_bytes: OnBytes = lambda count: None,
) -> Conversion:
    """Writes a step's adapters in PEFT's format, in float32.

    Args:
        target: the new directory, which must not exist or be empty.
        base_name: the Hugging Face directory, or the name on the Hub, that PEFT is to load the base from;
            None takes the directory that the adapters were trained on.

    Raises:
        UserError: there are no adapters, or nothing that PEFT could load their base from, or `target` cannot
            be written; then nothing is left.
    """
    if weights.adapters is None or weights.base is None:
        raise UserError(
            f"{weights.path} holds no adapters (LoRA), and PEFT's format holds nothing else; write the whole "
            f"model: python -m sealion_jax.convert to-hf {weights.path} DST"
        )
    base_name = base_directory(weights.base) if base_name is None else _absolute(base_name)
    lora, source = weights.adapters.lora, Exportable.of(weights)
    prefix = module_prefix(source)
    tensors = adapter_tensors(weights.path, weights.config, lora, prefix=prefix)
    total = sum(tensor.nbytes for tensor in tensors)
    with new_directory(target, needs_bytes=total) as place:
        write_file(place / ADAPTER_TENSORS, tensors, on_bytes=on_bytes)
        files, notes = small_files(source)
        notes += _stops_note(source, files.pop(GENERATION_FILE, None))
        settings = peft_settings(lora, base_name=base_name, prefix=prefix)
        write_files(place, {**files, ADAPTER_SETTINGS: json_bytes(settings)})
    return Conversion(
        path=epath.Path(target),
        num_tensors=len(tensors),
        num_bytes=total,
        dtype="float32",
        notes=tuple(notes),
    )


def base_directory(base: Weights) -> str:
    """Where PEFT loads this base from; raises UserError if it is no local Hugging Face directory."""
    if base.source.kind == "hf" and "://" not in str(base.path):
        return str(base.path)
    raise UserError(
        f"the adapters stand on {base.path}, and PEFT loads a base from a local Hugging Face directory or "
        f"the Hub: write one with python -m sealion_jax.convert to-hf {base.path} DIR, and give it as "
        "--base-name DIR (or the name on the Hub, if this base was converted from there and is unchanged)"
    )


def _absolute(base_name: str) -> str:
    """The whole path of a local directory, which PEFT would look for below wherever it runs.

    Raises:
        UserError: it is in a bucket.
    """
    if "://" in base_name:
        raise UserError(
            f"--base-name {base_name}: PEFT loads a base from a local directory or the Hub; give one of these"
        )
    return str(absolute(base_name)) if epath.Path(base_name).is_dir() else base_name


def module_prefix(source: Exportable) -> str:
    """What the names of the language model's modules begin with once Transformers has loaded the base."""
    if CONFIG_FILE not in source.files:
        return TEXT_PREFIX
    kind = parse_json_object(source.read_file(CONFIG_FILE), CONFIG_FILE).get("model_type")
    return MULTIMODAL_PREFIX if kind == MULTIMODAL_TYPE else TEXT_PREFIX


def adapter_tensors(
    step_dir: epath.Path, config: Gemma3Config, lora: LoraConfig, *, prefix: str
) -> list[NewTensor]:
    """PEFT's tensors of a step's adapters, in order, each read when it is written."""
    shapes = leaf_shapes(step_dir)
    table = tuple(adapter_table(config, lora, prefix=prefix))
    check_leaves(table, shapes, step_dir)
    read, own = functools.partial(read_leaf, step_dir), np.dtype(np.float32)
    tensors = [
        new_tensor(entry, k, name=name, read=read, own=own, stored=STORED_NAMES[own.name])
        for entry in table
        for k, name in enumerate(entry.names)
    ]
    return sorted(tensors, key=by_layer)


def adapter_table(config: Gemma3Config, lora: LoraConfig, *, prefix: str) -> Iterator[LeafTensors]:
    """Every leaf of a model's adapters and the tensors it is made of."""
    for weight in name_table(config, f"{PEFT_PREFIX}{prefix}"):
        module, _, target = weight.leaf.rpartition("/")
        if target not in lora.targets:
            continue
        inputs = INPUT_AXES[target]
        (out, summed), ours = weight.layout.groups, weight.layout.ours
        layouts = {
            ("a", "lora_A"): Layout(groups=("W", summed), ours=f"{ours[:inputs]}W"),
            ("b", "lora_B"): Layout(groups=(out, "W"), ours=f"W{ours[inputs:]}"),
        }
        for (part, matrix), layout in layouts.items():
            yield LeafTensors(
                leaf=f"{module}/{LORA}/{target}/{part}",
                names=tuple(f"{name.removesuffix('weight')}{matrix}.weight" for name in weight.names),
                layout=layout,
                sizes={**weight.sizes, "W": lora.rank},
                is_stacked=weight.is_stacked,
            )


def peft_settings(lora: LoraConfig, *, base_name: str, prefix: str) -> dict[str, Any]:
    """The content of adapter_config.json.

    The modules are named by one expression that is matched against whole names: the vision tower has a
    q_proj, a k_proj and a v_proj too, and a list of last names would adapt them with the language model's.
    """
    places = {leaf.rpartition("/")[2]: name.removesuffix(".weight") for leaf, name, _ in LAYER_TABLE}
    modules = "|".join(re.escape(places[target]) for target in lora.targets)
    return {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": rf"{re.escape(prefix)}layers\.\d+\.({modules})",
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _stops_note(source: Exportable, generation: bytes | epath.Path | None) -> list[str]:
    """A line where a tuned model's answers end at tokens that may not end its base's.

    Args:
        generation: generation_config.json of an export of the whole model: a path where nothing changes.
    """
    is_same = CONFIG_FILE not in source.files if generation is None else not isinstance(generation, bytes)
    if source.chat_template is None or is_same:
        return []
    stops = stop_ids(None if source.tokenizer is None else Tokenizer(source.tokenizer))
    return [
        f"PEFT stops where the base stops, and this model's answers end at one of the ids {stops}: give "
        f"generate() eos_token_id={stops}"
    ]
