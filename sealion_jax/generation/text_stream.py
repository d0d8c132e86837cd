"""Text as its tokens come, without ever showing a part of a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from sealion_jax.tokenizer import Tokenizer


class TextStream:
    r"""Tokens in, the text that they add out; the parts are the text of all tokens together.

    A character that is not in the vocabulary comes as several byte pieces. They are held back until the
    character is whole:

        tokens    Sel  amat  <0xF0> <0x9F>  <0x98> <0x80>  !
        shown     Sel  amat  -      -       -      😀      !
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = ""
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: Iterable[int]) -> str:
        """The text that these tokens add, but for a character that is not whole yet."""
        self._ids.extend(ids)
        return self._show(len(self._ids) - self._incomplete())

    def rest(self) -> str:
        """What was held back, as far as it makes text; at the end."""
        return self._show(len(self._ids))

    def _show(self, count: int) -> str:
        text = self._tokenizer.decode(self._ids[:count])
        new = text[len(self._shown) :]
        self._shown = text
        return new

    def _incomplete(self) -> int:
        """How many of the last tokens are bytes of a character whose other bytes have not come."""
        self._utf8.reset()
        for byte in self._last_bytes():
            self._utf8.decode(bytes([byte]))
        return len(self._utf8.getstate()[0])

    def _last_bytes(self) -> list[int]:
        """The bytes of the run of byte pieces at the end."""
        found: list[int] = []
        for piece in reversed(self._tokenizer.pieces(self._ids)):
            if len(piece) != len("<0xFF>") or not piece.startswith("<0x"):
                break
            found.append(int(piece[3:5], 16))
        return found[::-1]
