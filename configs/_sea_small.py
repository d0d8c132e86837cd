"""What the recipes on the small set of real data share: where it is, and the command that prepares it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sealion_jax import cli
from sealion_jax.errors import UserError
from sealion_jax.tokenizer import Tokenizer

FOLDER_VARIABLE = "SEALION_SEA_SMALL"
TEXTS_VARIABLE = "SEALION_SHARED_DATA"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where the data is, and where token stores, tokenizer and held-out rows go."""

    texts: str | None = None
    """With cpt/, sft/, dpo/, eval/, tokenizer/ in it; by default SEALION_SHARED_DATA, or ../shared/data."""
    tokenizer: str | None = None
    """A SentencePiece model with Gemma 3's layout of ids; by default the 16k stand-in beside the texts."""
    output: str = "data/sea_small"
    """Folder for the stores, the held-out rows and the tokenizer."""
    hold_out_seed: int = 0
    """Another seed holds out other rows."""

    @property
    def output_folder(self) -> Path:
        return Path(self.output)

    @property
    def tokenizer_path(self) -> str:
        return self.tokenizer or str(self.folder("tokenizer") / "standin_gemma3_layout_16k.model")

    def folder(self, part: str) -> Path:
        """A folder of the data.

        Raises:
            UserError: it is not there.
        """
        texts = Path(self.texts or os.environ.get(TEXTS_VARIABLE, "../shared/data"))
        if not (texts / part).is_dir():
            raise UserError(f"no {part} data at {texts}/{part}; give --texts, or set {TEXTS_VARIABLE}")
        return texts / part


def parse(argv: Sequence[str], *, recipe: str, description: str | None) -> Options:
    """The options of `python -m sealion_configs.<recipe>`."""
    return cli.parse(Options, argv, prog=f"python -m sealion_configs.{recipe}", description=description)


def prepared(recipe: str, name: str) -> Path:
    """A file or folder that the recipe's command prepares.

    Raises:
        UserError: it has not yet.
    """
    folder = Path(os.environ.get(FOLDER_VARIABLE, "data/sea_small"))
    if not (folder / name).exists():
        raise UserError(
            f"no prepared data at {folder / name}; make it with python -m sealion_configs.{recipe} "
            f"--output {folder}, or set {FOLDER_VARIABLE} to where it is"
        )
    return folder / name


def copy_tokenizer(options: Options) -> None:
    """Puts the tokenizer beside the stores."""
    content = Tokenizer.load(options.tokenizer_path).model_bytes
    (options.output_folder / "tokenizer.model").write_bytes(content)


def concatenate(parts: Sequence[Path], whole: Path) -> None:
    """Writes the lines of several files into one."""
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
