"""Hugging Face's config.json and our Gemma3Config, each from the other.

Two schemas are in the world. Transformers 4 writes `rope_theta`, `rope_local_base_freq`, `rope_scaling` and
`sliding_window_pattern`; version 5 writes `rope_parameters` by layer type and `layer_types`. Each version
reads both, and so do we. What a file leaves out has Transformers' default for it (models/gemma3/
configuration_gemma3.py, the same in both versions): the released multimodal files say little else than sizes.
What this model does not compute is refused by name, because a checkpoint that loads and gives other numbers
is worse than one that does not load.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

from etils import epath

from sealion_jax.config_tree import from_plain, to_plain
from sealion_jax.errors import UserError
from sealion_jax.model.config import FLOAT16_NAMES, Gemma3Config

CONFIG_FILE = "config.json"
TEXT_TYPE, MULTIMODAL_TYPE = "gemma3_text", "gemma3"
LOCAL, GLOBAL = "sliding_attention", "full_attention"
VERSION_4_KEYS = ("rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern")
VERSION_5_KEYS = ("rope_parameters", "layer_types")

# Ours, theirs, Transformers' default.
FIELDS: tuple[tuple[str, str, float], ...] = (
    ("vocab_size", "vocab_size", 262_208),
    ("num_layers", "num_hidden_layers", 26),
    ("model_dim", "hidden_size", 2304),
    ("num_heads", "num_attention_heads", 8),
    ("num_kv_heads", "num_key_value_heads", 4),
    ("head_dim", "head_dim", 256),
    ("feed_forward_dim", "intermediate_size", 9216),
    ("query_scale_dim", "query_pre_attn_scalar", 256),
    ("sliding_window_tokens", "sliding_window", 4096),
    ("max_context_tokens", "max_position_embeddings", 131_072),
    ("norm_epsilon", "rms_norm_eps", 1e-6),
)
MOST_LAYERS = 1000
DEFAULT_GLOBAL_BASE, DEFAULT_LOCAL_BASE, DEFAULT_PATTERN = 1_000_000.0, 10_000.0, 6
ACTIVATION = "gelu_pytorch_tanh"

# Theirs, the values that mean "not used".
UNUSED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("attention_bias", (False, None)),
    ("attn_logit_softcapping", (None,)),
    ("final_logit_softcapping", (None,)),
    ("use_bidirectional_attention", (False, None)),
    ("quantization_config", (None,)),
)


def model_json(config: Gemma3Config) -> bytes:
    """A model's configuration as a checkpoint's assets/model.json holds it."""
    return (json.dumps(to_plain(config, Gemma3Config), indent=1) + "\n").encode()


def read_model_json(content: bytes) -> Gemma3Config:
    """The configuration that `model_json` wrote; raises UserError if it is not one."""
    return from_plain(parse_json_object(content, "assets/model.json"), Gemma3Config, path="model.json")


def read_hf_config(directory: epath.PathLike) -> Gemma3Config:
    """The language model's configuration of a Hugging Face directory, local or gs://.

    Raises:
        UserError: no config.json, another kind of model, or something that this model does not compute.
    """
    file = epath.Path(directory) / CONFIG_FILE
    if not file.exists():
        raise UserError(f"{directory} has no {CONFIG_FILE}; expected a Hugging Face directory")
    return parse_hf_config(parse_json_object(file.read_bytes(), str(file)), str(file))


def parse_json_object(content: bytes, where: str) -> dict[str, Any]:
    """The object in a JSON file; raises UserError if it is anything else."""
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(parsed).__name__}")
    return parsed


def parse_hf_config(config: dict[str, Any], where: str) -> Gemma3Config:
    """Our configuration from the content of a config.json, which `where` names in messages."""
    text = text_config(config, where)
    for key, allowed in UNUSED:
        for level in (config, text):
            if level.get(key) not in allowed:
                raise UserError(
                    f"{where}: {key} = {level[key]!r} is not supported; Gemma 3 models do not use it"
                )
    _refuse_float16(config, text, where)
    activation = text.get("hidden_activation", ACTIVATION)
    if activation != ACTIVATION:
        raise UserError(
            f"{where}: hidden_activation = {activation!r}, but Gemma 3 computes {ACTIVATION!r}; "
            "if an exporter wrote this by mistake, correct it there"
        )
    fields: dict[str, Any] = {ours: _number(text, theirs, default, where) for ours, theirs, default in FIELDS}
    if fields["num_layers"] > MOST_LAYERS:
        raise UserError(
            f"{where}: num_hidden_layers = {fields['num_layers']:,}; expected {MOST_LAYERS:,} at most"
        )
    try:
        return Gemma3Config(
            **fields,
            layers_per_block=_layers_per_block(text, int(fields["num_layers"]), where),
            **_rope_fields(text, where),
        )
    except UserError as error:
        raise UserError(f"{where}: {error}" if where not in str(error) else str(error)) from None


def _refuse_float16(config: dict[str, Any], text: dict[str, Any], where: str) -> None:
    """Transformers and vLLM would compute in it, whatever the tensors are, and Gemma 3 overflows there."""
    for level in (config, text):
        for key in ("dtype", "torch_dtype"):
            if level.get(key) in FLOAT16_NAMES:
                raise UserError(
                    f"{where}: {key} = {level[key]!r}, in which Gemma 3 overflows; write the dtype of its "
                    "tensors there, bfloat16 or float32"
                )


def text_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The part of a config.json that describes the language model: all of it, or its "text_config"."""
    kind = config.get("model_type")
    text = config.get("text_config") if kind == MULTIMODAL_TYPE else config
    if kind not in (TEXT_TYPE, MULTIMODAL_TYPE) or not isinstance(text, dict):
        raise UserError(
            f"{where}: model_type is {kind!r}; expected Gemma 3's: {TEXT_TYPE!r}, or {MULTIMODAL_TYPE!r} "
            "with a text_config"
        )
    if text.get("model_type", TEXT_TYPE) != TEXT_TYPE:
        raise UserError(f"{where}: its text_config is {text['model_type']!r}; expected {TEXT_TYPE!r}")
    return text


def is_tied(config: dict[str, Any], where: str) -> bool:
    """Whether the output matrix is said to be the embedding, as it is in every released Gemma 3."""
    levels = (config, text_config(config, where))
    return all(level.get("tie_word_embeddings", True) is not False for level in levels)


def _number(text: dict[str, Any], key: str, default: float, where: str) -> Any:
    """A positive number under `key`, an int wherever the default is one and the value is whole."""
    value = text.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{where}: {key} is {value!r}; expected a positive number")
    if isinstance(default, int) and key != "query_pre_attn_scalar":
        if value != int(value):
            raise UserError(f"{where}: {key} is {value!r}; expected a whole number")
        return int(value)
    return value


def _layers_per_block(text: dict[str, Any], num_layers: int, where: str) -> int:
    """Layers in the repeating pattern of local layers and one global; UserError for any other pattern."""
    pattern, types = text.get("sliding_window_pattern"), text.get("layer_types")
    if pattern is not None and (type(pattern) is not int or pattern < 1):
        raise UserError(f"{where}: sliding_window_pattern is {pattern!r}; expected a positive whole number")
    if types is None:
        return pattern or DEFAULT_PATTERN
    known = isinstance(types, list) and all(kind in (LOCAL, GLOBAL) for kind in types)
    if not known or len(types) != num_layers:
        raise UserError(f"{where}: layer_types must name {num_layers} layers, each {LOCAL} or {GLOBAL}")
    # Without a global layer every longer pattern is the same model.
    absent = next((p for p in (pattern, DEFAULT_PATTERN) if p and p > num_layers), num_layers + 1)
    found = types.index(GLOBAL) + 1 if GLOBAL in types else absent
    if types != layer_types(num_layers, found):
        raise UserError(
            f"{where}: layer_types does not repeat local layers and one global layer from the first layer on "
            f"(it begins with {found - 1} local and 1 global)"
        )
    if pattern is not None and types != layer_types(num_layers, pattern):
        raise UserError(
            f"{where}: sliding_window_pattern = {pattern} contradicts layer_types; which one counts depends "
            "on the version of Transformers, so remove the wrong one"
        )
    return found


def layer_types(num_layers: int, layers_per_block: int) -> list[str]:
    """The kind of each layer, in Transformers' words."""
    return [GLOBAL if (k + 1) % layers_per_block == 0 else LOCAL for k in range(num_layers)]


def _rope_fields(text: dict[str, Any], where: str) -> dict[str, Any]:
    """Bases and factor of the rotary embeddings, read as Transformers does, from either schema or both."""
    by_type = text.get("rope_parameters") or {}
    if not isinstance(by_type, dict) or set(by_type) - {LOCAL, GLOBAL}:
        raise UserError(f"{where}: rope_parameters must have an entry each for {GLOBAL} and {LOCAL}")
    scaling = text.get("rope_scaling") or {}
    entries = {LOCAL: by_type.get(LOCAL) or {}, GLOBAL: by_type.get(GLOBAL) or {}}
    if not all(isinstance(entry, dict) for entry in (scaling, *entries.values())):
        raise UserError(f"{where}: rope_scaling and the entries of rope_parameters must be objects")
    for key, kind, old in (
        ("rope_theta", GLOBAL, text.get("rope_theta")),
        ("rope_local_base_freq", LOCAL, text.get("rope_local_base_freq")),
    ):
        new = entries[kind].get("rope_theta")
        if old is not None and new is not None and old != new:
            raise UserError(
                f"{where}: {key} = {old} contradicts rope_parameters' {new}; which one counts depends on "
                "the version of Transformers, so remove the wrong one"
            )
    if scaling and entries[GLOBAL] and _factor(scaling, where) != _factor(entries[GLOBAL], where):
        raise UserError(f"{where}: rope_scaling contradicts rope_parameters; remove the wrong one")
    if _factor(entries[LOCAL], where) != 1:
        raise UserError(f"{where}: local layers with scaled rotary embeddings are not Gemma 3's")
    bases = {
        GLOBAL: {"rope_theta": text.get("rope_theta") or DEFAULT_GLOBAL_BASE} | entries[GLOBAL],
        LOCAL: {"rope_theta": text.get("rope_local_base_freq") or DEFAULT_LOCAL_BASE} | entries[LOCAL],
    }
    return {
        "global_rope_base": float(_number(bases[GLOBAL], "rope_theta", DEFAULT_GLOBAL_BASE, where)),
        "local_rope_base": float(_number(bases[LOCAL], "rope_theta", DEFAULT_LOCAL_BASE, where)),
        "global_rope_factor": _factor({**entries[GLOBAL], **scaling}, where),
    }


def _factor(rope: dict[str, Any], where: str) -> float:
    """By what positions are divided; raises UserError for any scaling but the linear one."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear"):
        raise UserError(f"{where}: RoPE scaling {kind!r} is not supported; Gemma 3 uses 'linear' or none")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"{where}: partial_rotary_factor is not supported; Gemma 3 rotates whole heads")
    return float(_number(rope, "factor", 1.0, where)) if kind == "linear" else 1.0


def fresh_hf_config(config: Gemma3Config, *, dtype: str, ids: dict[str, Any]) -> dict[str, Any]:
    """A text-only config.json for a model that never had one.

    It has both schemas' keys, which agree, so that every version reads the same. `ids` are the token ids
    under Transformers' names (`bos_token_id`, ...).
    """
    content: dict[str, Any] = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": TEXT_TYPE,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "hidden_activation": ACTIVATION,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        **ids,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    for group in _groups(config).values():
        content |= group
    return dict(sorted(content.items()))


def updated_hf_config(
    source: dict[str, Any], config: Gemma3Config, *, dtype: str | None = None
) -> dict[str, Any]:
    """The source's config.json with what no longer holds replaced, in its own schema; mostly nothing.

    `dtype` is given where the weights' dtype has been changed.
    """
    content = copy.deepcopy(source)
    text = text_config(content, CONFIG_FILE)
    old, new = _groups(parse_hf_config(source, CONFIG_FILE)), _groups(config)
    foreign = VERSION_4_KEYS if "rope_parameters" in text else VERSION_5_KEYS
    for name, group in new.items():
        if group != old[name]:
            text |= {key: value for key, value in group.items() if key in text or key not in foreign}
    if dtype is not None:
        places = [
            (level, key) for level in (content, text) for key in ("dtype", "torch_dtype") if key in level
        ]
        fallback = "dtype" if "rope_parameters" in text else "torch_dtype"
        for level, key in places or [(content, fallback)]:
            level[key] = dtype
    return content


def _groups(config: Gemma3Config) -> dict[str, dict[str, Any]]:
    """Transformers' keys and values for `config`, grouped by what they say, with both schemas' keys."""
    plain = {theirs: getattr(config, ours) for ours, theirs, _ in FIELDS}
    scale = plain["query_pre_attn_scalar"]
    plain["query_pre_attn_scalar"] = int(scale) if scale == int(scale) else scale
    scaling = {"rope_type": "linear", "factor": config.global_rope_factor}
    scaling = None if config.global_rope_factor == 1 else scaling
    by_type = {
        GLOBAL: {"rope_theta": config.global_rope_base, **(scaling or {"rope_type": "default"})},
        LOCAL: {"rope_theta": config.local_rope_base, "rope_type": "default"},
    }
    rope = {
        "rope_theta": config.global_rope_base,
        "rope_local_base_freq": config.local_rope_base,
        "rope_scaling": scaling,
        "rope_parameters": by_type,
    }
    layers = {
        "num_hidden_layers": plain.pop("num_hidden_layers"),
        "layer_types": layer_types(config.num_layers, config.layers_per_block),
        "sliding_window_pattern": config.layers_per_block,
    }
    return {**{key: {key: value} for key, value in plain.items()}, "rope": rope, "layers": layers}


def describe(config: Gemma3Config) -> str:
    """One line for people: "34 layers, model dim 2560, 8/4 heads of 256, vocabulary 262,208"."""
    sizes = dataclasses.asdict(config)
    return (
        "{num_layers} layers, model dim {model_dim}, {num_heads}/{num_kv_heads} heads of {head_dim}, "
        "vocabulary {vocab_size:,}"
    ).format(**sizes)
