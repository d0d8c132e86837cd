"""Text to token ids and back, with Gemma 3's own SentencePiece model, unchanged.

Control tokens are only ever added by us. SentencePiece matches user-defined pieces in text, so a
document that spells `<start_of_turn>` would become the control token 105. Here the encoder is built
from a copy of the model in which every such piece has SentencePiece's type CONTROL, which is never
matched in text nor made by a merge; ids stay what they were. Nothing else about the model changes, so
text that spells no control piece gets exactly the ids that SentencePiece gives, and text that does is
cut as if the vocabulary had no such piece.

Which user-defined pieces are control? All, except those that stand for text: runs of whitespace
(newlines, tabs, and U+2581, which is SentencePiece's space), and the HTML tags of `TEXT_TAGS`. In Gemma 3:

    id               pieces                                        here
    0-3              <pad> <eos> <bos> <unk>                       control (never matched in text)
    4-106            <mask> [multimodal] <unused0..98>
                     <start_of_turn> <end_of_turn>                 control
    107-137          newline runs of 1 to 31                       text
    138-167          space runs of 2 to 31                         text
    168-237          HTML tags                                     text
    238-493          bytes <0x00>..<0xFF>                          never matched in text
    494-255967       ordinary pieces                               text
    255968-255998    tab runs of 1 to 31                           text
    255999-262143    <start_of_image> <end_of_image> <unused99..>  control

A user-defined piece that this table does not know is control: the safe side.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece
from etils import epath
from jaxtyping import Int32
from sentencepiece import sentencepiece_model_pb2

from sealion_jax.errors import UserError


def _tags(names: str) -> tuple[str, ...]:
    return (*(f"<{name}>" for name in names.split()), *(f"</{name}>" for name in names.split()))


# In Gemma 3's order, because a trained tokenizer gives these pieces the same ids.
TEXT_TAGS: tuple[str, ...] = (
    *_tags("table caption thead tbody tfoot tr th td"),
    *_tags("h1 h2 h3 h4 h5 h6 blockquote"),
    *_tags("strong em b i u s sub sup code"),
    *_tags("a html body img span bbox ul li div iframe footer"),
)

# Built when imported, so a type checker does not see it.
_ModelProto = sentencepiece_model_pb2.ModelProto  # pyright: ignore[reportAttributeAccessIssue]
_PieceType = _ModelProto.SentencePiece.Type
# Looked up once: protobuf takes a microsecond for each look, and a model has 262,144 pieces.
_UNKNOWN, _CONTROL, _USER_DEFINED = _PieceType.UNKNOWN, _PieceType.CONTROL, _PieceType.USER_DEFINED


class Tokenizer:
    """A SentencePiece model that never takes text for a control token; see the module's first lines.

    Safe to share between threads, and to send to another process (it travels as the model's bytes).
    """

    def __init__(self, model_bytes: bytes) -> None:
        model = _ModelProto()
        try:
            model.ParseFromString(model_bytes)
        except Exception as error:  # protobuf's own class for it depends on how protobuf was built
            raise UserError(f"not a SentencePiece model ({len(model_bytes)} bytes): {error}") from None
        if not model.pieces:
            raise UserError(f"not a SentencePiece model ({len(model_bytes)} bytes): it has no pieces")
        control = [i for i, piece in enumerate(model.pieces) if _is_control(piece.piece, piece.type)]
        self.model_bytes = model_bytes
        self.control_ids = frozenset(control)
        for i in control:
            if model.pieces[i].type == _USER_DEFINED:
                model.pieces[i].type = _CONTROL
        self._encoder = _processor(model.SerializeToString())

    @classmethod
    def load(cls, path: epath.PathLike) -> Tokenizer:
        """The tokenizer of a .model file, or of a directory (Hugging Face's) that has a tokenizer.model.

        Raises:
            UserError: there is no such file, or it is not a SentencePiece model.
        """
        file = epath.Path(path)
        if file.is_dir():
            if not (file / "tokenizer.model").exists():
                raise UserError(
                    f"{file} has no tokenizer.model (a tokenizer.json alone is not enough); "
                    "copy Gemma 3's SentencePiece model there, or name the .model file itself"
                )
            file = file / "tokenizer.model"
        if not file.exists():
            raise UserError(f"no tokenizer at {file}: expected a .model file or a directory with one")
        try:
            return cls(file.read_bytes())
        except UserError as error:
            raise UserError(f"{file}: {error}") from None

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes]]:
        return Tokenizer, (self.model_bytes,)

    @functools.cached_property
    def _decoder(self) -> sentencepiece.SentencePieceProcessor:
        # Made when first needed: whoever only encodes need not load the model twice.
        return _processor(self.model_bytes)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the model's bytes, in hex: what a token store remembers of its tokenizer."""
        return hashlib.sha256(self.model_bytes).hexdigest()

    @property
    def vocab_size(self) -> int:
        return self._encoder.vocab_size()

    @property
    def pad_id(self) -> int:
        return self._encoder.pad_id()

    @property
    def eos_id(self) -> int:
        return self._encoder.eos_id()

    @property
    def bos_id(self) -> int:
        return self._encoder.bos_id()

    @property
    def unk_id(self) -> int:
        return self._encoder.unk_id()

    @functools.cached_property
    def start_of_turn_id(self) -> int:
        return self.control_id("<start_of_turn>")

    @functools.cached_property
    def end_of_turn_id(self) -> int:
        return self.control_id("<end_of_turn>")

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: <eos>, and <end_of_turn> where there is one."""
        try:
            return self.eos_id, self.end_of_turn_id
        except UserError:  # a tokenizer of another family, whose models continue texts
            return (self.eos_id,)

    def control_id(self, piece: str) -> int:
        """The id of the control piece spelled `piece`; raises UserError where the model has none."""
        token = self._encoder.piece_to_id(piece)
        if token not in self.control_ids or self._encoder.id_to_piece(token) != piece:
            raise UserError(f"this tokenizer has no control token {piece}; use one with Gemma 3's layout")
        return token

    def encode(self, text: str) -> list[int]:
        """The ids of `text`: no <bos>, no <eos>, never a control token. A lone surrogate is a ValueError."""
        return self._encoder.encode(_as_utf8(text), out_type=int)

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        """The ids of each text, as `encode` gives them, on `num_threads` threads."""
        if not texts:
            return []
        return self._encoder.encode([_as_utf8(text) for text in texts], out_type=int, num_threads=num_threads)

    def encode_arrays(
        self, texts: Sequence[str], *, num_threads: int = 1
    ) -> list[Int32[np.ndarray, " tokens"]]:
        """The ids of each text, as `encode` gives them, but as arrays: a fifth faster than lists."""
        if not texts:
            return []
        return self._encoder.encode(
            [_as_utf8(text) for text in texts], out_type="numpy", num_threads=num_threads
        )

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, as SentencePiece gives it: <pad>, <bos>, <eos> vanish, other pieces are spelled.

        Inverse to `encode`, but for U+2581: SentencePiece spells a space so, and it comes back as one. Ids
        without a piece vanish too: a model may have, and write, more of them than its tokenizer has pieces.
        """
        return self._decoder.decode([int(i) for i in ids if i < self.vocab_size])

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The piece of each id, as the model spells it: U+2581 for a space, `<0xE2>` for a byte.

        Ids without a piece give an empty string.
        """
        return [self._decoder.id_to_piece(int(i)) if i < self.vocab_size else "" for i in ids]


def _processor(model_bytes: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    except RuntimeError as error:
        raise UserError(f"SentencePiece cannot use this model: {error}") from None


def _as_utf8(text: str) -> bytes:
    # SentencePiece's own error for a lone surrogate speaks of pybind casts.
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text has a lone surrogate at character {error.start}; it is not valid Unicode"
        ) from None


def _is_control(piece: str, kind: int) -> bool:
    if kind in (_CONTROL, _UNKNOWN):
        return True
    return kind == _USER_DEFINED and bool(piece.strip("\n\t▁")) and piece not in TEXT_TAGS


# Gemma 3's ids 4 to 237, in order. <pad> <eos> <bos> <unk> are 0 to 3 and the bytes 238 to 493.
_HEAD: tuple[str, ...] = (
    "<mask>",
    "[multimodal]",
    *(f"<unused{i}>" for i in range(99)),
    "<start_of_turn>",
    "<end_of_turn>",
    *("\n" * n for n in range(1, 32)),
    *("▁" * n for n in range(2, 32)),
    *TEXT_TAGS,
)
# These follow the ordinary pieces, as in Gemma 3; so their ids depend on the vocabulary's size.
_TAIL: tuple[str, ...] = (*("\t" * n for n in range(1, 32)), "<start_of_image>", "<end_of_image>")


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, path: epath.PathLike) -> Tokenizer:
    """A byte-pair tokenizer with Gemma 3's id layout, trained on `texts` and written to `path`.

    Gemma 3's settings: pad 0, eos 1, bos 2, unk 3, the pieces of `_HEAD` and the bytes where Gemma 3 has
    them, digits split, no dummy prefix, no normalisation, every run of whitespace kept, and bytes for what
    is not in the vocabulary. The same texts give the same model, byte for byte.

    Raises:
        UserError: no text, or a vocabulary too small for its characters or too large for its merges.
    """
    # Newlines and tabs are pieces of their own, so no merge crosses them.
    lines = (line for text in texts for line in re.split(r"[\n\t]+", text) if line.strip())
    options = {
        "sentence_iterator": (part for line in lines for part in _short_parts(line)),
        "vocab_size": vocab_size - len(_TAIL),
        "user_defined_symbols": list(_HEAD),
        "model_type": "bpe",
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
        **{"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>", "unk_piece": "<unk>"},
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "character_coverage": 1.0,
        "max_sentence_length": _MAX_LINE_BYTES,
        "num_threads": 1,
        "minloglevel": 2,
    }
    model_bytes = _run_trainer(options, vocab_size)
    model = _ModelProto.FromString(model_bytes)
    for piece in _TAIL:
        model.pieces.add(piece=piece, score=0.0, type=_USER_DEFINED)
    model.trainer_spec.vocab_size = len(model.pieces)
    tokenizer = Tokenizer(model.SerializeToString(deterministic=True))
    epath.Path(path).write_bytes(tokenizer.model_bytes)
    return tokenizer


_MAX_LINE_BYTES = 16384


def _short_parts(line: str) -> list[str]:
    # The trainer drops longer lines. A character is at most four bytes.
    size = _MAX_LINE_BYTES // 4
    return [line[i : i + size] for i in range(0, len(line), size)]


def _run_trainer(options: dict, vocab_size: int) -> bytes:
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(model_writer=out, **options)
    except RuntimeError as error:
        if "!sentences_.empty()" in str(error):
            raise UserError("cannot train a tokenizer without text: every text was empty") from None
        limit = re.search(r"required_chars\. \d+ vs (\d+)|set it to a value <= (\d+)", str(error))
        if limit is None:
            raise UserError(f"cannot train a tokenizer of {vocab_size} pieces: {error}") from None
        bound = int(limit[1] or limit[2]) + len(_TAIL)
        raise UserError(
            f"a vocabulary of {vocab_size} pieces does not fit these texts: it takes at "
            f"{'least' if limit[1] else 'most'} {bound} "
            "(every character needs a piece, and every piece must occur)"
        ) from None
    return out.getvalue()
