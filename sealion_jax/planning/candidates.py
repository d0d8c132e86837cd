"""What a search compiles: meshes, microbatches and remat policies, chosen by formulas that err.

They may be off by half, and decide nothing alone: the recipe as it is written is among the candidates, and
of each remat policy the best. Where nothing that was compiled fits, those that need less are next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from sealion_jax.errors import UserError
from sealion_jax.model.config import Gemma3Config, Remat
from sealion_jax.planning.analytical import abstract_mesh, analytical_state, estimate_analytically
from sealion_jax.planning.network import Place, gpu_places, places_of
from sealion_jax.planning.planner import tpu_mesh
from sealion_jax.planning.speed import speed_of
from sealion_jax.planning.topology import Topology, check_slices
from sealion_jax.recipe import TrainConfig
from sealion_jax.run.update import on_mesh
from sealion_jax.sharding import MeshConfig, batch_devices, check_tokens_divide, mesh_shape
from sealion_jax.training.state import TrainState

CANDIDATES = 8
"""Compiled by default."""
TENSOR_SIZES = (1, 2, 4, 8)
MOST_MICROBATCHES = 64
HOPELESS = 1.5
"""Times the memory that there is; what the formulas find larger is not compiled."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A recipe with settings of its own, and what the formulas say of it."""

    config: TrainConfig
    needed: float
    """Bytes of a device."""
    available: float
    step_overlapped: float
    step_in_turn: float
    first_choice: bool = True
    """Not one whose microbatches are more, or fewer, than formulas can be wrong by."""

    @property
    def order(self) -> tuple[bool, float, float]:
        """Sorts what fits first, and the fastest of it first."""
        return (self.needed > self.available, self.step_overlapped, self.step_in_turn)


def meshes(config: TrainConfig, topology: Topology) -> Iterator[MeshConfig]:
    """Every way to lay the recipe's axes over the pod, `context` as the recipe has it."""
    devices = topology.num_devices
    context = mesh_shape(config.mesh, devices)["context"]
    for tensor in TENSOR_SIZES:
        for fsdp in range(1, devices + 1):
            if devices % (fsdp * tensor * context):
                continue
            data = devices // (fsdp * tensor * context)
            if not topology.is_tpu or data % topology.num_slices == 0:
                yield MeshConfig(data=data, fsdp=fsdp, context=context, tensor=tensor)


def variants(config: TrainConfig, mesh: MeshConfig, topology: Topology) -> Iterator[TrainConfig]:
    """The recipe on a mesh with every remat policy and every number of microbatches that divides.

    Of a policy fewer microbatches come first.
    """
    shape: Any = abstract_mesh(mesh_shape(mesh, topology.num_devices))
    named = config.compute.keep or config.compute.offload
    for remat in get_args(Remat):
        if named and remat not in ("layer", "block"):
            continue
        compute = dataclasses.replace(config.compute, remat=remat)
        for batches in (2**k for k in range(MOST_MICROBATCHES.bit_length())):
            if config.global_batch_size % (batches * batch_devices(shape)):
                continue
            yield dataclasses.replace(
                config, mesh=mesh, microbatches=batches, rows_per_device=None, compute=compute
            )


def by_formulas(config: TrainConfig, model: Gemma3Config, topology: Topology) -> list[Candidate]:
    """All that may fit, and the fastest first.

    More microbatches than are needed only cost time. So of each mesh and policy the fewest that fit by the
    formulas, half as many and twice as many are first choices: formulas err.
    """
    found: list[Candidate] = []
    for mesh in meshes(config, topology):
        shape: Any = abstract_mesh(mesh_shape(mesh, topology.num_devices))
        laid = dataclasses.replace(config, mesh=mesh)
        try:
            places, state = _places(laid, topology), analytical_state(laid, model, shape)
        except UserError:
            continue  # the mesh cannot be laid over the torus, or some dimension does not divide
        fitting: dict[str, int] = {}
        for variant in variants(config, mesh, topology):
            one = _weighed(variant, model, topology, places, state)
            if one.needed > HOPELESS * one.available:
                continue
            remat = variant.compute.remat
            found.append(dataclasses.replace(one, first_choice=fitting.get(remat, 0) < 2))
            fitting[remat] = fitting.get(remat, 0) + (one.needed <= one.available)
    return sorted(found, key=lambda one: one.order)


def as_written(config: TrainConfig, model: Gemma3Config, topology: Topology) -> Candidate:
    """The recipe itself, with its mesh's sizes and its microbatches as numbers.

    Raises:
        UserError: it cannot be laid over the pod.
    """
    check_slices(config.mesh, topology)
    sizes = mesh_shape(config.mesh, topology.num_devices)
    shape: Any = abstract_mesh(sizes)
    check_tokens_divide(config.sequence_length_tokens, shape)
    config = dataclasses.replace(on_mesh(config, shape), mesh=MeshConfig(**sizes), rows_per_device=None)
    state = analytical_state(config, model, shape)
    return _weighed(config, model, topology, _places(config, topology), state)


def promising(ranked: Sequence[Candidate], *, most: int, recipe: Candidate | None = None) -> list[Candidate]:
    """Those to compile first: the recipe, the best of each remat policy, and the fastest.

    Args:
        ranked: as `by_formulas` gives them.
    """
    first = [one for one in ranked if one.first_choice]
    best: dict[str, Candidate] = {}
    for one in first:
        best.setdefault(one.config.compute.remat, one)
    chosen: list[Candidate] = []
    for one in [*([recipe] if recipe else []), *best.values(), *first]:
        if all(one.config != other.config for other in chosen):
            chosen.append(one)
    return chosen[:most]


def lighter(
    ranked: Sequence[Candidate], tried: Sequence[Candidate], nearest: tuple[Candidate, float], *, most: int
) -> list[Candidate]:
    """Those to compile next, where nothing that was compiled fits: they need less.

    So much less as the nearest one still lacks, if the formulas err alike; or else the least that there is,
    if it is less than all before.

    Args:
        tried: those that were compiled.
        nearest: of these the one that lacks least, and how many times the memory that there is it needs.
    """
    one, times = nearest
    known = [other.config for other in tried]
    left = [dataclasses.replace(other, first_choice=True) for other in ranked if other.config not in known]
    if enough := [other for other in left if other.needed <= one.needed / times]:
        return promising(enough, most=most)
    least = min(other.needed for other in tried)
    return sorted((other for other in left if other.needed < least), key=lambda other: other.needed)[:most]


def _places(config: TrainConfig, topology: Topology) -> list[Place]:
    """Where the devices of the recipe's mesh are."""
    if topology.is_tpu:
        return places_of(tpu_mesh(config, topology).devices.ravel().tolist())
    return gpu_places(topology)


def _weighed(
    config: TrainConfig,
    model: Gemma3Config,
    topology: Topology,
    places: Sequence[Place],
    state: TrainState,
) -> Candidate:
    shape = mesh_shape(config.mesh, topology.num_devices)
    estimate = estimate_analytically(config, model, shape, topology, places, state=state)
    speed = speed_of(config, model, topology, estimate)
    assert speed is not None  # formulas give one to what does not fit, too
    return Candidate(
        config=config,
        needed=estimate.needed,
        available=estimate.available,
        step_overlapped=speed.step_overlapped,
        step_in_turn=speed.step_in_turn,
    )
