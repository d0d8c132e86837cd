"""config.json of both schemas: read as Transformers reads it, refused where we would compute otherwise."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sealion_jax.checkpoint.hf import model_json, read_hf_config, read_model_json
from sealion_jax.checkpoint.hf_config import fresh_hf_config, parse_hf_config, updated_hf_config
from sealion_jax.errors import UserError
from sealion_jax.model.config import (
    Gemma3Config,
    gemma3_1b,
    gemma3_4b,
    gemma3_12b,
    gemma3_27b,
    gemma3_270m,
)
from tests.checkpoint.hf_models import CONFIG, TEXT_VERSION_4, TEXT_VERSION_5, multimodal

SCALED = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}

# As the released multimodal checkpoints have them: little else than what differs from the defaults.
RELEASED: dict[str, tuple[dict[str, Any], Gemma3Config]] = {
    "4b": (
        {
            "model_type": "gemma3",
            "torch_dtype": "bfloat16",
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "sliding_window": 1024,
                **SCALED,
            },
        },
        gemma3_4b(),
    ),
    "12b": (
        {
            "model_type": "gemma3",
            "text_config": {
                "hidden_size": 3840,
                "intermediate_size": 15360,
                "model_type": "gemma3_text",
                "num_attention_heads": 16,
                "num_hidden_layers": 48,
                "num_key_value_heads": 8,
                "sliding_window": 1024,
                **SCALED,
            },
        },
        gemma3_12b(),
    ),
    "27b": (
        {
            "model_type": "gemma3",
            "text_config": {
                "head_dim": 128,
                "hidden_size": 5376,
                "intermediate_size": 21504,
                "model_type": "gemma3_text",
                "num_attention_heads": 32,
                "num_hidden_layers": 62,
                "num_key_value_heads": 16,
                "query_pre_attn_scalar": 168,
                "sliding_window": 1024,
                **SCALED,
            },
        },
        gemma3_27b(),
    ),
    "1b": (
        {
            "model_type": "gemma3_text",
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "max_position_embeddings": 32768,
            "num_attention_heads": 4,
            "num_hidden_layers": 26,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "vocab_size": 262144,
        },
        gemma3_1b(),
    ),
    "270m": (
        {
            "model_type": "gemma3_text",
            "_sliding_window_pattern": 6,
            "head_dim": 256,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
            "max_position_embeddings": 32768,
            "num_attention_heads": 4,
            "num_hidden_layers": 18,
            "num_key_value_heads": 1,
            "rope_local_base_freq": 10000.0,
            "rope_theta": 1000000.0,
            "sliding_window": 512,
            "use_bidirectional_attention": False,
            "vocab_size": 262144,
        },
        gemma3_270m(),
    ),
}

SCHEMAS: dict[str, dict[str, Any]] = {
    "version 4": TEXT_VERSION_4,
    "version 5": TEXT_VERSION_5,
    "version 4 multimodal": multimodal(TEXT_VERSION_4),
    "version 5 multimodal": multimodal(TEXT_VERSION_5),
    "both": {**TEXT_VERSION_4, **TEXT_VERSION_5},
    "old key for the kind of scaling": {**TEXT_VERSION_4, "rope_scaling": {"type": "linear", "factor": 8}},
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_configurations_are_our_sizes(name: str) -> None:
    content, expected = RELEASED[name]
    assert parse_hf_config(content, "config.json") == expected


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_says_the_same(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SCHEMAS[name]))
    assert read_hf_config(tmp_path) == CONFIG


@pytest.mark.parametrize("name", [*RELEASED, *SCHEMAS])
def test_transformers_reads_the_same(name: str, tmp_path: Path) -> None:
    content = SCHEMAS[name] if name in SCHEMAS else RELEASED[name][0]
    assert parse_hf_config(content, "config.json") == as_transformers_reads(content, tmp_path)


def as_transformers_reads(content: dict[str, Any], folder: Path) -> Gemma3Config:
    """Our configuration, field by field from Transformers' object."""
    transformers = pytest.importorskip("transformers", minversion="5")
    (folder / "config.json").write_text(json.dumps(content))
    text = transformers.AutoConfig.from_pretrained(folder).get_text_config()
    full, local = text.rope_parameters["full_attention"], text.rope_parameters["sliding_attention"]
    return Gemma3Config(
        vocab_size=text.vocab_size,
        num_layers=text.num_hidden_layers,
        model_dim=text.hidden_size,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=text.head_dim,
        feed_forward_dim=text.intermediate_size,
        query_scale_dim=text.query_pre_attn_scalar,
        sliding_window_tokens=text.sliding_window,
        layers_per_block=text.layer_types.index("full_attention") + 1,
        local_rope_base=local["rope_theta"],
        global_rope_base=full["rope_theta"],
        global_rope_factor=full.get("factor", 1.0),
        max_context_tokens=text.max_position_embeddings,
        norm_epsilon=text.rms_norm_eps,
    )


def changed(base: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {**copy.deepcopy(base), **values}


def rope(**full: Any) -> dict[str, Any]:
    return changed(
        TEXT_VERSION_5,
        rope_parameters={"full_attention": full, "sliding_attention": {"rope_type": "default"}},
    )


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gemma2": (changed(TEXT_VERSION_4, model_type="gemma2"), "model_type is 'gemma2'; expected Gemma 3's"),
    "no model_type": ({"hidden_size": 64}, "model_type is None"),
    "no text_config": ({"model_type": "gemma3"}, "'gemma3' with a text_config"),
    "other text model": (
        {"model_type": "gemma3", "text_config": {"model_type": "llama"}},
        "its text_config is 'llama'",
    ),
    "wrong GELU": (
        changed(TEXT_VERSION_4, hidden_activation="gelu"),
        "hidden_activation = 'gelu', but Gemma 3 computes 'gelu_pytorch_tanh'",
    ),
    "soft-capped logits": (
        changed(TEXT_VERSION_4, final_logit_softcapping=30.0),
        "final_logit_softcapping = 30.0",
    ),
    "soft-capped attention": (
        changed(TEXT_VERSION_5, attn_logit_softcapping=50.0),
        "attn_logit_softcapping = 50",
    ),
    "biases": (changed(TEXT_VERSION_5, attention_bias=True), "attention_bias = True is not supported"),
    "bidirectional": (
        changed(TEXT_VERSION_5, use_bidirectional_attention=True),
        "use_bidirectional_attention",
    ),
    "quantized": (
        changed(multimodal(TEXT_VERSION_4), quantization_config={"bits": 4}),
        "quantization_config",
    ),
    "global first": (
        changed(TEXT_VERSION_5, layer_types=["full_attention", *["sliding_attention"] * 7]),
        "layer_types does not repeat local layers and one global layer",
    ),
    "irregular": (
        changed(
            TEXT_VERSION_5,
            layer_types=(["sliding_attention"] * 2 + ["full_attention"]) * 2 + ["full_attention"] * 2,
        ),
        "begins with 2 local and 1 global",
    ),
    "layers miscounted": (
        changed(TEXT_VERSION_5, layer_types=["sliding_attention"] * 7),
        "layer_types must name 8 layers",
    ),
    "other layers": (
        changed(TEXT_VERSION_5, layer_types=["linear_attention"] * 8),
        "each sliding_attention or full_attention",
    ),
    "pattern contradicts": (
        changed(TEXT_VERSION_5, sliding_window_pattern=2),
        "sliding_window_pattern = 2 contradicts layer_types",
    ),
    "pattern of nothing": (changed(TEXT_VERSION_4, sliding_window_pattern=0), "sliding_window_pattern is 0"),
    "yarn": (
        changed(TEXT_VERSION_4, rope_scaling={"rope_type": "yarn", "factor": 8.0}),
        "RoPE scaling 'yarn' is not supported",
    ),
    "partly rotated": (rope(rope_type="default", partial_rotary_factor=0.5), "partial_rotary_factor"),
    "local layers scaled": (
        changed(
            TEXT_VERSION_5,
            rope_parameters={"sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        ),
        "local layers with scaled rotary embeddings",
    ),
    "flat rope_parameters": (
        changed(TEXT_VERSION_5, rope_parameters={"rope_theta": 1e6, "rope_type": "default"}),
        "must have an entry each for full_attention and sliding_attention",
    ),
    "two bases": (
        changed(TEXT_VERSION_5, rope_theta=2e6),
        "rope_theta = 2000000.0 contradicts rope_parameters' 500000.0",
    ),
    "two factors": (
        changed(TEXT_VERSION_5, rope_scaling={"rope_type": "linear", "factor": 4.0}),
        "rope_scaling contradicts rope_parameters",
    ),
    "heads do not divide": (changed(TEXT_VERSION_4, num_key_value_heads=3), "must be a multiple of"),
    "no window": (
        changed(TEXT_VERSION_4, sliding_window=None),
        "sliding_window is None; expected a positive",
    ),
    "half a layer": (changed(TEXT_VERSION_4, num_hidden_layers=7.5), "expected a whole number"),
    "a text for a number": (
        changed(TEXT_VERSION_4, hidden_size="32"),
        "hidden_size is '32'; expected a positive",
    ),
    "true for a number": (changed(TEXT_VERSION_4, head_dim=True), "head_dim is True"),
    "infinite": (changed(TEXT_VERSION_4, rope_theta=float("inf")), "rope_theta is inf"),
    "endless": (changed(TEXT_VERSION_4, num_hidden_layers=10**9), "num_hidden_layers = 1,000,000,000"),
    "float16": (changed(TEXT_VERSION_4, torch_dtype="float16"), "torch_dtype = 'float16', in which"),
    "float16 inside": (changed(multimodal(TEXT_VERSION_5), dtype="float16"), "dtype = 'float16', in which"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_we_do_not_compute_is_refused(case: str) -> None:
    content, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        parse_hf_config(content, "there/config.json")
    assert str(caught.value).startswith("there/config.json: ")


@pytest.mark.parametrize("text", ["", "{", "[]", "nan", "{" * 10_000])
def test_a_file_that_is_no_configuration_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config.json(:| is not valid JSON)"):
        read_hf_config(tmp_path)


def test_a_directory_without_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config.json; expected a Hugging Face directory"):
        read_hf_config(tmp_path)


def test_a_pattern_longer_than_the_model_is_all_local() -> None:
    types = ["sliding_attention"] * 8
    config = parse_hf_config(changed(TEXT_VERSION_5, layer_types=types), "config.json")
    assert not any(config.is_global(layer) for layer in range(8))


@pytest.mark.parametrize("name", [key for key in SCHEMAS if key != "both"])
def test_nothing_changes_in_a_source_that_still_holds(name: str) -> None:
    assert updated_hf_config(SCHEMAS[name], CONFIG) == SCHEMAS[name]


CHANGES: dict[str, Callable[[Gemma3Config], Gemma3Config]] = {
    "context": lambda c: dataclasses.replace(c, max_context_tokens=1024),
    "vocabulary": lambda c: dataclasses.replace(c, vocab_size=800),
    "global base": lambda c: dataclasses.replace(c, global_rope_base=2e6),
    "local base": lambda c: dataclasses.replace(c, local_rope_base=2e4),
    "no scaling": lambda c: dataclasses.replace(c, global_rope_factor=1.0),
    "depth": lambda c: dataclasses.replace(c, num_layers=13),
    "pattern": lambda c: dataclasses.replace(c, layers_per_block=4),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_change_is_written_in_the_source_s_schema(name: str, change: str, tmp_path: Path) -> None:
    config = CHANGES[change](CONFIG)
    content = updated_hf_config(SCHEMAS[name], config)
    assert parse_hf_config(content, "config.json") == config
    assert as_transformers_reads(content, tmp_path) == config
    if name in ("version 4", "version 4 multimodal"):
        text = content.get("text_config", content)
        assert not {"rope_parameters", "layer_types"} & text.keys()
    if name in ("version 5", "version 5 multimodal"):
        text = content.get("text_config", content)
        assert (
            not {"rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern"} & text.keys()
        )


def test_only_the_dtype_changes_where_only_the_dtype_did() -> None:
    content = updated_hf_config(TEXT_VERSION_4, CONFIG, dtype="float32")
    assert content == {**TEXT_VERSION_4, "torch_dtype": "float32"}
    content = updated_hf_config(multimodal(TEXT_VERSION_5), CONFIG, dtype="float32")
    assert content == {**multimodal(TEXT_VERSION_5), "dtype": "float32"}


@pytest.mark.parametrize("config", [CONFIG, gemma3_1b(), gemma3_27b()], ids=["tiny", "1b", "27b"])
def test_a_fresh_configuration_reads_the_same_in_both_schemas(config: Gemma3Config, tmp_path: Path) -> None:
    content = fresh_hf_config(config, dtype="bfloat16", ids={"bos_token_id": 2, "eos_token_id": [1, 106]})
    version_5 = {"rope_parameters", "layer_types", "dtype"}
    version_4 = {
        "rope_theta",
        "rope_local_base_freq",
        "rope_scaling",
        "sliding_window_pattern",
        "torch_dtype",
    }
    assert version_4 | version_5 <= content.keys()
    for absent in (set(), version_4, version_5):
        part = {key: value for key, value in content.items() if key not in absent}
        assert parse_hf_config(part, "config.json") == config
        assert as_transformers_reads(part, tmp_path) == config


def test_transformers_takes_dtype_and_ids_from_a_fresh_configuration(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    ids = {"bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(fresh_hf_config(CONFIG, dtype="bfloat16", ids=ids)))
    found = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (str(found.dtype), found.eos_token_id, found.tie_word_embeddings) == (
        "torch.bfloat16",
        [1, 106],
        True,
    )
    assert found.architectures == ["Gemma3ForCausalLM"]


@pytest.mark.parametrize("config", [CONFIG, gemma3_27b()])
def test_our_own_configuration_comes_back(config: Gemma3Config) -> None:
    assert read_model_json(model_json(config)) == config
    with pytest.raises(UserError, match=r"unknown field model.json.depth"):
        read_model_json(b'{"depth": 3}')
