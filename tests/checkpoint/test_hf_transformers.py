"""Transformers and what we read and write: same tensors, same logits, and a comparison that sees if not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sealion_jax.checkpoint.hf import export_hf, import_hf
from sealion_jax.checkpoint.hf_verify import TOLERANCE, compare, require_memory
from sealion_jax.errors import UserError
from tests.checkpoint.hf_models import (
    BF16,
    CONFIG,
    F32,
    TEXT_VERSION_4,
    TEXT_VERSION_5,
    V,
    assert_same_tensors,
    multimodal,
    random_tensors,
    read_directory,
    text_shapes,
    vision_shapes,
    write_directory,
    write_step,
)
from tests.tiny_text import tiny_tokenizer

transformers: Any = pytest.importorskip("transformers", minversion="5")
torch: Any = pytest.importorskip("torch")

TOKENS = np.random.default_rng(0).integers(0, V, (2, 40))


def load(directory: Path) -> Any:
    """The model as Transformers loads it, with nothing missing and nothing left over."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", local_files_only=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS)).logits


def randomised(model: Any, *, seed: int = 0) -> Any:
    """The model with every parameter drawn anew, norms too, which Transformers begins at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(drawn.to(parameter.dtype))
    return model


def made_by_transformers(kind: str, folder: Path) -> Path:
    """A checkpoint that Transformers itself has made and saved; generation stops at <eos> alone."""
    text = transformers.Gemma3TextConfig(**{k: v for k, v in TEXT_VERSION_5.items() if k != "architectures"})
    if kind == "text":
        model = transformers.Gemma3ForCausalLM(text).to(torch.bfloat16)
    else:
        content = multimodal(TEXT_VERSION_5)
        others = content.keys() - {"text_config", "architectures", "dtype", "eos_token_id"}
        config = transformers.Gemma3Config(text_config=text, **{key: content[key] for key in others})
        model = transformers.Gemma3ForConditionalGeneration(config)
    randomised(model).save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.mark.parametrize("kind", ["text", "multimodal"])
def test_what_transformers_saves_comes_back(kind: str, tmp_path: Path) -> None:
    source = made_by_transformers(kind, tmp_path / "hf")
    import_hf(source, tmp_path / "step")
    export_hf(tmp_path / "step", tmp_path / "out")
    assert_same_tensors(read_directory(tmp_path / "out"), read_directory(source))
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (source / file).read_bytes()
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(source)))


HAND_MADE = {
    "text, version 4": (TEXT_VERSION_4, text_shapes("model."), BF16),
    "multimodal, version 4": (
        multimodal(TEXT_VERSION_4),
        text_shapes("language_model.model.") | vision_shapes("", "vision_tower."),
        F32,
    ),
    "multimodal, version 5": (
        multimodal(TEXT_VERSION_5),
        text_shapes("model.language_model.") | vision_shapes("model.", "vision_tower."),
        BF16,
    ),
}


@pytest.mark.parametrize("name", HAND_MADE)
def test_both_schemas_and_all_names_give_equal_logits(name: str, tmp_path: Path) -> None:
    config, shapes, dtype = HAND_MADE[name]
    config = {**config, **{key: dtype.name for key in ("dtype", "torch_dtype") if key in config}}
    source = write_directory(tmp_path / "hf", config, random_tensors(shapes, dtype))
    import_hf(source, tmp_path / "step")
    export_hf(tmp_path / "step", tmp_path / "out", max_shard_bytes=50_000)
    before, after = load(source), load(tmp_path / "out")
    assert {str(parameter.dtype) for parameter in after.parameters()} == {f"torch.{dtype.name}"}
    assert torch.equal(logits(after), logits(before))
    found = compare(tmp_path / "step", tmp_path / "out")
    assert found.agrees and found.max_difference < 1e-4 * max(1.0, found.max_logit)
    assert found.num_tokens == 72  # the window of 8 and 64 more


@pytest.fixture(scope="module")
def from_scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that no Hugging Face directory stands behind, in float32, with its own tokenizer."""
    folder = tmp_path_factory.mktemp("scratch")
    tokenizer, _ = tiny_tokenizer(folder)
    return write_step(folder / "step", CONFIG, {"tokenizer.model": tokenizer.model_bytes})


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_model_trained_from_scratch_is_read_by_transformers(
    dtype: str | None, from_scratch: Path, tmp_path: Path
) -> None:
    done = export_hf(from_scratch, tmp_path / "out", dtype=dtype)
    assert done.dtype == (dtype or "float32") and not done.notes
    model = load(tmp_path / "out")
    assert type(model).__name__ == "Gemma3ForCausalLM" and str(model.dtype) == f"torch.{done.dtype}"
    assert model.generation_config.eos_token_id == [1, 106]
    assert (model.generation_config.bos_token_id, model.generation_config.pad_token_id) == (2, 0)
    found = compare(from_scratch, tmp_path / "out")
    assert found.agrees and found.same_ids
    assert "agrees with Transformers" in found.describe()


def corrupt_config(directory: Path, **values: object) -> None:
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**content, **values}))


@pytest.mark.parametrize("case", ["factor", "window", "norm", "transposed", "tokenizer"])
def test_the_comparison_notices_a_wrong_export(case: str, from_scratch: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_hf(from_scratch, out)
    tensors = read_directory(out)
    name = "model.layers.3.self_attn.q_proj.weight"
    if case == "factor":
        rope = {
            "full_attention": {"rope_theta": 5e5, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 5e3, "rope_type": "default"},
        }
        corrupt_config(out, rope_parameters=rope, rope_scaling=None)
    elif case == "window":
        corrupt_config(out, sliding_window=9)
    elif case == "norm":
        tensors["model.layers.6.pre_feedforward_layernorm.weight"] += 0.05
        write_directory(out, json.loads((out / "config.json").read_text()), tensors)
    elif case == "transposed":
        heads = tensors[name].reshape(4, 16, 32)
        tensors[name] = np.ascontiguousarray(heads.transpose(1, 0, 2)).reshape(64, 32)
        write_directory(out, json.loads((out / "config.json").read_text()), tensors)
    else:
        settings = json.loads((out / "tokenizer_config.json").read_text())
        (out / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": False}))
    found = compare(from_scratch, out)
    assert not found.agrees
    assert "FAILED" in found.describe()
    assert found.same_ids is (case != "tokenizer")
    if case != "tokenizer":
        assert found.max_difference > 3 * TOLERANCE * found.max_logit


def test_the_comparison_needs_local_files_and_memory(from_scratch: Path) -> None:
    with pytest.raises(UserError, match="reads local directories only"):
        compare(from_scratch, "gs://bucket/model")
    with pytest.raises(UserError, match=r"holds the model in float32, \d+ GB in all; \d+ GB are free"):
        require_memory(10**15)
