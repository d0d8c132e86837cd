"""What a search compiles, in which order, and what becomes of candidates that fail; nothing is compiled."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import time

import numpy as np
import pytest

from sealion_jax.errors import UserError
from sealion_jax.model.config import ComputeConfig
from sealion_jax.planning import candidates as candidates_module
from sealion_jax.planning import search as search_module
from sealion_jax.planning.analytical import estimate_analytically
from sealion_jax.planning.candidates import (
    Candidate,
    as_written,
    by_formulas,
    lighter,
    meshes,
    promising,
    variants,
)
from sealion_jax.planning.network import Place, gpu_places
from sealion_jax.planning.search import CandidateError, available_memory, rank, search
from sealion_jax.planning.speed import speed_of
from sealion_jax.planning.tables import render_search
from sealion_jax.planning.topology import parse_topology
from sealion_jax.recipe import load_recipe
from sealion_jax.sharding import MeshConfig, mesh_shape

POD = parse_topology("h100:8x8")
NODE = parse_topology("h100:1x8")
TPUS = parse_topology("v5p:2x2x1")


def cpt_27b():
    return dataclasses.replace(load_recipe("cpt_27b"), microbatches=4, rows_per_device=None)


@pytest.fixture
def torus(monkeypatch):
    """Devices of a TPU pod along its torus, whatever the mesh: TPU's compiler is not asked for them."""

    def places(config, topology):
        return [Place(0, chip) for chip in np.ndindex(*topology.shape)]

    monkeypatch.setattr(candidates_module, "_places", places)


def made_up(config, *, needed, seconds, remat="block", microbatches=1) -> Candidate:
    config = dataclasses.replace(config, compute=ComputeConfig(remat=remat), microbatches=microbatches)
    return Candidate(
        config=config, needed=needed, available=10.0, step_overlapped=seconds, step_in_turn=2 * seconds
    )


def report_of(config, *, needed=1.0, seconds=1.0):
    """A report with what a search reads of it."""
    fits = needed <= 10
    ends = {"step_seconds": seconds, "mfu": 0.5, "days": 1.0}
    return {
        "fits": fits,
        "mesh": mesh_shape(config.mesh, TPUS.num_devices),
        "microbatches": config.microbatches,
        "remat": config.compute.remat,
        "memory": {"needed": needed, "available": 10.0, "exceeded_by": max(needed - 10.0, 0.0)},
        "speed": {"overlapped": ends, "in_turn": ends} if fits else None,
    }


def searched(config, *, most=8, tell=lambda line: None):
    return search(config, config.model, TPUS, command=[], most=most, processes=1, tell=tell)


def test_a_context_that_takes_what_is_left_is_known():
    config = dataclasses.replace(cpt_27b(), mesh=MeshConfig(fsdp=16, context=-1))
    assert {mesh.context for mesh in meshes(config, POD)} == {4}


def test_candidates_divide_and_differ():
    config = cpt_27b()
    found = [one for mesh in meshes(config, POD) for one in variants(config, mesh, POD)]
    assert len({(c.mesh, c.microbatches, c.compute.remat) for c in found}) == len(found) > 100
    for candidate in found:
        assert math.prod(mesh_shape(candidate.mesh, 64).values()) == 64
        rows = candidate.global_batch_size / candidate.microbatches
        assert rows % (candidate.mesh.data * candidate.mesh.fsdp) == 0


def test_a_search_ranks_what_fits_and_finds_no_slower_than_the_recipe():
    config = load_recipe("cpt_4b")
    found = search(config, config.model, NODE, command=[], most=6, processes=None, tell=lambda line: None)
    assert len(found.reports) == 6
    assert all(report["fits"] and report["method"] == "analytical" for report in found.reports)
    steps = [report["speed"]["overlapped"]["step_seconds"] for report in found.reports]
    assert steps == sorted(steps)
    config = dataclasses.replace(config, microbatches=64)
    recipe = estimate_analytically(config, config.model, mesh_shape(config.mesh, 8), NODE, gpu_places(NODE))
    speed = speed_of(config, config.model, NODE, recipe)
    assert speed is not None
    assert recipe.fits
    assert steps[0] <= speed.step_overlapped


def test_what_cannot_fit_is_no_candidate():
    """Weights, moments and gradients of 12B take 16 bytes a parameter, 188 GB: three GPUs of 72 at least."""
    config = load_recipe("cpt_12b")
    ranked = by_formulas(config, config.model, NODE)
    chosen = promising([one for one in ranked if one.needed <= one.available], most=10)
    assert len(chosen) == 10
    assert all(one.config.mesh.fsdp * one.config.mesh.tensor > 2 for one in chosen)
    assert len({(one.config.mesh, one.config.compute.remat) for one in chosen}) > 2


def test_the_recipe_is_compiled_first_and_the_best_of_each_policy(torus):
    """By formulas `dots` are the fastest of the 27B; its plan that fits has block and 4 microbatches."""
    config, pod = load_recipe("cpt_27b"), parse_topology("v5p:4x4x4")
    recipe = as_written(config, config.model, pod)
    assert (recipe.config.mesh, recipe.config.microbatches) == (MeshConfig(fsdp=64), 4)
    ranked = by_formulas(config, config.model, pod)
    chosen = promising(ranked, most=8, recipe=recipe)
    assert chosen[0] == recipe
    assert len(chosen) == 8 == len({repr(one.config) for one in chosen})
    assert {one.config.compute.remat for one in chosen} == {"none", "dots", "layer", "block"}
    for policy in ("none", "dots", "layer", "block"):
        best = next(one for one in ranked if one.first_choice and one.config.compute.remat == policy)
        assert any(one.config == best.config for one in chosen)


def test_a_search_compiles_the_recipe_though_formulas_find_it_hopeless(torus, monkeypatch):
    compiled = []

    def compile_one(config, command):
        compiled.append((config.mesh.fsdp, config.microbatches, config.compute.remat))
        return report_of(config)

    monkeypatch.setattr(search_module, "_in_process", compile_one)
    config = dataclasses.replace(cpt_27b(), compute=ComputeConfig(remat="none"))
    ranked = by_formulas(config, config.model, TPUS)
    assert all(one.config.compute.remat != "none" for one in ranked)
    searched(config)
    assert compiled[0] == (4, 4, "none")


def test_what_needs_less_is_next_by_as_much_as_the_nearest_lacks():
    """It needs 1.5 times what there is, where the formulas say 9: they must say 6 at most."""
    config = cpt_27b()
    tried = [
        made_up(config, needed=9.0, seconds=1.0),
        made_up(config, needed=8.0, seconds=1.5, microbatches=2),
    ]
    near = made_up(config, needed=6.5, seconds=2.0, microbatches=4)
    slow = made_up(config, needed=3.0, seconds=9.0, microbatches=16)
    fast = made_up(config, needed=6.0, seconds=3.0, microbatches=8)
    ranked = [*tried, near, fast, slow]
    assert lighter(ranked, tried, (tried[0], 1.5), most=8) == [fast, slow]
    assert lighter(ranked, tried, (tried[0], 1.5), most=1) == [fast]
    # Nothing has so little: the least that there is.
    assert lighter([*tried, near], tried, (tried[0], 1.5), most=8) == [near]
    assert lighter(tried, tried, (tried[0], 1.5), most=8) == []


def test_a_search_goes_on_to_what_needs_less_until_something_fits(torus, monkeypatch):
    """The compiler needs more than the formulas say, so that none of the first four fits."""
    config = load_recipe("cpt_1b")
    listed = by_formulas(config, config.model, TPUS)
    ranked = {repr(one.config): one for one in listed}
    recipe = as_written(config, config.model, TPUS)
    first = promising(listed, most=4, recipe=recipe)
    times = 1.01 * recipe.available / min(one.needed for one in first)
    compiled = []

    def compile_one(config, command):
        one = ranked[repr(config)]
        compiled.append(one)
        return report_of(config, needed=times * one.needed / one.available * 10, seconds=one.step_overlapped)

    monkeypatch.setattr(search_module, "_in_process", compile_one)
    said = []
    found = searched(config, most=4, tell=said.append)
    assert found.reports[0]["fits"]
    assert {repr(one.config) for one in compiled[:4]} == {repr(one.config) for one in first}
    assert "none fits; going on to those that need less" in said
    assert 4 < len(compiled) <= 8
    assert len(compiled) == len(found.reports) == len({repr(one.config) for one in compiled})


def test_one_failure_does_not_lose_the_others(torus, monkeypatch, capsys):
    def compile_one(config, command):
        if config.compute.remat == "dots":
            raise CandidateError(1, "Traceback (most recent call last):\nRuntimeError: the compiler crashed")
        return report_of(config)

    monkeypatch.setattr(search_module, "_in_process", compile_one)
    found = searched(load_recipe("cpt_1b"), most=4)
    assert len(found.reports) == 3
    (failed,) = found.failed
    assert failed["remat"] == "dots"
    assert failed["error"].startswith("ended with 1: Traceback")
    last = render_search(found.reports, found.failed).splitlines()[-1]
    assert last.startswith("  failed: data ")
    assert last.endswith("remat dots: RuntimeError: the compiler crashed")
    said = capsys.readouterr().err
    assert "remat dots: failed: RuntimeError: the compiler crashed" in said
    assert "4/4 candidates" in said


@pytest.mark.parametrize(("code", "kind"), [(1, RuntimeError), (2, UserError)])
def test_when_all_fail_the_first_ones_words_are_told(torus, monkeypatch, code, kind):
    def fail(config, command):
        raise CandidateError(code, "a line\nerror: gpu is a kernel for a GPU")

    monkeypatch.setattr(search_module, "_in_process", fail)
    with pytest.raises(kind, match="gpu is a kernel for a GPU"):
        searched(load_recipe("cpt_1b"), most=2)


def test_a_process_that_writes_no_report_has_failed(monkeypatch):
    def run(words, **settings):
        return subprocess.CompletedProcess(words, -9, "", "compiling\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(CandidateError, match="ended with -9: compiling"):
        search_module._in_process(cpt_27b(), [])


def test_a_recipe_that_cannot_be_laid_over_the_pod_is_left_out_with_a_word(torus, monkeypatch):
    monkeypatch.setattr(search_module, "_in_process", lambda config, command: report_of(config))
    said = []
    config = dataclasses.replace(load_recipe("cpt_1b"), global_batch_size=2, rows_per_device=None)
    found = searched(config, most=2, tell=said.append)
    assert len(found.reports) == 2
    assert said[0].startswith("the recipe as it is written is left out: global batch 2 must be a multiple")


def test_a_search_tells_that_it_goes_on(torus, monkeypatch, capsys):
    """Before the first candidate has ended, too."""
    monkeypatch.setattr(search_module, "SECONDS_BETWEEN_LINES", 0.05)
    progress = search_module.Progress
    monkeypatch.setattr(
        search_module,
        "Progress",
        lambda total, what, *, unit: progress(total, what, unit=unit, seconds_between_lines=0.05),
    )

    def slow(config, command):
        time.sleep(0.4)
        return report_of(config)

    monkeypatch.setattr(search_module, "_in_process", slow)
    searched(load_recipe("cpt_1b"), most=1)
    said = capsys.readouterr().err.splitlines()
    assert "compiled: 0/1 candidates" in said[0]
    assert said[-1].startswith("compiled: 1/1 candidates")


def test_available_memory_counts_the_page_cache(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 24000000 kB\nMemFree:  1000000 kB\nMemAvailable:   20000000 kB\n")
    assert available_memory(meminfo) == 20_000_000 * 1024
    assert available_memory(tmp_path / "none") > 0


def test_ranking_puts_what_does_not_fit_last_and_the_nearest_first():
    def report(fits, seconds, exceeded):
        speed = {"overlapped": {"step_seconds": seconds}, "in_turn": {"step_seconds": 2 * seconds}}
        return {"fits": fits, "speed": speed if fits else None, "memory": {"exceeded_by": exceeded}}

    fast, slow = report(True, 1.0, 0), report(True, 2.0, 0)
    near, far = report(False, 0.1, 1e9), report(False, 0.1, 9e9)
    assert rank([far, slow, near, fast]) == [fast, slow, near, far]
