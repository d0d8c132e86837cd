"""What follows from each way that a pod can end, told to Kubernetes and to JobSet.

| a pod ends with | the JobSet |
| --- | --- |
| 2: the user's mistake, where it is the first start | fails at once |
| 75: asked to stop, saved; or its node was taken away | starts all pods again, without counting |
| anything else | starts all pods again, maxRestarts times |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sealion_jax.cli import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USER_ERROR

# What is refused after a restart was right before, so it is a node's fault perhaps: a failure like others.
# JobSet's rules see a pod's code and no more, not which start it is. A signal ends bash's wait while training
# may still be saving.
_TOLD_APART = """\
"$@" &
trap 'heard=yes; kill -TERM $! 2>/dev/null' TERM
heard=yes
while [[ $heard ]]; do heard=; wait $!; code=$?; done
if [[ $code == %d && $JOBSET_RESTART_ATTEMPT != 0 ]]; then code=%d; fi
exit $code"""


def told_apart(command: Sequence[str], *, sourced: str | None = None) -> list[str]:
    """The command in a shell that passes SIGTERM on, and ends with its code: with 1 for a later start's 2.

    Args:
        sourced: a script of the node that is read before.
    """
    script = _TOLD_APART % (EXIT_USER_ERROR, EXIT_FAILED)
    if sourced is not None:
        script = f"source {sourced} || exit\n{script}"
    return ["bash", "-c", script, "bash", *command]


def pod_rules() -> list[dict[str, Any]]:
    """Which failures end a pod's Job by a rule; job_rules says by its index what follows."""

    def on_exit(code: int) -> dict[str, Any]:
        return {"containerName": "train", "operator": "In", "values": [code]}

    return [
        {"action": "FailJob", "onExitCodes": on_exit(EXIT_USER_ERROR)},
        {"action": "FailJob", "onExitCodes": on_exit(EXIT_PREEMPTED)},
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]


def job_rules() -> list[dict[str, Any]]:
    """The user's mistake ends all; preemptions restart all and do not count; other failures count.

    Kubernetes ends a failed Job's message with the rule's index.
    """

    def rule(name: str, action: str, index: str) -> dict[str, Any]:
        return {
            "name": name,
            "action": action,
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": [f"matching FailJob rule at index {index}$"],
        }

    return [
        rule("userMistake", "FailJobSet", "0"),
        rule("preempted", "RestartJobSetAndIgnoreMaxRestarts", "[12]"),
    ]
