"""What entry points share: exit codes, parsing options, progress, and quiet libraries.

Nothing heavy is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import math
import os
import select
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, NoReturn, TypeVar

from sealion_jax.config_tree import nearest
from sealion_jax.errors import Preempted, UserError

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130
EXIT_PIPE_CLOSED = 141

LARGE_UNITS = ("B", "token", "tokens")
"""Units that come in such numbers that they are told in thousands and millions."""

Options = TypeVar("Options")
Item = TypeVar("Item")


def run(main: Callable[[Sequence[str]], Any], argv: Sequence[str] | None = None) -> NoReturn:
    """Calls `main(argv)` and ends the process with the exit code that its outcome stands for.

    0 done; 2 the user's mistake, told without a traceback; 75 stopped by a preemption after saving;
    130 Ctrl-C; 141 whoever read the output has gone (`| head`); 1 anything else, with the traceback.
    """
    quiet_libraries()
    sys.exit(_outcome(main, sys.argv[1:] if argv is None else argv))


def _outcome(main: Callable[[Sequence[str]], Any], argv: Sequence[str]) -> int:
    code = EXIT_DONE
    try:
        main(argv)
        sys.stdout.flush()
    except UserError as error:
        _tell(f"error: {error}")
        code = EXIT_USER_ERROR
    except Preempted as stop:
        _tell(str(stop))
        code = EXIT_PREEMPTED
    except KeyboardInterrupt:
        _tell("interrupted")
        code = EXIT_INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            code = EXIT_PIPE_CLOSED
        else:
            traceback.print_exc()
            code = EXIT_FAILED
    return code


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _output_is_closed() -> bool:
    """Whether it is our own output that nobody reads, not some other connection that broke."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    closed = any(event & select.POLLERR for _, event in output.poll(0))
    if closed:
        # What is still buffered would fail once more when the interpreter exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def quiet_libraries() -> None:
    """Leaves only warnings and errors of libraries that report every step of theirs."""
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.WARNING)
    for name in ("jax", "orbax", "grain", "etils", "matplotlib", "tensorflow_datasets", "gcsfs", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)


def parse(
    options: type[Options] | Options, argv: Sequence[str], *, prog: str, description: str | None = None
) -> Options:
    """The options of an entry point, from a dataclass (or an instance of one, for its values as defaults).

    Raises:
        UserError: an option is unknown, ill-typed or missing, or the dataclass refused its values.
        SystemExit: after printing, for `--help`.
    """
    import tyro

    is_type = isinstance(options, type)
    settings: dict[str, Any] = {"prog": prog, "description": description}
    settings["config"] = (tyro.conf.FlagCreatePairsOff,)
    if not is_type:
        settings["default"] = options
    cls: Any = options if is_type else type(options)
    if any(word in ("-h", "--help") for word in argv):
        return tyro.cli(cls, args=list(argv), **settings)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed, unknown = tyro.cli(cls, args=list(argv), return_unknown_args=True, **settings)
    except SystemExit as stopped:
        raise _refusal_of_tyro(stopped, said.getvalue(), prog) from stopped
    if unknown:
        raise _unknown_options(unknown, cls, prog)
    return parsed


def _refusal_of_tyro(stopped: BaseException, said: str, prog: str) -> UserError:
    """The dataclass's own refusal when there is one; else what tyro printed, in one line."""
    cause: BaseException | None = stopped
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        cause = cause.__context__
    lines = [line.strip(" │╭╮╰╯─") for line in said.splitlines()]
    lines = [line for line in lines[1:] if line.strip("-")]
    helped = next((k for k, line in enumerate(lines) if line.startswith("For full helptext")), len(lines))
    text = (
        " ".join(lines[:helped]).replace("Error parsing ", "").replace(" Argument helptext: ", "; expected ")
    )
    text = text or f"{prog}: these options were not understood"
    return UserError(f"{text} (see {prog} --help)")


def _unknown_options(unknown: Sequence[str], cls: Any, prog: str) -> UserError:
    first = unknown[0]
    if not first.startswith("-"):
        return UserError(f"unexpected argument {first!r} (see {prog} --help)")
    name = first.partition("=")[0]
    known = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(cls)]
    close = nearest(name.replace("_", "-"), known)
    hint = f"; did you mean {close[0]}?" if close else f" (see {prog} --help)"
    return UserError(f"unknown option {name}{hint}")


class Progress:
    """Tells how far some long work is: a bar on a terminal, elsewhere a plain line now and then.

    Lines go to standard error. Without a total only the count and the speed are told.
    """

    def __init__(
        self,
        total: int | None,
        description: str,
        *,
        unit: str = "it",
        initial: int = 0,
        seconds_between_lines: float = 10.0,
    ) -> None:
        self.count = initial
        self._initial = initial
        self._total = total
        self._description = description
        self._unit = unit
        self._pause = seconds_between_lines
        self._started = self._last_line = time.monotonic()
        self._note = ""
        self._told: int | None = None
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            scale = unit in LARGE_UNITS
            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=description,
                unit=unit,
                unit_scale=scale,
                dynamic_ncols=True,
            )

    def update(self, amount: int = 1, note: str | None = None) -> None:
        """Counts `amount` more; `note` stays beside the numbers until the next one."""
        self.count += amount
        self._note = self._note if note is None else note
        if self._bar is not None:
            if note is not None:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(amount)
        elif time.monotonic() - self._last_line >= self._pause:
            self._print_line()

    def say(self, line: str) -> None:
        """Prints a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            _tell(line)

    def close(self) -> None:
        """Ends the bar, or prints the last line, unless it was the last already."""
        if self._bar is not None:
            self._bar.close()
        elif self._told != self.count:
            self._print_line()

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        self._told = self.count
        elapsed = max(self._last_line - self._started, 1e-9)
        rate = (self.count - self._initial) / elapsed
        parts = [f"{self._description}: {self._amount(self.count)}"]
        if self._total:
            parts[0] = parts[0].rstrip() + f"/{self._amount(self._total)}{self._unit}"
            parts[0] += f" ({self.count / self._total:.0%})"
            left = self._total - self.count
            parts.append(f"{left / rate:.0f} s left" if rate and left > 0 else f"{elapsed:.0f} s")
        else:
            parts[0] += self._unit
            parts.append(f"{elapsed:.0f} s")
        parts.append(f"{self._amount(rate)}{self._unit}/s")
        if self._note:
            parts.append(self._note)
        _tell(", ".join(parts))

    def _amount(self, count: float) -> str:
        """The number, ready to have the unit appended."""
        rounded = float(f"{count:.3g}")
        power = min(int(math.log10(rounded)) // 3, 4) if rounded >= 1 and self._unit in LARGE_UNITS else 0
        if power:
            return f"{rounded / 1000**power:.3g} {' kMGT'[power]}"
        return f"{count:,} " if isinstance(count, int) else f"{count:,.3g} "

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def progress(items: Iterable[Item], description: str, *, unit: str = "it") -> Iterator[Item]:
    """The same items, with the progress over them shown."""
    total = len(items) if isinstance(items, Sized) else None
    with Progress(total, description, unit=unit) as shown:
        for item in items:
            yield item
            shown.update()
