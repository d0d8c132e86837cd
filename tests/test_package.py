"""The wheel: all of the code, the recipes, the corpus and the kernels are in it, and it works on its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.commands import command_environment

ROOT = Path(__file__).parents[1]
# Folder in the repository -> name that it is imported by.
PACKAGES = {"sealion_jax": "sealion_jax", "kernels": "sealion_kernels", "configs": "sealion_configs"}


def run(*command: object, cwd: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of what it is made of, so that nothing is left in the repository."""
    folder = tmp_path_factory.mktemp("build")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    run(*pip, "--no-build-isolation", "-w", "dist", ".", cwd=folder, environment=command_environment())
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def contents(wheel) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_every_module_is_in_the_wheel_and_nothing_else(contents):
    expected = {
        f"{package}/{file.relative_to(ROOT / folder)}"
        for folder, package in PACKAGES.items()
        for file in (ROOT / folder).rglob("*.py")
    }
    assert {name for name in contents if name.endswith(".py")} == expected


def test_the_corpus_the_licence_and_the_marker_of_types_are_in_the_wheel(contents):
    corpus = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "sealion_jax/data/corpus").rglob("*.*")
        if file.suffix in (".jsonl", ".md")
    }
    assert sum(name.endswith(".jsonl") for name in corpus) == 3 * 13
    assert corpus <= contents
    assert "sealion_jax/py.typed" in contents
    assert any(name.endswith("/LICENSE") for name in contents)


def test_the_wheel_says_what_it_needs(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    metadata = archive.read(name).decode()
    for line in ("Requires-Python: >=3.11", "License-Expression: Apache-2.0", "Requires-Dist: jax>=0.10"):
        assert line in metadata
    for extra in ("hf", "tpu", "cuda", "dev"):
        assert f"Provides-Extra: {extra}\n" in metadata
    plain = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line
    ]
    assert not any("torch" in line or "transformers" in line for line in plain)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The python of a fresh environment that has the wheel, and this environment's other packages."""
    folder = tmp_path_factory.mktemp("fresh")
    environment = command_environment()
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=folder, environment=environment)
    python = folder / "venv" / "bin" / "python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--python",
        python,
        "install",
        "--quiet",
    ]
    run(*pip, "--no-deps", "--no-index", wheel, cwd=folder, environment=environment)
    # A path added by a .pth file is searched, but its own .pth files are not read: the editable install of
    # this repository stays out of sight.
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = run(python, "-c", code, cwd=folder, environment=environment).stdout.strip()
    (Path(own) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture
def elsewhere(tmp_path) -> dict[str, str]:
    """The environment of a user who has never run this before."""
    environment = command_environment()
    environment.pop("PYTHONPATH", None)
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    return environment


@pytest.mark.slow
def test_the_installed_wheel_stands_alone(installed, elsewhere, tmp_path):
    code = (
        "import json, sealion_jax, sealion_kernels, sealion_configs\n"
        "from sealion_jax.recipe import recipe_names\n"
        "files = [p.__file__ for p in (sealion_jax, sealion_kernels, sealion_configs)]\n"
        "print(json.dumps([files, recipe_names()]))"
    )
    done = run(installed, "-c", code, cwd=tmp_path, environment=elsewhere)
    files, names = json.loads(done.stdout)
    home = str(installed.parents[1])
    assert all(file.startswith(home) for file in files), files
    assert {"cpt_tiny", "cpt_sea_small", "cpt_1b", "cpt_4b", "cpt_12b", "cpt_27b"} <= set(names)


@pytest.mark.slow
def test_the_installed_wheel_trains_the_embedded_default(installed, elsewhere, tmp_path):
    """All of it but its length: fewer steps, smaller batches, less evaluation."""
    words = "--steps 3 --global-batch-size 2 --optimizer.schedule.warmup-steps 1 --evaluation.max-documents 1"
    run(installed, "-m", "sealion_jax.train", *words.split(), cwd=tmp_path, environment=elsewhere)
    run_dir = tmp_path / "runs" / "cpt_tiny"
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["loss"] > 0 for row in rows[1:])
    assert rows[-1]["eval/th/bits_per_byte"] > 0
    assert (run_dir / "checkpoints" / "3").is_dir()
    assert list((run_dir / "plots").glob("*.png"))
    assert (tmp_path / "cache").is_dir()
