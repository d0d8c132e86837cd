"""Orbax's part: how the trees of a step are written, and reading them onto devices of whatever mesh."""

from __future__ import annotations

import json
import logging
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from sealion_jax.checkpoint.arrays import CHUNK_BYTES, DATA_FILE_BYTES, STACKED, leaf_shapes
from sealion_jax.checkpoint.layout import OPTIMIZER, PARAMS, TRAIN_FILE
from sealion_jax.errors import UserError

PyTree = Any

_SHOWN = 5


def load_params(step_dir: epath.PathLike, abstract: PyTree) -> PyTree:
    """The parameters of a step's directory, as `abstract` wants them: ShapeDtypeStructs with shardings.

    They are converted to another floating-point dtype if it asks for one. Every process reads what its
    devices hold. Raises UserError if names or shapes differ. Digests are not checked here: `locate.resolve`
    does.
    """
    return load_tree(step_dir, PARAMS, abstract, same_dtype=False)


def load_optimizer(step_dir: epath.PathLike, abstract: PyTree) -> PyTree:
    """The optimizer's state of a step's directory, in the structure of `abstract`; dtypes must be equal."""
    return load_tree(step_dir, OPTIMIZER, abstract, same_dtype=True)


def load_tree(step_dir: epath.PathLike, tree: str, abstract: PyTree, *, same_dtype: bool) -> PyTree:
    """The tree "params" or "optimizer" of a step's directory on the devices that `abstract` names."""
    quiet_orbax()
    directory = epath.Path(step_dir) / tree
    _check_fit(directory, leaf_shapes(step_dir, tree=tree), abstract, same_dtype=same_dtype)
    somewhere = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    targets = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or somewhere
        ),
        abstract,
    )
    handler = ocp.PyTreeCheckpointHandler()
    return handler.restore(
        directory,
        args=ocp.args.PyTreeRestore(
            targets, restore_args=ocp.checkpoint_utils.construct_restore_args(targets)
        ),
    )


def tree_writer() -> ocp.PyTreeCheckpointHandler:
    """What writes one tree of jax.Arrays.

    Where several processes hold the same array they share the writing of it, from 1 MB on; with one process
    that would only cut small arrays into slivers. Shardings are not recorded: who restores says which.
    """
    array_handler = ocp.type_handlers.ArrayHandler(
        use_replica_parallel=jax.process_count() > 1,
        min_slice_bytes_for_replica_parallel=2**20,
        enable_write_sharding_file=False,
    )
    return ocp.PyTreeCheckpointHandler(
        use_compression=False,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, array_handler)),
    )


def save_args(tree: PyTree) -> ocp.args.PyTreeSave:
    """What to hand to Orbax to save `tree`: stacked arrays cut by block, no chunk above CHUNK_BYTES."""

    def of_leaf(path: tuple[Any, ...], leaf: jax.Array) -> ocp.SaveArgs:
        stacked = leaf.ndim > 0 and any(getattr(key, "key", None) == STACKED for key in path)
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stacked else ())

    return ocp.args.PyTreeSave(
        tree,
        save_args=jax.tree_util.tree_map_with_path(of_leaf, tree),
        ocdbt_target_data_file_size=DATA_FILE_BYTES,
    )


def read_train(step_dir: epath.PathLike) -> dict[str, Any]:
    """The loop's counters as they were saved; {"step": 0} for converted weights, which have none."""
    path = epath.Path(step_dir) / TRAIN_FILE
    return json.loads(path.read_text()) if path.exists() else {"step": 0}


def quiet_orbax() -> None:
    """Keeps Orbax's own log lines off the user's screen; its errors are raised, and told by us."""
    logger = logging.getLogger("absl")
    if not any(isinstance(filter_, _NotOrbax) for filter_ in logger.filters):
        logger.addFilter(_NotOrbax())


class _NotOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "/orbax/" not in record.pathname.replace("\\", "/")


def _check_fit(
    directory: epath.Path, stored: dict[str, jax.ShapeDtypeStruct], abstract: PyTree, *, same_dtype: bool
) -> None:
    """Raises UserError that lists names if the stored arrays are not those of `abstract`."""
    wanted = {
        "/".join(_key_text(key) for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    }
    problems = [f"{name} is missing" for name in wanted if name not in stored]
    problems += [f"{name} is not expected" for name in stored if name not in wanted]
    for name in wanted.keys() & stored.keys():
        have, want = stored[name], wanted[name]
        if have.shape != want.shape:
            problems.append(f"{name} has shape {list(have.shape)} instead of {list(want.shape)}")
        elif same_dtype and have.dtype != want.dtype:
            problems.append(f"{name} is {have.dtype} instead of {want.dtype}")
    if problems:
        shown = "; ".join(sorted(problems)[:_SHOWN])
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise UserError(
            f"{directory} does not fit this recipe's model or optimizer: {shown}{more}. "
            "Use the recipe it was written with, or another checkpoint"
        )


def _key_text(key: Any) -> str:
    """A tree path's key as Orbax writes it."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
