"""Asking a run to stop; JAX is imported late, so that a signal is heard from a run's first moment on."""

from __future__ import annotations

import signal
from collections.abc import Hashable
from types import FrameType


class StopRequest:
    """Whether the run has been asked to stop (SIGTERM), as all its processes see it.

    Made first thing: from then on SIGTERM ends the process no more. With several processes JAX's preemption
    service takes the signal over when they join, and picks a moment that none has passed yet, so all of them
    stop at the same one.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._asked = 0
        self._moment: Hashable = None
        self._answer = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._signalled = True

    @property
    def heard(self) -> bool:
        """Whether this process has been asked; of use only before the processes have joined."""
        return self._signalled

    def requested(self, moment: Hashable) -> bool:
        """Whether the run stops at this moment of it: after so many steps, or at one that has a name.

        Every process asks for the same moments in the same order. The answer for a moment stays as it is
        until the next is asked for; a yes for good, so that it counts also where the moment was not used
        (a loss jumped there, and the run went back).
        """
        if not self._answer and (self._asked == 0 or moment != self._moment):
            self._asked += 1
            self._moment, self._answer = moment, self._agreed()
        return self._answer

    def _agreed(self) -> bool:
        import jax
        from jax.experimental import multihost_utils

        if jax.process_count() == 1:
            return self._signalled
        if self._signalled:
            # It came before the processes joined, so the service has not seen it.
            self._signalled = False
            signal.raise_signal(signal.SIGTERM)
        # The service says yes to one number alone, the next after the highest that any process has asked:
        # questions are numbered without a gap, and steps are not, since a run may go on from step 500.
        return multihost_utils.reached_preemption_sync_point(self._asked)
