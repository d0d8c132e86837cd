"""The same tokens through Transformers and through our model: do both give the same logits?

Both compute in float32 on the CPU, one after the other. The sequence is longer than the sliding window, so
that windows, both rotary bases and the scaling of positions all take part.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int

from sealion_jax.checkpoint.hf_weights import HfWeights
from sealion_jax.checkpoint.safetensors_stream import NUMPY_DTYPES, StoredTensor
from sealion_jax.checkpoint.weights import Weights, open_weights
from sealion_jax.errors import UserError
from sealion_jax.machine import available_bytes
from sealion_jax.model.config import ComputeConfig, Gemma3Config
from sealion_jax.model.gemma3 import binder
from sealion_jax.tokenizer import Tokenizer

TOLERANCE = 3e-4
"""Of the largest logit. Float32 rounding through all layers stays far below; a wrong norm, rotation, window
or transposition far above."""

PROMPTS = (
    "The ferry to the island leaves at six in the morning.",
    "Pasar pagi di kota itu buka sebelum matahari terbit.",
    "ตลาดเช้าเปิดก่อนพระอาทิตย์ขึ้น",
    "Chợ sáng mở cửa trước khi mặt trời mọc.",
    "காலைச் சந்தை சூரியன் உதிக்கும் முன் திறக்கும்.",
    "ဈေးသည် နေမထွက်မီ ဖွင့်သည်။",
    "ផ្សារពេលព្រឹកបើកមុនថ្ងៃរះ។",
    "ຕະຫຼາດເຊົ້າເປີດກ່ອນຕາເວັນຂຶ້ນ.",
    "早市在日出之前开门。",
    "def area(r):\n\treturn 3.14159 * r ** 2  # 0x1F\n\n\n",
)

_LONGEST = 2048
_COMPARED_POSITIONS = 64


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the comparison found."""

    max_difference: float
    max_logit: float
    num_tokens: int
    missing: tuple[str, ...]
    """Tensors that Transformers did not find, or did not know."""
    same_ids: bool | None
    """Whether both tokenizers gave the prompts the same ids; None where one has no tokenizer."""

    @property
    def agrees(self) -> bool:
        close = self.max_difference <= TOLERANCE * self.max_logit
        return close and not self.missing and self.same_ids is not False

    def describe(self) -> str:
        """A line or two for people."""
        lines = [
            f"verify: {self.num_tokens} tokens, largest difference of logits {self.max_difference:.2e} "
            f"(largest logit {self.max_logit:.3g}, tolerance {TOLERANCE * self.max_logit:.2e})"
        ]
        if self.missing:
            lines.append(f"verify: Transformers misses or does not know {', '.join(self.missing[:10])}")
        if self.same_ids is not None:
            lines.append(
                f"verify: token ids of {len(PROMPTS)} prompts {'equal' if self.same_ids else 'DIFFER'}"
            )
        lines.append(
            "verify: agrees with Transformers" if self.agrees else "verify: FAILED, do not use the result"
        )
        return "\n".join(lines)


def require_memory(num_params: int) -> None:
    """Raises UserError if a comparison of a model of this size would not fit into memory."""
    # 1B was seen with 6.5 GB: four bytes a parameter, copies that XLA makes, and the libraries.
    needed = 5.5 * num_params + 1.5e9
    available = available_bytes()
    if available is not None and available < needed:
        raise UserError(
            f"--verify holds the model in float32, {needed / 1e9:.0f} GB in all; {available / 1e9:.0f} GB "
            "are free; convert without it and compare on a larger machine"
        )


def compare(ours: epath.PathLike | Weights, theirs: epath.PathLike) -> Comparison:
    """The logits of the checkpoint `ours` in our model against those of `theirs` in Transformers.

    Our weights are rounded to the dtype that they have in `theirs`; adapters are merged with their base.

    Raises:
        UserError: a directory is remote, or there is not enough memory.
    """
    if "://" in str(theirs):
        raise UserError(f"--verify reads local directories only, and {theirs} is not one")
    weights = ours if isinstance(ours, Weights) else open_weights(str(ours))
    reference = HfWeights.open(theirs)
    require_memory(sum(int(np.prod(tensor.shape)) for tensor in reference.folder.tensors.values()))
    tokenizer = _tokenizer(weights)
    tokens = _tokens(weights.config, tokenizer)
    positions = np.unique(np.linspace(0, len(tokens) - 1, _COMPARED_POSITIONS).astype(int))
    expected, missing = _their_logits(theirs, tokens, positions)
    found = _our_logits(weights, reference, tokens, positions)
    return Comparison(
        max_difference=float(np.max(np.abs(found - expected))),
        max_logit=float(np.max(np.abs(expected))),
        num_tokens=len(tokens),
        missing=missing,
        same_ids=_same_ids(tokenizer, theirs),
    )


def _tokenizer(weights: Weights) -> Tokenizer | None:
    try:
        return Tokenizer.load(weights.tokenizer_path)
    except UserError:
        return None


def _tokens(config: Gemma3Config, tokenizer: Tokenizer | None) -> np.ndarray:
    """<bos>, the prompts, and random ids up to a length beyond the window."""
    length = min(config.sliding_window_tokens + 64, config.max_context_tokens, _LONGEST)
    ids = [tokenizer.bos_id, *(i for text in PROMPTS for i in tokenizer.encode(text))] if tokenizer else [2]
    highest = min(config.vocab_size, tokenizer.vocab_size if tokenizer else config.vocab_size)
    drawn = np.random.default_rng(0).integers(0, highest, length)
    return np.concatenate([np.asarray(ids, np.int32), drawn.astype(np.int32)])[:length]


def _their_logits(
    directory: epath.PathLike, tokens: np.ndarray, positions: np.ndarray
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Transformers' logits [positions, V], and the names of tensors that it misses or does not know."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        str(directory), dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    model, info = loaded
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens, dtype=torch.long)[None], logits_to_keep=torch.tensor(positions)
        )
    logits = out.logits[0].float().numpy()
    missing = tuple(sorted({*info["missing_keys"], *info["unexpected_keys"]}))
    del model, loaded, out
    gc.collect()
    return logits, missing


def _our_logits(
    weights: Weights, reference: HfWeights, tokens: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """Our logits [positions, V] with the weights in the dtypes of `reference`."""
    abstract: dict[str, Any] = {}
    for leaf, entry in reference.table.items():
        *parents, last = leaf.split("/")
        level = abstract
        for key in parents:
            level = level.setdefault(key, {})
        level[last] = jax.ShapeDtypeStruct(entry.shape, reference.dtype(leaf))
    # Rounded first, then widened leaf by leaf: inside the step XLA would hold all of both forms at once.
    leaves, structure = jax.tree.flatten(weights.load(abstract))
    names = [
        "/".join(entry.key for entry in path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract)
    ]
    for k, leaf in enumerate(leaves):
        leaves[k] = _widened(leaf, [reference.folder.tensors[n] for n in reference.table[names[k]].names])
        del leaf
    with jax.default_matmul_precision("highest"):
        return np.asarray(
            _logits(jax.tree.unflatten(structure, leaves), tokens, positions, config=weights.config)
        )


def _widened(leaf: jax.Array, tensors: Sequence[StoredTensor]) -> jax.Array:
    """The leaf in float32; where its tensors have several dtypes, each block rounded to its own first."""
    dtypes = [NUMPY_DTYPES[tensor.dtype] for tensor in tensors]
    if len(set(dtypes)) == 1:
        return leaf.astype(jnp.float32)
    blocks = zip(leaf, dtypes, strict=True)
    return jnp.stack([block.astype(dtype).astype(jnp.float32) for block, dtype in blocks])


@functools.partial(jax.jit, static_argnames=("config",))
def _logits(
    params: Any, tokens: Int[Array, " T"], positions: Int[Array, " P"], *, config: Gemma3Config
) -> Float[Array, "P V"]:
    """Logits of a sequence at some of its positions, in float32."""
    model = binder(config, compute=ComputeConfig(dtype="float32", remat="none"))(params)
    counted = jnp.arange(len(tokens), dtype=jnp.int32)
    hidden = model(tokens[None], positions=counted[None], segment_ids=jnp.ones_like(tokens)[None])
    return model.logits(hidden[:, positions])[0]


def _same_ids(tokenizer: Tokenizer | None, directory: epath.PathLike) -> bool | None:
    """Whether Transformers' tokenizer gives the prompts our ids behind its <bos>."""
    folder = epath.Path(directory)
    if tokenizer is None or not any(
        (folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")
    ):
        return None
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    return all(
        list(theirs(text)["input_ids"]) == [tokenizer.bos_id, *tokenizer.encode(text)] for text in PROMPTS
    )
