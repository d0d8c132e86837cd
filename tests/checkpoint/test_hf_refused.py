"""Sources and places that conversion refuses: each a clear line, and nothing half-written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sealion_jax.checkpoint.digests import write_digests
from sealion_jax.checkpoint.hf import export_hf, import_hf, model_json
from sealion_jax.errors import UserError
from tests.checkpoint.hf_models import (
    CONFIG,
    TEXT_VERSION_4,
    D,
    V,
    random_tensors,
    text_shapes,
    write_directory,
)

Tensors = dict[str, np.ndarray]
NINTH = {name: shape for name, shape in text_shapes("model.", 9).items() if ".layers.8." in name}


def without_norms(tensors: Tensors) -> Tensors:
    return {
        name: array
        for name, array in tensors.items()
        if not name.endswith(("q_norm.weight", "k_norm.weight"))
    }


WRONG_TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "unknown": (
        lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)},
        "1 tensors are not known: model.layers.0.self_attn.rotary_emb.inv_freq",
    ),
    "missing": (
        without_norms,
        "16 tensors are missing: model.layers.0.self_attn.q_norm.weight, .* and 6 more",
    ),
    "a layer too many": (
        lambda t: t | random_tensors(NINTH),
        "13 tensors are not known: model.layers.8.* and 3 more",
    ),
    "padded vocabulary": (
        lambda t: t | random_tensors({"model.embed_tokens.weight": (768, D)}),
        r"model.embed_tokens.weight is \[768, 32\] instead of \[704, 32\]",
    ),
    "float16": (
        lambda t: {name: array.astype(np.float16) for name, array in t.items()},
        r"dtype F16 \(float16 overflows in Gemma 3\), where bfloat16 or float32 is expected",
    ),
    "another head": (
        lambda t: t | random_tensors({"lm_head.weight": (V, D)}, seed=7),
        "lm_head.weight is not equal to model.embed_tokens.weight",
    ),
    "no Gemma": (
        lambda t: random_tensors({"transformer.wte.weight": (V, D), "transformer.ln_f.weight": (D,)}),
        "has no embedding of Gemma 3: expected one of .*model.embed_tokens.weight",
    ),
}


def assert_refused(source: Path, message: str) -> None:
    target = source.parent / "made" / "step"
    with pytest.raises(UserError, match=message):
        import_hf(source, target)
    assert not target.parent.exists() or not list(target.parent.iterdir())


@pytest.fixture
def tensors() -> Tensors:
    return random_tensors(text_shapes("model."))


@pytest.fixture
def source(tensors: Tensors, tmp_path: Path) -> Path:
    """A good one, in two shards."""
    return write_directory(tmp_path / "hf", TEXT_VERSION_4, tensors, num_shards=2)


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_tensors_that_are_not_the_model_s(case: str, tensors: Tensors, tmp_path: Path) -> None:
    change, message = WRONG_TENSORS[case]
    assert_refused(write_directory(tmp_path / "hf", TEXT_VERSION_4, change(tensors), num_shards=2), message)


def test_an_untied_head_that_is_not_there(tensors: Tensors, tmp_path: Path) -> None:
    config = {**TEXT_VERSION_4, "tie_word_embeddings": False}
    source = write_directory(tmp_path / "hf", config, tensors)
    assert_refused(source, "tie_word_embeddings = false, but there is no lm_head.weight")


def test_a_truncated_shard(source: Path) -> None:
    shard = source / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert_refused(source, "model-00002-of-00002.safetensors is truncated")


def test_a_missing_shard(source: Path) -> None:
    (source / "model-00001-of-00002.safetensors").unlink()
    assert_refused(source, "model-00001-of-00002.safetensors missing, of 2 files")


def test_a_broken_tokenizer(source: Path) -> None:
    (source / "tokenizer.model").write_bytes(b"<html>not found</html>")
    assert_refused(source, "tokenizer.model: not a SentencePiece model")


def test_places_and_checkpoints_that_are_no_good(source: Path, tmp_path: Path) -> None:
    step, out = tmp_path / "step", tmp_path / "out"
    import_hf(source, step)
    for write, what in ((import_hf, source), (export_hf, step)):
        before = sorted(path.name for path in source.iterdir())
        with pytest.raises(UserError, match="exists and is not empty; give another place"):
            write(what, source)
        assert sorted(path.name for path in source.iterdir()) == before

    (step / "assets/model.json").write_bytes(model_json(dataclasses.replace(CONFIG, num_layers=9)))
    with pytest.raises(UserError, match=r"is damaged: assets/model.json: content changed"):
        export_hf(step, out)
    write_digests(step)
    with pytest.raises(
        UserError,
        match=r"has not the weights that its assets describe: blocks/layer_0/attention/key is ",
    ):
        export_hf(step, out)
    (step / "assets/model.json").unlink()
    write_digests(step)
    with pytest.raises(UserError, match=r"has no assets/model.json"):
        export_hf(step, out)
    assert not out.exists()
