"""Recipes: loading, overriding, their JSON, their checks, and what a resume may change."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealion_jax.data.mixture import SourceConfig, StageConfig
from sealion_jax.errors import UserError
from sealion_jax.evaluation.config import EvaluationConfig
from sealion_jax.objectives.preference_config import PreferenceConfig
from sealion_jax.optimizer import (
    CosineSchedule,
    OptimizerConfig,
    WarmupStableDecay,
    learning_rate_schedule,
)
from sealion_jax.recipe import (
    RESUME_RULES,
    TrainConfig,
    apply_overrides,
    check_resume,
    from_json,
    load_and_override,
    load_recipe,
    override_names,
    read_fingerprints,
    recipe_names,
    to_json,
)
from sealion_jax.recipe.resume import rule_of
from tests.tiny_recipe import config

NAN, INF = float("nan"), float("inf")

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
        ({"seed": -1}, ["seed must be at least 0, not -1"]),
        ({"seed": 2**63}, ["seed must be less than 9223372036854775808"]),
        ({"steps": 12.5}, ["steps is 12.5; expected a whole number"]),
        ({"steps": "12"}, ["steps is '12'; expected a whole number"]),
        ({"tokenizer": Path("t.model")}, ["tokenizer is", "expected a text"]),
        ({"optimizer": CosineSchedule()}, ["optimizer is", "expected a OptimizerConfig"]),
        ({"evaluation": EvaluationConfig(sets={"news": 3})}, ["evaluation.sets.news is 3", "a text"]),
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


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("model.query_scale_dim", [0.5, 256], [0, -1, NAN, INF, "256", True]),
        ("model.local_rope_base", [1e4], [0, -3, NAN, INF]),
        ("model.global_rope_base", [1e6], [0, -3, NAN, INF]),
        ("model.global_rope_factor", [8.0], [0, -1, NAN, INF]),
        ("model.norm_epsilon", [1e-12], [0, -1, NAN, INF]),
        ("model.max_context_tokens", [256], [0, -1, 256.5, NAN]),
        ("model.num_layers", [1], [0, 2.5, NAN, "2", True]),
        ("optimizer.beta1", [0, 0.999], [-0.1, 1, NAN, INF]),
        ("optimizer.beta2", [0, 0.999], [-0.1, 1, NAN, INF]),
        ("optimizer.epsilon", [1e-15], [0, -1, NAN, INF]),
        ("optimizer.weight_decay", [0, 0.1], [-1, NAN, INF, "0.1"]),
        ("optimizer.max_grad_norm", [0.1, 1], [0, -1, NAN, INF]),
        ("optimizer.schedule.peak_learning_rate", [0, 1e-5], [-1, NAN, INF, "1e-5"]),
        ("optimizer.schedule.final_learning_rate", [0], [-1, NAN, INF]),
        ("optimizer.schedule.warmup_steps", [0], [-1, 0.5, "3"]),
        ("optimizer.schedule.decay_steps", [0], [-1, 0.5, "3"]),
        ("mesh.data", [1, 2], [0, -2, 1.5, "2"]),
        ("checkpoints.interval_steps", [1], [0, 2.5, "2"]),
    ],
)
def test_a_number_that_makes_no_sense_is_refused_by_its_field(field, good, bad):
    *groups, name = field.split(".")
    group = config(optimizer=OptimizerConfig(schedule=WarmupStableDecay()))
    for step in groups:
        group = getattr(group, step)
    for value in good:
        assert getattr(dataclasses.replace(group, **{name: value}), name) == value
    for value in bad:
        with pytest.raises(UserError, match=name):
            dataclasses.replace(group, **{name: value})


def test_a_list_where_a_tuple_is_expected_is_refused():
    stages: Any = list(config().data.stages)
    with pytest.raises(UserError, match=r"data\.stages is a list; expected a tuple"):
        config(data=dataclasses.replace(config().data, stages=stages))


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


@given(rate=st.floats(min_value=0, max_value=1e6), seed=st.integers(min_value=0, max_value=2**63 - 1))
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


def test_fingerprints_lie_beside_the_fields():
    fingerprints = {"tokenizer": "ab", "data.sources.id.store": "cd"}
    text = to_json(config(), fingerprints=fingerprints)
    assert from_json(text) == config()
    assert read_fingerprints(text) == fingerprints
    assert read_fingerprints(to_json(config())) == {}
    with pytest.raises(UserError, match=r"fingerprints\.tokenizer is 3"):
        read_fingerprints('{"fingerprints": {"tokenizer": 3}}')


def test_a_field_that_an_older_config_json_lacks_takes_its_default():
    plain = json.loads(to_json(config()))
    del plain["seed"], plain["optimizer"]["beta1"]
    assert from_json(json.dumps(plain)) == config()


# Loading


WRONG = """
from sealion_jax.recipe import load_recipe
import dataclasses

def recipe():
    return dataclasses.replace(load_recipe("cpt_tiny"), steps={steps})
"""


@pytest.mark.parametrize("steps", ["12.5", "'12'", "True", "0"])
def test_a_value_of_another_type_is_told_with_its_file_and_field(tmp_path, steps):
    file = tmp_path / "wrong.py"
    file.write_text(WRONG.format(steps=steps))
    with pytest.raises(UserError, match=rf"^{file}: steps (is|must be) .*({steps}|least 1)"):
        load_recipe(str(file))


MISUSED_FIELDS = """
import dataclasses
from sealion_jax.data.mixture import SourceConfig
from sealion_jax.objectives import preference_config as losses
from sealion_jax.objectives.preference_config import APOZeroLoss

def recipe():
    return losses.PreferenceConfig(losses=({loss},))
"""


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (
            "APOZeroLoss(label_smoothing=0.1)",
            r"APOZeroLoss has no field label_smoothing\. Its fields: weight, beta",
        ),
        ("losses.SimPOLoss(reference_free=True)", r"SimPOLoss has no field reference_free\."),
        ("losses.SigmoidLoss(bta=0.1)", r"SigmoidLoss has no field bta; did you mean beta\?"),
        ("SourceConfig(name='a')", "SourceConfig needs 'store'"),
    ],
)
def test_fields_that_are_too_many_or_too_few_are_told_with_their_line(tmp_path, loss, told):
    file = tmp_path / "wrong.py"
    file.write_text(MISUSED_FIELDS.format(loss=loss))
    with pytest.raises(UserError, match=rf"^{file}, line 8: {told}"):
        load_recipe(str(file))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            "--steps 10 cpt_tiny",
            ["--steps 10 cpt_tiny: expected", "if cpt_tiny is the recipe, it comes first"],
        ),
        ("cpt_tiny", ["unexpected argument 'cpt_tiny'", "it comes first"]),
        ("--steps 10 my/own.py", ["if my/own.py is the recipe, it comes first"]),
    ],
)
def test_a_recipe_that_does_not_come_first_is_told_so(argv, words):
    with pytest.raises(UserError) as error:
        load_and_override(None, argv.split())
    for word in words:
        assert word in str(error.value)


def test_the_recipe_is_overridden_and_no_place_is_told_where_it_is_right():
    assert load_and_override("cpt_tiny", ["--steps", "10", "--name", "cpt_1b"]).steps == 10
    for name, argv in (("cpt_tiny", ["--steps", "cpt_tiny"]), (None, ["--steps", "x"])):
        with pytest.raises(UserError, match=r"whole number, such as 1000$"):
            load_and_override(name, argv)


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


@pytest.mark.parametrize(("steps", "done"), [(90, 91), (90, 100), (100, 101)])
def test_fewer_steps_than_are_done_are_refused(steps, done):
    with pytest.raises(UserError, match=rf"steps is {steps}, but this run has done {done} already"):
        check_resume(config(), apply_overrides(config(), ["--steps", str(steps)]), step=done)
    assert check_resume(config(), config(), step=100) == []


WSD = "--optimizer.schedule wsd --optimizer.schedule.warmup-steps 10 --optimizer.schedule.decay-steps 20"
COSINE = "--optimizer.schedule.warmup-steps 10"


@pytest.mark.parametrize(
    ("before", "after", "step", "exact_from"),
    [
        (WSD, "--steps 300", 80, None),
        (WSD, "--steps 300", 81, 80),
        (WSD, "--steps 300", 95, 80),
        (WSD, "--steps 60", 40, None),
        (WSD, "--steps 60", 41, 40),
        (WSD, "--optimizer.schedule.decay-steps 60", 40, None),
        (WSD, "--optimizer.schedule.decay-steps 60", 60, 40),
        (WSD, "--optimizer.schedule.peak-learning-rate 1e-4", 5, 0),
        (WSD, "--optimizer.schedule.peak-learning-rate 1e-4", 0, None),
        (WSD, "--optimizer.schedule.peak-learning-rate 1e-4", None, None),
        (COSINE, "--steps 300", 10, None),
        (COSINE, "--steps 300", 50, 10),
        (COSINE, "--optimizer.schedule wsd", 50, 10),
        (COSINE, "--logging.interval-steps 7", 50, None),
    ],
)
def test_another_learning_rate_for_steps_that_are_done_is_told(before, after, step, exact_from):
    old = apply_overrides(config(), before.split())
    new = apply_overrides(old, after.split())
    told = [line for line in check_resume(old, new, step=step) if line.startswith("warning")]
    if exact_from is None:
        assert told == []
        return
    (line,) = told
    remedy = f"checkpoint {exact_from} or one" if exact_from else "none but the run's beginning"
    assert f"step {exact_from + 1} would have had" in line
    assert f"from {remedy}" in line

    # The oracle: the last checkpoint before which both schedules agree.
    def rates(config: TrainConfig) -> list[float]:
        rate = learning_rate_schedule(config.optimizer.schedule, config.steps)
        return [float(rate(number)) for number in range(exact_from + 1)]

    assert rates(old)[:-1] == rates(new)[:-1]
    assert rates(old)[-1] != rates(new)[-1]


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


MOVED = ["--tokenizer", "moved/t.model", "--data.sources.id.store", "gs://c/id"]
HELD = {"tokenizer": "a", "data.sources.id.store": "b", "data.sources.th.store": "c"}


def test_an_input_that_holds_the_same_may_lie_elsewhere():
    told = check_resume(config(), apply_overrides(config(), MOVED), step=10, inputs=(HELD, HELD))
    assert told == ["tokenizer: t.model -> moved/t.model", "data.sources.id.store: gs://b/id -> gs://c/id"]


@pytest.mark.parametrize("recorded", [{}, {**HELD, "tokenizer": "x", "data.sources.id.store": "x"}])
def test_an_input_that_moved_and_may_hold_something_else_is_refused(recorded):
    with pytest.raises(UserError) as error:
        check_resume(config(), apply_overrides(config(), MOVED), step=10, inputs=(recorded, HELD))
    assert "tokenizer: t.model -> moved/t.model" in str(error.value)
    assert "data.sources.id.store: gs://b/id -> gs://c/id" in str(error.value)


def test_an_input_that_holds_something_else_where_it_was_is_refused():
    found = {**HELD, "data.sources.th.store": "x", "data.sources.new.store": "y"}
    with pytest.raises(UserError, match=r"data\.sources\.th\.store: what lies there is not") as error:
        check_resume(config(), config(), step=10, inputs=(HELD, found))
    assert "tokenizer:" not in str(error.value)
    assert "data.sources.new" not in str(error.value)


def test_a_source_must_not_go():
    fewer = dataclasses.replace(config().data, sources=config().data.sources[:1], stages=())
    with pytest.raises(UserError, match=r"data\.sources\.th"):
        check_resume(config(), config(data=fewer), step=10)


def test_every_field_has_a_rule_and_every_rule_a_field():
    variants = [
        config(),
        config(optimizer=OptimizerConfig(schedule=WarmupStableDecay())),
        config(objective=PreferenceConfig()),
    ]
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
