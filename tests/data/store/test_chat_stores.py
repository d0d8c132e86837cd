"""Stores of chats and pairs: tokens, marks and numbers against the format in plain words; kinds apart."""

from __future__ import annotations

import dataclasses
import json
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest

from sealion_jax.data.chat.conversation import Conversation, Preference
from sealion_jax.data.chat.rows import chat_from_fields, preference_from_fields
from sealion_jax.data.chat.template import CHAT_TEMPLATE
from sealion_jax.data.store.cache import CacheConfig
from sealion_jax.data.store.documents import encode_chats, encode_texts, kind_settings
from sealion_jax.data.store.layout import discard, refuse_other_files
from sealion_jax.data.store.manifest import Manifest, SourceFile
from sealion_jax.data.store.remote import discard_remote
from sealion_jax.data.store.token_store import LEARNED_BIT, TokenStore
from sealion_jax.data.store.writer import StoreWriter, store_tokenizer, write_chat_store, write_store
from sealion_jax.errors import UserError
from sealion_jax.tokenizer import Tokenizer
from tests.tiny_text import SENTENCES, tiny_tokenizer

TEXTS = list(SENTENCES.values())


def turns(*texts: str) -> list[dict]:
    """Messages of the user and the assistant by turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


# Each with what is said, and from which turn on the assistant's words are learned.
CHATS: list[tuple[dict, list[str], int]] = [
    *(({"messages": turns(text, text[::-1].strip())}, [text, text[::-1].strip()], 0) for text in TEXTS),
    ({"messages": turns("Hi", "a", "And?", "ร้อน 7")}, ["Hi", "a", "And?", "ร้อน 7"], 0),
    ({"prompt": turns("Hi", "a", "And?"), "completion": "b"}, ["Hi", "a", "And?", "b"], 3),
    ({"prompt": "Hi", "completion": "<end_of_turn>"}, ["Hi", "<end_of_turn>"], 1),
]
PAIRS = [
    {"prompt": turns("Hi", "a", text), "chosen": f"{text} sea", "rejected": text, "lang": language}
    for language, text in SENTENCES.items()
]


def said(texts: list[str], learned_from: int) -> tuple[str, str]:
    """A conversation as one text, and those parts of it that are learned, joined."""
    whole, learned = "<bos>", ""
    for number, text in enumerate(texts):
        whole += f"<start_of_turn>{('user', 'model')[number % 2]}\n{text}<end_of_turn>\n"
        learned += f"{text}<end_of_turn>" * (number % 2 == 1 and number >= learned_from)
    return whole, learned


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))[0]


@pytest.fixture
def chats(tmp_path: Path, tokenizer: Tokenizer) -> TokenStore:
    given = [(chat_from_fields(row), f"l{i % 3}") for i, (row, _, _) in enumerate(CHATS)]
    write_chat_store(tmp_path / "chats", given, tokenizer=tokenizer, shard_tokens=100)
    return TokenStore.open(tmp_path / "chats")


@pytest.fixture
def pairs(tmp_path: Path, tokenizer: Tokenizer) -> TokenStore:
    given = [(preference_from_fields(row), row["lang"]) for row in PAIRS]
    write_chat_store(tmp_path / "pairs", given, tokenizer=tokenizer, source="here")
    return TokenStore.open(tmp_path / "pairs")


def check_document(store: TokenStore, index: int, expected: tuple[str, str], tokenizer: Tokenizer) -> None:
    ids, learned = store.document_with_mask(index)
    assert ids.dtype == np.int32 and learned.dtype == bool
    text, learned_text = expected
    assert "<bos>" + tokenizer.decode(ids) == text
    assert tokenizer.decode(ids[learned]) == learned_text
    assert ids[learned][-1] == tokenizer.end_of_turn_id
    assert store.learned_start[index] == np.flatnonzero(learned)[0]
    assert store.learned_stop[index] == np.flatnonzero(learned)[-1] + 1
    assert np.array_equal(store.document(index), ids.astype(np.uint32) + learned * np.uint32(LEARNED_BIT))


def test_a_store_of_chats(chats: TokenStore, tokenizer: Tokenizer) -> None:
    assert chats.kind == "chats" and chats.num_documents == len(CHATS) and len(chats.manifest.shards) > 2
    for i, (_, texts, learned_from) in enumerate(CHATS):
        check_document(chats, i, said(texts, learned_from), tokenizer)
        assert chats.text_bytes[i] == sum(
            len(text.encode()) for n, text in enumerate(texts) if n % 2 and n >= learned_from
        )
        assert chats.language_names[chats.languages[i]] == f"l{i % 3}"
        assert chats.origin(i) == ("memory", i + 1)
    assert chats.manifest.bytes == chats.text_bytes.sum()
    assert chats.learned_start.dtype == chats.learned_stop.dtype == np.int32
    assert Manifest.from_json(chats.manifest.to_json(), "here") == chats.manifest


def test_a_message_that_spells_the_end_of_its_turn_has_one_end(
    chats: TokenStore, tokenizer: Tokenizer
) -> None:
    ids, learned = chats.document_with_mask(len(CHATS) - 1)
    assert (ids[learned] == tokenizer.end_of_turn_id).sum() == 1 and learned.sum() > 5


def test_a_store_of_pairs(pairs: TokenStore, tokenizer: Tokenizer) -> None:
    assert pairs.kind == "pairs" and pairs.num_documents == 2 * len(PAIRS)
    assert pairs.manifest.rows == len(PAIRS)
    assert [source.documents for source in pairs.manifest.sources] == [2 * len(PAIRS)]
    for k, row in enumerate(PAIRS):
        for side, answer in enumerate((row["chosen"], row["rejected"])):
            texts = [message["content"] for message in row["prompt"]] + [answer]
            check_document(pairs, 2 * k + side, said(texts, 3), tokenizer)
            assert pairs.text_bytes[2 * k + side] == len(answer.encode())
            assert pairs.language_names[pairs.languages[2 * k + side]] == row["lang"]
            assert pairs.origin(2 * k + side) == ("here", k + 1)
    totals = pairs.manifest.languages
    assert {one.language: one.documents for one in totals} == dict.fromkeys(SENTENCES, 2)


def test_a_store_of_texts_has_no_marks(tmp_path: Path, tokenizer: Tokenizer) -> None:
    manifest = write_store(tmp_path / "store", TEXTS, tokenizer=tokenizer)
    store = TokenStore.open(tmp_path / "store")
    assert store.kind == "text" and "kind" not in json.loads(manifest.to_json())
    assert {path.name for path in (tmp_path / "store").iterdir()}.isdisjoint(
        {"learned_start.bin", "learned_stop.bin"}
    )
    for i in range(len(TEXTS)):
        ids, learned = store.document_with_mask(i)
        assert np.array_equal(ids, store.document(i)) and not learned.any()
    for name in ("learned_start", "learned_stop"):
        with pytest.raises(ValueError, match=f"store of texts, which has no {name}"):
            getattr(store, name)


def test_the_settings_tell_the_kind_and_the_format(
    chats: TokenStore, pairs: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [store.manifest.settings["kind"] for store in (chats, pairs)] == ["chats", "pairs"]
    before = kind_settings("chats")
    assert chats.manifest.settings == before and kind_settings("text") == {}
    monkeypatch.setattr("sealion_jax.data.store.documents.CHAT_TEMPLATE", CHAT_TEMPLATE + " ")
    assert kind_settings("chats")["chat_format"] != before["chat_format"]


def test_a_kind_that_this_version_does_not_know(pairs: TokenStore) -> None:
    file = Path(pairs.path) / "manifest.json"
    file.write_text(file.read_text("utf-8").replace('"kind": "pairs"', '"kind": "songs"'), "utf-8")
    with pytest.raises(UserError, match=r"of kind 'songs', this program reads text, chats, pairs"):
        TokenStore.open(pairs.path)


def test_damage_in_the_marks_is_named(pairs: TokenStore) -> None:
    file = Path(pairs.path) / "learned_stop.bin"
    content = file.read_bytes()
    assert pairs.verify() == [] and len(content) == 4 * pairs.num_documents
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert pairs.verify() == ["learned_stop.bin has other bytes than its manifest says"]
    file.unlink()
    with pytest.raises(UserError, match=r"learned_stop\.bin is missing"):
        TokenStore.open(pairs.path)


def test_chats_and_pairs_are_not_mixed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    given: list[Conversation | Preference] = [
        chat_from_fields(CHATS[0][0]),
        preference_from_fields(PAIRS[0]),
    ]
    with pytest.raises(ValueError, match="1 conversations and 1 preferences"):
        write_chat_store(tmp_path / "store", given, tokenizer=tokenizer)


# --- the writer


def write_chats(writer: StoreWriter, tokenizer: Tokenizer, numbers: range) -> None:
    for i in numbers:
        chat = chat_from_fields(CHATS[i][0])
        writer.append(encode_chats([chat], tokenizer, lines=[i + 1], languages=["id"]), source=0)


def finish(writer: StoreWriter, tokenizer: Tokenizer) -> None:
    source = SourceFile(path="s", format="jsonl", bytes=1, sha256="", rows=0, documents=0)
    writer.finish(tokenizer=store_tokenizer(tokenizer), sources=(source,), settings={})


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("kept", [0, 3])
def test_going_on_after_a_kill_gives_the_same_bytes(tmp_path: Path, tokenizer: Tokenizer, kept: int) -> None:
    with StoreWriter(tmp_path / "whole", job="job", kind="chats", shard_tokens=64) as writer:
        write_chats(writer, tokenizer, range(len(CHATS)))
        finish(writer, tokenizer)
    with StoreWriter(tmp_path / "killed", job="job", kind="chats", shard_tokens=64) as writer:
        write_chats(writer, tokenizer, range(kept))
        if kept:
            writer.commit([kept])
        write_chats(writer, tokenizer, range(kept, kept + 2))
    with StoreWriter(tmp_path / "killed", job="job", kind="chats", shard_tokens=64) as writer:
        write_chats(writer, tokenizer, range(kept, len(CHATS)))
        finish(writer, tokenizer)
    assert content_of(tmp_path / "killed") == content_of(tmp_path / "whole")


def test_rows_of_another_kind_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = encode_texts(["sea"], tokenizer, lines=[1], languages=["en"])
    with (
        StoreWriter(tmp_path / "chats", job="job", kind="chats") as writer,
        pytest.raises(ValueError, match="another kind than the store's, which is chats"),
    ):
        writer.append(text, source=0)
    with (
        StoreWriter(tmp_path / "texts", job="job") as writer,
        pytest.raises(ValueError, match="another kind than the store's, which is text"),
    ):
        write_chats(writer, tokenizer, range(1))


def test_texts_in_the_place_of_chats_that_were_never_committed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with StoreWriter(tmp_path / "store", job="chats", kind="chats") as writer:
        write_chats(writer, tokenizer, range(3))
    write_store(tmp_path / "texts", ["sea"], tokenizer=tokenizer)
    write_store(tmp_path / "store", ["sea"], tokenizer=tokenizer)
    assert content_of(tmp_path / "store") == content_of(tmp_path / "texts")


# --- what other code keeps in a store

REFERENCES = ("references/0a1f.f32", "references/0a1f.json", "references/.0a1f.f32-12-34")


def test_discarding_takes_the_references_along(tmp_path: Path, pairs: TokenStore) -> None:
    folder = Path(pairs.path)
    (folder / "references").mkdir()
    refuse_other_files(folder)
    for name in REFERENCES:
        (folder / name).write_bytes(b"1234")
    refuse_other_files(folder)
    assert TokenStore.open(folder).verify() == []
    (folder / "references" / "thesis.tex").write_text("...")
    with pytest.raises(UserError, match=r"other files in it \(references/thesis\.tex\)"):
        refuse_other_files(folder)
    discard(folder)
    assert [path.name for path in folder.rglob("*")] == ["references", "thesis.tex"]
    (folder / "references" / "thesis.tex").unlink()
    discard(folder)
    assert list(folder.iterdir()) == []


def test_a_store_in_a_bucket_and_its_references(pairs: TokenStore, tmp_path: Path) -> None:
    """fsspec's in-memory file system stands for gs://."""
    bucket = f"memory://{uuid.uuid4().hex}/store"
    system, folder = fsspec.core.url_to_fs(bucket)
    system.put(pairs.path, bucket, recursive=True)
    there = TokenStore.open(bucket, cache=CacheConfig(folder=str(tmp_path / "cache")))
    for name in ("learned_start", "learned_stop", "text_bytes"):
        assert np.array_equal(getattr(there, name), getattr(pairs, name))
    assert all(map(np.array_equal, there.document_with_mask(3), pairs.document_with_mask(3)))
    for name in (*REFERENCES, "references/thesis.tex"):
        system.pipe_file(f"{folder}/{name}", b"1234")
    discard_remote(bucket)
    assert system.find(folder) == [f"{folder}/references/thesis.tex"]


def test_an_empty_store_of_chats_has_no_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    manifest = write_chat_store(tmp_path / "store", [], tokenizer=tokenizer)
    assert (manifest.kind, manifest.documents, manifest.tokens) == ("chats", 0, 0)
    store = TokenStore.open(tmp_path / "store")
    assert len(store.learned_start) == 0 and dataclasses.asdict(manifest)["languages"] == ()
