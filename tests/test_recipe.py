"""Recipes: loading, overriding, their JSON, their checks, and what a resume may change."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealion_jax.config_tree import differences, nearest
from sealion_jax.data.mixture import MixtureConfig, SourceConfig, StageConfig
from sealion_jax.errors import UserError
from sealion_jax.evaluation.config import EvaluationConfig
from sealion_jax.model.config import Gemma3Config
from sealion_jax.optimizer import CosineSchedule, OptimizerConfig, WarmupStableDecay
from sealion_jax.recipe import (
    RESUME_RULES,
    TrainConfig,
    apply_overrides,
    check_resume,
    from_json,
    load_recipe,
    override_names,
    overrides_help,
    recipe_names,
    to_json,
)
from sealion_jax.recipe.resume import rule_of

MODEL = Gemma3Config(
    vocab_size=256,
    num_layers=2,
    model_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    feed_forward_dim=32,
    max_context_tokens=512,
)


def config(**changes) -> TrainConfig:
    data = MixtureConfig(
        sources=(
            SourceConfig(name="id", store="gs://b/id", weight=0.1),
            SourceConfig(name="th", store="gs://b/th", weight=0.2),
        ),
        stages=(StageConfig(start_step=50, weights={"id": 1.0, "th": 3.0}),),
    )
    base = TrainConfig(
        name="base",
        tokenizer="t.model",
        model=MODEL,
        data=data,
        sequence_length_tokens=128,
        global_batch_size=8,
        steps=100,
        evaluation=EvaluationConfig(sets={"news": "news.jsonl"}),
    )
    return dataclasses.replace(base, **changes)


# Checks


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"global_batch_size": 8, "microbatches": 3}, ["multiple of microbatches (3)", "try 6 or 9"]),
        ({"global_batch_size": 2, "microbatches": 4}, ["try 4"]),
        ({"steps": 0}, ["steps must be at least 1, not 0"]),
        ({"sequence_length_tokens": 1}, ["sequence_length_tokens must be at least 2"]),
        ({"sequence_length_tokens": 1024}, ["1024", "model.max_context_tokens, 512"]),
        ({"model": None}, ["init_from"]),
        ({"name": "a/b"}, ["slash"]),
        ({"seed": -1}, ["seed"]),
        (
            {"optimizer": OptimizerConfig(schedule=CosineSchedule(warmup_steps=101))},
            ["warmup_steps (101)", "steps (100)"],
        ),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(changes, words):
    with pytest.raises(UserError) as error:
        config(**changes)
    for word in words:
        assert word in str(error.value)


# JSON


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": None, "init_from": "gs://b/gemma", "run_dir": "runs/ä"},
        {"optimizer": OptimizerConfig(schedule=WarmupStableDecay(warmup_steps=3, decay_steps=5))},
        {"optimizer": OptimizerConfig(epsilon=5e-324, beta1=0.1 + 0.2)},
        {"evaluation": EvaluationConfig(sets={})},
    ],
)
def test_json_gives_the_same_configuration_back(changes):
    original = config(**changes)
    restored = from_json(to_json(original))
    assert restored == original
    assert type(restored.optimizer.schedule) is type(original.optimizer.schedule)
    assert to_json(restored) == to_json(original)


@given(rate=st.floats(min_value=0, max_value=1e6), seed=st.integers(min_value=0, max_value=2**63))
@settings(max_examples=50, deadline=None)
def test_json_and_overrides_keep_every_bit_of_a_number(rate, seed):
    words = ["--optimizer.schedule.peak-learning-rate", repr(rate), "--seed", str(seed)]
    changed = apply_overrides(config(), words)
    assert changed.optimizer.schedule.peak_learning_rate == rate
    assert changed.seed == seed
    assert from_json(to_json(changed)) == changed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plain: plain.update(stepz=3), ["unknown field stepz"]),
        (lambda plain: plain.update(steps="3"), ["steps is '3'", "a whole number"]),
        (lambda plain: plain.update(steps=True), ["steps is True"]),
        (lambda plain: plain.pop("tokenizer"), ["field tokenizer is missing"]),
        (lambda plain: plain["optimizer"]["schedule"].update(kind="Linear"), ["optimizer.schedule.kind"]),
        (lambda plain: plain["data"]["sources"][1].update(weight="much"), ["data.sources.1.weight"]),
        (lambda plain: plain["compute"].update(dtype="int8"), ["compute.dtype", "bfloat16"]),
    ],
)
def test_a_damaged_config_json_is_refused_by_the_field(change, words):
    plain = json.loads(to_json(config()))
    change(plain)
    with pytest.raises(UserError) as error:
        from_json(json.dumps(plain))
    for word in ["config.json", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_config_json_that_is_no_object_is_refused(text):
    with pytest.raises(UserError, match=r"config\.json"):
        from_json(text)


def test_a_field_that_an_older_config_json_lacks_takes_its_default():
    plain = json.loads(to_json(config()))
    del plain["seed"], plain["optimizer"]["beta1"]
    assert from_json(json.dumps(plain)) == config()


# Overrides


def changed_fields(*argv: str) -> dict[str, object]:
    return {path: new for path, _, new in differences(config(), apply_overrides(config(), argv))}


@pytest.mark.parametrize(
    "argv",
    [
        ["--optimizer.schedule.peak-learning-rate", "1e-5"],
        ["--optimizer.schedule.peak_learning_rate", "1e-5"],
        ["--optimizer.schedule.peak_learning_rate=1e-5"],
        ["--optimizer.schedule.peak-learning-rate=0.00001"],
    ],
)
def test_a_nested_field_is_set_however_it_is_spelt(argv):
    assert changed_fields(*argv) == {"optimizer.schedule.peak_learning_rate": 1e-5}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--mesh.fsdp 2 --mesh.data -1", {"mesh.fsdp": 2, "mesh.data": -1}),
        ("--checkpoints.keep-every-steps 10", {"checkpoints.keep_every_steps": 10}),
        ("--checkpoints.keep-every-steps none", {}),
        ("--compute.dtype float32", {"compute.dtype": "float32"}),
        ("--data.sources.th.weight 0.9", {"data.sources.th.weight": 0.9}),
        ("--data.sources.1.weight 0.9", {"data.sources.th.weight": 0.9}),
        ("--data.stages.0.weights.th 5", {"data.stages.0.weights.th": 5.0}),
        ("--evaluation.sets.su su.jsonl", {"evaluation.sets.su": "su.jsonl"}),
        ("--evaluation.sets.v1.2 f", {"evaluation.sets.v1.2": "f"}),
        ("--evaluation.sets none", {"evaluation.sets.news": None}),
        (
            "--evaluation.sets a=x=y b=z",
            {"evaluation.sets.news": None, "evaluation.sets.a": "x=y", "evaluation.sets.b": "z"},
        ),
        ("--run-dir=--odd", {"run_dir": "--odd"}),
        ("--microbatches 3 --global-batch-size 9", {"microbatches": 3, "global_batch_size": 9}),
        ("--model none --init-from gs://b/x", {"model": None, "init_from": "gs://b/x"}),
        ("--steps 5 --steps 7", {"steps": 7}),
        ("", {}),
    ],
)
def test_overrides_of_every_kind(argv, expected):
    assert changed_fields(*argv.split()) == expected


@pytest.mark.parametrize("name", ["wsd", "warmup-stable-decay", "WarmupStableDecay"])
def test_another_schedule_keeps_what_both_have(name):
    argv = ["--optimizer.schedule", name, "--optimizer.schedule.decay-steps", "10", "--steps", "200"]
    base = config(optimizer=OptimizerConfig(schedule=CosineSchedule(peak_learning_rate=3e-4, warmup_steps=7)))
    changed = apply_overrides(base, argv)
    assert changed.optimizer.schedule == WarmupStableDecay(
        peak_learning_rate=3e-4, warmup_steps=7, decay_steps=10
    )
    assert changed.steps == 200


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--step 3", ["unknown override --step", "did you mean --steps?"]),
        ("--optimizer.schedule.peak-learning-rat 3", ["--optimizer.schedule.peak-learning-rate?"]),
        ("--learning-rate 3", ["--optimizer.schedule.peak-learning-rate?"]),
        ("--optimiser.beta1 0.9", ["did you mean --optimizer.beta1?"]),
        ("--data.sources.xx.weight 1", ["did you mean --data.sources.th.weight?"]),
        ("--steps 1e3", ["--steps 1e3: expected a whole number, such as 1000"]),
        ("--steps", ["--steps needs a value"]),
        ("--steps 1 2", ["--steps 1 2: expected a whole number"]),
        ("--steps true", ["expected a whole number"]),
        ("--optimizer.beta1 x", ["expected a number, such as 1e-5"]),
        ("--optimizer 3", ["is a group of fields", "--optimizer.beta1"]),
        ("--optimizer.schedule linear", ["one of CosineSchedule, WarmupStableDecay"]),
        ("--compute.remat sometimes", ["compute.remat", "one of none", "'sometimes'"]),
        ("--compute.dtype float16", ["float16 overflows", "bfloat16"]),
        ("--evaluation.sets news", ["name=value pairs"]),
        ("--mesh.data -1", ["at most one is -1"]),
        ("--microbatches 3", ["must be a multiple"]),
        ("steps 3", ["unexpected argument 'steps'", "--some.field VALUE"]),
        ("--steps 3 --", ["unexpected argument '--'"]),
    ],
)
def test_a_wrong_override_is_told_in_one_line(argv, words):
    with pytest.raises(UserError) as error:
        apply_overrides(config(), argv.split())
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_field_of_a_model_that_comes_from_a_checkpoint_cannot_be_set():
    with pytest.raises(UserError, match="model is none in this recipe"):
        apply_overrides(config(model=None, init_from="x"), ["--model.num-layers", "3"])


def test_every_listed_override_is_taken_with_the_value_it_has():
    for line in overrides_help(config()).splitlines():
        name, value = line.strip().split("    ")[0].split(" ", 1)
        if not value.startswith("{"):
            assert apply_overrides(config(), [name, value]) == config(), line
    assert len(overrides_help(config()).splitlines()) == len(override_names(config()))


def test_the_nearest_name():
    names = ["steps", "optimizer.beta1", "optimizer.beta2", "data.stages.0.start-step"]
    assert nearest("step", names) == ["steps"]
    assert nearest("beta2", names) == ["optimizer.beta2"]
    assert nearest("qqqqqq", names) == []


# Loading


RECIPE = '''
from __future__ import annotations
from dataclasses import dataclass, replace
from tests_recipe_base import config

@dataclass(frozen=True)
class Mine:
    """A recipe may define dataclasses."""
    steps: int = 7

def recipe():
    return config(name="mine", steps=Mine().steps + 50)
'''


def test_a_recipe_from_a_file(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tests_recipe_base", sys.modules[__name__])
    file = tmp_path / "mine.py"
    file.write_text(RECIPE)
    assert load_recipe(str(file)) == config(name="mine", steps=57)
    monkeypatch.chdir(tmp_path)
    assert load_recipe("mine.py").name == "mine"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("x = 1", ["defines no function recipe()"]),
        ("def recipe():\n    return 3", ["must return a TrainConfig, not a int"]),
        ("def recipe(:\n    pass", ["line 1"]),
        ("from sealion_jax.errors import UserError\ndef recipe():\n    raise UserError('set X')", ["set X"]),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content, words):
    file = tmp_path / "bad.py"
    file.write_text(content)
    with pytest.raises(UserError) as error:
        load_recipe(str(file))
    for word in words:
        assert word in str(error.value)


def test_a_mistake_in_the_recipe_keeps_its_traceback(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("def recipe():\n    return 1 / 0")
    with pytest.raises(ZeroDivisionError):
        load_recipe(str(file))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cpt_tny", ["unknown recipe 'cpt_tny'", "did you mean cpt_tiny?", "cpt_27b"]),
        ("_sea_lion", ["unknown recipe"]),
        ("no/such/file.py", ["no recipe file no/such/file.py", "cpt_tiny"]),
        ("gone.py", ["no recipe file gone.py"]),
    ],
)
def test_an_unknown_recipe_is_refused_with_the_ones_there_are(name, words):
    with pytest.raises(UserError) as error:
        load_recipe(name)
    for word in words:
        assert word in str(error.value)


def test_the_recipes_that_are_promised_exist():
    promised = {"cpt_tiny", "cpt_sea_small", "cpt_1b", "cpt_4b", "cpt_12b", "cpt_27b"}
    assert promised <= set(recipe_names())


# Resuming


def test_nothing_changed_nothing_told():
    assert check_resume(config(), from_json(to_json(config())), step=10) == []


@pytest.mark.parametrize(
    ("argv", "fields"),
    [
        ("--steps 300", ["steps: 100 -> 300"]),
        ("--steps 90", ["steps: 100 -> 90"]),
        ("--optimizer.schedule wsd", ["optimizer.schedule"]),
        ("--optimizer.schedule.final-learning-rate 1e-6", ["optimizer.schedule.final_learning_rate"]),
        ("--logging.interval-steps 5 --mesh.data 2", ["logging.interval_steps: 1 -> 5", "mesh.data"]),
        ("--checkpoints.keep-last 9", ["checkpoints.keep_last"]),
        ("--evaluation.sets.su su.jsonl", ["evaluation.sets.su: none -> su.jsonl"]),
        ("--microbatches 2", ["microbatches"]),
        ("--compute.remat dots --compute.attention dense", ["compute.remat", "compute.attention"]),
        ("--run-dir elsewhere", ["run_dir"]),
        ("--data.stages.0.weights.th 5", ["data.stages.0.weights.th: 3.0 -> 5.0"]),
        ("--data.stages.0.start-step 60", ["data.stages.0.start_step"]),
    ],
)
def test_what_may_change_is_told(argv, fields):
    told = check_resume(config(), apply_overrides(config(), argv.split()), step=50)
    for field in fields:
        assert any(field in line for line in told), told


@pytest.mark.parametrize(
    ("argv", "field"),
    [
        ("--name other", "name: base -> other"),
        ("--tokenizer other.model", "tokenizer: t.model -> other.model"),
        ("--model.num-layers 3", "model.num_layers: 2 -> 3"),
        ("--init-from x", "init_from: none -> x"),
        ("--seed 1", "seed: 0 -> 1"),
        ("--data.seed 1", "data.seed: 0 -> 1"),
        ("--data.sources.id.weight 0.9", "data.sources.id.weight: 0.1 -> 0.9"),
        ("--data.sources.id.store x", "data.sources.id.store: gs://b/id -> x"),
        ("--sequence-length-tokens 64", "sequence_length_tokens: 128 -> 64"),
        ("--global-batch-size 16", "global_batch_size: 8 -> 16"),
        ("--compute.dtype float32", "compute.dtype: bfloat16 -> float32"),
        ("--optimizer.beta2 0.9", "optimizer.beta2: 0.95 -> 0.9"),
        ("--optimizer.weight-decay 0", "optimizer.weight_decay"),
        ("--optimizer.max-grad-norm 2", "optimizer.max_grad_norm"),
    ],
)
def test_what_must_not_change_is_refused_with_both_values(argv, field):
    changed = apply_overrides(config(), [*argv.split(), "--steps", "300"])
    with pytest.raises(UserError) as error:
        check_resume(config(), changed, step=10)
    assert field in str(error.value)
    assert "another --run-dir" in str(error.value)
    assert "steps: 100 -> 300" not in str(error.value)


def test_all_forbidden_changes_are_listed_at_once():
    argv = ["--seed=1", "--model.num-layers=3", "--global-batch-size=16"]
    changed = apply_overrides(config(), argv)
    with pytest.raises(UserError) as error:
        check_resume(config(), changed)
    for field in ("seed: 0 -> 1", "model.num_layers: 2 -> 3", "global_batch_size: 8 -> 16"):
        assert field in str(error.value)


@pytest.mark.parametrize("step", [51, None])
def test_a_stage_that_has_begun_or_may_have_must_not_change(step):
    changed = apply_overrides(config(), ["--data.stages.0.weights.th", "5"])
    with pytest.raises(UserError, match=r"data\.stages\.0\.weights\.th"):
        check_resume(config(), changed, step=step)


def with_source(weight: float | None, *, first: bool = False) -> TrainConfig:
    new = SourceConfig(name="lo", store="gs://b/lo", weight=weight)
    old = config().data
    stage = StageConfig(start_step=80, weights={"lo": 1.0})
    sources = (new, *old.sources) if first else (*old.sources, new)
    return config(data=dataclasses.replace(old, sources=sources, stages=(*old.stages, stage)))


def test_a_new_source_may_come_in_with_a_later_stage():
    told = check_resume(config(), with_source(0.0), step=60)
    assert any(line.startswith("data.sources.lo: none -> ") for line in told)
    assert any(line.startswith("data.stages.1: none -> ") for line in told)


@pytest.mark.parametrize(("weight", "first"), [(1.0, False), (0.0, True)])
def test_a_new_source_must_not_change_what_was_read(weight, first):
    with pytest.raises(UserError, match=r"data\.sources"):
        check_resume(config(), with_source(weight, first=first), step=60)


def test_a_source_must_not_go():
    fewer = dataclasses.replace(config().data, sources=config().data.sources[:1], stages=())
    with pytest.raises(UserError, match=r"data\.sources\.th"):
        check_resume(config(), config(data=fewer), step=10)


def test_every_field_has_a_rule_and_every_rule_a_field():
    variants = [config(), config(optimizer=OptimizerConfig(schedule=WarmupStableDecay()))]
    paths = {name.replace("-", "_") for variant in variants for name in override_names(variant)}
    used = {rule_of(path).field for path in paths} | {rule_of("data.sources").field}
    assert {field.name for field in dataclasses.fields(TrainConfig)} <= {path.split(".")[0] for path in paths}
    assert used == {rule.field for rule in RESUME_RULES}


def test_a_field_without_a_rule_is_an_error():
    with pytest.raises(LookupError, match="newfield"):
        rule_of("newfield.x")


def test_the_page_has_the_table_of_rules():
    page = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    rows = re.findall(r"^\| `([a-z_.]+)` \| (yes|no) \| (.+) \|$", page, flags=re.MULTILINE)
    expected = [(rule.field, "yes" if rule.may_change else "no", rule.why) for rule in RESUME_RULES]
    assert rows == expected
