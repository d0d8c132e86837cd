"""Whether the processes of a run agree, and the words for it where they do not."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sealion_jax.config_tree import differences
from sealion_jax.distributed.words import Introduction

RECIPE = "recipe"
_MOST_FIELDS = 5
_MOST_LINES = 8
_MOST_CHARACTERS = 80

_REMEDIES = {
    RECIPE: "start all processes with the same RECIPE and the same options, from the same files",
    "run directory": "give all processes the same --run-dir, on storage that all of them see",
}
_REMEDY = "start all processes from one environment, or install the same one on every node"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A process's clock against that of process 0."""

    ahead_seconds: float
    within_seconds: float
    """The real difference is at most so far from that: half of the time between question and answer."""


def disagreements(present: Sequence[Introduction]) -> list[str]:
    """A line for every group of processes that is about to do something else than most, and the remedies.

    What most processes have is right; where as many have the one as the other, what the first of them has.
    """
    lines: list[str] = []
    remedies: list[str] = []
    for fact in dict.fromkeys(name for one in present for name in one.facts):
        groups = group_by(present, lambda one, fact=fact: one.facts.get(fact, "none"))
        if len(groups) == 1:
            continue
        common, many = groups[0]
        others = "the others" if len(many) > len(present) / 2 else _who(many)
        for value, odd in groups[1:]:
            if fact == RECIPE:
                told = _recipes(value, common)
                lines.append(f"{_who(odd)} {_has(odd)} another recipe than {others}: {told}")
            else:
                lines.append(
                    f"{_who(odd)} {_has(odd)} another {fact} than {others}: "
                    f"{_short(value)} there, {_short(common)} elsewhere"
                )
        remedies.append(_REMEDIES.get(fact, _REMEDY))
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"and {len(lines) - _MOST_LINES} more"]
    return [*lines, *dict.fromkeys(remedies)]


def group_by(present: Sequence[Introduction], key: Any) -> list[tuple[Any, list[Introduction]]]:
    """The processes by what `key` gives for them: the largest group first, and then in their order."""
    counts = Counter(key(one) for one in present)
    values = sorted(counts, key=lambda value: -counts[value])  # stable: at a draw, who comes first
    return [(value, [one for one in present if key(one) == value]) for value in values]


def clock_warnings(
    present: Sequence[Introduction], readings: Mapping[int, Reading], *, limit_seconds: float
) -> list[str]:
    """A line for every clock that is surely off by more than the limit, against that of most processes.

    Clocks are those of processes, since machines may bear the same name, as containers do; where all
    processes of a name are off alike, the line is about their host.
    """
    known = [one for one in present if one.process in readings]
    if not known:
        return []
    ahead = {one.process: readings[one.process].ahead_seconds for one in known}
    usual = statistics.median_low(ahead.values())
    off: dict[tuple[str, bool], list[Introduction]] = {}
    for one in known:
        by = ahead[one.process] - usual
        if abs(by) - readings[one.process].within_seconds > limit_seconds:
            off.setdefault((one.host, by > 0), []).append(one)
    lines = []
    for (host, is_ahead), some in off.items():
        whose = host if len(some) == sum(one.host == host for one in known) else _who(some)
        seconds = min(abs(ahead[one.process] - usual) for one in some)
        lines.append(
            f"warning: the clock of {whose} is {seconds:.1f} s {'ahead of' if is_ahead else 'behind'} the "
            "others' clocks; the lease of the run directory and times in logs go by them. Set the clocks "
            "(chrony, ntp) to the same time"
        )
    return lines


def missing_text(
    present: Sequence[Introduction], *, processes: int, hosts: Sequence[str], nodes: Sequence[str]
) -> str:
    """ "process 2 (node5) and process 3 (node6)": who has not come, with names where they are known."""
    here = {one.process for one in present}
    missing = [number for number in range(processes) if number not in here]
    named = [
        f"{number} ({hosts[number]})" if number < len(hosts) else f"{number}"
        for number in missing[: 4 * _MOST_LINES]
    ]
    if len(missing) > len(named):
        named.append(f"{len(missing) - len(named)} more")
    text = f"process{'es' if len(missing) > 1 else ''} {', '.join(named)}"
    silent = [node for node in nodes if node not in {one.host for one in present}]
    if not hosts and silent:
        text += f" (nobody came from {', '.join(silent)})"
    return text


def _recipes(value: str, common: str) -> str:
    """The fields in which two recipes, as JSON, are not the same."""
    try:
        found = list(differences(json.loads(common), json.loads(value)))
    except ValueError:
        found = []
    told = [
        f"{path}: {_short(json.dumps(new))} there, {_short(json.dumps(old))} elsewhere"
        for path, old, new in found[:_MOST_FIELDS]
    ]
    if len(found) > _MOST_FIELDS:
        told.append(f"and {len(found) - _MOST_FIELDS} more fields")
    return "; ".join(told) or "they are written otherwise"


def _who(group: Sequence[Introduction]) -> str:
    """The processes of a group: "process 3 on node7", "processes 2, 3 on node5, node6"."""
    if len(group) == 1:
        return group[0].describe()
    some = group[:_MOST_LINES]
    rest = f" and {len(group) - len(some)} more" if len(group) > len(some) else ""
    numbers = ", ".join(str(one.process) for one in some)
    return f"processes {numbers}{rest} on {', '.join(dict.fromkeys(one.host for one in some))}"


def _has(group: Sequence[Introduction]) -> str:
    return "has" if len(group) == 1 else "have"


def _short(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 3]}..."
