"""What has to hold before JAX starts, for compiling for TPUs on a machine that has none. Imports no JAX."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec

from sealion_jax.errors import UserError

WITHOUT_TPU: Mapping[str, str] = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""The environment in which libtpu looks for no chips, and several processes may compile side by side."""


def prepare_environment() -> None:
    """Sets this process, and those that it starts, to compile for TPUs and to compute on the CPU alone."""
    os.environ.update(WITHOUT_TPU)
    os.environ["JAX_PLATFORMS"] = "cpu"


def check_libtpu() -> None:
    """Raises UserError unless TPU's compiler is installed."""
    if find_spec("libtpu") is None:
        raise UserError(
            "compiling for a TPU needs libtpu, though no TPU, and it is not installed; "
            "pip install 'sealion_jax[tpu]' in an environment of its own (elsewhere all that uses JAX would "
            "begin with warnings about a missing TPU)"
        )
