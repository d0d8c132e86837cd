"""What follows from each way that a pod can end, told to Kubernetes and to JobSet.

| a pod ends with | the JobSet |
| --- | --- |
| 2: the user's mistake | fails at once |
| 75: asked to stop, saved; or its node was taken away | starts all pods again, without counting |
| anything else | starts all pods again, maxRestarts times |
"""

from __future__ import annotations

from typing import Any

from sealion_jax.cli import EXIT_PREEMPTED, EXIT_USER_ERROR


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
