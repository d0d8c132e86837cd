"""The recipes in configs/: what they promise, and that they can be started."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from sealion_configs import _sea_lion, cpt_sea_small, cpt_tiny
from sealion_jax.data.mixture import MixtureConfig
from sealion_jax.data.store.token_store import TokenStore
from sealion_jax.embedded import embedded
from sealion_jax.errors import UserError
from sealion_jax.evaluation.documents import read_documents
from sealion_jax.model.config import Gemma3Config
from sealion_jax.model.gemma3 import abstract_params, parameter_axes
from sealion_jax.objectives.preference_config import PreferenceConfig
from sealion_jax.optimizer import CosineSchedule, WarmupStableDecay, learning_rate_schedule
from sealion_jax.recipe import TrainConfig, from_json, load_recipe, to_json
from sealion_jax.run.update import on_mesh
from sealion_jax.sharding import (
    MESH_AXES,
    batch_devices,
    mesh_shape,
    partition_spec,
)

LARGE = {"cpt_1b": 1e9, "cpt_4b": 3.88e9, "cpt_12b": 11.77e9, "cpt_27b": 27.0e9}


def num_parameters(model: Gemma3Config) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(model, jnp.float32)))


def mesh_over(config: TrainConfig, devices: int) -> AbstractMesh:
    return AbstractMesh(tuple(mesh_shape(config.mesh, devices).values()), MESH_AXES)


@pytest.mark.parametrize("name", LARGE)
def test_a_large_recipe_has_the_published_settings(name):
    config = load_recipe(name)
    assert config.name == name
    assert config.model is not None
    assert num_parameters(config.model) == pytest.approx(LARGE[name], rel=0.01)
    assert (config.sequence_length_tokens, config.global_batch_size) == (8192, 1024)
    tokens = config.steps * config.sequence_length_tokens * config.global_batch_size
    assert tokens == pytest.approx(500e9, rel=1e-4)
    assert isinstance(config.optimizer.schedule, CosineSchedule)
    assert config.optimizer.schedule.final_learning_rate == 4e-8
    assert config.compute.dtype == "bfloat16"
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("cpt_1b", (4, 8, 256)),
        ("cpt_4b", (8, 16, 256)),
        ("cpt_12b", (16, 64, 256)),
        ("cpt_27b", (32, 64, 256)),
    ],
)
def test_a_large_recipe_divides_over_the_devices_it_is_for(name, devices):
    config = load_recipe(name)
    assert config.model is not None
    axes = parameter_axes(config.model)
    for count in devices:
        mesh = mesh_over(config, count)
        rows = config.global_batch_size // batch_devices(mesh) // on_mesh(config, mesh).microbatches
        assert 1 <= rows <= (config.rows_per_device or 0)

        def split(path, leaf, mesh=mesh):
            logical = axes
            for entry in path:
                logical = logical[entry.key]
            return partition_spec(logical, leaf.shape, mesh)

        jax.tree_util.tree_map_with_path(split, abstract_params(config.model, jnp.float32))


@pytest.mark.parametrize("size", ["1b", "4b", "27b"])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_later_stage_goes_on_from_the_one_before(stage, size, monkeypatch):
    monkeypatch.setenv("SEALION_BUCKET", "gs://mine")
    config, before = load_recipe(f"{stage}_{size}"), load_recipe(f"cpt_{size}")
    assert (config.model, config.tokenizer, config.mesh) == (before.model, before.tokenizer, before.mesh)
    assert config.init_from == f"gs://mine/runs/{'cpt' if stage == 'sft' else 'sft'}_{size}"
    assert len(config.data.sources) == 10
    if stage == "dpo":
        assert isinstance(config.objective, PreferenceConfig)
        assert [loss.name for loss in config.objective.losses] == ["apo_zero"]
    assert from_json(to_json(config)) == config
    for count in {"1b": (4, 128), "4b": (8, 128), "27b": (16, 128)}[size]:
        mesh = mesh_over(config, count)
        assert config.global_batch_size % (batch_devices(mesh) * on_mesh(config, mesh).microbatches) == 0


def test_the_mixture_is_sea_lion_v4s():
    shares = _sea_lion.V4_PERCENT_OF_TOKENS
    assert sum(shares.values()) == 100
    assert shares["code_starcoder"] == 10
    assert sum(share for name, share in shares.items() if name.startswith("en_")) == 40
    assert (shares["zh"], shares["vi"], shares["id"], shares["th"]) == (9, 8.5, 8.5, 8.5)
    assert sum(shares[name] for name in ("tl", "ta", "ms", "km", "lo", "my")) == 15.5
    mixture = _sea_lion.sea_lion_v4_mixture("gs://b")
    assert isinstance(mixture, MixtureConfig)
    assert {source.name: source.weight for source in mixture.sources} == shares


def test_the_bucket_is_the_users(monkeypatch):
    monkeypatch.setenv("SEALION_BUCKET", "gs://mine/")
    config = load_recipe("cpt_27b")
    assert config.init_from == config.tokenizer == "gs://mine/gemma-3-27b-it"
    assert {s.store for s in config.data.sources} >= {"gs://mine/stores/lo", "gs://mine/stores/en_dclm_hq"}
    monkeypatch.delenv("SEALION_BUCKET")
    assert "$SEALION_BUCKET" in load_recipe("cpt_27b").data.sources[0].store


def test_the_schedules_reach_what_the_cards_say():
    steps = 1000
    v3 = _sea_lion.v3_schedule(steps)
    assert isinstance(v3, WarmupStableDecay)
    rate = learning_rate_schedule(v3, steps)
    assert [float(rate(jnp.int32(step))) for step in (99, 500, 899, 999)] == pytest.approx(
        [1e-5, 1e-5, 1e-5, 1e-7], rel=1e-6
    )
    rate = learning_rate_schedule(_sea_lion.v4_schedule(steps), steps)
    assert float(rate(jnp.int32(999))) == pytest.approx(4e-8, rel=1e-3)


def test_the_embedded_default_has_every_mechanism_of_gemma_3():
    config = load_recipe()
    model = config.model
    assert config.name == "cpt_tiny"
    assert model is not None
    assert (model.num_blocks, model.num_rest_layers) == (1, 2)
    assert model.num_heads > model.num_kv_heads > 1
    assert model.sliding_window_tokens < config.sequence_length_tokens
    assert model.global_rope_factor != 1
    assert model.query_scale_dim != model.head_dim
    assert 2e6 < num_parameters(model) < 8e6
    assert config.compute.dtype == "float32"
    assert from_json(to_json(config)) == config


def test_the_embedded_default_trains_on_thirteen_languages_alike():
    config = load_recipe("cpt_tiny")
    names = {source.name for source in config.data.sources}
    assert names == {"id", "ms", "tl", "vi", "th", "ta", "my", "km", "lo", "jv", "su", "en", "zh"}
    assert {source.weight for source in config.data.sources} == {1.0}
    assert set(config.evaluation.sets) == names
    for source in config.data.sources:
        assert TokenStore.open(source.store).num_documents > 0
    assert config.model == cpt_tiny.model(embedded().vocab_size)


@pytest.mark.parametrize("vocabulary", [16_384, 262_144])
def test_the_small_recipe_is_small_with_either_tokenizer(vocabulary):
    assert 19.9e6 < num_parameters(cpt_sea_small.model(vocabulary)) < 60e6


def test_the_small_recipe_says_how_to_prepare_its_data(tmp_path, monkeypatch):
    monkeypatch.setenv("SEALION_SEA_SMALL", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"python -m sealion_configs\.cpt_sea_small --output"):
        load_recipe("cpt_sea_small")
    with pytest.raises(UserError, match="SEALION_SHARED_DATA"):
        cpt_sea_small.main(["--texts", str(tmp_path)])


@pytest.fixture(scope="module")
def small_texts(tmp_path_factory):
    """A folder laid out like the shared data, with the embedded corpus in it."""
    corpus = embedded()
    folder = tmp_path_factory.mktemp("texts")
    (folder / "cpt").mkdir()
    (folder / "eval").mkdir()
    for language, file in corpus.texts.heldout.items():
        text = file.read_text(encoding="utf-8")
        row = json.loads(text.splitlines()[0])
        many = [{**row, "text": f"{row['text']} {number}"} for number in range(40)]
        lines = [json.dumps(each, ensure_ascii=False) for each in many]
        (folder / "cpt" / f"{language}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = [
        {"doc": doc, "line": line} | {lang: f"{lang} {line}" for lang in cpt_sea_small.NTREX_LANGUAGES}
        for doc, line in (("b", 7), ("a", 3), ("a", 2), ("b", 8))
    ]
    heldout = "\n".join(map(json.dumps, rows)) + "\n"
    (folder / "eval" / "ntrex_heldout.jsonl").write_text(heldout)
    return folder


def test_the_small_recipe_starts_from_what_its_command_prepares(small_texts, tmp_path, monkeypatch, capsys):
    output = tmp_path / "small"
    argv = ["--texts", str(small_texts), "--tokenizer", str(embedded().tokenizer), "--output", str(output)]
    monkeypatch.setattr(cpt_sea_small, "HELD_OUT_SHARE", 0.3)
    cpt_sea_small.main(argv)
    monkeypatch.setenv("SEALION_SEA_SMALL", str(output))
    config = load_recipe("cpt_sea_small")
    assert config.model is not None
    assert config.model.vocab_size == embedded().vocab_size
    stores = {source.name: TokenStore.open(source.store) for source in config.data.sources}
    assert len(stores) == 13
    for language, file in config.evaluation.sets.items():
        held_out = list(read_documents(file))
        assert held_out, language
        assert {document.language for document in held_out} == {language}
    assert [document.text for document in read_documents(config.evaluation.sets["th"])] == [
        "th 2\nth 3",
        "th 7\nth 8",
    ]
    assert stores["th"].num_documents == 40
    assert stores["jv"].num_documents + len(list(read_documents(config.evaluation.sets["jv"]))) == 40
    before = {file: file.stat().st_mtime_ns for file in output.rglob("*.bin")}
    cpt_sea_small.main(argv)
    assert {file: file.stat().st_mtime_ns for file in output.rglob("*.bin")} == before
    assert "next: python -m sealion_jax.train cpt_sea_small" in capsys.readouterr().out


@pytest.mark.slow
def test_the_small_recipe_on_the_real_texts(shared_data, tmp_path, monkeypatch):
    cpt_sea_small.main(["--texts", str(shared_data), "--output", str(tmp_path)])
    monkeypatch.setenv("SEALION_SEA_SMALL", str(tmp_path))
    config = load_recipe("cpt_sea_small")
    assert config.model is not None
    assert config.model.vocab_size == 16_384
    documents = {s.name: TokenStore.open(s.store).num_documents for s in config.data.sources}
    assert documents["en"] == documents["zh"] == 131
    for language, rows in (("jv", 3929), ("su", 4199)):
        held_out = len(list(read_documents(config.evaluation.sets[language])))
        assert documents[language] + held_out == rows
        assert held_out == pytest.approx(rows * 0.02, rel=0.5)
