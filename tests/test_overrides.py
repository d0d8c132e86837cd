"""Overrides on the command line: what they set, what is refused, and what is suggested instead."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealion_jax.config_tree import differences, nearest
from sealion_jax.errors import UserError
from sealion_jax.model.lora import LoraConfig
from sealion_jax.optimizer import CosineSchedule, OptimizerConfig, WarmupStableDecay
from sealion_jax.recipe import apply_overrides, override_names, overrides_help
from sealion_jax.recipe.suggestions import OTHER_NAMES, suggest
from tests.tiny_recipe import config

FLOAT16 = ["float16", "fp16", "half", "FLOAT16"]


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
        ("--data.stages none", {"data.stages.0": None}),
        ("--data.stages NONE", {"data.stages.0": None}),
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
@pytest.mark.parametrize("order", [1, -1])
def test_another_schedule_keeps_what_both_have(name, order):
    options = [("--optimizer.schedule", name), ("--optimizer.schedule.decay-steps", "10"), ("--steps", "200")]
    argv = [word for option in options[::order] for word in option]
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
        ("--learning-rate 3", ["--optimizer.schedule.peak-learning-rate or --optimizer"]),
        ("--lr 3", ["did you mean --optimizer.schedule.peak-learning-rate?", "RECIPE --help"]),
        ("--proccess-id 3", ["did you mean --process-id?"]),
        (
            "--optimizer.schedule.decay-steps 4",
            [
                "is a field of WarmupStableDecay",
                "a CosineSchedule",
                "--optimizer.schedule warmup-stable-decay",
            ],
        ),
        (
            "--optimizer.schedule cosine --optimizer.schedule.decay-steps 4",
            ["is a field of WarmupStableDecay"],
        ),
        ("--data.stages 3", ["--data.stages 3: expected a list", "none"]),
        ("--data.sources none", ["at least one source"]),
        ("--data.stages none --data.stages.0.start-step 3", ["entry 0", "emptied"]),
        ("--seed 99999999999999999999", ["seed must be less than"]),
        ("--optimizer.max-grad-norm nan", ["optimizer.max_grad_norm must be a finite number, not nan"]),
        ("--optimiser.beta1 0.9", ["did you mean --optimizer.beta1?"]),
        (
            "--data.sources.xx.weight 1",
            ["did you mean --data.sources.id.weight or --data.sources.th.weight?"],
        ),
        ("--steps 1e3", ["--steps 1e3: expected a whole number, such as 1000"]),
        ("--steps", ["--steps needs a value"]),
        ("--steps 1 2", ["--steps 1 2: expected a whole number"]),
        ("--steps true", ["expected a whole number"]),
        ("--optimizer.beta1 x", ["expected a number, such as 1e-5"]),
        ("--optimizer 3", ["is a group of fields", "--optimizer.beta1"]),
        ("--optimizer.schedule linear", ["one of CosineSchedule, WarmupStableDecay"]),
        ("--compute.remat sometimes", ["compute.remat", "one of none", "'sometimes'"]),
        *((f"--compute.dtype {n}", ["float16 overflows", "bfloat16"]) for n in FLOAT16),
        ("--evaluation.sets news", ["name=value pairs"]),
        ("--mesh.data -1", ["at most one is -1"]),
        ("--microbatches 3", ["must be a multiple"]),
        ("steps 3", ["unexpected argument 'steps'", "--some.field VALUE"]),
        ("--steps 3 --", ["unexpected argument '--'"]),
    ],
)
def test_a_wrong_override_is_told_in_one_line(argv, words):
    with pytest.raises(UserError) as error:
        apply_overrides(config(), argv.split(), options=("process-id",))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_group_that_is_none_is_there_once_a_field_of_it_is_named():
    """Together with what it needs, in whichever order; all its other fields have their defaults."""
    assert config().lora is None
    for argv in ("--lora.rank 4 --init-from x", "--init-from x --lora.rank=4"):
        assert apply_overrides(config(), argv.split()).lora == LoraConfig(rank=4)
    needed = ["--init-from", "x", "--lora.rank", "4"]
    changed = apply_overrides(config(), [*needed, "--lora.targets", "query", "up"])
    assert changed.lora == LoraConfig(rank=4, targets=("query", "up"))
    assert apply_overrides(changed, ["--lora", "none"]).lora is None
    with pytest.raises(UserError, match="rank is set in a group that is set to none"):
        apply_overrides(changed, ["--lora", "none", "--lora.rank", "4"])
    with pytest.raises(UserError, match="lora needs init_from"):
        apply_overrides(config(), ["--lora.rank", "4"])
    with pytest.raises(UserError, match=r"did you mean --lora\.rank"):
        apply_overrides(config(), ["--lora.rnak", "4"])


def test_a_field_of_a_model_that_comes_from_a_checkpoint_cannot_be_set():
    with pytest.raises(UserError, match="model is none in this recipe"):
        apply_overrides(config(model=None, init_from="x"), ["--model.num-layers", "3"])


def test_every_listed_override_is_taken_with_the_value_it_has():
    for line in overrides_help(config()).splitlines():
        name, value = line.strip().split("    ")[0].split(" ", 1)
        if not value.startswith("{"):
            words = value.split() if name == "--compiler.flag-sets" else [value]
            assert apply_overrides(config(), [name, *words]) == config(), line
    assert len(overrides_help(config()).splitlines()) == len(override_names(config()))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("lr", ["optimizer.schedule.peak-learning-rate"]),
        ("optimizer.lr", ["optimizer.schedule.peak-learning-rate"]),
        ("peak-lr", ["optimizer.schedule.peak-learning-rate"]),
        ("rate", ["optimizer.schedule.peak-learning-rate", "optimizer.schedule.final-learning-rate"]),
        ("seq-len", ["sequence-length-tokens"]),
        ("seq_len", ["sequence-length-tokens"]),
        ("context-length", ["sequence-length-tokens"]),
        ("warmup", ["optimizer.schedule.warmup-steps"]),
        ("precision", ["compute.dtype"]),
        ("bf16", ["compute.dtype"]),
        ("model.dtype", ["compute.dtype"]),
        ("batch-size", ["global-batch-size"]),
        ("batchsize", ["evaluation.batch-size", "global-batch-size"]),
        ("epochs", ["steps"]),
        ("wd", ["optimizer.weight-decay"]),
        ("optimizer.eps", ["optimizer.epsilon"]),
        ("optimizer.beta", ["optimizer.beta1", "optimizer.beta2"]),
        ("tokenizer.path", ["tokenizer"]),
    ],
)
def test_a_field_is_suggested_by_its_words_their_initials_and_other_names(name, fields):
    known = override_names(config())
    assert set(OTHER_NAMES) <= set(known)
    assert suggest(name, known) == fields


@given(name=st.text(alphabet="abelrst-_.019", min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_there_is_always_a_suggestion(name):
    known = override_names(config())
    found = suggest(name, known)
    assert 1 <= len(found) <= 3
    assert set(found) <= set(known)


def test_the_nearest_name():
    names = ["steps", "optimizer.beta1", "optimizer.beta2", "data.stages.0.start-step"]
    assert nearest("step", names) == ["steps"]
    assert nearest("beta2", names) == ["optimizer.beta2"]
    assert nearest("qqqqqq", names) == []
