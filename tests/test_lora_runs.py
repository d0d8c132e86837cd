"""Adapters through the real commands: trained, gone on with, measured, asked, and their base moved."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest

from sealion_jax import evaluate, generate, train
from sealion_jax.checkpoint.arrays import leaf_shapes, read_leaf
from sealion_jax.checkpoint.weights import open_weights
from sealion_jax.errors import UserError
from sealion_jax.model.gemma3 import abstract_params
from sealion_jax.model.lora import LoraConfig, trained_parameters
from tests.commands import commands_in_this_process
from tests.tiny_chats import add_chats
from tests.tiny_run import copy_run, losses_of, make_world, rows_of

LORA = LoraConfig(rank=3, alpha=6.0, targets=("query", "value", "up"))
WORDS = ["--lora.rank", "3", "--lora.alpha", "6", "--lora.targets", *LORA.targets]


@dataclass(frozen=True)
class Adapted:
    """A run of adapters that nothing happened to, and what they stand on."""

    recipe: str
    base: Path
    """A step's directory."""
    run_dir: Path

    @property
    def folder(self) -> Path:
        return self.run_dir.parent

    def train(self, run_dir: Path, *words: str, base: Path | None = None) -> None:
        """Runs the command that made it, in another directory."""
        start = ["--init-from", str(base or self.base)]
        train.main([self.recipe, "--run-dir", str(run_dir), *start, *WORDS, *words])


@pytest.fixture(scope="module", autouse=True)
def left_as_it_was(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What commands set for their whole process; and compiled steps that this module's runs share."""
    with commands_in_this_process(cache=tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapted]:
    folder = make_world(tmp_path_factory.mktemp("world")).folder
    recipes = add_chats(folder)
    train.main([recipes["chats"], "--run-dir", str(folder / "base"), "--steps", "4"])
    base = folder / "base" / "checkpoints" / "4"
    made = {kind: Adapted(recipe, base, folder / f"lora_{kind}") for kind, recipe in recipes.items()}
    for adapted in made.values():
        adapted.train(adapted.run_dir)
    return made


@pytest.fixture(params=["chats", "pairs"])
def adapted(both: dict[str, Adapted], request: pytest.FixtureRequest) -> Adapted:
    return both[request.param]


def merged(checkpoint: Path) -> dict[str, np.ndarray]:
    """Every weight by its name, with adapters added to those that have one."""
    weights = open_weights(str(checkpoint))
    leaves = jax.tree_util.tree_leaves_with_path(weights.load(abstract_params(weights.config)))
    return {"/".join(entry.key for entry in path): np.asarray(leaf) for path, leaf in leaves}


def saved_bytes(step: Path) -> int:
    return sum(file.stat().st_size for file in (step / "params").rglob("*") if file.is_file())


def test_only_the_adapters_are_trained_and_saved(adapted: Adapted):
    before, after = merged(adapted.base), merged(adapted.run_dir)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert {name.rpartition("/")[2] for name in changed} == set(LORA.targets)
    assert len(changed) == 3 * len(LORA.targets)  # of two layers in the stacked block and of the third
    assert saved_bytes(adapted.run_dir / "checkpoints" / "8") < saved_bytes(adapted.base) / 4


def test_the_number_of_trained_parameters_is_told(both: dict[str, Adapted], tmp_path, capsys):
    both["chats"].train(tmp_path / "run", "--steps", "2")
    trained = trained_parameters(open_weights(str(both["chats"].base)).config, LORA)
    output = capsys.readouterr().out
    assert f"{trained:,} of " in output
    assert "parameters are trained: LoRA of rank 3 on query, value, up" in output


def test_preferences_begin_at_the_model_without_adapters(both: dict[str, Adapted], tmp_path):
    adapted = both["pairs"]
    first, last = rows_of(adapted.run_dir)[1], rows_of(adapted.run_dir)[-1]
    assert abs(first["loss/sigmoid"] - math.log(2)) < 1e-6
    assert abs(first["rewards/margins"]) < 1e-5
    # `evaluate` with the base as the reference measures what the run did.
    data, scores = adapted.folder / "pairs.jsonl", tmp_path / "scores.json"
    options = ["--data", data, "--reference", adapted.base, "--context-tokens", "64", "--output", scores]
    evaluate.main([str(adapted.run_dir), *map(str, options)])
    measured = json.loads(scores.read_text())["sets"]["pairs"]
    for name in ("reward_margin", "reward_accuracy"):
        assert measured[name] == pytest.approx(last[f"eval/held-out/{name}"], abs=1e-4)
    # A run that names the base has the same numbers.
    adapted.train(tmp_path / "named", "--objective.reference", str(adapted.base))
    assert losses_of(tmp_path / "named") == losses_of(adapted.run_dir)


@pytest.mark.parametrize("newest", [2, 6])
def test_gone_on_with_it_is_bit_equal(adapted: Adapted, tmp_path, newest):
    resumed = copy_run(adapted.run_dir, tmp_path / "resumed", newest=newest)
    adapted.train(resumed)
    assert losses_of(resumed) == losses_of(adapted.run_dir)
    ours, theirs = (place / "checkpoints" / "8" for place in (resumed, adapted.run_dir))
    assert leaf_shapes(ours) == leaf_shapes(theirs)
    for leaf in leaf_shapes(theirs):
        np.testing.assert_array_equal(read_leaf(ours, leaf), read_leaf(theirs, leaf))


def test_a_base_may_move_but_not_change(both: dict[str, Adapted], tmp_path):
    adapted = both["chats"]
    moved = Path(shutil.copytree(adapted.base, tmp_path / "moved"))
    resumed = copy_run(adapted.run_dir, tmp_path / "resumed", newest=6)
    adapted.train(resumed, base=moved)
    assert losses_of(resumed) == losses_of(adapted.run_dir)
    base = open_weights(str(resumed)).base
    assert base is not None and base.path.name == "moved"

    other = copy_run(adapted.run_dir, tmp_path / "other", newest=6)
    with pytest.raises(UserError, match="init_from"):
        adapted.train(other, base=adapted.base.with_name("2"))
    with pytest.raises(UserError, match="lora"):
        adapted.train(other, "--lora.rank", "4")


def test_adapters_can_be_asked(both: dict[str, Adapted], capsys):
    adapted = both["chats"]
    generate.main([str(adapted.run_dir), str(adapted.base), "--prompt", "nasi kopi", "--max-new-tokens", "5"])
    output = capsys.readouterr().out
    assert f"[{adapted.run_dir}: " in output and f"[{adapted.base}: " in output


def test_a_base_that_is_gone_is_told_with_the_way_out(both: dict[str, Adapted]):
    adapted = both["chats"]
    aside = shutil.move(adapted.base, adapted.base.with_name("aside"))
    try:
        told = rf"cannot be read at {adapted.base}.*convert to-hf .* --base DIR"
        with pytest.raises(UserError, match=told):
            open_weights(str(adapted.run_dir))
        assert open_weights(str(adapted.run_dir), base=str(aside)).base is not None
    finally:
        shutil.move(aside, adapted.base)
