"""The corpus in the package as tests read it: its rows, their sentences, and a judge of languages."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

CORPUS = Path(__file__).parents[3] / "sealion_jax" / "data" / "corpus"
LANGUAGES = ["en", "id", "jv", "km", "lo", "ms", "my", "su", "ta", "th", "tl", "vi", "zh"]
# Too alike to be told apart in a sentence or two.
SAME = {"ms": "id"}

Row = dict[str, object]


def rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def sentences(text: str) -> set[str]:
    """What stands between sentence marks. Thai has none: there it is what stands between spaces."""
    thai = re.search("[\u0e01-\u0e5b]", text)
    ends = r"\s+" if thai else r"(?<=[.?!។။])\s*(?!\d)|(?<=[。？！])|\n"
    return {part.casefold() for part in re.split(ends, text) if part}


def grams(text: str) -> Iterable[str]:
    padded = f" {text.lower()} "
    return (padded[i : i + n] for n in (1, 2, 3) for i in range(len(padded) - n + 1))


def language_of(text: str, counts: dict[str, Counter[str]]) -> str:
    """The likeliest language: naive Bayes on runs of one to three characters, counted in each language."""

    def log_likelihood(language: str) -> float:
        count = counts[language]
        total = count.total() + 1000
        return sum(math.log((count[gram] + 0.1) / total) for gram in grams(text))

    likeliest = max(counts, key=log_likelihood)
    return SAME.get(likeliest, likeliest)
