"""Global batches: pure in (mixture, step, skips), whoever reads which rows, with how many threads."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest

from sealion_jax.data.batches import GlobalBatches, batch_digest
from sealion_jax.data.mixture import Mixture, MixtureConfig, SourceConfig, StageConfig
from sealion_jax.data.packing.windows import PackedWindows
from sealion_jax.errors import UserError
from tests.data.token_documents import distinct_documents, store_of

BATCH, LENGTH = 8, 16


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Mixture:
    folder = tmp_path_factory.mktemp("stores")
    rng = np.random.default_rng(1)
    windows, sources = [], []
    for k, (name, documents, weight) in enumerate([("id", 70, 0.6), ("th", 40, 0.3), ("km", 6, 0.1)]):
        texts = distinct_documents(rng.integers(1, 50, documents).tolist(), first=1000 + 10_000 * k)
        windows.append(PackedWindows(store_of(folder / name, texts, languages=[name] * documents), LENGTH))
        sources.append(SourceConfig(name=name, store=str(folder / name), weight=weight))
    stages = (StageConfig(start_step=5, weights={"th": 1.0, "km": 0.5}),)
    config = MixtureConfig(sources=tuple(sources), stages=stages)
    return Mixture(config, windows, global_batch_size=BATCH)


@pytest.fixture(scope="module")
def batches(mixture) -> GlobalBatches:
    return GlobalBatches(mixture, global_batch_size=BATCH)


def whole(batches: GlobalBatches, step: int):
    return batches.rows(step, range(BATCH))


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_a_batch_is_consecutive_elements_of_the_mixture(mixture, batches):
    for step in (0, 4, 5, 1000):
        batch = whole(batches, step)
        assert {name: array.shape for name, array in batch.items()} == {
            **dict.fromkeys(("tokens", "targets", "segment_ids", "positions", "loss_mask"), (BATCH, LENGTH)),
            "source": (BATCH,),
        }
        for row in range(BATCH):
            element = mixture.row(step * BATCH + row)
            assert all(np.array_equal(batch[name][row], element[name]) for name in batch)
    assert batch["tokens"].dtype == batch["source"].dtype == np.int32
    assert batch["loss_mask"].dtype == np.float32


def test_stages_start_with_their_step(batches):
    assert 0 in whole(batches, 4)["source"]
    assert all(0 not in whole(batches, step)["source"] for step in range(5, 20))


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_any_number_of_reading_processes_gives_the_same_batch(mixture, batches, processes):
    share = BATCH // processes
    for step in (0, 3, 6):
        parts = [
            # Each process has its own objects, as it would have on its own machine.
            GlobalBatches(
                Mixture(mixture.config, mixture.sources, global_batch_size=BATCH), global_batch_size=BATCH
            ).rows(step, range(p * share, (p + 1) * share))
            for p in range(processes)
        ]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        assert equal(joined, whole(batches, step))


def test_rows_come_in_the_order_asked_for_and_only_those_are_read(mixture, batches, monkeypatch):
    batch = whole(batches, 2)
    read = []
    row = PackedWindows.row
    monkeypatch.setattr(PackedWindows, "row", lambda self, window: read.append(window) or row(self, window))
    some = batches.rows(2, [6, 1, 1])
    assert all(np.array_equal(some[name], batch[name][[6, 1, 1]]) for name in batch)
    assert len(read) == 3


@pytest.mark.parametrize(("prefetch", "threads"), [(0, 0), (1, 1), (8, 2), (16, 8)])
def test_iteration_gives_the_rows_of_every_step_in_order(batches, prefetch, threads):
    taken = list(itertools.islice(batches.iterate(3, [1, 5], prefetch=prefetch, threads=threads), 12))
    assert [step for step, _ in taken] == list(range(3, 15))
    assert all(equal(batch, batches.rows(step, [1, 5])) for step, batch in taken)


def test_resuming_at_any_step_gives_the_batches_of_the_run_that_went_through(batches):
    through = dict(itertools.islice(batches.iterate(0, range(BATCH)), 12))
    for start in (1, 5, 11):
        again = GlobalBatches(batches.mixture, global_batch_size=BATCH)
        resumed = dict(itertools.islice(again.iterate(start, range(BATCH)), 12 - start))
        assert all(batch_digest(through[step]) == batch_digest(batch) for step, batch in resumed.items())
        assert len(resumed) == 12 - start


def test_leaving_an_iteration_stops_its_threads(batches):
    before = set(threading.enumerate())
    iterator = batches.iterate(0, range(BATCH), prefetch=4, threads=2)
    next(iterator)
    started = set(threading.enumerate()) - before
    assert started
    iterator.close()
    for thread in started:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in started)


def test_an_error_while_prefetching_reaches_whoever_asks(batches, monkeypatch):
    def broken(self, window):
        raise OSError("the disk went away")

    monkeypatch.setattr(PackedWindows, "row", broken)
    with pytest.raises(OSError, match="the disk went away"):
        next(batches.iterate(0, [0]))


def test_skipped_batches_are_left_out_and_the_rest_follow(mixture, batches):
    skips = ((2, 3), (6, 1), (7, 2))
    skipping = GlobalBatches(mixture, global_batch_size=BATCH, skips=skips)
    left_out = {2, 3, 4, 6, 7, 8}
    kept = [number for number in range(40) if number not in left_out]
    assert [skipping.batch_number(step) for step in range(len(kept))] == kept
    for step in range(6):
        assert equal(whole(skipping, step), whole(batches, kept[step]))
    assert skipping.documents(2, 3) == batches.documents(5, 3)
    assert skipping.digest(3) == batches.digest(kept[3])


@pytest.mark.parametrize("before", [(), ((2, 3),), ((0, 1), (6, 2))])
def test_a_skip_from_a_step_on_leaves_earlier_steps_alone(mixture, before):
    old = GlobalBatches(mixture, global_batch_size=BATCH, skips=before)
    for step, count in itertools.product(range(8), (1, 2, 5)):
        new = old.with_skip(step, count)
        expected = [old.batch_number(s) for s in range(20) if not step <= s < step + count]
        assert [new.batch_number(s) for s in range(len(expected))] == expected
        # What is saved is enough to come back to it.
        again = GlobalBatches(mixture, global_batch_size=BATCH, skips=new.skips)
        assert again.batch_number(11) == new.batch_number(11)


@pytest.mark.parametrize("skips", [((3, 0),), ((-1, 2),), ((5, 2), (6, 1)), ((5, 2), (2, 1))])
def test_skips_that_are_no_ranges_in_order_are_refused(mixture, skips):
    with pytest.raises(UserError, match="in order, apart"):
        GlobalBatches(mixture, global_batch_size=BATCH, skips=skips)


def test_a_batch_size_other_than_the_mixtures_is_refused(mixture):
    with pytest.raises(ValueError, match="over a mixture for 8"):
        GlobalBatches(mixture, global_batch_size=4)


def test_rows_outside_the_batch_are_refused(batches):
    for step, row in ((0, BATCH), (0, -1), (-1, 0)):
        with pytest.raises(IndexError, match="a batch has 8 rows"):
            batches.rows(step, [row])


def test_documents_of_a_row_hold_the_tokens_of_the_row(mixture, batches):
    for step, row in itertools.product((0, 7), range(BATCH)):
        batch, origin = batches.rows(step, [row]), batches.documents(step, row)
        source = int(batch["source"][0])
        assert origin.source == mixture.names[source]
        store = mixture.sources[source].store
        for span in origin.spans:
            part = store.document(span.document)[span.start : span.stop]
            np.testing.assert_array_equal(batch["tokens"][0][span.row_stop - len(part) : span.row_stop], part)


def test_a_batch_is_described_by_its_documents(batches):
    text = batches.describe(0, most=3)
    assert text.startswith("batch 0, 8 rows\n")
    named = {batches.documents(0, row).source for row in range(BATCH)}
    assert all(f"  {name} (" in text for name in named)
    first = batches.documents(0, 0)
    assert str(first.spans[0].document) in text


def test_digests_tell_batches_apart_and_agree_between_readers(mixture, batches):
    digests = [batches.digest(step) for step in range(20)]
    assert len(set(digests)) == 20
    fresh = Mixture(mixture.config, mixture.sources, global_batch_size=BATCH)
    assert GlobalBatches(fresh, global_batch_size=BATCH).digest(7) == digests[7]
    batch = whole(batches, 0)
    changed = {**batch, "loss_mask": batch["loss_mask"].copy()}
    assert batch_digest(changed) == batch_digest(batch)
    changed["loss_mask"][3, 3] = 1 - changed["loss_mask"][3, 3]
    assert batch_digest(changed) != batch_digest(batch)
