"""`plan` as a user runs it, where TPU's compiler is not needed: refusals, GPU pods, exit codes."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from sealion_jax import plan
from sealion_jax.errors import UserError
from sealion_jax.planning.environment import WITHOUT_TPU
from tests.commands import command_environment, start

FP8, INT8 = (["--compute.quantization", kind] for kind in ("fp8", "int8"))

PREFERENCES = """
from sealion_jax.data.mixture import MixtureConfig, SourceConfig
from sealion_jax.model.config import gemma3_1b
from sealion_jax.objectives.preference_config import PreferenceConfig, SigmoidLoss
from sealion_jax.recipe import TrainConfig

def recipe():
    return TrainConfig(
        name="pairs",
        tokenizer="gs://nowhere/tokenizer.model",
        init_from="gs://nowhere/run",
        model=gemma3_1b(),
        data=MixtureConfig(sources=(SourceConfig(name="pairs", store="gs://nowhere/pairs", weight=1.0),)),
        objective=PreferenceConfig(losses=(SigmoidLoss(beta=0.1),)),
        sequence_length_tokens=8192,
        global_batch_size=16,
        steps=10,
    )
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What the command sets for its process is set back."""
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    for name in (*WITHOUT_TPU, "JAX_PLATFORMS"):
        monkeypatch.setenv(name, "cpu" if name == "JAX_PLATFORMS" else WITHOUT_TPU[name])


def test_a_gpu_pod_is_planned_by_formulas_and_says_so(tmp_path, capsys):
    """The recipe's stores and checkpoint are in a bucket that is not there; none is opened."""
    output = tmp_path / "new" / "plan.json"
    plan.main(["cpt_27b", "--topology", "h200:8x8", "--output", str(output)])
    said = capsys.readouterr().out
    report = json.loads(output.read_text())
    assert "ANALYTICAL" in said
    assert said.index("Assumed of each h200") < said.index("Memory of a chip")
    assert (report["method"], report["fits"], report["chips"]) == ("analytical", True, 64)
    kinds = report["memory"]["kinds"]
    available = report["memory"]["available"]
    assert available == pytest.approx(0.9 * 141e9)  # what is left is for NCCL and CUDA
    assert report["memory"]["needed"] == sum(kinds.values()) <= available
    assert report["assumptions"]["memory_fraction"] == 0.9
    assert "memory that programs may use (XLA_PYTHON_CLIENT_MEM_FRACTION 0.9)" in said
    assert f"{0.9 * 141e9 / 2**30:.2f} GiB" in said
    speed = report["speed"]
    assert speed["tokens"] == 59_605 * 1024 * 8192
    ends = speed["overlapped"]
    assert ends["days"] == pytest.approx(59_605 * ends["step_seconds"] / 86_400)
    assert ends["chip_hours"] == pytest.approx(64 * 24 * ends["days"])
    assert ends["tokens_per_second"] * ends["days"] * 86_400 == pytest.approx(speed["tokens"])
    assert 0 < speed["in_turn"]["mfu"] < ends["mfu"] < 1


def test_what_does_not_fit_is_reported_and_ends_with_2(tmp_path):
    output = tmp_path / "plan.json"
    command = ["cpt_27b", "--topology", "h100:1x8", "--output", output]
    done = start("plan", *command, environment=command_environment())
    said, _ = done.communicate(timeout=300)
    assert done.returncode == 2, said
    report = json.loads(output.read_text())
    assert not report["fits"]
    exceeded = report["memory"]["exceeded_by"]
    assert exceeded == report["memory"]["needed"] - report["memory"]["available"] > 0
    assert f"IT DOES NOT FIT, by {exceeded / 2**30:.2f} GiB" in said
    assert f"error: cpt_27b does not fit on h100:1x8, by {exceeded / 2**30:.2f} GiB a chip" in said
    assert "What would make it fit" in said
    assert "Traceback" not in said


def test_overrides_change_the_plan(tmp_path):
    sizes = []
    for batches in ("4", "16"):
        output = tmp_path / f"{batches}.json"
        plan.main(["cpt_27b", "--topology", "h200:8x8", "--microbatches", batches, "--output", str(output)])
        sizes.append(json.loads(output.read_text())["memory"]["kinds"]["activations and temporaries"])
    assert sizes[1] < sizes[0]


def test_a_search_over_a_gpu_pod(tmp_path, capsys):
    output = tmp_path / "plan.json"
    words = ["cpt_1b", "--topology", "h100:1x4", "--search", "--candidates", "3", "--output", str(output)]
    plan.main(words)
    found = json.loads(output.read_text())
    assert len(found["search"]) == 3
    assert found["best"] == found["search"][0]
    assert all(report["fits"] for report in found["search"])
    assert "microbatches  remat" in capsys.readouterr().out


def test_places_of_pairs_are_an_assumption_that_is_told(tmp_path, capsys):
    recipe = tmp_path / "pairs.py"
    recipe.write_text(PREFERENCES)
    plan.main([str(recipe), "--topology", "h100:1x8", "--output", str(tmp_path / "plan.json")])
    report = json.loads((tmp_path / "plan.json").read_text())
    assert report["assumptions"]["pair_places_a_row"] == 8192 // 64
    assert "room for 128 pairs" in capsys.readouterr().out
    # Beside the five fields of tokens and the source, two of segments and two of the reference.
    assert report["memory"]["kinds"]["batch"] == 16 * (5 * 8192 + 1 + 4 * 128) * 4 / 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cpt_27b"], "--topology is missing"),
        (["cpt_27b", "--topology", "v9:4x4"], "unknown chip 'v9'"),
        (["cpt_27", "--topology", "h100:8x8"], r"unknown recipe 'cpt_27'; did you mean cpt_27b"),
        (["cpt_27b", "--topology", "h100:8x8", "--microbatch", "2"], r"did you mean --microbatches"),
        (["cpt_27b", "--topology", "h100:8x8", "--candidates", "0"], "--candidates is 0"),
        (["cpt_27b", "--topology", "h100:8x8", "--candidates", "4"], "--candidates is of a search"),
        (["cpt_27b", "--topology", "h100:8x8", "--processes", "2"], "--processes is of a search"),
        (["cpt_27b", "--topology", "h100:8x8", "--global-batch-size", "96"], "must be a multiple of 64"),
        (["cpt_27b", "--topology", "h100:7x8"], "does not divide|must be a multiple"),
        (["cpt_27b", "--topology", "v5e:4x4", "--num-slices", "2"], r"multiple of the slices"),
        (["cpt_27b", "--topology", "h100:8x8", "--model", "none"], r"needs the model's shapes alone"),
        (["cpt_27b", "--topology", "h100:8x8", "--output", "."], "it is a directory"),
        (["cpt_1b", "--topology", "v5e:2x2", *FP8], "v5e is not known to multiply fp8.*take int8 or none"),
        (["cpt_1b", "--topology", "v5e:2x2", *FP8, "--search"], "v5e is not known to multiply fp8"),
        (["cpt_1b", "--topology", "a100:1x8", *FP8], "a100 is not known to multiply fp8.*take int8 or none"),
        (
            ["cpt_1b", "--topology", "tpu7x:2x2x1", *INT8],
            r"tpu7x is not known to multiply int8",
        ),
        (["cpt_1b", "--topology", "h100:1x8", "--compute.attention", "tpu"], r"a kernel for a TPU.*kind gpu"),
        (["cpt_1b", "--topology", "v5e:2x2", "--compute.attention", "gpu"], r"a kernel for a GPU.*kind tpu"),
    ],
)
def test_refusals(words, message):
    with pytest.raises(UserError, match=message):
        plan.main(words)


@pytest.mark.skipif(find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_it_says_what_to_install():
    with pytest.raises(UserError, match=r"needs libtpu.*pip install 'sealion_jax\[tpu\]'"):
        plan.main(["cpt_27b", "--topology", "v5p:4x4x4"])
