"""The watch's threads, in this process: what ends it, what is called off, and what is left alone."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from sealion_jax.errors import Preempted, UserError
from sealion_jax.storage import file_system
from sealion_jax.watching import Activity, Ends, Watch, WatchConfig, beats, ending, watch
from sealion_jax.watching.beats import SILENCE_SECONDS, Beat, BeatFiles, read_hangs
from sealion_jax.watching.status import status_lines
from tests.storage.gcs import Faults, gcs_server


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(watch, "_HEARD_SECONDS", 0.6)
    monkeypatch.setattr(watch, "_ALIKE_SECONDS", 0.2)


@pytest.fixture
def run_dir(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A run directory on the disk, or as asked for: on a store of objects in memory, or on gs://."""
    place = getattr(request, "param", "disk")
    if place == "disk":
        yield str(tmp_path / "run")
        return
    if place == "bucket":
        with gcs_server() as server:
            for name, value in server.environment().items():
                monkeypatch.setenv(name, value)
            fsspec.filesystem("gs").clear_instance_cache()  # clients from before know nothing of the server
            yield server.url("run")
            fsspec.filesystem("gs").clear_instance_cache()
        return
    url = f"memory://{uuid.uuid4().hex}/run"
    yield url
    fs, path = fsspec.core.url_to_fs(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)


on_disk_and_objects = pytest.mark.parametrize("run_dir", ["disk", "objects"], indirect=True)


class FakeEnds(Ends):
    """What processes tell each other, without JAX's service."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count, self._mistake = 0, None

    def tell(self, mistake: str | None) -> None:
        with self._lock:
            self._count, self._mistake = self._count + 1, self._mistake or mistake

    def count(self) -> int:
        return self._count

    def mistake(self) -> str | None:
        return self._mistake


class Watched:
    """A process's watch, which notes that it would have ended the process instead of doing it."""

    def __init__(
        self,
        run_dir: str,
        process: int = 0,
        processes: int = 1,
        *,
        ends: Ends | None = None,
        **config: float | None,
    ) -> None:
        self.lines: list[str] = []
        self.code: int | None = None
        self._ended = threading.Event()
        settings = {"beat_seconds": 0.1, "silent_seconds": 0.5, "least_seconds": 1.0} | config
        self.watch = Watch(
            run_dir,
            WatchConfig(**settings),
            process=process,
            processes=processes,
            attempt="attempt",
            ends=ends,
            report=self.lines.append,
            end=self._end,
        )

    def _end(self, code: int) -> None:
        self.code, self.ended_at = code, time.monotonic()
        self._ended.set()

    def wait_for_end(self, seconds: float = 10.0) -> bool:
        return self._ended.wait(seconds)

    def wait_for_line(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not self.lines and time.monotonic() < deadline:
            time.sleep(0.01)
        return bool(self.lines)

    @contextlib.contextmanager
    def running(self) -> Iterator[Activity]:
        """The activity of a run that holds its directory."""
        with self.watch as activity:
            activity.lease = 1
            yield activity

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def hangs_of(run_dir: str) -> list[dict]:
    return read_hangs(run_dir)


def stacks_of(run_dir: str, process: int) -> str:
    fs, path = fsspec.core.url_to_fs(run_dir)
    return fs.cat_file(f"{path}/heartbeats/{process}.stacks.txt").decode()


@on_disk_and_objects
def test_a_process_alone_that_is_stuck_dumps_its_stacks_and_ends(run_dir):
    watched = Watched(run_dir, least_seconds=0.6)
    with watched.running() as activity:
        activity.finished_step(3)
        assert watched.wait_for_end()
    assert watched.code == 1
    (hang,) = hangs_of(run_dir)
    assert hang["kind"] == "overdue" and "step 4 has taken" in hang["reason"]
    assert "ending the run: process 0: step 4 has taken" in watched.text
    stacks = stacks_of(run_dir, 0)
    # This very test, in the thread that is stuck.
    assert "test_a_process_alone_that_is_stuck_dumps_its_stacks_and_ends" in stacks
    assert stacks.count("most recent call first") >= 3


def test_steps_that_go_on_are_left_alone_and_the_end_is_told(run_dir):
    watched = Watched(run_dir, least_seconds=0.6)
    with watched.running() as activity:
        for step in range(1, 8):
            time.sleep(0.2)
            activity.finished_step(step)
        before = BeatFiles(run_dir, "attempt").read(0)
    after = BeatFiles(run_dir, "attempt").read(0)
    assert watched.code is None and watched.lines == []
    assert before is not None and before.ended is None and before.beat >= 8 and before.step >= 5
    assert after is not None and after.ended == "done" and after.step == 7
    assert [thread for thread in threading.enumerate() if thread.name in ("watch", "heartbeats")] == []
    assert hangs_of(run_dir) == []


@pytest.mark.parametrize(
    ("error", "ended"), [(Preempted("x"), "stopped"), (UserError("y"), "UserError: y"), (None, "done")]
)
def test_how_a_process_ended_is_in_its_heartbeat(run_dir, error, ended):
    watched = Watched(run_dir, processes=2)
    with contextlib.suppress(Preempted, UserError), watched.watch:
        if error is not None:
            raise error
    beat = BeatFiles(run_dir, "attempt").read(0)
    assert beat is not None and beat.ended == ended
    assert watched.code is None


def test_storage_that_answers_no_more_does_not_keep_a_hung_process(run_dir, monkeypatch):
    """The heartbeat is stuck in a write; the limit is kept all the same."""
    release = threading.Event()
    monkeypatch.setattr(BeatFiles, "write", lambda *_: release.wait(60))
    monkeypatch.setattr("sealion_jax.watching.watch.longest_seconds", lambda _config: 1.0)
    watched = Watched(run_dir, least_seconds=0.5)
    try:
        with watched.running() as activity:
            activity.finished_step(1)
            assert watched.wait_for_end()
            release.set()
    finally:
        release.set()
    assert watched.code == 1
    assert "the run directory does not answer" in watched.text


def test_storage_that_fails_stops_no_training(run_dir, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(BeatFiles, "write", fail)
    watched = Watched(run_dir)
    with watched.running() as activity:
        for step in range(8):
            time.sleep(0.1)
            activity.finished_step(step)
    assert watched.code is None


@pytest.mark.parametrize("run_dir", ["disk", "bucket"], indirect=True)
def test_a_neighbour_that_falls_silent_is_told_once_this_process_waits(run_dir):
    """Process 1 writes no heartbeat any more; process 0 ends only after its own steps stand still."""
    first, second = Watched(run_dir, 0, 2), Watched(run_dir, 1, 2)
    with second.watch:
        time.sleep(0.3)
    silent = BeatFiles(run_dir, "attempt").read(1)
    assert silent is not None
    # As a process of another machine would have left it, so that nobody sees that it is gone.
    BeatFiles(run_dir, "attempt").write(
        dataclasses.replace(silent, ended=None, machine="another", pid=2**22 + 1)
    )
    with first.watch as activity:
        for step in range(1, 15):  # longer than silence may be
            time.sleep(0.1)
            activity.finished_step(step)
        assert first.code is None
        assert first.wait_for_end()
    (hang,) = hangs_of(run_dir)
    assert hang["kind"] == "silent" and hang["silent"] == [1]
    assert "process 1" in first.lines[0] and "was not heard of for" in first.lines[0]


def test_a_neighbour_that_answers_again_is_called_off(run_dir, monkeypatch):
    """Process 1's heartbeats are late by more than they may, and come before it is given up."""
    first, second = Watched(run_dir, 0, 2, least_seconds=None), Watched(run_dir, 1, 2, least_seconds=None)
    write = BeatFiles.write
    late = threading.Event()

    def late_write(files, beat):
        if beat.process == 1 and late.is_set():
            time.sleep(0.65)
            late.clear()
        write(files, beat)

    monkeypatch.setattr(BeatFiles, "write", late_write)
    with second.watch, first.watch:
        time.sleep(0.8)
        late.set()
        deadline = time.monotonic() + 10
        while "it was nothing" not in first.text and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        assert first.code is None and second.code is None
    assert "it was nothing: all processes answer" in first.text
    assert hangs_of(run_dir) == []


def test_when_all_answer_the_one_that_is_behind_is_named_and_all_end(run_dir):
    watched = [Watched(run_dir, number, 3, least_seconds=0.8) for number in range(3)]
    with contextlib.ExitStack() as watches:
        activities = [watches.enter_context(one.watch) for one in watched]
        for number, activity in enumerate(activities):
            activity.finished_step(8 if number == 2 else 9)
        assert all(one.wait_for_end() for one in watched)
    (hang,) = hangs_of(run_dir)
    assert hang["silent"] == [] and hang["behind"] == [2] and hang["kind"] == "overdue"
    assert any("process 2" in line and "wait for this one" in line for line in hang["lines"])
    assert "wait for this one" in watched[0].text  # the lowest tells it all, the others where it is
    assert all("hangs.jsonl" in one.text for one in watched[1:])


@on_disk_and_objects
def test_an_error_in_one_process_ends_all_and_is_named(run_dir, capsys):
    first, second = Watched(run_dir, 0, 2, least_seconds=None), Watched(run_dir, 1, 2, least_seconds=None)
    with first.watch:
        with contextlib.suppress(RuntimeError), second.watch:
            time.sleep(0.3)
            raise RuntimeError("its own")
        assert first.wait_for_end()
    assert (first.code, second.code) == (1, 1)
    assert "RuntimeError: its own" in capsys.readouterr().err
    assert "ending the run: process 1 failed: RuntimeError: its own" in first.text


@pytest.mark.parametrize("storage_fails", [False, True])
@pytest.mark.parametrize("who", [0, 1])
def test_the_users_mistake_that_one_process_meets_ends_all_with_2(run_dir, who, storage_fails, monkeypatch):
    """A full disk, say, on which nothing can be told. Process 0 goes last, and with it JAX's service."""

    def fail(*_: object) -> None:
        raise OSError("no space")

    ends = FakeEnds()
    watched = [Watched(run_dir, number, 3, ends=ends, least_seconds=None) for number in range(3)]
    with contextlib.ExitStack() as waiting:
        for number in {0, 1, 2} - {who}:
            waiting.enter_context(watched[number].watch)
        with contextlib.suppress(UserError), watched[who].watch:
            time.sleep(0.3)
            if storage_fails:
                monkeypatch.setattr(BeatFiles, "write", fail)
                monkeypatch.setattr(BeatFiles, "note_once", fail)
            raise UserError("no room\nfor it")
        assert all(one.wait_for_end(3) for one in watched)
        shown = status_lines(run_dir)[1:]
    assert [one.code for one in watched] == [2, 2, 2]
    assert watched[who].lines == ["error: no room\nfor it"]
    for number in {0, 1, 2} - {who}:
        (line,) = watched[number].lines
        assert line.startswith(f"error: process {who} (pid ") and line.endswith("): no room for it")
    assert watched[0].ended_at > max(one.ended_at for one in watched[1:]) + 0.1
    assert hangs_of(run_dir) == []
    assert storage_fails or all("ended: error: " in line for line in shown if line[0] != str(who))


def test_the_users_mistake_that_all_meet_is_left_to_them(run_dir):
    """Nobody is ended, nothing is said twice, and it takes no longer than the slowest."""
    ends = FakeEnds()
    watched = [Watched(run_dir, number, 2, ends=ends) for number in range(2)]

    def refused(number: int) -> None:
        with contextlib.suppress(UserError), watched[number].watch:
            time.sleep(0.1 * number)
            raise UserError("a mistake in the recipe")

    started = time.monotonic()
    threads = [threading.Thread(target=refused, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - started < 1.0
    assert [(one.code, one.lines) for one in watched] == [(None, []), (None, [])]


def test_a_mistake_after_all_others_are_done_is_left_to_whoever_meets_it(run_dir):
    """They wait for it in JAX's exit, which goes wrong when a process is ended."""
    ends = FakeEnds()
    watched = [Watched(run_dir, number, 2, ends=ends) for number in range(2)]
    with contextlib.suppress(UserError), watched[0].watch:
        with watched[1].watch:
            pass
        raise UserError("no room for the digests")
    assert [one.code for one in watched] == [None, None]


def test_what_breaks_because_another_process_has_ended_is_not_told(run_dir, capsys):
    ends = FakeEnds()
    ends.tell("process 1: no room")
    watched = Watched(run_dir, 0, 2, ends=ends)
    with contextlib.suppress(RuntimeError), watched.watch:
        assert watched.wait_for_line(3)
        raise RuntimeError("connection closed by peer")
    assert watched.code == 2 and watched.lines == ["error: process 1: no room"]
    assert capsys.readouterr().err == ""


def test_another_thread_ends_the_run(run_dir):
    """Whatever the main thread does meanwhile."""
    ends = FakeEnds()
    watched = [Watched(run_dir, number, 2, ends=ends) for number in range(2)]
    alone = Watched(run_dir)
    with watched[0].watch, watched[1].watch, alone.watch:
        threading.Thread(target=watched[0].watch.end_run, args=(UserError("taken over"),)).start()
        alone.watch.end_run(UserError("taken over"))
        assert all(one.wait_for_end(3) for one in watched)
    assert [one.code for one in (*watched, alone)] == [2, 2, 2]
    assert watched[0].lines == alone.lines == ["error: taken over"]


@on_disk_and_objects
def test_what_an_earlier_attempt_left_is_not_taken_for_this_one(run_dir):
    """A heartbeat of the same process from before is no sign of life, and its alarm is none."""
    with Watched(run_dir, 1, 2).watch:
        pass
    beat, before = BeatFiles(run_dir, "attempt").read(1), BeatFiles(run_dir, "before")
    assert beat is not None
    before.write(dataclasses.replace(beat, attempt="before", ended=None))
    before.note_once("alarm-1", {"kind": "silent", "by": 0, "reason": "old", "moves": 0})
    fs, path = fsspec.core.url_to_fs(run_dir)
    fs.rm_file(f"{path}/heartbeats/1-attempt.json")
    fs.pipe_file(f"{path}/heartbeats/.1-before.json-7-8", b"its writer was killed")
    fs.pipe_file(f"{path}/heartbeats/5.stacks.txt", b"somebody may want to read them")
    watched = Watched(run_dir, 0, 2, least_seconds=None)
    with watched.running() as activity:
        activity.begin("compiling", step=0)
        assert watched.wait_for_end()
    (hang,) = hangs_of(run_dir)
    assert hang["silent"] == [1] and hang["processes"]["1"] is None
    assert "old" not in watched.text
    # What was there is removed, as the run holds its directory.
    left = sorted(name.rsplit("/", 1)[-1] for name in fs.ls(f"{path}/heartbeats", detail=False))
    own = ["0-attempt.json", "0.stacks.txt", "5.stacks.txt", "alarm-1-attempt.json", "verdict-1-attempt.json"]
    assert left == own


@on_disk_and_objects
def test_a_second_start_disturbs_no_run_that_goes_on(run_dir):
    """It has the same process numbers, says that it is dead and has alarms; it is all one to the run."""
    watched = [Watched(run_dir, number, 2, least_seconds=None) for number in range(2)]
    with watched[0].running(), watched[1].running():
        time.sleep(0.3)
        own = [BeatFiles(run_dir, "attempt").read(number) for number in range(2)]
        second = BeatFiles(run_dir, "second")
        deadline = time.monotonic() + 1.5  # thrice as long as a process may be silent
        while time.monotonic() < deadline:
            for beat in own:
                assert beat is not None
                second.write(dataclasses.replace(beat, attempt="second", pid=2**22 + 1, lease=None, beat=1))
            second.note_once("alarm-1", {"kind": "silent", "by": 0, "reason": "its", "moves": 0})
            second.note_once("verdict-1", {"called_off": False, "silent": [0, 1], "lines": ["all end"]})
            time.sleep(0.05)
        lines = status_lines(run_dir)
    assert [one.lines for one in watched] == [[], []] and [one.code for one in watched] == [None, None]
    assert len(lines) == 3 and all(" is dead" not in line for line in lines)


def test_a_process_alone_writes_nothing_before_the_run_directory_is_its_own(run_dir):
    with pytest.raises(UserError), Watched(run_dir).watch:
        time.sleep(0.3)
        raise UserError("a mistake in the recipe")
    assert not Path(run_dir).exists()


@on_disk_and_objects
def test_a_note_is_written_once(run_dir):
    files = BeatFiles(run_dir, "attempt")
    assert files.note_once("verdict-1", {"n": 1})
    assert not files.note_once("verdict-1", {"n": 2})
    assert files.note("verdict-1") == {"n": 1}
    assert BeatFiles(run_dir, "another").note("verdict-1") is None


@on_disk_and_objects
def test_the_status_is_a_line_a_process(run_dir):
    assert status_lines(run_dir) == []
    with Watched(run_dir, 1, 2).watch as activity, Watched(run_dir, 0, 2).watch as other:
        activity.finished_step(4)
        other.finished_step(4)
        with other.during("evaluating"):
            time.sleep(0.4)
            lines = status_lines(run_dir)
    assert lines[0].split() == ["process", "host", "pid", "step", "doing", "for", "last", "heartbeat"]
    assert [line.split()[0] for line in lines[1:]] == ["0", "1"]
    assert "evaluating" in lines[1] and "step 5" in lines[2]
    assert "ended: done" in status_lines(run_dir)[1]
    assert "one is due every" not in lines[1]


@on_disk_and_objects
@pytest.mark.parametrize(("lease", "is_later"), [(2, True), (0, False)], ids=["later start", "killed before"])
def test_a_process_that_wakes_up_ends_at_once_if_its_run_was_started_again(
    run_dir, monkeypatch, lease, is_later
):
    """It was stopped for long (its heartbeat stands in a write); another process has its place since.

    What a killed attempt of before has left says that it holds the run directory, too: that is no reason.
    """
    write = BeatFiles.write
    asleep, awake = threading.Event(), threading.Event()

    def sleepy_write(files, beat):
        if beat.attempt == "attempt" and beat.beat == 3:
            asleep.set()
            awake.wait(20)
        write(files, beat)

    monkeypatch.setattr(BeatFiles, "write", sleepy_write)
    watched = Watched(run_dir)
    try:
        with watched.running() as activity:
            assert asleep.wait(10)
            other = BeatFiles(run_dir, "attempt").read(0)
            assert other is not None
            time.sleep(0.8)
            awake.set()
            time.sleep(0.05)
            write(BeatFiles(run_dir, "next"), dataclasses.replace(other, attempt="next", lease=lease, beat=1))
            for step in range(1, 100 if is_later else 20):
                if watched.wait_for_end(0.05):
                    break
                activity.finished_step(step)
            assert watched.code == (1 if is_later else None)
    finally:
        awake.set()
    assert ("was stopped, and the run went on without it" in watched.text) == is_later
    assert hangs_of(run_dir) == []


def test_a_silent_process_that_wakes_up_follows_the_verdict_at_once(run_dir, monkeypatch):
    """It neither writes a verdict of its own nor asks the others, who are gone."""
    files = BeatFiles(run_dir, "attempt")
    files.note_once("alarm-1", {"kind": "silent", "by": 1, "reason": "0 is silent", "moves": 0})
    verdict = {"called_off": False, "written_by": 1, "silent": [0], "lines": ["ending the run: 0 is silent"]}
    files.note_once("verdict-1", verdict)
    watched = Watched(run_dir, 0, 2, least_seconds=None)
    started = time.monotonic()
    with watched.watch:
        assert watched.wait_for_end(5)
    assert time.monotonic() - started < 1.5
    assert watched.lines == ["ending the run: 0 is silent"]
    assert hangs_of(run_dir) == []


HOLDS_THE_LOCK = """
import ctypes, sys
from sealion_jax.watching import Watch, WatchConfig
config = WatchConfig(beat_seconds=0.1, silent_seconds=0.5)
with Watch(sys.argv[1], config, process=1, processes=2, attempt="attempt") as activity:
    activity.finished_step(2)
    def is_stuck_in_here():
        mutex, c = ctypes.create_string_buffer(64), ctypes.PyDLL(None)  # which keeps Python's lock in calls
        c.pthread_mutex_lock(mutex)
        c.pthread_mutex_lock(mutex)
    import time
    time.sleep(0.5)
    is_stuck_in_here()
"""


def test_a_process_in_which_no_python_runs_writes_its_stacks_and_is_killed(run_dir):
    stuck = subprocess.Popen([sys.executable, "-c", HOLDS_THE_LOCK, run_dir])
    watched = Watched(run_dir, 0, 2, least_seconds=None)
    try:
        deadline = time.monotonic() + 30
        while BeatFiles(run_dir, "attempt").read(1) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        with watched.running() as activity:
            activity.finished_step(2)
            assert watched.wait_for_end(20)
        assert stuck.wait(5) == -signal.SIGKILL
    finally:
        stuck.kill()
    assert f"killed process 1 (pid {stuck.pid} on " in watched.text
    assert "in is_stuck_in_here" in stacks_of(run_dir, 1)


@pytest.mark.parametrize("own", [0, 255])
def test_a_large_run_settles_an_alarm_in_time(run_dir, own, monkeypatch):
    """256 processes in a bucket that takes 30 ms to answer, a few looks at each: one after another, 40 s."""
    processes, read = 256, BeatFiles.read
    watched = Watched(run_dir, own, processes, least_seconds=None, silent_seconds=0.4)
    with Watched(run_dir, own, processes).watch:
        pass
    beat = BeatFiles(run_dir, "attempt").read(own)
    assert beat is not None
    asked: list[int] = []

    def slow_read(files: BeatFiles, process: int) -> Beat | None:
        asked.append(process)
        time.sleep(0.03)
        if process == own:
            return read(files, process)
        silent = process == (own + 1) % processes
        other = dataclasses.replace(beat, ended=None, process=process, machine="another")
        return other if silent else dataclasses.replace(other, alarm=1, beat=time.monotonic_ns())

    monkeypatch.setattr(BeatFiles, "read", slow_read)
    with watched.running() as activity:
        activity.begin("compiling", step=0)
        time.sleep(0.5)
        raised = time.monotonic()
        if own:  # process 0 lives, and it is its word that counts
            time.sleep(1.0)
            assert watched.code is None and set(asked) <= {*range(9), 255}
            return
        assert watched.wait_for_end(8)
    assert watched.ended_at - raised < 4
    (hang,) = hangs_of(run_dir)
    assert hang["silent"] == [1] and len(hang["processes"]) == processes


def test_a_heartbeat_that_gets_no_answer_is_sent_again_in_seconds(monkeypatch):
    """Its client is its own, whatever the others' limit: a minute of silence passes for a dead process."""
    with gcs_server() as server, server.faulty(Faults(first_writes=("delay",), delay_seconds=60)) as door:
        for name, value in door.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(beats, "SILENCE_SECONDS", 0.5)
        fsspec.filesystem("gs").clear_instance_cache()
        started = time.monotonic()
        files = BeatFiles(server.url("run"), "attempt")
        files.note_once("alarm-1", {"n": 1})
        assert time.monotonic() - started < 10
        assert files.note("alarm-1") == {"n": 1}
        usual, _ = file_system(server.url("run"))
        assert usual.requests_timeout.sock_read == 60
        fsspec.filesystem("gs").clear_instance_cache()
    silent = WatchConfig().silent_seconds
    assert silent is not None and silent > 3 * SILENCE_SECONDS
