"""JAX's store of keys and values does what its callers count on; it is JAX's own, and may change with it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sealion_jax.key_value_store import key_value_store
from tests.commands import command_environment, free_port

# A process of its own: JAX's service has to be there before its devices are.
ONE_OF_ONE = """
import sys, time
import jax
import pytest
from sealion_jax.key_value_store import key_value_store

jax.distributed.initialize(sys.argv[1], num_processes=1, process_id=0)
store = key_value_store()

store.key_value_set("a/x", "1")
with pytest.raises(Exception, match="ALREADY_EXISTS"):
    store.key_value_set("a/x", "2")
with pytest.raises(Exception, match="ALREADY_EXISTS"):
    store.key_value_set("a/x", "2", allow_overwrite=False)
assert store.key_value_try_get("a/x") == "1"
store.key_value_set("a/x", "3", allow_overwrite=True)
assert store.blocking_key_value_get("a/x", 1000) == "3"

store.key_value_set("a/b/y", "4")
store.key_value_set("ab", "5")
assert sorted(store.key_value_dir_get("a")) == [("a/b/y", "4"), ("a/x", "3")]
assert store.key_value_dir_get("none") == []

with pytest.raises(Exception, match="NOT_FOUND"):
    store.key_value_try_get("none")
began = time.monotonic()
with pytest.raises(Exception, match="DEADLINE_EXCEEDED"):
    store.blocking_key_value_get("none", 200)
assert 0.1 < time.monotonic() - began < 10

assert [store.key_value_increment("n", by) for by in (0, 1, 2, 0)] == [0, 1, 3, 3]
store.wait_at_barrier("all", 1000)

store.key_value_delete("a/")
assert store.key_value_dir_get("a") == []
assert store.key_value_try_get("ab") == "5"
store.key_value_delete("none/")

jax.distributed.shutdown()
with pytest.raises(RuntimeError, match="alone, or not joined"):
    key_value_store()
"""


def test_jax_keeps_what_is_told():
    run = subprocess.run(
        [sys.executable, "-c", ONE_OF_ONE, f"127.0.0.1:{free_port()}"],
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_a_process_that_is_alone_has_no_store():
    with pytest.raises(RuntimeError, match="this process is alone"):
        key_value_store()
