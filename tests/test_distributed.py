"""Joining other processes: what is refused before anything is tried."""

from __future__ import annotations

import pytest

from sealion_jax import train
from sealion_jax.distributed import DistributedConfig
from sealion_jax.errors import UserError


@pytest.mark.parametrize(
    "given",
    [{"num_processes": 2}, {"coordinator_address": "h:1"}, {"num_processes": 2, "process_id": 0}],
)
def test_half_of_what_joining_needs_is_refused_with_the_options_of_the_command(given, capsys):
    with pytest.raises(UserError) as error:
        DistributedConfig(**given)
    with pytest.raises(SystemExit):
        train.main(["--help"])
    options = capsys.readouterr().out.split()
    for name in ("--coordinator-address", "--num-processes", "--process-id"):
        assert name in str(error.value).replace(",", "").split()
        assert name in options
