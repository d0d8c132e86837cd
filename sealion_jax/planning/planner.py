"""A recipe's plan: its step compiled for a TPU pod, or by formulas for a GPU pod."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from sealion_jax.checkpoint.weights import open_weights
from sealion_jax.errors import UserError
from sealion_jax.model.config import Gemma3Config
from sealion_jax.planning.advice import advise
from sealion_jax.planning.analytical import abstract_mesh, estimate_analytically
from sealion_jax.planning.environment import check_libtpu
from sealion_jax.planning.estimate import Estimate, estimate_compiled
from sealion_jax.planning.network import Place, gpu_places, places_of
from sealion_jax.planning.report import make_report
from sealion_jax.planning.step import compile_step, parts_of
from sealion_jax.planning.topology import Topology, check_slices, plan_mesh, tpu_devices
from sealion_jax.recipe import TrainConfig
from sealion_jax.run.update import check_compute, on_mesh
from sealion_jax.sharding import check_tokens_divide, mesh_shape


def model_of(config: TrainConfig) -> Gemma3Config:
    """The recipe's model; where it has none, the shapes that `init_from` tells: nothing else is opened.

    Raises:
        UserError: `init_from` is not there.
    """
    if config.model is not None:
        return config.model
    assert config.init_from is not None  # TrainConfig demands one of the two
    try:
        return open_weights(config.init_from).config
    except UserError as error:
        raise UserError(
            f"{error}. A plan needs the model's shapes alone: give the recipe a model, such as gemma3_4b()"
        ) from error


def plan(
    config: TrainConfig, model: Gemma3Config, topology: Topology, *, tell: Callable[[str], None]
) -> dict[str, Any]:
    """The report on a recipe's step, as JSON.

    Raises:
        UserError: the recipe does not divide over the pod, its chips cannot do what the recipe asks for, or
            TPU's compiler is missing.
    """
    check_slices(config.mesh, topology)
    check_compute(config.compute, platform=topology.platform, chip=topology.chip)
    recipe = config
    if not topology.is_tpu:
        shape = mesh_shape(config.mesh, topology.num_devices)
        config = on_mesh(config, _shaped(shape))
        check_tokens_divide(config.sequence_length_tokens, _shaped(shape))
        places = gpu_places(topology)
        estimate = estimate_analytically(config, model, shape, topology, places)
        return _report(recipe, config, model, shape, topology, places, estimate, analytical=None)
    mesh = tpu_mesh(config, topology)
    config = on_mesh(config, mesh)
    shape, places = dict(mesh.shape), places_of(mesh.devices.ravel().tolist())
    parts = parts_of(config, model, mesh)
    tell(f"compiling the step of {config.name} for {topology.describe()}")
    compiled = compile_step(parts, tell=tell)
    tell(f"compiled in {compiled.seconds:.0f} s; reading the program")
    estimate = estimate_compiled(config, parts.abstract, mesh, topology, compiled)
    analytical = estimate_analytically(config, model, shape, topology, places)
    return _report(recipe, config, model, shape, topology, places, estimate, analytical=analytical)


def tpu_mesh(config: TrainConfig, topology: Topology) -> Mesh:
    """The recipe's mesh over the devices of a TPU pod that is not there.

    Raises:
        UserError: TPU's compiler is missing, or the mesh cannot be laid over the pod.
    """
    check_libtpu()
    devices = tpu_devices(topology)
    try:
        return plan_mesh(config.mesh, topology, devices)
    except NotImplementedError as error:
        raise UserError(
            f"mesh {mesh_shape(config.mesh, len(devices))} cannot be laid over {topology.describe()}: "
            f"{str(error).splitlines()[0]}; take axes whose sizes divide the torus's directions"
        ) from error


def _shaped(shape: Mapping[str, int]) -> Any:
    """A mesh of this shape, of which only the shape is asked."""
    return abstract_mesh(shape)


def _report(
    recipe: TrainConfig,
    config: TrainConfig,
    model: Gemma3Config,
    shape: Mapping[str, int],
    topology: Topology,
    places: Sequence[Place],
    estimate: Estimate,
    *,
    analytical: Estimate | None,
) -> dict[str, Any]:
    advice = [] if estimate.fits else advise(recipe, model, shape, topology, places, estimate)
    return make_report(config, model, topology, shape, estimate, analytical=analytical, advice=advice)
