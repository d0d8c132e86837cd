"""The container's recipe: versions for all that the package asks for, and steps that find their files."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch" / "container"


def _versions(name: str) -> dict[str, str]:
    lines = [line for line in (FOLDER / name).read_text().splitlines() if not line.startswith("#")]
    pairs = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines]
    assert all(pairs), "a version is not pinned"
    return {canonicalize_name(pair[1]): pair[2] for pair in pairs if pair}


def _asked_for() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lists = [project["project"]["dependencies"], *project["project"]["optional-dependencies"].values()]
    return [Requirement(word) for words in lists for word in words] + [
        Requirement(word) for word in project["build-system"]["requires"]
    ]


@pytest.mark.parametrize("requirement", _asked_for(), ids=str)
def test_every_requirement_has_a_version_that_it_allows(requirement):
    """Where this fails launch/container/lock.sh chooses anew."""
    version = _versions("versions.txt").get(canonicalize_name(requirement.name))
    assert version is not None
    assert requirement.specifier.contains(version, prereleases=True)


def test_nvidias_libraries_are_apart_and_complete():
    both = _versions("versions-cuda.txt")
    assert {"nvidia-cudnn-cu13", "nvidia-nccl-cu13", "nvidia-cublas"} <= set(both)
    assert not set(both) & set(_versions("versions.txt"))


def _install(tmp_path: Path, *extras: str) -> list[list[str]]:
    """The words of each call of python by install.sh in a folder that is not the checkout."""
    checkout = tmp_path / "a checkout"
    (checkout / "launch").mkdir(parents=True)
    subprocess.run(["cp", "-r", FOLDER, checkout / "launch"], check=True, timeout=30)
    python = tmp_path / "python"
    calls = tmp_path / "calls"
    python.write_text(
        '#!/usr/bin/env bash\nprintf "%s\\n" "$@" END >>"$CALLS"\n'
        '[[ $* != "-m venv "* ]] || { mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; }\n'
    )
    python.chmod(0o755)
    script = checkout / "launch" / "container" / "install.sh"
    env = {**os.environ, "PYTHON": str(python), "CALLS": str(calls)}
    subprocess.run([script, *extras], env=env, check=True, timeout=30)
    return [call.strip("\n").split("\n") for call in calls.read_text().split("END\n") if call.strip()]


@pytest.mark.parametrize(
    ("extras", "target", "cuda", "made"),
    [
        ((), ".", False, {"installed"}),
        (("tpu",), ".[tpu]", False, {"installed"}),
        (("cuda",), ".[cuda]", True, {"installed"}),
        (("dev", "hf", "peers"), ".[dev,hf,peers]", False, {"installed", "installed-dev"}),
    ],
)
def test_installing_keeps_to_the_versions_and_spares_make_its_own(tmp_path, extras, target, cuda, made):
    environment, builders, package = _install(tmp_path, *extras)
    assert environment == ["-m", "venv", ".venv"]
    for call in (builders, package):
        assert "launch/container/versions.txt" in call
        assert ("launch/container/versions-cuda.txt" in call) == cuda
    assert package[-3:] == ["--no-build-isolation", "--editable", target]
    stamps = {path.name for path in (tmp_path / "a checkout" / ".venv").iterdir() if path.is_file()}
    assert stamps == made
    # What make would install itself, as its rules for these files have it.
    rules = (ROOT / "Makefile").read_text()
    assert all(f"$(VENV)/{name}: pyproject.toml" in rules for name in stamps)


def test_the_recipe_copies_the_checkout_without_history_and_installs_it():
    recipe = (FOLDER / "Containerfile").read_text()
    steps = [line for line in recipe.splitlines() if line and not line.startswith("#")]
    assert re.fullmatch(r"FROM docker\.io/library/python:3\.11\.\d+-slim-bookworm", steps[0])
    assert any(
        step.startswith("RUN ") and step.endswith("launch/container/install.sh $EXTRAS") for step in steps
    )
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".git", ".venv*", "runs"} <= set(ignored)
    assert "launch" not in ignored
