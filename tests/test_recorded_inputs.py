"""What config.json says of a run, and what of its inputs may be elsewhere when it goes on."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import pytest
from etils import epath

from sealion_jax.checkpoint.digests import write_digests
from sealion_jax.checkpoint.hf import model_json
from sealion_jax.data.store.writer import write_store
from sealion_jax.errors import UserError
from sealion_jax.recipe import apply_overrides, load_recipe, to_json
from sealion_jax.run import beginning
from sealion_jax.run.beginning import check_recorded, check_same_inputs, record, recorded_model
from sealion_jax.run.parts import Parts, build
from tests.tiny_run import TinyWorld, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> TinyWorld:
    return make_world(tmp_path_factory.mktemp("world"))


def parts_of(world: TinyWorld, *overrides: object) -> Parts:
    return build(apply_overrides(load_recipe(world.recipe), [str(word) for word in overrides]))


@pytest.fixture
def run_dir(world, tmp_path):
    record(parts_of(world), tmp_path, reference=None)
    return tmp_path


def test_inputs_that_were_copied_elsewhere_are_the_same(world, run_dir):
    shutil.copytree(world.folder / "stores" / "one", run_dir / "one")
    shutil.copy(world.folder / "tokenizer.model", run_dir / "t.model")
    moved = parts_of(world, "--data.sources.one.store", run_dir / "one", "--tokenizer", run_dir / "t.model")
    told = check_recorded(moved, run_dir, step=None)
    assert [line.split(":")[0] for line in told] == ["tokenizer", "data.sources.one.store"]
    record(moved, run_dir, reference=None)
    assert check_recorded(moved, run_dir, step=None) == []


def test_another_spelling_of_the_same_path_is_the_same(world, run_dir):
    spelt = f"{world.folder}/stores/../stores/one/"
    assert check_recorded(parts_of(world, "--data.sources.one.store", spelt), run_dir, step=None)


def test_a_store_that_holds_something_else_is_another_one(world, run_dir):
    tokenizer = parts_of(world).tokenizer
    write_store(run_dir / "one", [("nasi ikan kopi " * 30, "one")] * 20, tokenizer=tokenizer)
    other = parts_of(world, "--data.sources.one.store", run_dir / "one")
    with pytest.raises(UserError, match=r"data\.sources\.one\.store: .* -> "):
        check_recorded(other, run_dir, step=None)
    record(other, run_dir, reference=None)
    shutil.rmtree(run_dir / "one")
    shutil.copytree(world.folder / "stores" / "one", run_dir / "one")
    with pytest.raises(UserError, match=r"data\.sources\.one\.store: what lies there is not"):
        check_recorded(parts_of(world, "--data.sources.one.store", run_dir / "one"), run_dir, step=None)


def test_a_run_that_was_recorded_without_fingerprints_goes_on_where_its_inputs_were(world, run_dir):
    plain = json.loads((run_dir / "config.json").read_text())
    del plain["fingerprints"]
    (run_dir / "config.json").write_text(json.dumps(plain))
    assert check_recorded(parts_of(world), run_dir, step=None) == []


def test_the_model_of_a_checkpoint_is_recorded(world, run_dir):
    parts = parts_of(world)
    left_open = dataclasses.replace(
        parts, config=dataclasses.replace(parts.config, model=None, init_from="gs://b/gemma")
    )
    record(left_open, run_dir, reference=None)
    assert json.loads((run_dir / "config.json").read_text())["model"] == dataclasses.asdict(parts.model)
    assert check_recorded(left_open, run_dir, step=None) == []
    (run_dir / "config.json").write_text(to_json(left_open.config))
    assert check_recorded(left_open, run_dir, step=None) == []
    shapes = dataclasses.replace(parts.model, feed_forward_dim=96)
    other = dataclasses.replace(left_open, config=dataclasses.replace(left_open.config, model=shapes))
    with pytest.raises(UserError, match=r"model\.feed_forward_dim: 64 -> 96"):
        check_recorded(other, run_dir, step=None)


def test_a_flipped_bit_in_the_newest_model_json_makes_no_other_model(world, run_dir):
    model = parts_of(world).model
    for step in (2, 4):
        file = run_dir / "checkpoints" / str(step) / "assets" / "model.json"
        file.parent.mkdir(parents=True)
        file.write_bytes(model_json(model))
        write_digests(file.parents[1])
    content = file.read_bytes()
    assert content.count(b"1e-06") == 1  # norm_epsilon, which is used anew by every step
    file.write_bytes(content.replace(b"1e-06", b"3e-06"))
    assert recorded_model(epath.Path(run_dir)) == model
    shutil.rmtree(file.parents[2] / "2")
    assert recorded_model(epath.Path(run_dir)) is None


def test_a_record_of_another_model_than_the_checkpoints_is_refused(world, run_dir):
    parts = parts_of(world)
    other = dataclasses.replace(parts, model=dataclasses.replace(parts.model, norm_epsilon=1e-5))
    with pytest.raises(UserError, match=r"config\.json was changed .*norm_epsilon: 1e-05 in the checkpoints"):
        check_recorded(other, run_dir, step=None)


def test_a_store_that_differs_on_one_process_is_refused_on_all(world, run_dir, monkeypatch):
    parts = parts_of(world)
    check_same_inputs(parts)
    write_store(run_dir / "one", [("nasi ikan kopi " * 30, "one")] * 20, tokenizer=parts.tokenizer)
    other = parts_of(world, "--data.sources.one.store", run_dir / "one")

    lines: list[str] = []
    monkeypatch.setattr(beginning, "all_lines", lambda own: lines.extend(own) or own)
    for process, one in enumerate((parts, other, parts)):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        check_same_inputs(one)
    monkeypatch.setattr(beginning, "all_lines", lambda _: lines)
    with pytest.raises(UserError, match=r"^process 1 reads another data\.sources\.one\.store than"):
        check_same_inputs(parts)
