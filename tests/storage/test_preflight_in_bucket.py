"""Preflight measures a bucket as it measures a disk, and leaves nothing there."""

from __future__ import annotations

from sealion_jax.preflighting.storage import measure_storage
from tests.storage.gcs import GcsServer


def test_a_bucket_is_written_read_and_left_as_it_was(here: GcsServer):
    rates = measure_storage(here.url("measured/preflight"), process=1, mebibytes=16)
    assert min(rates.write_mb_per_s, rates.read_mb_per_s, rates.small_write_ms) > 0
    assert here.files().find(here.url("measured").removeprefix("gs://")) == []
