"""One process that joins others:

    python -m tests.distributed.joiner '{"config": {...}, "facts": {...}, "ahead": seconds, "stay": seconds}'

Ends as a command does: 0 joined, 2 refused, 75 asked to stop. `ahead` has its clock go wrong.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence

from sealion_jax import cli
from sealion_jax.distributed import DistributedConfig, join
from sealion_jax.stopping import StopRequest


def main(argv: Sequence[str]) -> None:
    given = json.loads(argv[0])
    stop = StopRequest()
    if given.get("ahead"):
        true = time.time
        time.time = lambda: true() + given["ahead"]
    print("started", flush=True)
    config = DistributedConfig(**given["config"])
    joined = join(config, os.environ, facts=given.get("facts"), asked_to_stop=lambda: stop.heard)
    import jax

    print("joined", len(joined.devices), jax.distributed.is_initialized(), flush=True)
    time.sleep(given.get("stay", 0))
    print("stayed", jax.process_count(), flush=True)


if __name__ == "__main__":
    cli.run(main)
