"""What every test of `prepare` starts from: a tokenizer, and a file of rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.prepare.prepare_command import ROWS, write_rows
from tests.tiny_text import tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))[1]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)
