"""The tokenizer's files of an export: the source's own, byte for byte, or the few that a bare model needs."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from sealion_jax.checkpoint.hf_config import parse_json_object
from sealion_jax.errors import UserError
from sealion_jax.tokenizer import Tokenizer

MODEL_FILE = "tokenizer.model"
FAST_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
VOCABULARY_FILES = (MODEL_FILE, FAST_FILE, SETTINGS_FILE, "special_tokens_map.json", "added_tokens.json")
"""What says which id a text gets."""


def tokenizer_files(
    ours: bytes | None, source: Collection[str], *, read: Callable[[str], bytes]
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """(files to write anew, names of the source's files to carry over) for a checkpoint's tokenizer.

    The source's vocabulary files are carried if they are of the tokenizer that the checkpoint was trained
    with, `ours`; otherwise, or where the source had none, a bare model gets the settings file with which
    Transformers' AutoTokenizer gives the same ids.

    Args:
        ours: the SentencePiece model in the checkpoint, None if it has none.
        source: names of the files that came from the source.
        read: gives the content of one of them.
    """
    present = tuple(name for name in VOCABULARY_FILES if name in source)
    if ours is None:
        return {}, present
    tokenizer = Tokenizer(ours)
    if (FAST_FILE in present or SETTINGS_FILE in present) and agrees(tokenizer, present, read=read):
        return {}, present
    return {MODEL_FILE: ours, SETTINGS_FILE: bare_settings(tokenizer)}, ()


def bare_settings(tokenizer: Tokenizer) -> bytes:
    """The tokenizer_config.json for a SentencePiece model without one."""
    ids = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id]
    if min(ids) < 0:
        raise UserError(
            f"the tokenizer lacks one of <bos>, <eos>, <pad>, <unk> (their ids are {ids}); use one with "
            "Gemma 3's layout"
        )
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    content: dict[str, Any] = {
        "add_bos_token": True,
        "add_eos_token": False,
        **dict(zip(names, tokenizer.pieces(ids), strict=True)),
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "GemmaTokenizer",
    }
    return json_bytes(content)


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """A JSON file as Transformers lays it out."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def stop_ids(tokenizer: Tokenizer | None) -> list[int]:
    """The ids of <eos> and <end_of_turn>, at which a chat model's answer ends; Gemma 3's without a tokenizer.

    Raises:
        UserError: the tokenizer has no turns.
    """
    return [1, 106] if tokenizer is None else [tokenizer.eos_id, tokenizer.end_of_turn_id]


def token_ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The ids that config.json and generation_config.json name; Gemma 3's without a tokenizer.

    Generation stops at <eos> and at the end of a turn.
    """
    if tokenizer is None:
        return {"bos_token_id": 2, "eos_token_id": stop_ids(None), "pad_token_id": 0}
    stops = list(tokenizer.stop_ids)
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stops if len(stops) > 1 else stops[0],
        "pad_token_id": tokenizer.pad_id,
    }


def agrees(tokenizer: Tokenizer, source: Collection[str], *, read: Callable[[str], bytes]) -> bool:
    """Whether the source's tokenizer files give the same ids to the same pieces; False if there are none.

    Control pieces may have other names: copies of Gemma 3's model differ in a few that are reserved.
    """
    if MODEL_FILE in source:
        content = read(MODEL_FILE)
        if content == tokenizer.model_bytes:
            return True
        other = Tokenizer(content)
        pieces = other.pieces(range(other.vocab_size))
        vocabulary = {piece: k for k, piece in enumerate(pieces)}
    elif FAST_FILE in source:
        model = parse_json_object(read(FAST_FILE), FAST_FILE).get("model")
        found = model.get("vocab") if isinstance(model, dict) else None
        vocabulary = found if isinstance(found, dict) else {}
    else:
        return False
    ids = [k for k in range(tokenizer.vocab_size) if k not in tokenizer.control_ids]
    return all(vocabulary.get(piece) == k for k, piece in zip(ids, tokenizer.pieces(ids), strict=True))
