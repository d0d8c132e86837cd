"""An exported tokenizer gives, in Transformers, the ids that the model was trained with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from sealion_jax.checkpoint.digests import write_digests
from sealion_jax.checkpoint.hf import export_hf, import_hf
from sealion_jax.checkpoint.hf_tokenizer import agrees, bare_settings, token_ids, tokenizer_files
from sealion_jax.errors import UserError
from sealion_jax.tokenizer import Tokenizer, train_tokenizer
from tests.checkpoint.hf_models import TEXT_VERSION_5, random_tensors, text_shapes, write_directory
from tests.tiny_text import SENTENCES, tiny_tokenizer

HARD = (
    "",
    " ",
    "  two  spaces ",
    "\ttab\n\n\nlines\n",
    "1234567 ๑๒๓",
    "né́e ﬁ ½ 👩‍🌾",
    "<b>bold</b>",
    "a\u200bb\u00a0c",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))[0]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Another vocabulary of the same size."""
    texts = [text[::-1] for text in SENTENCES.values()]
    return train_tokenizer(texts, vocab_size=700, path=tmp_path_factory.mktemp("other") / "other.model")


def files_for(
    ours: Tokenizer | None, source: Mapping[str, bytes]
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    return tokenizer_files(ours and ours.model_bytes, source, read=lambda name: source[name])


def write_bare(tokenizer: Tokenizer, folder: Path) -> Any:
    """Transformers' tokenizer of an export that has only a SentencePiece model."""
    transformers = pytest.importorskip("transformers", minversion="5")
    new, carried = files_for(tokenizer, {})
    assert sorted(new) == ["tokenizer.model", "tokenizer_config.json"] and not carried
    for name, content in new.items():
        (folder / name).write_bytes(content)
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def assert_same_ids(theirs: Any, tokenizer: Tokenizer, texts: list[str]) -> None:
    """Both SentencePiece itself and our tokenizer, with <bos> in front."""
    plain = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    for text in texts:
        expected = [2, *plain.encode(text)]
        assert theirs(text)["input_ids"] == expected, text
        assert [tokenizer.bos_id, *tokenizer.encode(text)] == expected, text


def test_a_bare_model_gives_the_same_ids_in_transformers(tiny: Tokenizer, tmp_path: Path) -> None:
    theirs = write_bare(tiny, tmp_path)
    assert_same_ids(theirs, tiny, [*SENTENCES.values(), *HARD])
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id, theirs.unk_token_id) == (
        0,
        1,
        2,
        3,
    )
    assert len(theirs) == tiny.vocab_size
    turn = theirs("<start_of_turn>user", add_special_tokens=False)["input_ids"]
    assert turn[0] == tiny.start_of_turn_id == 105


@pytest.mark.parametrize(
    "model",
    ["standin_gemma3_layout_16k.model", pytest.param("gemma3_262k.model", marks=pytest.mark.slow)],
)
def test_every_language_gives_the_same_ids_in_transformers(
    model: str, shared_data: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(shared_data / "tokenizer" / model)
    theirs = write_bare(tokenizer, tmp_path)
    languages = sorted((shared_data / "cpt").glob("*.jsonl"))
    assert len(languages) == 13
    for file in languages:
        with file.open() as lines:
            texts = [json.loads(line)["text"] for _, line in zip(range(12), lines, strict=False)]
        assert_same_ids(theirs, tokenizer, [*texts, *HARD])


def test_settings_name_the_special_tokens(tiny: Tokenizer) -> None:
    settings = json.loads(bare_settings(tiny))
    assert settings["tokenizer_class"] == "GemmaTokenizer" and settings["add_bos_token"] is True
    names = ("pad_token", "eos_token", "bos_token", "unk_token")
    assert [settings[name] for name in names] == ["<pad>", "<eos>", "<bos>", "<unk>"]
    assert (
        token_ids(tiny) == token_ids(None) == {"bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0}
    )


def test_the_source_s_files_are_carried_if_they_are_of_this_tokenizer(
    tiny: Tokenizer, other: Tokenizer
) -> None:
    settings = b'{"chat_template": "x"}'
    whole = {"tokenizer.model": tiny.model_bytes, "tokenizer_config.json": settings, "config.json": b"{}"}
    assert files_for(tiny, whole) == ({}, ("tokenizer.model", "tokenizer_config.json"))
    assert files_for(None, whole) == ({}, ("tokenizer.model", "tokenizer_config.json"))
    bare = {"tokenizer.model": tiny.model_bytes, "tokenizer_config.json": bare_settings(tiny)}
    assert files_for(tiny, {"tokenizer.model": tiny.model_bytes}) == (bare, ())
    assert files_for(tiny, {**whole, "tokenizer.model": other.model_bytes}) == (bare, ())
    assert files_for(tiny, {"tokenizer_config.json": settings}) == (bare, ())


def test_a_copy_with_another_name_for_a_reserved_piece_is_the_same_tokenizer(tiny: Tokenizer) -> None:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(tiny.model_bytes)  # pyright: ignore[reportAttributeAccessIssue]
    model.pieces[7].piece = "<reserved>"
    copied = {"tokenizer.model": model.SerializeToString(), "tokenizer_config.json": b"{}"}
    assert files_for(tiny, copied) == ({}, ("tokenizer.model", "tokenizer_config.json"))
    model.pieces[600].piece = "another"
    copied["tokenizer.model"] = model.SerializeToString()
    assert not agrees(tiny, copied, read=copied.__getitem__)
    assert files_for(tiny, copied)[1] == ()


@pytest.fixture(scope="module")
def fast_only(tiny: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokenizer Transformers 5 has saved: tokenizer.json alone."""
    folder = tmp_path_factory.mktemp("fast")
    theirs = write_bare(tiny, folder)
    for path in folder.iterdir():
        path.unlink()
    theirs.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    return write_directory(folder, TEXT_VERSION_5, random_tensors(text_shapes("model.")))


def test_a_tokenizer_json_alone_is_carried_and_told(fast_only: Path, tmp_path: Path) -> None:
    done = import_hf(fast_only, tmp_path / "step")
    assert "no tokenizer.model in the source" in done.notes[0]
    assert not export_hf(tmp_path / "step", tmp_path / "out").notes
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (fast_only / name).read_bytes()


def test_a_tokenizer_can_be_named_for_a_source_without_one(
    fast_only: Path, tiny: Tokenizer, other: Tokenizer, tmp_path: Path
) -> None:
    for name, tokenizer in (("tiny", tiny), ("other", other)):
        (tmp_path / f"{name}.model").write_bytes(tokenizer.model_bytes)
    with pytest.raises(UserError, match=r"other.model gives other ids than the source's own tokenizer"):
        import_hf(fast_only, tmp_path / "step", tokenizer=tmp_path / "other.model")
    assert not import_hf(fast_only, tmp_path / "step", tokenizer=tmp_path / "tiny.model").notes
    assert (tmp_path / "step/assets/tokenizer.model").read_bytes() == tiny.model_bytes
    export_hf(tmp_path / "step", tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (fast_only / "tokenizer.json").read_bytes()

    large = train_tokenizer(SENTENCES.values(), vocab_size=710, path=tmp_path / "large.model")
    assert large.vocab_size > 704
    with pytest.raises(UserError, match=r"has 710 pieces, the model only 704 embeddings"):
        import_hf(fast_only, tmp_path / "step2", tokenizer=tmp_path / "large.model")


def test_training_with_another_tokenizer_replaces_the_source_s(
    tiny: Tokenizer, other: Tokenizer, tmp_path: Path
) -> None:
    files = {
        "tokenizer.model": other.model_bytes,
        "tokenizer_config.json": b"{}",
        "chat_template.jinja": b"x",
    }
    source = write_directory(
        tmp_path / "hf", TEXT_VERSION_5, random_tensors(text_shapes("model.")), files=files
    )
    import_hf(source, tmp_path / "step")
    (tmp_path / "step/assets/tokenizer.model").write_bytes(tiny.model_bytes)
    write_digests(tmp_path / "step")
    done = export_hf(tmp_path / "step", tmp_path / "out")
    assert done.notes == (
        "the source's tokenizer files are left out: the checkpoint was trained with another tokenizer",
    )
    assert (tmp_path / "out/tokenizer.model").read_bytes() == tiny.model_bytes
    assert (tmp_path / "out/tokenizer_config.json").read_bytes() == bare_settings(tiny)
    assert (tmp_path / "out/chat_template.jinja").read_bytes() == b"x"
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation == {"bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0}
