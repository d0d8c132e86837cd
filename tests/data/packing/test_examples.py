"""Rows of chats and pairs: against each conversation rendered by itself; cuts, counts, places."""

from __future__ import annotations

import numpy as np
import pytest

from sealion_jax.data.chat.conversation import AssistantTurn, Conversation, Preference, UserTurn
from sealion_jax.data.chat.rendering import Learn, loss_mask, render_chat
from sealion_jax.data.mixture import MixtureConfig, SourceConfig, open_mixture
from sealion_jax.data.packing.examples import ExamplesConfig, PackedExamples
from sealion_jax.data.store.token_store import TokenStore
from sealion_jax.data.store.writer import write_chat_store
from sealion_jax.errors import UserError
from sealion_jax.tokenizer import Tokenizer
from tests.tiny_text import SENTENCES, tiny_tokenizer

WORDS = " ".join(SENTENCES.values()).split()
LENGTH = 96


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))[0]


def words(rng: np.random.Generator, most: int) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(1, most)))


def chat(rng: np.random.Generator, *, most: int = 12) -> Conversation:
    turns: list[UserTurn | AssistantTurn] = []
    for _ in range(rng.integers(1, 4)):
        turns += [UserTurn(text=words(rng, most)), AssistantTurn(text=words(rng, most))]
    if rng.random() < 0.3:
        turns.append(UserTurn(text=words(rng, most)))
    return Conversation(turns=tuple(turns))


def pair(rng: np.random.Generator, *, most: int = 10) -> Preference:
    prompt = UserTurn(text=words(rng, most))
    good, bad = words(rng, most), words(rng, most)
    chosen, rejected = (
        Conversation(turns=(prompt, AssistantTurn(text=text)), prompt_turns=1) for text in (good, bad + " no")
    )
    return Preference(chosen=chosen, rejected=rejected)


@pytest.fixture(scope="module")
def chats(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    rng = np.random.default_rng(0)
    conversations = [chat(rng) for _ in range(150)]
    path = tmp_path_factory.mktemp("chats")
    write_chat_store(
        path / "s", [(c, "id" if k % 3 else "th") for k, c in enumerate(conversations)], tokenizer=tokenizer
    )
    return conversations, TokenStore.open(path / "s")


@pytest.fixture(scope="module")
def pairs(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    rng = np.random.default_rng(1)
    preferences = [pair(rng) for _ in range(80)]
    path = tmp_path_factory.mktemp("pairs")
    write_chat_store(
        path / "s", [(p, "id" if k % 2 else "th") for k, p in enumerate(preferences)], tokenizer=tokenizer
    )
    return preferences, TokenStore.open(path / "s")


def segments(packed: PackedExamples):
    """(document, row, slice of its positions) of every segment, as the row's own arrays tell."""
    for window in range(len(packed)):
        row = packed.row(window)
        for segment, document in enumerate(packed.documents(window).tolist(), start=1):
            (where,) = np.nonzero(row["segment_ids"] == segment)
            assert np.array_equal(where, np.arange(where[0], where[-1] + 1))
            yield document, row, slice(where[0], where[-1] + 1)


@pytest.mark.parametrize("learn", ["assistant", "last_assistant", "everything"])
def test_every_chat_that_fits_is_in_one_row_whole_and_nothing_else_is(
    chats, tokenizer: Tokenizer, learn: Learn
):
    conversations, store = chats
    packed = PackedExamples(store, LENGTH, ExamplesConfig(learn=learn))
    rendered = [render_chat(conversation, tokenizer) for conversation in conversations]
    seen = []
    for document, row, where in segments(packed):
        expected, mask = rendered[document], loss_mask(rendered[document], learn=learn)
        assert row["tokens"][where].tolist() == expected.ids[:-1].tolist()
        assert row["targets"][where].tolist() == expected.ids[1:].tolist()
        assert row["loss_mask"][where].tolist() == mask[1:].astype(float).tolist()
        assert row["positions"][where].tolist() == list(range(len(expected.ids) - 1))
        seen.append(document)
    assert sorted(seen) == [k for k, one in enumerate(rendered) if len(one.ids) - 1 <= LENGTH]
    assert 0 < len(seen) < len(rendered)
    for window in range(len(packed)):
        row = packed.row(window)
        padding = row["segment_ids"] == 0
        assert not any(row[name][padding].any() for name in ("tokens", "targets", "positions", "loss_mask"))
    used = sum(len(rendered[document].ids) - 1 for document in seen)
    assert packed.num_positions == used


def test_examples_too_long_are_counted_by_language(chats, tokenizer: Tokenizer):
    conversations, store = chats
    left_out = PackedExamples(store, LENGTH).left_out()
    too_long = [k for k, c in enumerate(conversations) if len(render_chat(c, tokenizer).ids) - 1 > LENGTH]
    languages = ["id" if k % 3 else "th" for k in too_long]
    assert left_out.too_long == {name: languages.count(name) for name in ("th", "id")}
    assert not left_out.truncated and not left_out.nothing_to_learn
    listed = list(PackedExamples(store, LENGTH).left_out_documents())
    assert listed == [("too_long", document) for document in too_long]


def test_a_multiplier_counts_the_rows_that_are_read(tokenizer: Tokenizer, tmp_path):
    """Two stores of the same rows, one with many chats beside that are too long: as many epochs of each."""
    rng = np.random.default_rng(1)
    short = [chat(rng, most=4) for _ in range(60)]
    long = [
        Conversation(turns=(UserTurn(text=" ".join(["air"] * LENGTH)), AssistantTurn(text="api")))
        for _ in range(30)
    ]
    for name, conversations in (("short", short), ("both", [*short, *long])):
        write_chat_store(tmp_path / name, [(c, "id") for c in conversations], tokenizer=tokenizer)
    sources = (SourceConfig(name=n, store=str(tmp_path / n), multiplier=1) for n in ("short", "both"))
    mixture = open_mixture(
        MixtureConfig(sources=tuple(sources)),
        sequence_length_tokens=LENGTH,
        global_batch_size=1,
        tokenizer=tokenizer,
    )
    assert len(mixture.sources[0]) == len(mixture.sources[1])
    assert mixture.schedule.counts(1000).tolist() == [500, 500]


def test_a_cut_chat_is_its_end_behind_bos(chats, tokenizer: Tokenizer):
    conversations, store = chats
    length = 40
    packed = PackedExamples(store, length, ExamplesConfig(too_long="truncate_left"))
    seen, cut = set(), 0
    for document, row, where in segments(packed):
        rendered = render_chat(conversations[document], tokenizer)
        ids, mask = rendered.ids, loss_mask(rendered)
        if len(ids) - 1 > length:
            ids, mask = np.r_[ids[:1], ids[-length:]], np.r_[mask[:1], mask[-length:]]
            cut += 1
        assert row["tokens"][where].tolist() == ids[:-1].tolist()
        assert row["targets"][where].tolist() == ids[1:].tolist()
        assert row["loss_mask"][where].tolist() == mask[1:].astype(float).tolist()
        assert mask[1:].any()
        seen.add(document)
    left_out = packed.left_out()
    assert cut == sum(left_out.truncated.values()) > 0
    # What the assistant said may all be cut away where a question follows it: nothing is left to learn.
    gone = [
        k
        for k, c in enumerate(conversations)
        if len(render_chat(c, tokenizer).ids) - 1 > length
        and not loss_mask(render_chat(c, tokenizer))[-length:].any()
    ]
    assert gone and set(gone) == set(range(len(conversations))) - seen
    assert sum(left_out.nothing_to_learn.values()) == len(gone)
    everything = PackedExamples(store, length, ExamplesConfig(too_long="truncate_left", learn="everything"))
    assert everything.num_examples == len(conversations)


def test_both_answers_of_a_pair_are_in_one_row_and_named(pairs, tokenizer: Tokenizer):
    preferences, store = pairs
    references = np.arange(store.num_documents, dtype=np.float32) * -1.5
    packed = PackedExamples(store, LENGTH).with_pairs(places=9, references=references)
    seen = []
    for window in range(len(packed)):
        row, documents = packed.row(window), packed.documents(window)
        assert row["chosen_segment"].shape == row["rejected_segment"].shape == (9,)
        for place in range(9):
            segment = int(row["chosen_segment"][place])
            if place >= len(documents) // 2:
                assert segment == 0 == row["rejected_segment"][place] == row["reference_chosen"][place]
                continue
            number = int(documents[2 * place]) // 2
            sides = ("chosen", preferences[number].chosen), ("rejected", preferences[number].rejected)
            for name, conversation in sides:
                where = row["segment_ids"] == row[f"{name}_segment"][place]
                rendered = render_chat(conversation, tokenizer)
                assert row["tokens"][where].tolist() == rendered.ids[:-1].tolist()
                assert row["loss_mask"][where].tolist() == loss_mask(rendered)[1:].astype(float).tolist()
                assert row[f"reference_{name}"][place] == references[2 * number + (name == "rejected")]
            seen.append(number)
    assert len(set(seen)) == len(seen) == packed.num_examples < len(preferences)


def test_a_cut_pair_loses_the_same_of_its_prompt_on_both_sides(pairs, tokenizer: Tokenizer):
    preferences, store = pairs
    length = 60
    packed = PackedExamples(store, length, ExamplesConfig(too_long="truncate_left"))
    cut = 0
    for window in range(len(packed)):
        row, documents = packed.row(window), packed.documents(window)
        for place in range(len(documents) // 2):
            preference = preferences[int(documents[2 * place]) // 2]
            prompts = []
            for name, conversation in (("chosen", preference.chosen), ("rejected", preference.rejected)):
                rendered = render_chat(conversation, tokenizer)
                where = row["segment_ids"] == row[f"{name}_segment"][place]
                tokens, learned = row["tokens"][where], row["loss_mask"][where] > 0
                assert row["targets"][where][learned].tolist() == rendered.ids[loss_mask(rendered)].tolist()
                prompts.append(tokens[: int(np.argmax(learned)) + 1].tolist())
                assert tokens[0] == tokenizer.bos_id
            assert prompts[0] == prompts[1]
            whole = len(render_chat(preference.chosen, tokenizer).ids) + len(
                render_chat(preference.rejected, tokenizer).ids
            )
            cut += whole - 2 > length
    left_out = packed.left_out()
    assert cut == sum(left_out.truncated.values()) > 0
    assert packed.num_examples + sum(left_out.nothing_to_learn.values()) == len(preferences)


def test_spans_tell_what_rows_hold(chats):
    _, store = chats
    packed = PackedExamples(store, 40, ExamplesConfig(too_long="truncate_left"))
    for window in range(0, len(packed), 5):
        row = packed.row(window)
        for span in packed.spans(window):
            assert (row["segment_ids"][span.row_start : span.row_stop] == span.segment).all()
            ids, _ = store.document_with_mask(span.document)
            expected = np.concatenate((ids[:1], ids[span.start + 1 : span.stop]))
            assert row["tokens"][span.row_start : span.row_stop].tolist() == expected.tolist()
            assert span.language == store.language_names[store.languages[span.document]]


def test_a_store_of_which_nothing_fits_is_refused(chats):
    with pytest.raises(UserError, match=r"none of the 150 chats .*truncate_left"):
        PackedExamples(chats[1], 4)
