"""Which devices a compiled program's collectives join, and along which axes of the mesh those differ."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

Groups = list[list[int]]
"""Devices that are joined, by their places in the mesh, counted along its last axis first."""

_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}\s]*\})\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH_AXIS = re.compile(r"'?([\w.]+)'?(?::\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{([\d,{}\s]*)\}")
_MESH = re.compile(
    r"replica_groups=@?mesh\[([^\]]*)\](?:,? device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}"
)


def axes_of(groups: Iterable[Sequence[int]], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of the mesh along which the devices of some group differ."""
    sizes = tuple(mesh_shape.values())
    differ = np.zeros(len(sizes), bool)
    for group in groups:
        places = np.stack(np.unravel_index(np.asarray(group), sizes))
        differ |= (places != places[:, :1]).any(axis=1)
    return tuple(axis for axis, differs in zip(mesh_shape, differ, strict=True) if differs)


def device_groups(text: str, num_devices: int) -> Groups:
    """The devices that an instruction joins, group by group.

    Read are lists, `{{0,1},{2,3}}`; iotas, `[2,4]<=[4,2]T(1,0)`: the numbers from 0 in this shape,
    transposed, cut into two groups of four; and axes of a mesh of the compiler's own,
    `mesh['a'=2,'b'=4] {'b'}`.

    Raises:
        ValueError: they are written in another way.
    """
    if found := _IOTA.search(text):
        count, size = int(found[1]), int(found[2])
        return _iota(found[3], found[4]).reshape(count, size).tolist()
    if found := _MESH.search(text):
        return _mesh_groups(*found.groups())
    if found := (_PAIRS.search(text) or _LISTED.search(text)):
        groups = [[int(i) for i in one.split(",")] for one in re.findall(r"\{([\d,\s]+)\}", found[0])]
        return _chains(groups) if found.re is _PAIRS else groups
    if "replica_groups={}" in text:
        return [list(range(num_devices))]
    wrong = re.search(r"replica_groups=\S*", text)
    raise ValueError(
        f"groups of devices that are not understood: {wrong[0] if wrong else text[:200]}; this is a "
        "form that the compiler's text has not had before: teach sealion_jax/planning/groups.py to read it"
    )


def _iota(shape: str, transposed: str | None) -> np.ndarray:
    sizes = [int(size) for size in shape.split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose([int(axis) for axis in transposed.split(",")]) if transposed else ids


def _mesh_groups(axes: str, ids: str | None, transposed: str | None, joined: str) -> Groups:
    """Groups along some axes of a mesh; an axis `'a':(2)4` is the part of a after its first 2, of size 4."""
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.]+)'?=(\d+)", axes)}
    order = _iota(ids, transposed) if ids else np.arange(math.prod(sizes.values()))
    split: list[int] = []
    chosen: list[int] = []
    wanted = {
        name: (int(before or 1), size and int(size)) for name, before, size in _MESH_AXIS.findall(joined)
    }
    for name, size in sizes.items():
        before, part = wanted.get(name, (1, 1))
        part = size if part == "" else part
        pieces = [before, part, size // (before * part)] if name in wanted else [size]
        if name in wanted:
            chosen.append(len(split) + 1)
        split += pieces
    devices = order.reshape(split)
    others = [axis for axis in range(len(split)) if axis not in chosen]
    size = math.prod(split[axis] for axis in chosen)
    return devices.transpose([*others, *chosen]).reshape(-1, size).tolist()


def _chains(pairs: Groups) -> Groups:
    """Devices that are joined by pairs (from, to), directly or not."""
    group = {device: {device} for pair in pairs for device in pair}
    for source, target in pairs:
        if group[source] is not group[target]:
            both = group[source] | group[target]
            group.update(dict.fromkeys(both, both))
    return [sorted(one) for one in {id(one): one for one in group.values()}.values()] or [[0]]
