"""Token stores: what is written is read back, across shards, from a bucket, after a kill; damage is named."""

from __future__ import annotations

import errno
import json
import multiprocessing
import pickle
import tracemalloc
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sealion_jax.data.store.cache import CacheConfig
from sealion_jax.data.store.layout import discard
from sealion_jax.data.store.manifest import Manifest, SourceFile, StoreTokenizer
from sealion_jax.data.store.token_store import TokenStore
from sealion_jax.data.store.writer import EncodedRows, StoreWriter, write_store
from sealion_jax.errors import UserError
from sealion_jax.tokenizer import Tokenizer
from tests.tiny_text import SENTENCES, tiny_tokenizer

TEXTS = [(text * (1 + i % 3), language) for i in range(7) for language, text in SENTENCES.items()]
TOKENIZER = StoreTokenizer(fingerprint="f" * 64, vocab_size=700, bos_id=2, eos_id=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))[0]


@pytest.fixture
def store(tmp_path: Path, tokenizer: Tokenizer) -> TokenStore:
    write_store(tmp_path / "store", TEXTS, tokenizer=tokenizer, shard_tokens=100)
    return TokenStore.open(tmp_path / "store")


def flat(tokenizer: Tokenizer) -> list[int]:
    return [i for text, _ in TEXTS for i in (tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id)]


def test_documents_offsets_languages_and_bytes(store: TokenStore, tokenizer: Tokenizer) -> None:
    expected = flat(tokenizer)
    assert store.num_tokens == len(expected) == store.offsets[-1]
    assert store.num_documents == len(TEXTS) == len(store.languages) == len(store.text_bytes)
    assert store.read(0, store.num_tokens).tolist() == expected
    for i, (text, language) in enumerate(TEXTS):
        ids = store.document(i)
        assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert tokenizer.decode(ids[1:-1]) == text
        assert store.language_names[store.languages[i]] == language
        assert store.text_bytes[i] == len(text.encode())
        assert store.origin(i) == ("memory", i + 1)


def test_manifest_totals(store: TokenStore) -> None:
    manifest = store.manifest
    for totals in manifest.languages:
        mine = [i for i, (_, language) in enumerate(TEXTS) if language == totals.language]
        assert totals.documents == len(mine)
        assert totals.tokens == sum(len(store.document(i)) for i in mine)
        assert totals.bytes == sum(len(TEXTS[i][0].encode()) for i in mine)
        assert totals.bytes_per_token == totals.bytes / (totals.tokens - 2 * totals.documents)
    assert (manifest.documents, manifest.tokens) == (len(TEXTS), store.num_tokens)
    assert manifest.bytes == sum(totals.bytes for totals in manifest.languages)
    assert len(manifest.shards) == -(-store.num_tokens // 100) > 5
    assert all(shard.bytes == 400 for shard in manifest.shards[:-1])
    assert Manifest.from_json(manifest.to_json(), "here") == manifest


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_range_is_the_flat_array_s(store: TokenStore, tokenizer: Tokenizer, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, store.num_tokens))
    stop = data.draw(st.integers(start, store.num_tokens))
    found = store.read(start, stop)
    assert found.dtype == np.uint32
    assert found.tolist() == flat(tokenizer)[start:stop]


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (0, 10**9), (5, 4)])
def test_ranges_outside_are_refused(store: TokenStore, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="are not inside"):
        store.read(start, stop)


def test_it_travels_to_another_process(store: TokenStore) -> None:
    assert len(pickle.dumps(store)) < 20_000, "by its path, not by its tokens"
    assert np.array_equal(pickle.loads(pickle.dumps(store)).read(90, 310), store.read(90, 310))


# --- what can be wrong with a store


def test_damage_is_named(store: TokenStore) -> None:
    folder = Path(store.path)
    assert store.verify() == []
    shard = folder / "tokens-00002.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    assert store.verify() == ["tokens-00002.bin has other bytes than its manifest says"]
    shard.write_bytes(content[:-4])
    (folder / "lines.bin").unlink()
    with pytest.raises(UserError) as refusal:
        TokenStore.open(folder)
    assert "tokens-00002.bin has 396 bytes instead of 400" in str(refusal.value)
    assert "lines.bin is missing" in str(refusal.value)


def test_no_store_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "nothing", tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="is not a finished token store"):
            TokenStore.open(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: "{}", "is damaged"),
        (lambda text: "[]", "is damaged"),
        (lambda text: json.dumps({"format": "bread"}), "is not the manifest of a token store"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 9'), "has format version 9"),
        (lambda text: text.replace('"tokens"', '"tokans"'), "is damaged"),
    ],
)
def test_bad_manifests(store: TokenStore, change, message: str) -> None:
    file = Path(store.path) / "manifest.json"
    file.write_text(change(file.read_text("utf-8")), "utf-8")
    with pytest.raises(UserError, match=message) as refusal:
        TokenStore.open(store.path)
    assert "manifest.json" in str(refusal.value)


def test_another_tokenizer_is_refused(store: TokenStore, tokenizer: Tokenizer) -> None:
    store.require_tokenizer(tokenizer.fingerprint)
    with pytest.raises(UserError, match="was made with another tokenizer"):
        store.require_tokenizer("0" * 64)


# --- stores in a bucket: fsspec's in-memory file system stands for gs://


@pytest.fixture
def remote(store: TokenStore) -> Iterator[str]:
    bucket = f"memory://bucket-{uuid.uuid4().hex}/store"
    system = fsspec.filesystem("memory")
    system.put(store.path, bucket, recursive=True)
    yield bucket
    system.rm(bucket.rpartition("/")[0], recursive=True)


def test_a_remote_store_reads_the_same(remote: str, store: TokenStore, tmp_path: Path) -> None:
    there = TokenStore.open(remote, cache=CacheConfig(folder=str(tmp_path / "cache")))
    assert there.manifest == store.manifest
    for name in ("offsets", "languages", "text_bytes"):
        assert np.array_equal(getattr(there, name), getattr(store, name))
    for start, stop in [(0, 10), (95, 305), (0, store.num_tokens), (7, 7)]:
        assert np.array_equal(there.read(start, stop), store.read(start, stop))
    assert there.verify() == []
    assert np.array_equal(pickle.loads(pickle.dumps(there)).read(3, 200), store.read(3, 200))


def test_remote_damage_is_named(remote: str, tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe_file(f"{remote}/tokens-00001.bin", b"1234")
    with pytest.raises(UserError, match=r"tokens-00001\.bin has 4 bytes instead of 400"):
        TokenStore.open(remote, cache=CacheConfig(folder=str(tmp_path)))
    with pytest.raises(UserError, match="is not a finished token store"):
        TokenStore.open(remote + "x", cache=CacheConfig(folder=str(tmp_path)))


# --- the writer


def rows(seed: int) -> EncodedRows:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, 40, 5)
    return EncodedRows(
        rows=7,
        tokens=generator.integers(0, 700, lengths.sum(), np.uint32),
        lengths=lengths,
        text_bytes=lengths * 3,
        lines=np.arange(5) + 1,
        language_names=(f"l{seed % 3}", "id"),
        languages=np.array([0, 1, 0, 0, 1], np.uint16),
        skip_reasons=("empty",),
        skipped=b'{"reason": "empty"}\n',
        num_held_out=1,
        held_out=b'{"text": "%d"}\n' % seed,
    )


def finish(writer: StoreWriter, held_out: Path) -> Manifest:
    sources = tuple(
        SourceFile(path=f"s{i}", format="jsonl", bytes=1, sha256="", rows=0, documents=0) for i in range(2)
    )
    return writer.finish(tokenizer=TOKENIZER, sources=sources, settings={}, held_out_file=str(held_out))


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("kept", [0, 1, 4, 9, 12])
def test_going_on_after_a_kill_gives_the_same_bytes(tmp_path: Path, kept: int) -> None:
    """Killed after a commit at `kept` and two uncommitted appends; every append closes a shard."""
    held_out = tmp_path / "held_out.jsonl"
    with StoreWriter(tmp_path / "whole", job="job", shard_tokens=64) as writer:
        for i in range(14):
            writer.append(rows(i), source=i // 8)
        whole = finish(writer, held_out)
    expected = held_out.read_bytes()
    with StoreWriter(tmp_path / "killed", job="job", shard_tokens=64) as writer:
        for i in range(kept + 2):
            if i == kept and kept:
                writer.commit([i])
            writer.append(rows(i), source=i // 8)
    (tmp_path / "killed" / ".progress.json-12-34").write_text("half a")
    with StoreWriter(tmp_path / "killed", job="job", shard_tokens=64) as writer:
        assert writer.position == ([kept] if kept else None)
        for i in range(kept, 14):
            writer.append(rows(i), source=i // 8)
        assert finish(writer, held_out) == whole
    assert content_of(tmp_path / "killed") == content_of(tmp_path / "whole")
    assert held_out.read_bytes() == expected
    store = TokenStore.open(tmp_path / "killed")
    assert store.verify() == []
    assert np.array_equal(
        store.read(0, store.num_tokens), np.concatenate([rows(i).tokens for i in range(14)])
    )
    assert [source.rows for source in whole.sources] == [56, 42]
    assert (whole.rows, whole.documents, whole.held_out, whole.skipped) == (98, 70, 14, {"empty": 14})
    assert store.origin(39) == ("s0", 5) and store.origin(40) == ("s1", 1)


def test_many_languages_are_counted_each(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    names = [f"l{i}" for i in range(900)]
    expected: dict[str, list[int]] = {}
    spoken: list[str] = []
    with StoreWriter(tmp_path / "store", job="job") as writer:
        for _ in range(5):
            mine = generator.permutation(names)[:500].tolist()
            documents = np.concatenate([np.arange(500), generator.integers(0, 500, 700)])
            lengths = generator.integers(2, 9, len(documents))
            encoded = EncodedRows(
                rows=len(documents),
                tokens=np.zeros(lengths.sum(), np.uint32),
                lengths=lengths,
                text_bytes=lengths * 2**40,
                lines=np.arange(len(documents)),
                language_names=tuple(mine),
                languages=documents.astype(np.uint16),
            )
            writer.append(encoded, source=0)
            spoken += [mine[i] for i in documents]
            for i, length in zip(documents, lengths.tolist(), strict=True):
                before = expected.setdefault(mine[i], [0, 0, 0])
                expected[mine[i]] = [before[0] + 1, before[1] + length, before[2] + length * 2**40]
        finish(writer, tmp_path / "held_out.jsonl")
    store = TokenStore.open(tmp_path / "store")
    assert [store.language_names[i] for i in store.languages] == spoken
    assert {
        totals.language: [totals.documents, totals.tokens, totals.bytes]
        for totals in store.manifest.languages
    } == expected
    assert list(expected) == list(store.language_names), "in the order of their first appearance"


def test_an_append_costs_the_same_after_many_sources(tmp_path: Path) -> None:
    """Nothing that grows with what came before is copied: a dict of 50,000 entries is above a megabyte."""
    with StoreWriter(tmp_path, job="job") as writer:
        writer.counts.source_rows.update(dict.fromkeys(range(50_000), 1))
        writer.counts.source_documents.update(dict.fromkeys(range(50_000), 1))
        writer.append(rows(0), source=50_000)
        tracemalloc.start()
        writer.append(rows(0), source=50_001)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(writer.counts.source_rows) == 50_002
    assert peak < 200_000


def test_a_last_shard_that_is_exactly_full(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokens = len(tokenizer.encode("sea")) + 2
    write_store(tmp_path / "store", ["sea"] * 4, tokenizer=tokenizer, shard_tokens=2 * tokens)
    assert sorted(p.name for p in (tmp_path / "store").glob("tokens*")) == [
        "tokens-00000.bin",
        "tokens-00001.bin",
    ]
    assert TokenStore.open(tmp_path / "store").read(0, 4 * tokens).tolist().count(tokenizer.bos_id) == 4


def test_folders_that_a_writer_refuses(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_store(tmp_path / "done", ["a"], tokenizer=tokenizer)
    with pytest.raises(UserError, match="already holds a finished token store"):
        StoreWriter(tmp_path / "done", job="job")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    with pytest.raises(UserError, match=r"other files in it \(thesis\.tex\)"):
        StoreWriter(tmp_path / "mine", job="job")
    with StoreWriter(tmp_path / "other", job="a job") as writer:
        writer.append(rows(0), source=0)
        writer.commit([1])
        with pytest.raises(UserError, match="is being written by another prepare"):
            StoreWriter(tmp_path / "other", job="a job")
        with pytest.raises(UserError, match="is being written by another prepare"):
            discard(tmp_path / "other")
    with pytest.raises(UserError, match="unfinished work of another prepare"):
        StoreWriter(tmp_path / "other", job="another job")
    (tmp_path / "other" / "tokens-00000.bin").write_bytes(b"")
    with pytest.raises(UserError, match="has 0 bytes, at least"):
        StoreWriter(tmp_path / "other", job="a job")


def test_work_without_a_commit_gives_way_to_another_job(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, job="a job") as writer:
        writer.append(rows(0), source=0)
    with StoreWriter(tmp_path, job="another job") as writer:
        assert writer.counts.rows == 0
        writer.append(rows(1), source=0)
        finish(writer, tmp_path / "held_out.jsonl")
    assert TokenStore.open(tmp_path).verify() == []


def test_discarding_leaves_what_is_not_the_store_s(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_store(tmp_path / "store", TEXTS, tokenizer=tokenizer, shard_tokens=100)
    (tmp_path / "store" / "thesis.tex").write_text("...")
    discard(tmp_path / "store")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["thesis.tex"]
    discard(tmp_path / "nothing there")


def _hold(folder: str, held, release) -> None:
    with StoreWriter(Path(folder), job="job"):
        held.set()
        release.wait(30)


def test_one_writer_at_a_time_also_across_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), held, release))
    process.start()
    assert held.wait(60)
    with pytest.raises(UserError, match="is being written by another prepare"):
        StoreWriter(tmp_path, job="job")
    process.kill()
    process.join()
    with StoreWriter(tmp_path, job="job") as writer:
        assert writer.counts.documents == 0


def test_a_full_disk_is_told_and_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StoreWriter(tmp_path / "store", job="job") as writer:
        writer.append(rows(0), source=0)
        writer.commit([1])
        # The raw write fails, as on a full disk, after some of the files got their part.
        with monkeypatch.context() as patched:
            patched.setattr(writer._files["lines.bin"], "_file", _Full(writer._files["lines.bin"]._file))
            with pytest.raises(
                UserError, match=r"cannot write .*lines\.bin: No space left on device; make room"
            ):
                writer.append(rows(1), source=0)
    with StoreWriter(tmp_path / "store", job="job") as writer:
        assert writer.position == [1]
        writer.append(rows(1), source=0)
        finish(writer, tmp_path / "held_out.jsonl")
    expected = np.concatenate([rows(0).tokens, rows(1).tokens])
    assert np.array_equal(TokenStore.open(tmp_path / "store").read(0, len(expected)), expected)


class _Full:
    """A file on a disk that has just become full."""

    def __init__(self, file) -> None:
        self._file = file

    def write(self, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        self._file.close()
