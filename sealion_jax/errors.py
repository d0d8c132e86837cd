"""Errors that entry points turn into exit codes instead of tracebacks."""


class UserError(ValueError):
    """A mistake of the user's: told in a line or two, exit code 2, no traceback.

    The message says what was wrong, what was expected and what to do.
    """


class Preempted(Exception):  # noqa: N818 (not an error)
    """The run was asked to stop, has saved, and goes on when started again: exit code 75."""
