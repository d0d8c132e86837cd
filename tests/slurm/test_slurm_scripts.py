"""The Slurm scripts over an srun, scontrol, scancel and sbatch that only note what they are asked."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SLURM = Path(__file__).parents[2] / "launch" / "slurm"

# Each notes its arguments, one call a line of "name<TAB>argument<TAB>...".
NOTES = '#!/usr/bin/env bash\n{ printf "%s" "${0##*/}"; printf "\\t%s" "$@"; echo; } >>"$NOTED"\n'
FAKES = {
    "srun": NOTES
    + '[[ -z $RANK_0_SAYS ]] || echo "$RANK_0_SAYS" >>"$LOG_DIR/slurm-42/0.log"\n'
    + 'echo "${PYTHONSAFEPATH:-}" >"$NOTED.safe_path"\n'
    + 'printf "%s" "$SRUN_SAYS" >&2\nexit "$SRUN_CODE"\n',
    # It answers after so many calls.
    "scontrol": NOTES
    + '(($(grep -c ^scontrol "$NOTED") > ${SILENT:-0})) || { echo "${ERROR:-no answer}" >&2; exit 1; }\n'
    + 'echo "JobId=42 JobState=$STATE Reason=None Requeue=${MAY_REQUEUE:-1} Restarts=$RESTARTS BatchFlag=1"\n'
    + "[[ $1 != requeue || -z ${REFUSED:-} ]]\n",
    "scancel": NOTES,
    "sleep": NOTES,
    "sbatch": NOTES + 'echo "$((100 + $(grep -c ^sbatch "$NOTED")));cluster"\n',
}

ODD = ("cpt_27b", "--run-dir", "/shared/a run; $(touch x) 'q' \"d\" *", "--data.note", "", "--x=`id`")
KILLED_BY_SRUN = "srun: error: n2: task 1: Killed\n"


class Scripts:
    """The scripts, run in a folder with their fakes first on the path."""

    def __init__(self, folder: Path) -> None:
        self.noted = folder / "noted"
        self.logs = folder / "logs"
        for name, text in FAKES.items():
            (folder / "bin" / name).parent.mkdir(exist_ok=True)
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "NOTED": str(self.noted),
            "LOG_DIR": str(self.logs),
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "STATE": "RUNNING",
            "RESTARTS": "0",
            "SRUN_SAYS": "",
            "SRUN_CODE": "0",
            "RANK_0_SAYS": "",
        }

    def run(self, *command: object, **settings: str) -> subprocess.CompletedProcess[str]:
        self.noted.write_text("")
        return subprocess.run(
            [*map(str, command)],
            env={**self.environment, **settings},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def train(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return self.run("bash", SLURM / "train.sbatch", *(arguments or ("cpt_tiny",)), **settings)

    def calls(self, name: str) -> list[list[str]]:
        lines = [line.split("\t") for line in self.noted.read_text().splitlines()]
        return [words for program, *words in lines if program == name]

    @property
    def requeued(self) -> bool:
        return ["requeue", "42"] in self.calls("scontrol")


@pytest.fixture
def scripts(tmp_path: Path) -> Scripts:
    return Scripts(tmp_path)


def test_arguments_reach_training_as_they_are(scripts: Scripts) -> None:
    done = scripts.train(*ODD, PYTHON="/venv/bin/python")
    assert done.returncode == 0, done.stderr
    (words,) = scripts.calls("srun")
    assert words[-len(ODD) - 3 :] == ["/venv/bin/python", "-m", "sealion_jax.train", *ODD]
    assert {"--kill-on-bad-exit=1", "--wait=60", f"--output={scripts.logs}/slurm-42/%t.log"} <= set(words)
    assert not any(word.startswith("--container") for word in words)
    assert not (scripts.folder / "x").exists()


def test_a_container_is_given_to_srun_and_the_settings_may_have_spaces(scripts: Scripts) -> None:
    scripts.train(CONTAINER="/images/sealion 1.sqsh", CONTAINER_MOUNTS="/shared:/shared")
    (words,) = scripts.calls("srun")
    assert "--container-image=/images/sealion 1.sqsh" in words
    assert "--container-mounts=/shared:/shared" in words
    assert f"--container-workdir={scripts.folder}" in words


@pytest.mark.parametrize(("image", "safe"), [("/images/sealion.sqsh", "1\n"), ("", "\n")])
def test_in_a_container_all_code_is_the_images(scripts: Scripts, image, safe) -> None:
    scripts.train(CONTAINER=image)
    assert (scripts.folder / "noted.safe_path").read_text() == safe


@pytest.mark.parametrize(
    ("code", "says", "ends", "requeued", "counted"),
    [
        ("0", "", 0, False, False),
        ("2", "srun: error: n1: tasks 0-1: Exited with exit code 2\n", 2, False, False),
        ("75", "srun: error: n1: task 0: Exited with exit code 75\n", 75, True, False),
        ("1", "srun: error: n1: task 0: Exited with exit code 1\n", 1, True, True),
        ("137", KILLED_BY_SRUN, 137, True, True),
        # srun ends with the highest code, that of a rank which it killed itself; the first one's counts.
        ("137", f"srun: error: n1: task 0: Exited with exit code 2\n{KILLED_BY_SRUN}", 2, False, False),
        ("137", f"srun: error: n1: task 0: Exited with exit code 75\n{KILLED_BY_SRUN}", 75, True, False),
        # A rank that others' end made stop and save says nothing about why the run ended.
        ("137", f"{KILLED_BY_SRUN}srun: error: n1: task 0: Exited with exit code 75\n", 137, True, True),
        # srun itself, before any task was there.
        ("1", "srun: error: Unable to create step for job 42\n", 1, True, True),
    ],
)
def test_what_ended_first_decides(scripts: Scripts, code, says, ends, requeued, counted) -> None:
    done = scripts.train(SRUN_CODE=code, SRUN_SAYS=says)
    assert (done.returncode, scripts.requeued) == (ends, requeued), done.stdout
    assert (scripts.logs / "slurm-42" / "failures").exists() == counted
    assert done.stderr == says


@pytest.mark.parametrize(
    ("state", "restarts"), [("CANCELLED", "0"), ("COMPLETING", "0"), ("RUNNING", "1"), ("RUNNING", "10")]
)
@pytest.mark.parametrize("code", ["0", "1", "2", "75"])
def test_a_job_that_was_cancelled_or_runs_elsewhere_is_left_alone(scripts, state, restarts, code) -> None:
    done = scripts.train(SRUN_CODE=code, STATE=state, RESTARTS=restarts, CHAIN=str(scripts.folder))
    assert done.returncode == int(code)
    assert not scripts.requeued
    assert scripts.calls("scancel") == []
    assert not (scripts.logs / "slurm-42" / "failures").exists()
    assert "not started again from here" in done.stdout


def test_a_later_start_knows_that_it_is_one(scripts: Scripts) -> None:
    done = scripts.train(SRUN_CODE="75", RESTARTS="1", SLURM_RESTART_COUNT="1")
    assert scripts.requeued
    assert "job 42, start 2: starting again" in done.stdout


def test_a_crash_loop_ends_after_three_starts_from_the_same_step(scripts: Scripts) -> None:
    def fail(step: int | None) -> tuple[bool, str]:
        says = "" if step is None else f"resuming after step {step} (runs/first/checkpoints/{step})"
        done = scripts.train(SRUN_CODE="1", RANK_0_SAYS=says)
        assert done.returncode == 1
        return scripts.requeued, done.stdout

    assert [fail(None)[0], fail(None)[0]] == [True, True]
    assert [fail(500)[0], fail(500)[0], fail(600)[0], fail(600)[0]] == [True] * 4
    # One that did not get as far as to say where it goes on has not got further.
    requeued, said = fail(None)
    assert not requeued
    assert "given up: 3 starts in a row got no further" in said


@pytest.mark.parametrize("further", [False, True])
def test_stops_without_end_that_get_no_further_end_the_job(scripts: Scripts, further) -> None:
    requeued = []
    for step in range(4):
        says = f"resuming after step {step} (x)" if further else ""
        done = scripts.train(SRUN_CODE="75", RANK_0_SAYS=says)
        requeued.append(scripts.requeued)
    assert requeued == ([True] * 4 if further else [True, True, False, False])
    assert ("Is --time long enough" in done.stdout) != further
    assert not (scripts.logs / "slurm-42" / "failures").exists()


def test_what_a_later_start_is_refused_may_be_its_nodes_fault(scripts: Scripts) -> None:
    scripts.train(SRUN_CODE="75", RANK_0_SAYS="resuming after step 7 (x)")
    ends = []
    for restarts in ("1", "2"):
        done = scripts.train(SRUN_CODE="2", RESTARTS=restarts, SLURM_RESTART_COUNT=restarts)
        ends.append((done.returncode, scripts.requeued))
    assert ends == [(2, True), (2, False)]
    assert "given up: 3 starts in a row got no further" in done.stdout


def test_also_after_a_start_that_slurm_ended(scripts: Scripts) -> None:
    """When a node fails the script is gone, and writes nothing down."""
    scripts.train(SRUN_CODE="2", RESTARTS="1", SLURM_RESTART_COUNT="1")
    assert scripts.requeued


@pytest.mark.parametrize("code", ["75", "1"])
def test_a_controller_that_is_silent_for_a_while_is_asked_again(scripts: Scripts, code) -> None:
    scripts.train(SRUN_CODE=code, SILENT="5")
    assert scripts.requeued
    assert scripts.calls("sleep") == [["5"]] * 5


def test_a_controller_that_stays_silent_is_told(scripts: Scripts) -> None:
    done = scripts.train(SRUN_CODE="75", SILENT="1000")
    assert done.returncode == 75
    assert len(scripts.calls("scontrol")) == 60
    assert "Slurm does not answer (no answer)" in done.stdout
    assert "cancelled" not in done.stdout


def test_a_job_that_slurm_has_forgotten_is_over(scripts: Scripts) -> None:
    done = scripts.train(SRUN_CODE="75", SILENT="1000", ERROR="error: Invalid job id specified")
    assert len(scripts.calls("scontrol")) == 1
    assert "not started again from here" in done.stdout


@pytest.mark.parametrize(("restarts", "again"), [("0", False), ("1", True), ("21", False)])
def test_a_node_without_the_logs_folder_is_told(scripts: Scripts, restarts, again) -> None:
    scripts.logs.write_text("a file")
    done = scripts.train(RESTARTS=restarts, SLURM_RESTART_COUNT=restarts)
    assert done.returncode == 2
    assert "error: the folder" in done.stderr
    assert (scripts.requeued, scripts.calls("srun")) == (again, [])


@pytest.mark.parametrize("state", ["RUNNING", "SIGNALING"])
def test_a_job_that_is_told_of_its_time_limit_at_this_moment_is_started_again(scripts, state) -> None:
    scripts.train(SRUN_CODE="75", STATE=state)
    assert scripts.requeued


def test_a_job_can_be_stopped_for_good(scripts: Scripts) -> None:
    done = scripts.train(SRUN_CODE="75", MAY_REQUEUE="0")
    assert not scripts.requeued
    assert "not started again: told so" in done.stdout


def test_a_cluster_that_refuses_is_told(scripts: Scripts) -> None:
    done = scripts.train(SRUN_CODE="75", REFUSED="yes")
    assert (done.returncode, scripts.requeued) == (75, True)
    assert "Slurm refused" in done.stdout


def test_being_asked_to_stop_is_no_failure(scripts: Scripts) -> None:
    for step in range(5):
        scripts.train(SRUN_CODE="75", RANK_0_SAYS=f"resuming after step {step} (x)", MAX_RESTARTS="1")
        assert scripts.requeued


def test_there_is_an_end_to_failures_that_get_further(scripts: Scripts) -> None:
    requeued = []
    for step in range(4):
        done = scripts.train(SRUN_CODE="1", RANK_0_SAYS=f"resuming after step {step} (x)", MAX_RESTARTS="3")
        requeued.append(scripts.requeued)
    assert requeued == [True, True, True, False]
    assert "given up after 3 restarts" in done.stdout


def _chain(scripts: Scripts, *given: str) -> tuple[str, str]:
    """The folder of a chain of three jobs, and what was said."""
    done = scripts.run(SLURM / "chain.sh", "3", *given)
    assert done.returncode == 0, done.stderr
    (folder,) = scripts.logs.glob("chain-*")
    return str(folder), done.stdout


@pytest.mark.parametrize(("code", "cancelled"), [("0", True), ("2", True), ("75", False), ("1", False)])
def test_the_rest_of_a_chain_is_cancelled_when_it_is_of_no_use(scripts: Scripts, code, cancelled) -> None:
    chain, _ = _chain(scripts, "--job-name", "my own", "train.sbatch")
    scripts.train(SRUN_CODE=code, CHAIN=chain, REQUEUE="0")
    assert not scripts.requeued
    expected = ["--quiet", "--state", "PENDING", "101", "102", "103"]
    assert scripts.calls("scancel") == ([expected] if cancelled else [])


def test_starts_that_get_no_further_are_counted_over_all_jobs_of_a_chain(scripts: Scripts) -> None:
    chain, _ = _chain(scripts, "train.sbatch")
    cancelled = []
    for job, code in (("101", "1"), ("102", "2"), ("103", "75")):
        says = "resuming after step 7 (x)" if job == "101" else ""
        done = scripts.train(SRUN_CODE=code, CHAIN=chain, REQUEUE="0", SLURM_JOB_ID=job, RANK_0_SAYS=says)
        assert done.returncode == int(code)
        cancelled.append(scripts.calls("scancel") != [])
    assert cancelled == [False, False, True]
    assert "given up: 3 starts in a row got no further" in done.stdout


def test_outside_of_a_job_it_says_how_to_begin(scripts: Scripts) -> None:
    done = scripts.train(SLURM_JOB_ID="")
    assert done.returncode != 0
    assert "start this script with sbatch" in done.stderr
    assert scripts.calls("srun") == []


def test_the_jobs_of_a_chain_wait_for_each_other(scripts: Scripts) -> None:
    given = ("--nodes", "4", str(SLURM / "train.sbatch"), *ODD)
    chain, said = _chain(scripts, *given)
    calls = scripts.calls("sbatch")
    assert [words[-len(given) :] for words in calls] == [list(given)] * 3
    assert [words[1 : -len(given)] for words in calls] == [
        [],
        ["--dependency=afterany:101"],
        ["--dependency=afterany:102"],
    ]
    assert "job 103 (3 of 3), afterany:102" in said
    assert f"cancel all: xargs scancel <{chain}/jobs" in said


def test_a_chain_without_a_folder_for_its_logs_is_refused(scripts: Scripts) -> None:
    scripts.logs.write_text("a file")
    done = scripts.run(SLURM / "chain.sh", "3", "train.sbatch")
    assert (done.returncode, scripts.calls("sbatch")) == (2, [])
    assert "error: the folder" in done.stderr


@pytest.mark.parametrize("given", [(), ("3",), ("0", "x"), ("many", "x")])
def test_a_chain_without_a_number_is_refused(scripts: Scripts, given) -> None:
    done = scripts.run(SLURM / "chain.sh", *given)
    assert (done.returncode, scripts.calls("sbatch")) == (2, [])
    assert "usage:" in done.stderr
