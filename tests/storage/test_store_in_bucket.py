"""A token store in a bucket is read over the network once; what was read serves later epochs and starts."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sealion_jax.data.store.cache import CacheConfig
from sealion_jax.data.store.token_store import TokenStore
from sealion_jax.data.store.writer import write_store
from sealion_jax.tokenizer import train_tokenizer
from tests.storage.gcs import BUCKET, FaultyDoor, GcsServer
from tests.tiny_run import TEXT

ROOT = Path(__file__).resolve().parents[2]

READ_ALL = """
import hashlib, sys
from sealion_jax.data.store.cache import CacheConfig
from sealion_jax.data.store.token_store import TokenStore
store = TokenStore.open(sys.argv[1], cache=CacheConfig(folder=sys.argv[2]))
digest = hashlib.sha256(store.offsets.tobytes())
for document in range(store.num_documents):
    digest.update(store.document(document).tobytes())
print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    tokenizer = train_tokenizer([TEXT] * 50, vocab_size=580, path=folder / "tokenizer.model")
    write_store(folder / "store", [TEXT] * 200, tokenizer=tokenizer, shard_tokens=2000)
    return folder / "store"


@pytest.fixture
def remote(local: Path, here: GcsServer, tmp_path: Path) -> str:
    url = here.url(f"stores/{tmp_path.name}")
    for file in local.iterdir():
        here.files().pipe_file(f"{url}/{file.name}", file.read_bytes())
    return url


def content_reads(door: FaultyDoor) -> list[str]:
    """Names of the store's files whose bytes were asked for, but for the manifest's."""
    names = [
        request.path.split("?")[0].rsplit("%2F")[-1]
        for request in door.requests()
        if request.is_read_of_content
    ]
    return [name for name in names if name != "manifest.json"]


def test_a_second_epoch_and_a_restart_ask_for_nothing(
    remote: str, local: Path, counted: FaultyDoor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in counted.environment().items():
        monkeypatch.setenv(name, value)
    here = TokenStore.open(local)
    cache = CacheConfig(folder=str(tmp_path / "cache"))

    def read_all() -> None:
        there = TokenStore.open(remote, cache=cache)
        for _epoch in range(2):
            for document in range(there.num_documents):
                assert np.array_equal(there.document(document), here.document(document))
        for name in ("languages", "text_bytes"):
            assert np.array_equal(getattr(there, name), getattr(here, name))

    read_all()
    shards = len(here.manifest.shards)
    assert shards > 2
    first = content_reads(counted)
    assert len(first) == len(set(first)) == shards + 3, "every file once, each being smaller than a block"
    read_all()
    assert content_reads(counted) == first


@pytest.mark.slow
def test_processes_of_a_machine_share_it(
    remote: str, local: Path, counted: FaultyDoor, tmp_path: Path
) -> None:
    """Four that start at once read the same bytes; a fifth that comes later asks for none."""
    environment = {**os.environ, **counted.environment(), "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-c", READ_ALL, remote, str(tmp_path / "cache")]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    together = [start() for _ in range(4)]
    said = [process.communicate(timeout=120)[0].strip() for process in together]
    before = len(content_reads(counted))
    said.append(start().communicate(timeout=120)[0].strip())
    here = TokenStore.open(local)
    digest = hashlib.sha256(here.offsets.tobytes() + here.read(0, here.num_tokens).tobytes())
    assert said == [digest.hexdigest()] * 5
    assert len(content_reads(counted)) == before > 0


def test_a_damaged_shard_in_the_bucket_is_named(remote: str, here: GcsServer, tmp_path: Path) -> None:
    path = f"{remote.replace('gs://', '')}/tokens-00001.bin"
    assert path.startswith(BUCKET)
    content = here.files().cat_file(path)
    here.files().pipe_file(path, content[:-1] + bytes([content[-1] ^ 1]))
    store = TokenStore.open(remote, cache=CacheConfig(folder=str(tmp_path)))
    with pytest.raises(ValueError, match=r"tokens-00001\.bin has other bytes than its manifest says"):
        store.read(0, store.num_tokens)
