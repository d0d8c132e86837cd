"""Exit codes, the parsing of options, and progress, each seen from outside."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
import sys
import termios
import textwrap
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
import tyro

from sealion_jax import cli
from sealion_jax.errors import Preempted, UserError


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command of these tests takes."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Files."""
    output: str
    """Where to."""
    max_skipped_share: float = 0.01
    workers: int | None = None
    format: Literal["auto", "text"] = "auto"
    strict: bool = False

    def __post_init__(self) -> None:
        if self.max_skipped_share > 1:
            raise UserError(f"the share is {self.max_skipped_share}; it is at most 1")


def parse(*argv: str) -> Options:
    return cli.parse(Options, argv, prog="python -m command")


def outcome(body: str, **settings) -> subprocess.CompletedProcess:
    """What becomes of a process whose main has this body."""
    code = f"from sealion_jax import cli\ndef main(argv):\n{textwrap.indent(body, '    ')}\ncli.run(main)"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, **settings
    )


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (None, 0, ""),
        (UserError("the batch does not divide"), 2, "error: the batch does not divide\n"),
        (Preempted("saved step 3"), 75, "saved step 3\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_an_outcome_has_its_exit_code_and_no_traceback(raised, code, said, capsys):
    def main(argv):
        assert argv == ["x"]
        if raised is not None:
            raise raised

    with pytest.raises(SystemExit) as stopped:
        cli.run(main, ["x"])
    assert stopped.value.code == code
    assert capsys.readouterr().err == said


def test_a_bug_shows_its_traceback_and_exits_1():
    done = outcome("raise ValueError('a bug')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ValueError: a bug" in done.stderr


def test_ctrl_c_exits_130():
    code = (
        "import signal, time\nfrom sealion_jax import cli\n"
        # What is started in the background inherits that SIGINT is ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def main(argv):\n    print('ready', flush=True)\n    time.sleep(60)\ncli.run(main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "interrupted\n")


def test_a_reader_who_leaves_early_gets_no_traceback():
    program = f"from sealion_jax import cli\ncli.run(lambda argv: [print(i) for i in range({10**6})])"
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{program}" | head -n 1; echo "${{PIPESTATUS[0]}}"'],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "0\n141\n"
    assert done.stderr == ""


def test_a_broken_connection_is_not_taken_for_a_closed_output():
    done = outcome("raise BrokenPipeError('the bucket hung up')")
    assert done.returncode == 1
    assert "the bucket hung up" in done.stderr


def test_options_are_parsed_with_dashes_or_underscores():
    expected = Options(inputs=("a", "b"), output="o", max_skipped_share=1e-5, workers=2, strict=True)
    assert (
        parse("a", "b", "--output", "o", "--max-skipped-share", "1e-5", "--workers=2", "--strict") == expected
    )
    assert parse("a", "b", "--output=o", "--max_skipped_share=1e-5", "--workers", "2", "--strict") == expected


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--output", "o", "--worker", "2"], ["unknown option --worker", "did you mean --workers?"]),
        (["--output", "o", "--skipped-share", "2"], ["did you mean --max-skipped-share?"]),
        (["--output", "o", "--workers", "two"], ["--workers", "'two'", "INT"]),
        (["--output", "o", "--max-skipped-share", "x"], ["--max-skipped-share", "'x'", "FLOAT"]),
        (["--output", "o", "--format", "pdf"], ["--format", "pdf", "text"]),
        (["a"], ["--output", "equired"]),
        (["--output", "o", "--max-skipped-share", "2"], ["the share is 2.0; it is at most 1"]),
    ],
)
def test_a_wrong_option_is_told_in_one_line(argv, words):
    with pytest.raises(UserError) as error:
        parse(*argv)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_defaults_may_come_from_an_instance():
    default = Options(output="o", workers=3)
    assert cli.parse(default, ["--strict"], prog="p") == Options(output="o", workers=3, strict=True)


def test_help_shows_the_docstrings_and_exits_0(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    assert "Where to." in capsys.readouterr().out


def test_elsewhere_than_on_a_terminal_progress_is_plain_lines(capsys):
    with cli.Progress(4, "packing", unit="row", seconds_between_lines=0.0) as shown:
        for _ in range(2):
            shown.update(2, note="loss 3.1")
        shown.say("half way")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("packing: 2/4 row (50%), ")
    assert lines[0].endswith("loss 3.1")
    assert lines[1].startswith("packing: 4/4 row (100%), ")
    assert lines[2:] == ["half way"]
    assert not any("\r" in line for line in lines)


def test_on_a_terminal_progress_is_a_bar():
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    code = "from sealion_jax import cli\nfor _ in cli.progress(range(3), 'packing'): pass"
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True, timeout=60)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "\r" in shown
    assert "packing: 100%" in shown


def test_lines_come_no_more_often_than_asked(capsys):
    with cli.Progress(None, "reading", unit="B", seconds_between_lines=60) as shown:
        for _ in range(1000):
            shown.update(3100)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("reading: 3.1 MB, ")


def test_progress_gives_the_items_back(capsys):
    assert list(cli.progress([3, 1, 2], "counting", unit="row")) == [3, 1, 2]
    assert "counting: 3/3 row (100%)" in capsys.readouterr().err


def test_the_command_line_needs_no_jax():
    done = outcome("import sys; cli.parse\nassert 'jax' not in sys.modules, 'cli imports jax'")
    assert done.returncode == 0, done.stderr
