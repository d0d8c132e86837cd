"""A few sentences in five scripts, and a tokenizer trained on them in a moment."""

from __future__ import annotations

from pathlib import Path

from sealion_jax.tokenizer import Tokenizer, train_tokenizer

SENTENCES = {
    "id": "Ibu membeli 23 kilo beras di pasar pagi ini, 14 lagi besok.",
    "en": "The river is wide and slow where it meets the sea.",
    "vi": "Mùa mưa năm nay đến sớm hơn mọi năm.",
    "th": "ตลาดเช้าเปิดตั้งแต่ก่อนฟ้าสว่าง",
    "ta": "மழை பெய்தால் ஆறு நிறையும்.",
}


def tiny_tokenizer(folder: Path, *, vocab_size: int = 700) -> tuple[Tokenizer, Path]:
    """A tokenizer of Gemma 3's layout and the file it is in."""
    path = folder / "tiny.model"
    return train_tokenizer(SENTENCES.values(), vocab_size=vocab_size, path=path), path
