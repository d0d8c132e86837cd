"""The name table: which Hugging Face tensors make up which of our leaves, and how their axes lie.

Letters are those of shapes.py: V vocabulary, D model, N query heads, K key-value heads, H head dim, F
feed-forward. A layout reads "theirs -> ours"; axes in parentheses are one axis there. Hugging Face
stores matrices as [out, in]; norms are stored alike on both sides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sealion_jax.errors import UserError
from sealion_jax.model.config import Gemma3Config

# Our leaf, their tensor, layout.
LAYER_TABLE: tuple[tuple[str, str, str], ...] = (
    ("attention/query", "self_attn.q_proj.weight", "(N H) D -> D N H"),
    ("attention/key", "self_attn.k_proj.weight", "(K H) D -> D K H"),
    ("attention/value", "self_attn.v_proj.weight", "(K H) D -> D K H"),
    ("attention/output", "self_attn.o_proj.weight", "D (N H) -> N H D"),
    ("attention/query_norm/scale", "self_attn.q_norm.weight", "H -> H"),
    ("attention/key_norm/scale", "self_attn.k_norm.weight", "H -> H"),
    ("mlp/gate", "mlp.gate_proj.weight", "F D -> D F"),
    ("mlp/up", "mlp.up_proj.weight", "F D -> D F"),
    ("mlp/down", "mlp.down_proj.weight", "D F -> F D"),
    ("pre_attention_norm/scale", "input_layernorm.weight", "D -> D"),
    ("post_attention_norm/scale", "post_attention_layernorm.weight", "D -> D"),
    ("pre_mlp_norm/scale", "pre_feedforward_layernorm.weight", "D -> D"),
    ("post_mlp_norm/scale", "post_feedforward_layernorm.weight", "D -> D"),
)
FIRST_TABLE = (("embedder/embedding", "embed_tokens.weight", "V D -> V D"),)
LAST_TABLE = (("final_norm/scale", "norm.weight", "D -> D"),)

PREFIXES = (
    "language_model.model.",  # multimodal, as Transformers 4 and 5 save it
    "model.language_model.",  # multimodal, as Transformers 5 (and late 4) has it in memory
    "language_model.",  # multimodal without its head
    "model.",  # text only
    "",  # text only, without its head
)
HEADS = ("lm_head.weight", "language_model.lm_head.weight")
"""The output matrix where it is stored beside the embedding, to which it is tied."""
CARRIED_PREFIXES = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)
"""Of tensors that are not the language model's: carried through untouched."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one tensor lies there and here."""

    groups: tuple[str, ...]
    """Their axes, each the letters that are merged into it."""
    ours: str
    """Our axes, in order."""

    @classmethod
    def parse(cls, text: str) -> Layout:
        theirs, ours = text.split(" -> ")
        groups = (group.strip("()").replace(" ", "") for group in re.findall(r"\([^)]*\)|\S+", theirs))
        return cls(groups=tuple(groups), ours=ours.replace(" ", ""))

    @property
    def theirs(self) -> str:
        """Their axes with merged ones apart."""
        return "".join(self.groups)

    @property
    def is_identity(self) -> bool:
        """Whether both sides store the same array."""
        return tuple(self.ours) == self.groups

    def their_shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        return tuple(math.prod(sizes[letter] for letter in group) for group in self.groups)

    def our_shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        return tuple(sizes[letter] for letter in self.ours)

    def to_ours(self, apart: np.ndarray) -> np.ndarray:
        """A view in our order of an array whose axes are `theirs`."""
        return apart.transpose([self.theirs.index(letter) for letter in self.ours])

    def to_theirs(self, array: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
        """Our array as they store it; copied where the order of axes changes."""
        apart = array.transpose([self.ours.index(letter) for letter in self.theirs])
        return contiguous(apart).reshape(self.their_shape(sizes))


@dataclass(frozen=True, kw_only=True)
class LeafTensors:
    """One of our leaves and the tensors it is made of: one for each block of a stacked leaf, else one."""

    leaf: str
    names: tuple[str, ...]
    layout: Layout
    sizes: dict[str, int]
    is_stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The leaf's shape."""
        return (*((len(self.names),) if self.is_stacked else ()), *self.layout.our_shape(self.sizes))

    @property
    def their_shape(self) -> tuple[int, ...]:
        """The shape of each of its tensors."""
        return self.layout.their_shape(self.sizes)


def name_table(config: Gemma3Config, prefix: str) -> tuple[LeafTensors, ...]:
    """Every leaf of a model and the tensors it is made of, whose names begin with `prefix`."""
    sizes = {
        "V": config.vocab_size,
        "D": config.model_dim,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "F": config.feed_forward_dim,
    }
    blocks, period = config.num_blocks, config.layers_per_block

    def entry(leaf: str, names: Iterable[str], layout: str, *, is_stacked: bool) -> LeafTensors:
        return LeafTensors(
            leaf=leaf,
            names=tuple(f"{prefix}{name}" for name in names),
            layout=Layout.parse(layout),
            sizes=sizes,
            is_stacked=is_stacked,
        )

    def single(table: Sequence[tuple[str, str, str]]) -> list[LeafTensors]:
        return [entry(leaf, (theirs,), layout, is_stacked=False) for leaf, theirs, layout in table]

    entries = single(FIRST_TABLE)
    for position in range(period if blocks else 0):
        for leaf, theirs, layout in LAYER_TABLE:
            names = (f"layers.{block * period + position}.{theirs}" for block in range(blocks))
            entries.append(entry(f"blocks/layer_{position}/{leaf}", names, layout, is_stacked=True))
    for position in range(config.num_rest_layers):
        for leaf, theirs, layout in LAYER_TABLE:
            names = (f"layers.{blocks * period + position}.{theirs}",)
            entries.append(entry(f"rest/layer_{position}/{leaf}", names, layout, is_stacked=False))
    return (*entries, *single(LAST_TABLE))


def find_prefix(names: Iterable[str], where: str) -> str:
    """What the names of the language model's tensors begin with; raises UserError if there is none."""
    known = set(names)
    embedding = FIRST_TABLE[0][1]
    for prefix in PREFIXES:
        if f"{prefix}{embedding}" in known:
            return prefix
    expected = ", ".join(f"{prefix}{embedding}" for prefix in PREFIXES)
    raise UserError(
        f"{where} has no embedding of Gemma 3: expected one of {expected} among its {len(known)} tensors "
        f"({', '.join(sorted(known)[:3])}, ...)"
    )


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array with its elements in order; copied as integers, because NumPy moves bfloat16 slowly."""
    if array.flags.c_contiguous:
        return array
    return np.ascontiguousarray(array.view(f"u{array.dtype.itemsize}")).view(array.dtype)
