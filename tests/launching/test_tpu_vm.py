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
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        self.env["TMPDIR"] = str(self.temporary)

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

    def fails(self, **calls: int) -> None:
        """The next calls of gcloud with these actions find no network."""
        (self.folder / "failing").write_text(
            "\n".join(action for action in calls for _ in range(calls[action]))
        )

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
            (home / "sealion_jax" / ".venv" / "installed").touch()

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


def test_what_gcloud_does_not_tell_is_not_asked_for_anew(pod):
    pod.plays()
    pod.fails(describe=1)
    assert "no network" in pod.does("create", "--accelerator-type", "v6e-64", code=1)
    assert pod.calls("create") == []


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
    assert list(pod.temporary.iterdir()) == []


def test_setup_leaves_nothing_behind_when_it_fails(pod):
    pod.fails(scp=1)
    pod.does("setup", code=1)
    assert pod.calls("ssh") == []
    assert list(pod.temporary.iterdir()) == []


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
        (("2", "0"), 1, 2),
        (("75", "2", "0"), 3, 0),
        (("1", "2", "2", "0"), 3, 2),
        (("1", "1", "1", "0"), 3, 1),
    ],
)
def test_training_starts_again_after_75_and_failures_but_not_after_a_mistake_at_first(
    pod, codes, starts, code
):
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


def test_one_that_is_lost_counts_more_than_what_the_others_end_with(pod):
    pod.plays(codes=("2",))
    pod.is_set_up()
    pod.does("run", "--", "cpt_27b")
    assert "refused" in pod.does("wait", code=2)
    (pod.folder / "run1-0" / "sealion_jax" / "runs" / "tpu_vm" / "ended").unlink()
    assert "does not run on every worker" in pod.does("wait", code=1)


def test_a_worker_on_which_training_does_not_start_is_told(pod):
    pod.plays(codes=("waits",))
    pod.is_set_up()
    state = pod.folder / "run1-1" / "sealion_jax" / "runs" / "tpu_vm"
    state.mkdir(parents=True)
    (state / "log").mkdir()  # what cannot be written
    told = pod.does("run", "--", "cpt_27b", code=1)
    assert told.count("training started") == 1
    assert "error: training did not start" in told


def test_keep_asks_again_for_a_slice_that_was_preempted(pod):
    pod.plays(states=("SUSPENDED", "", "PROVISIONING", "SUSPENDED", "SUSPENDED", "", "ACTIVE"))
    pod.is_set_up()
    pod.does("keep", "--accelerator-type", "v6e-64", "--", "cpt_27b")
    assert len(pod.calls("delete")) == 3
    assert len(pod.calls("create")) == 2
    assert pod.has(0, "started", "started\n")


def _keep(pod, *options: str, code: int = 0) -> str:
    logs = ("--output", str(pod.folder / "logs"))
    return pod.does("keep", "--accelerator-type", "v6e-64", *logs, *options, "--", "cpt_27b", code=code)


@pytest.mark.parametrize(("code", "kept"), [(0, False), (2, False), (0, True)])
def test_keep_gives_the_slice_back_when_training_has_ended(pod, code, kept):
    pod.plays(codes=(str(code),))
    pod.is_set_up()
    told = _keep(pod, *(("--keep-slice",) if kept else ()), code=code)
    assert len(pod.calls("delete")) == (0 if kept else 1)
    assert ("goes on costing" in told) == kept
    # The logs were there before.
    assert f"exit code {code}" in (pod.folder / "logs" / "run1" / "1.log").read_text()


def test_keep_outlasts_a_network_that_is_gone_for_a_while(pod):
    pod.plays(states=("SUSPENDED", "", "ACTIVE"), codes=("1", "0"))
    pod.is_set_up()
    pod.fails(describe=3, delete=2, ssh=4)
    told = _keep(pod)
    assert "is asked again: ERROR: gcloud crashed" in told
    assert "goes on costing" not in told
    assert len(pod.calls("create")) == 1
    assert all(pod.has(worker, "started", "started\n" * 2) for worker in range(2))


def test_keep_leaves_a_slice_that_trains_as_it_is(pod):
    pod.plays(codes=("waits",))
    pod.is_set_up()
    pod.does("run", "--", "cpt_27b")
    assert pod.has(0, "started", "started\n")
    pod.fails(describe=5, ssh=5)
    words = [SCRIPT, "keep", *NAMED, "--output", str(pod.folder / "logs"), "--", "cpt_27b"]
    keep = subprocess.Popen(words, env=pod.env, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 30
        while not any("status" in " ".join(call) for call in pod.calls("ssh")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        pod.does("stop")
        told = keep.communicate(timeout=30)[1]
    finally:
        keep.kill()
    assert keep.returncode == 75, told
    assert pod.calls("create") == []
    assert pod.calls("scp") == []
    assert all(pod.has(worker, "started", "started\n") for worker in range(2))


def test_keep_sets_up_workers_that_are_bare(pod):
    pod.plays(codes=("1", "0"))
    pod.fails(scp=1)
    _keep(pod)
    assert len(pod.calls("scp")) == 2
    assert all(pod.has(worker, "started", "started\n" * 2) for worker in range(2))


def test_keep_ends_where_the_first_request_is_refused(pod):
    pod.plays(states=("",))
    pod.fails(create=1)
    assert "gcloud refused" in _keep(pod, code=1)
    assert len(pod.calls("create")) == 1


def test_keep_takes_refusals_after_a_loss_for_failures(pod):
    pod.plays(codes=("lost", "2", "2", "2", "0"))
    pod.is_set_up()
    _keep(pod, code=2)
    assert all(pod.has(worker, "started", "started\n" * 4) for worker in range(2))


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
        ("run", ("--", "cpt_27b", "--cluster=none"), "--cluster is set by worker.sh"),
        (
            "keep",
            ("--", "cpt_27b", "--join-timeout-seconds", "9"),
            "--join-timeout-seconds is set by worker.sh",
        ),
    ],
)
def test_mistakes_are_told(pod, action, options, message):
    assert message in pod.does(action, *options, code=2)
