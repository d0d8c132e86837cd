"""The corpus in the package: every language, the held-out documents apart, made once, safe to make twice."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from sealion_jax.data.chat.rendering import render_chat
from sealion_jax.data.chat.rows import chat_from_fields, preference_from_fields
from sealion_jax.data.store.token_store import TokenStore
from sealion_jax.embedded import HELD_OUT_ROWS, PARTS, EmbeddedCorpus, EmbeddedPart, Part, embedded
from sealion_jax.errors import UserError
from sealion_jax.tokenizer import Tokenizer

LANGUAGES = {"en", "id", "jv", "km", "lo", "ms", "my", "su", "ta", "th", "tl", "vi", "zh"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def corpus(cache: Path) -> EmbeddedCorpus:
    return embedded(cache=cache)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer(corpus: EmbeddedCorpus) -> Tokenizer:
    return Tokenizer.load(corpus.tokenizer)


@pytest.mark.parametrize("name", PARTS)
def test_stores_and_held_out_files_make_up_the_corpus(
    corpus: EmbeddedCorpus, tokenizer: Tokenizer, name: Part
) -> None:
    part: EmbeddedPart = getattr(corpus, name)
    assert set(part.stores) == set(part.heldout) == LANGUAGES
    package = Path(__file__).parents[1] / "sealion_jax" / "data" / "corpus" / name
    for language in LANGUAGES:
        store = TokenStore.open(part.stores[language])
        store.require_tokenizer(tokenizer.fingerprint)
        assert store.language_names == (language,) and store.verify() == []
        all_rows = rows(package / f"{language}.jsonl")
        held_out = rows(part.heldout[language])
        assert held_out == all_rows[-HELD_OUT_ROWS:] and len(held_out) == HELD_OUT_ROWS
        stored = [store.document_with_mask(i)[0].tolist() for i in range(store.num_documents)]
        assert stored == [ids for row in all_rows[:-HELD_OUT_ROWS] for ids in documents(row, tokenizer)]
        assert store.origin(3)[1] == (2 if name == "pairs" else 4)


def documents(row: dict, tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of what a row becomes: a text, a chat, or both conversations of a pair."""
    if "text" in row:
        return [[tokenizer.bos_id, *tokenizer.encode(row["text"]), tokenizer.eos_id]]
    if "messages" in row:
        return [render_chat(chat_from_fields(row), tokenizer).ids.tolist()]
    preference = preference_from_fields(row)
    return [render_chat(side, tokenizer).ids.tolist() for side in (preference.chosen, preference.rejected)]


def test_the_tokenizer_fits_the_model_and_the_chat_format(corpus: EmbeddedCorpus, tokenizer: Tokenizer):
    assert tokenizer.vocab_size == corpus.vocab_size
    assert (tokenizer.start_of_turn_id, tokenizer.end_of_turn_id) == (105, 106)


def test_it_is_made_once(corpus: EmbeddedCorpus, cache: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert embedded(cache=cache) == corpus
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before
    assert [path.name for path in cache.iterdir()] == [corpus.tokenizer.parent.name], "nothing is left aside"


def _make(cache: str, start, names) -> None:
    start.wait()
    names.put(str(embedded(cache=Path(cache)).tokenizer))


def test_two_processes_at_once(corpus: EmbeddedCorpus, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, names = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_make, args=(str(tmp_path), start, names)) for _ in range(2)]
    for process in processes:
        process.start()
    found = {names.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
        assert process.exitcode == 0
    (path,) = found
    assert Path(path).read_bytes() == corpus.tokenizer.read_bytes(), "made anew, the same bytes"
    assert len(list(tmp_path.iterdir())) == 1


def test_the_user_s_cache_is_the_default(
    corpus: EmbeddedCorpus, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "sealion_jax").symlink_to(cache)
    assert embedded().tokenizer.parent.name == corpus.tokenizer.parent.name
    assert embedded().tokenizer.is_relative_to(tmp_path)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        embedded(cache=tmp_path / "file" / "cache")
    assert os.listdir(tmp_path) == ["file"]
