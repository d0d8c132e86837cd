"""The script for TPU VMs, over a gcloud that is not one; what it has workers do is done, in folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "tpu_vm" / "pod.sh"
FAKE = Path(__file__).parent / "fake_gcloud.py"
NAMED = ("--name", "run1", "--zone", "here-a")
WORDS = ("cpt_27b", "--run-dir", 'gs://b/it\'s "one"', "--name", "two  words $HOME; exit 3", "--empty", "")


class Pod:
    """The script, and what gcloud and the workers were told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        gcloud = folder / "bin" / "gcloud"
        gcloud.parent.mkdir()
        gcloud.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
        gcloud.chmod(0o755)
        self.env = {**os.environ, "PATH": f"{gcloud.parent}:{os.environ['PATH']}", "POLL_SECONDS": "0.1"}
        self.env["FAKE_GCLOUD"] = str(folder)

    def does(self, action: str, *options: str, code: int = 0) -> str:
        """What the script printed, standard error included; it must end with this code."""
        done = subprocess.run(
            [SCRIPT, action, *NAMED, *options],
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def plays(self, *, states: tuple[str, ...] = ("ACTIVE",), codes: tuple[str, ...] = ("0",)) -> None:
        (self.folder / "states").write_text("\n".join(states))
        (self.folder / "codes").write_text("\n".join(codes) + "\n")

    def calls(self, action: str) -> list[list[str]]:
        """The words of gcloud's calls with this action, without what every call has."""
        lines = (self.folder / "calls.jsonl").read_text().splitlines()
        every = [*("--quiet", "--zone", "here-a")]
        calls = [json.loads(line) for line in lines]
        assert all(call[:2] == ["compute", "tpus"] and call[-3:] == every for call in calls)
        return [call[2:-3] for call in calls if call[3] == action]

    def is_set_up(self) -> None:
        """Workers have the scripts, and a python; as after `setup`, but quicker."""
        for worker in range(2):
            home = self._home(worker)
            (home / "sealion_jax" / "launch").mkdir(parents=True)
            subprocess.run(
                ["cp", "-r", ROOT / "launch" / "tpu_vm", home / "sealion_jax" / "launch"],
                check=True,
                timeout=30,
            )
            (home / "sealion_jax" / ".venv" / "bin").mkdir(parents=True)
            os.symlink(home / "bin" / "python3.13", home / "sealion_jax" / ".venv" / "bin" / "python")

    def _home(self, worker: int) -> Path:
        code = f"import sys; sys.path[0] = {str(FAKE.parent)!r}; import fake_gcloud; "
        code += f"print(fake_gcloud.worker_home('run1', {worker}))"
        made = subprocess.run(
            [sys.executable, "-c", code],
            env=self.env,
            stdout=subprocess.PIPE,
            text=True,
            timeout=30,
            check=True,
        )
        return Path(made.stdout.strip())

    def has(self, worker: int, name: str, text: str) -> bool:
        """Whether a worker wrote this down, within seconds."""
        path = self.folder / f"run1-{worker}" / name
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if path.exists() and path.read_text() == text:
                return True
            time.sleep(0.05)
        return False


@pytest.fixture
def pod(tmp_path):
    pod = Pod(tmp_path)
    yield pod
    pod.does("stop") if (tmp_path / "run1-0" / "sealion_jax").exists() else None


def test_a_slice_is_asked_for_and_awaited(pod):
    pod.plays(states=("", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"))
    told = pod.does("create", "--accelerator-type", "v5p-128", "--spot", "--service-account", "a@b")
    assert pod.calls("create") == [
        [
            *("queued-resources", "create", "run1", "--accelerator-type", "v5p-128"),
            *(
                "--runtime-version",
                "v2-alpha-tpuv5",
                "--spot",
                "--service-account",
                "a@b",
                "--node-id",
                "run1",
            ),
        ]
    ]
    assert [line.split()[-1] for line in told.splitlines()] == [
        "WAITING_FOR_RESOURCES",
        "PROVISIONING",
        "ACTIVE",
    ]


def test_several_slices_are_one_request_and_each_gets_its_commands(pod):
    pod.plays(states=("", "ACTIVE"))
    pod.does("create", "--accelerator-type", "v6e-256", "--slices", "3")
    assert pod.calls("create")[0][-4:] == ["--node-count", "3", "--node-prefix", "run1"]
    pod.does("stop", "--slices", "3", code=1)  # no worker has the script yet
    assert sorted(call[2] for call in pod.calls("ssh")) == ["run1-0", "run1-1", "run1-2"]
    assert all("--worker=all" in call for call in pod.calls("ssh"))


def test_a_request_that_is_there_already_is_awaited_only(pod):
    pod.plays(states=("PROVISIONING", "ACTIVE"))
    pod.does("create")
    assert pod.calls("create") == []


def test_waiting_has_a_limit_and_says_what_to_do(pod):
    pod.plays(states=("WAITING_FOR_RESOURCES",))
    told = pod.does("create", "--wait-minutes", "0", code=1)
    assert "stays in the queue; run pod.sh create again" in told


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_request_that_failed_is_told(pod, state):
    pod.plays(states=("PROVISIONING", state))
    assert "pod.sh delete, then create again" in pod.does("create", code=1)


@pytest.mark.parametrize("git", [True, False])
def test_setup_brings_the_checkout_and_installs_pinned_versions(pod, git, monkeypatch):
    if not git:  # a checkout that was copied, or a machine without git
        monkeypatch.setitem(pod.env, "GIT_DIR", str(pod.folder / "nowhere"))
    pod.does("setup")
    for worker in range(2):
        home = pod.folder / f"run1-{worker}"
        assert (home / "sealion_jax" / "sealion_jax" / "train.py").exists()
        assert not (home / "sealion_jax" / ".git").exists()
        assert not (home / "sealion_jax" / ".venv" / "lib").exists()
        words = (home / "pip").read_text().splitlines()
        assert words[-2:] == ["--editable", ".[tpu]"]
        assert "launch/container/versions.txt" in words
    assert (pod.folder / "run1-0" / "sealion_jax" / ".venv" / "installed").exists()


def test_training_gets_its_words_on_every_worker(pod):
    pod.is_set_up()
    pod.plays()
    pod.does("run", "--", *WORDS)
    expected = ["-m", "sealion_jax.train", *WORDS, "--cluster", "tpu-vm", "--join-timeout-seconds", "1800"]
    for worker in range(2):
        assert pod.has(worker, "words", "".join(f"{word}\0" for word in expected))
    assert "exit code 0" in pod.does("wait")


@pytest.mark.parametrize(
    ("codes", "starts", "code"),
    [
        (("75", "1", "75", "0"), 4, 0),
        (("75", "2", "0"), 2, 2),
        (("1", "1", "1", "0"), 3, 1),
    ],
)
def test_training_starts_again_after_75_and_failures_but_not_after_a_mistake(pod, codes, starts, code):
    pod.plays(codes=codes)
    pod.is_set_up()
    pod.does("run", "--max-restarts", "2", "--", "cpt_27b")
    pod.does("wait", code=code)
    assert all(pod.has(worker, "started", "started\n" * starts) for worker in range(2))


def test_stop_has_training_save_and_it_does_not_start_again(pod):
    pod.plays(codes=("waits", "0"))
    pod.is_set_up()
    pod.does("run", "--", "cpt_27b")
    assert all(pod.has(worker, "started", "started\n") for worker in range(2))
    assert "training runs already" in pod.does("run", "--", "cpt_27b")
    pod.does("stop")
    pod.does("wait", code=75)
    assert all(pod.has(worker, "saved", "saved\n") for worker in range(2))
    assert all(pod.has(worker, "started", "started\n") for worker in range(2))


def test_logs_of_all_workers_are_collected(pod):
    pod.plays()
    pod.is_set_up()
    pod.does("run", "--", "cpt_27b")
    pod.does("wait")
    pod.does("logs", "--output", str(pod.folder / "logs"))
    for worker in range(2):
        assert "ended with exit code 0" in (pod.folder / "logs" / "run1" / f"{worker}.log").read_text()


def test_a_worker_that_lost_its_training_is_told(pod):
    pod.plays(codes=("waits",))
    pod.is_set_up()
    told = pod.does("wait", code=1)
    assert "does not run on every worker" in told
    assert "is ACTIVE" in told


def test_keep_asks_again_for_a_slice_that_was_preempted(pod):
    pod.plays(states=("SUSPENDED", "", "PROVISIONING", "SUSPENDED", "SUSPENDED", "", "ACTIVE"))
    pod.is_set_up()
    pod.does("keep", "--accelerator-type", "v6e-64", "--", "cpt_27b")
    assert len(pod.calls("delete")) == 2
    assert len(pod.calls("create")) == 2
    assert pod.has(0, "started", "started\n")


def test_a_slice_is_given_back(pod):
    pod.does("delete")
    assert pod.calls("delete") == [["queued-resources", "delete", "run1", "--force"]]


@pytest.mark.parametrize(
    ("action", "options", "message"),
    [
        ("start", (), "Trains on Cloud TPU VMs"),
        ("create", (), "--accelerator-type is missing"),
        ("create", ("--accelerator-type", "v9-8"), "--runtime-version is missing"),
        ("create", ("--spt", "1"), "unknown option --spt"),
        ("create", ("--slices",), "--slices needs a value"),
        ("run", ("--slices", "two"), "whole number instead of two"),
        ("run", ("--name", "Run 1"), "lower-case"),
        ("run", ("--zone", ""), "--zone is missing"),
    ],
)
def test_mistakes_are_told(pod, action, options, message):
    assert message in pod.does(action, *options, code=2)
