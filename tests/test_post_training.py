"""Fine-tuning on chats and on pairs through the real command: references, resuming, what is refused."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sealion_jax import preview, train
from sealion_jax.checkpoint.arrays import leaf_shapes, read_leaf
from sealion_jax.checkpoint.digests import write_digests
from sealion_jax.data.store.references import ReferenceCache
from sealion_jax.data.store.token_store import TokenStore
from sealion_jax.errors import UserError
from sealion_jax.run import references
from sealion_jax.tokenizer import train_tokenizer
from tests.commands import command_environment, commands_in_this_process, start, start_together
from tests.tiny_chats import add_chats
from tests.tiny_run import copy_run, losses_of, make_world, rows_of

STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world")).folder


@pytest.fixture(scope="module")
def recipes(folder: Path) -> dict[str, str]:
    return add_chats(folder)


@pytest.fixture(scope="module", autouse=True)
def left_as_it_was(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What commands set for their whole process; and compiled steps that this module's runs share."""
    with commands_in_this_process(cache=tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def runs(recipes: dict[str, str], folder: Path) -> dict[str, Path]:
    """A run of each kind that nothing happened to."""
    runs = {}
    for kind, recipe in recipes.items():
        runs[kind] = folder / f"run_{kind}"
        train.main([recipe, "--run-dir", str(runs[kind])])
    return runs


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return command_environment(cache=tmp_path_factory.mktemp("commands"))


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "pairs").glob("*/references/*"))


def test_a_run_on_chats_tells_losses_by_source_and_learns(runs: dict[str, Path]):
    rows = rows_of(runs["chats"])
    assert {"loss", "loss/one", "loss/two"} <= rows[-1].keys()
    assert rows[-1]["eval/held-out/loss"] < rows[0]["eval/held-out/loss"]
    assert (runs["chats"] / "plots" / "bits_per_byte.png").exists()


def test_preferences_begin_at_log_2_with_references_from_the_cache(runs: dict[str, Path], folder: Path):
    rows = rows_of(runs["pairs"])
    assert len(kept(folder)) == 2
    first = rows[1]
    assert abs(first["loss/sigmoid"] - math.log(2)) < 1e-6
    assert all(
        abs(first[name]) < 1e-5 for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "kl")
    )
    # Both are means: one over pairs, the other over tokens.
    assert first["loss"] == pytest.approx(first["loss/sigmoid"] + 0.1 * first["loss/sft"], rel=1e-5)
    assert rows[0]["eval/held-out/reward_accuracy"] == 0.5
    assert rows[-1]["eval/held-out/reward_margin"] > 0 == rows[0]["eval/held-out/reward_margin"]
    assert {
        "rewards/accuracies/one",
        "log_probs/chosen/two",
        "tokens/rejected",
        "loss/sft/one",
    } <= first.keys()
    assert (runs["pairs"] / "plots" / "preferences.png").exists()


def test_references_are_computed_once_and_give_the_same_run(runs, recipes, tmp_path, monkeypatch):
    monkeypatch.setattr(references, "compute_references", None)
    train.main([recipes["pairs"], "--run-dir", str(tmp_path / "again")])
    assert losses_of(tmp_path / "again") == losses_of(runs["pairs"])


def test_references_of_another_model_are_noticed_and_not_used(runs, recipes, folder, tmp_path, capsys):
    before = kept(folder)
    train.main([recipes["pairs"], "--run-dir", str(tmp_path / "other"), "--seed", "5", "--steps", "2"])
    output = capsys.readouterr().out
    assert "the reference log-probabilities kept for one, two are of other weights" in output
    assert len(kept(folder)) == 4 and set(before) < set(kept(folder))
    assert abs(rows_of(tmp_path / "other")[1]["loss/sigmoid"] - math.log(2)) < 1e-6


def test_references_that_are_damaged_are_computed_again(runs, recipes, folder, tmp_path):
    victim = kept(folder)[0]
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    train.main([recipes["pairs"], "--run-dir", str(tmp_path / "run"), "--steps", "2"])
    assert victim.read_bytes() == whole
    assert losses_of(tmp_path / "run")[1] == losses_of(runs["pairs"])[1]


def test_a_store_that_cannot_be_written_leaves_them_to_the_run(runs, recipes, folder, tmp_path, capsys):
    place = folder / "pairs" / "one" / "references"
    aside = shutil.move(place, tmp_path / "aside")
    place.write_text("in the way")
    try:
        train.main([recipes["pairs"], "--run-dir", str(tmp_path / "run"), "--steps", "2"])
        assert "references cannot be written" in capsys.readouterr().err
        assert (
            len(list((tmp_path / "run" / "references").iterdir())) == 2
        )  # of `one`, and of the held-out set
        assert losses_of(tmp_path / "run")[1] == losses_of(runs["pairs"])[1]
    finally:
        place.unlink()
        shutil.move(aside, place)


def test_a_run_goes_on_without_its_reference_only_while_its_numbers_are_kept(runs, folder, tmp_path, recipes):
    weights = runs["chats"] / "checkpoints" / str(STEPS)
    start_from = Path(shutil.copytree(weights, tmp_path / "weights"))
    words = [recipes["pairs"], "--run-dir", str(tmp_path / "run"), "--init-from", str(start_from)]
    words += ["--checkpoints.interval-steps", "2"]
    before = set(kept(folder))
    train.main(words)
    new = set(kept(folder)) - before
    undisturbed = losses_of(tmp_path / "run")

    resumed = copy_run(tmp_path / "run", tmp_path / "resumed", newest=4)
    shutil.rmtree(start_from)
    train.main([*words[:2], str(resumed), *words[3:]])
    assert losses_of(resumed) == undisturbed

    shutil.copytree(runs["chats"] / "checkpoints" / "6", start_from)
    for file in new:
        file.unlink()
    other = copy_run(tmp_path / "run", tmp_path / "other", newest=4)
    with pytest.raises(
        UserError, match=r"the reference at .*weights is not the one that this run began with"
    ):
        train.main([*words[:2], str(other), *words[3:]])

    shutil.rmtree(start_from)
    shutil.copytree(weights, start_from)
    train.main([*words[:2], str(other), *words[3:]])
    assert losses_of(other) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chats", "pairs"])
def test_killed_and_resumed_is_bit_equal(kind, recipes, folder, tmp_path, environment):
    for file in kept(folder):
        file.unlink()  # so that a kill may come while they are computed
    run_dir = tmp_path / "run"
    command = ("train", recipes[kind], "--run-dir", run_dir)
    undisturbed = tmp_path / "undisturbed"
    assert start("train", recipes[kind], "--run-dir", undisturbed, environment=environment).wait() == 0
    moments = [
        lambda: bool(kept(folder)) or (run_dir / "metrics.jsonl").exists(),
        lambda: (run_dir / "metrics.jsonl").exists() and len(rows_of(run_dir)) > 3,
        lambda: any((run_dir / "checkpoints").glob("*.unfinished")),
    ]
    for file in kept(folder):
        file.unlink()
    kills = 0
    for moment in moments:
        process = start(*command, environment=environment)
        deadline = time.monotonic() + 120
        while process.poll() is None and not moment():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        kills += process.poll() is None
        process.kill()
        process.communicate()
    process = start(*command, environment=environment)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert kills >= 2
    assert losses_of(run_dir) == losses_of(undisturbed)
    ours, theirs = (place / "checkpoints" / str(STEPS) for place in (run_dir, undisturbed))
    for leaf in leaf_shapes(theirs):
        np.testing.assert_array_equal(read_leaf(ours, leaf), read_leaf(theirs, leaf))


@pytest.mark.slow
def test_two_processes_prefer_as_one(runs, recipes, folder, tmp_path, environment):
    """References, evaluation, samples and the step, over gloo; with no references kept from one process."""
    for file in kept(folder):
        file.unlink()
    words = ["--samples.prompts", "nasi", "--samples.max-new-tokens", "4", "--samples.format", "chat"]
    command = ("train", recipes["pairs"], "--run-dir", tmp_path / "run", *words)
    for process in start_together(*command, processes=2, environment=environment):
        output, _ = process.communicate()
        assert process.returncode == 0, output
    rows, alone = rows_of(tmp_path / "run"), rows_of(runs["pairs"])
    assert abs(rows[1]["loss/sigmoid"] - math.log(2)) < 1e-6
    for name in ("loss", "rewards/margins", "tokens/chosen"):
        found, expected = ([row[name] for row in some[1:]] for some in (rows, alone))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert rows[-1]["eval/held-out/reward_margin"] == pytest.approx(
        alone[-1]["eval/held-out/reward_margin"], rel=1e-3
    )
    assert len(kept(folder)) == 2
    samples = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in samples] == [0, STEPS]


def test_chats_that_are_left_out_are_listed_with_their_place(recipes, folder, tmp_path, capsys):
    words = ["--sequence-length-tokens", "24", "--data.examples.too-long", "drop", "--steps", "2"]
    train.main([recipes["chats"], "--run-dir", str(tmp_path / "run"), *words])
    listed = tmp_path / "run" / "left_out.jsonl"
    assert f"those left out are listed in {listed}" in capsys.readouterr().out
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    told = json.loads((tmp_path / "run" / "summary.json").read_text())["examples"]
    for source in ("one", "two"):
        mine = [row for row in rows if row["source"] == source]
        assert len(mine) == sum(told[source]["left_out"]["too_long"].values()) > 0
        store = TokenStore.open(folder / "chats" / source)
        lengths = dict(zip(map(store.origin, range(60)), np.diff(store.offsets).tolist(), strict=True))
        assert {row["reason"] for row in mine} == {"too_long"}
        assert all(lengths[row["file"], row["row"]] - 1 > 24 for row in mine)


def test_preview_tells_the_chosen_from_the_rejected(recipes, capsys):
    preview.main([recipes["pairs"], "--step", "0", "--row", "0"])
    headings = [line for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("segment ")]
    assert len(headings) > 1
    for number, heading in enumerate(headings):
        assert f"{('chosen', 'rejected')[number % 2]}, " in heading


def test_a_reference_may_move_but_not_change(runs, recipes, folder, tmp_path):
    named = Path(shutil.copytree(runs["chats"] / "checkpoints" / "8", tmp_path / "named"))
    words = [recipes["pairs"], "--run-dir", str(tmp_path / "run"), "--objective.reference"]
    train.main([*words, str(named), "--steps", "4"])
    moved = named.rename(tmp_path / "moved")
    train.main([*words, str(moved), "--steps", "6"])
    assert sorted(losses_of(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]
    with pytest.raises(UserError, match=r"objective\.reference"):
        train.main([*words, str(runs["chats"] / "checkpoints" / "6"), "--steps", "8"])


def test_a_reference_that_reads_other_tokens_is_refused(runs, recipes, tmp_path):
    other = Path(shutil.copytree(runs["chats"] / "checkpoints" / "8", tmp_path / "other"))
    train_tokenizer(["lain sekali"], vocab_size=550, path=other / "assets" / "tokenizer.model")
    (other / "digests.json").unlink()
    write_digests(other)
    words = [recipes["pairs"], "--run-dir", str(tmp_path / "run"), "--objective.reference", str(other)]
    with pytest.raises(UserError, match="has another tokenizer than this run"):
        train.main(words)


def test_in_bfloat16_preferences_begin_within_the_bound_of_the_docs(runs, recipes, tmp_path):
    """With references that were computed on the same mesh, and on another in batches of another size."""
    words = [recipes["pairs"], "--compute.dtype", "bfloat16", "--steps", "2", "--run-dir"]
    train.main([*words, str(tmp_path / "same")])
    train.main([*words, str(tmp_path / "other"), "--microbatches", "2", "--mesh.tensor", "2"])
    for name, bound in (("same", 5e-4), ("other", 5e-3)):
        assert abs(rows_of(tmp_path / name)[1]["loss/sigmoid"] - math.log(2)) < bound


@pytest.mark.parametrize(
    ("kind", "words", "told"),
    [
        (
            "chats",
            ["--objective", "preference-config"],
            "source one holds no pairs; prepare pairs with --kind",
        ),
        (
            "pairs",
            ["--objective", "causal-lm-config"],
            "source one holds pairs, and the objective learns the",
        ),
        ("pairs", ["--data.sources.one.loss-weight", "2"], "holds pairs, whose loss is a mean over pairs"),
        ("pairs", ["--data.sources.two.store", "{folder}/chats/two"], r"two \(chats\)"),
        ("chats", ["--data.examples.learn", "nothing"], "one of assistant, last_assistant, everything"),
        ("chats", ["--data.sources.one.loss-weight", "0"], "loss_weight of source one"),
        ("pairs", ["--objective.reference", "{folder}/nowhere"], "there is no checkpoint at .*nowhere"),
    ],
)
def test_data_and_objectives_that_do_not_fit_are_refused(recipes, tmp_path, kind, words, told):
    folder = Path(recipes[kind]).parent
    words = [word.format(folder=folder) for word in words]
    with pytest.raises(UserError, match=told):
        train.main([recipes[kind], "--run-dir", str(tmp_path / "run"), *words])


def test_a_cache_tells_its_numbers_from_others(tmp_path: Path):
    cache = ReferenceCache(folder=str(tmp_path / "r"), parts={"weights": "a", "store": "b"})
    assert cache.read(3) is None and cache.others() == []
    values = np.array([1.5, np.nan, -2.25], np.float32)
    cache.write(references.Kept(values, 2))
    found = cache.read(3)
    assert found is not None and found.rows_done == 2
    np.testing.assert_array_equal(found.values, values)
    assert cache.read(4) is None
    other = ReferenceCache(folder=str(tmp_path / "r"), parts={"weights": "c", "store": "b"})
    assert other.read(3) is None and other.others() == [{"weights": "a", "store": "b"}]
