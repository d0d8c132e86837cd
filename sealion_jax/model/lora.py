"""Low-rank adapters: which weights have one, what it adds to their products, and where it lies in the tree.

With LoRA (Hu et al. 2022, arXiv:2106.09685) a product x w becomes x w + alpha / rank * (x a) b, and only a
and b are trained. They lie beside the weight, whose place and name stay as they are:

    blocks/layer_0/attention/query           [blocks, D, N, H]
    blocks/layer_0/attention/lora/query/a    [blocks, D, W]
    blocks/layer_0/attention/lora/query/b    [blocks, W, N, H]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from flax import nnx
from jaxtyping import Array, Float

from sealion_jax.checks import check_number
from sealion_jax.config_tree import nearest
from sealion_jax.errors import UserError
from sealion_jax.model.config import Gemma3Config
from sealion_jax.model.parameters import Initializer, own_axes

if TYPE_CHECKING:
    from sealion_jax.layout import Layout

Target = Literal["query", "key", "value", "output", "gate", "up", "down"]
TARGETS: tuple[Target, ...] = get_args(Target)
INPUT_AXES: Mapping[Target, int] = {target: 2 if target == "output" else 1 for target in TARGETS}
"""How many of a weight's first axes a product sums over; the others come out of it."""

LORA = "lora"
"""The key of a module's adapters in the tree."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which weights have an adapter, and of what rank; the other weights stay as they are."""

    rank: int = 16
    """Columns of a and rows of b: what an adapter can change grows with it, and so does its size."""
    alpha: float = 32.0
    """What an adapter gives is multiplied by alpha / rank."""
    targets: tuple[Target, ...] = TARGETS
    """Of every layer: query, key, value, output (attention), gate, up, down (feed-forward)."""

    def __post_init__(self) -> None:
        check_number("lora.rank", self.rank, least=1, whole=True)
        check_number("lora.alpha", self.alpha, above=0)
        for target in self.targets:
            if target not in TARGETS:
                close = nearest(str(target), TARGETS)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise UserError(f"lora.targets has {target!r}; expected some of {', '.join(TARGETS)}{hint}")
        if len(set(self.targets)) != len(self.targets) or not self.targets:
            raise UserError(
                f"lora.targets ({', '.join(self.targets) or 'none'}) must name at least one weight, and each "
                "only once"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def describe(self) -> str:
        """In words: "LoRA of rank 16 on query, value"."""
        return f"LoRA of rank {self.rank} on {', '.join(self.targets)}"


class Adapter(nnx.Module):
    """What is added to x w: scale * (x a) b, for w [*in, *out], a [*in, W] and b [W, *out].

    It begins at zero, as b does. a is normal with variance 1 / fan-in, which keeps x a at x's scale.
    """

    def __init__(self, weight: nnx.Param, config: LoraConfig, *, inputs: int, init: Initializer):
        stacked = 0 if init.stack is None else 1
        shape, axes = weight.shape[stacked:], weight.get_metadata("axes")[stacked:]
        self.scale = config.scale
        self.a = init.matrix(
            (*shape[:inputs], config.rank), (*axes[:inputs], "rank"), fan_in=math.prod(shape[:inputs])
        )
        self.b = init.zeros((config.rank, *shape[inputs:]), ("rank", *axes[inputs:]))

    def __call__(self, equation: str, x: Float[Array, ...], *, layout: Layout) -> Float[Array, ...]:
        """In x's dtype.

        Args:
            equation: of the product of x and the weight, such as "BTD,DNH->BTNH".
        """
        down, up = low_rank_equations(equation)
        low = layout.product(down, x, self.a[...], own_axes(self.a)) * self.scale
        low = layout.activation(low, ("batch", "tokens", "rank"))
        return layout.product(up, low, self.b[...], own_axes(self.b))


class Adapters(nnx.Module):
    """The adapters of a module's weights, under the names of these; None for a weight that has none."""

    query: Adapter | None = None
    key: Adapter | None = None
    value: Adapter | None = None
    output: Adapter | None = None
    gate: Adapter | None = None
    up: Adapter | None = None
    down: Adapter | None = None

    def __init__(self, weights: Mapping[Target, nnx.Param], config: LoraConfig | None, *, init: Initializer):
        for name, weight in weights.items():
            if config is not None and name in config.targets:
                setattr(self, name, Adapter(weight, config, inputs=INPUT_AXES[name], init=init))


def low_rank_equations(equation: str) -> tuple[str, str]:
    """The two products that take a weight's place: "BTD,DW->BTW" and "BTW,WNH->BTNH" for "BTD,DNH->BTNH"."""
    operands, result = equation.split("->")
    x, weight = operands.split(",")
    summed = "".join(letter for letter in weight if letter not in result)
    rest = "".join(letter for letter in x if letter not in summed)
    return f"{x},{summed}W->{rest}W", f"{rest}W,W{weight.removeprefix(summed)}->{result}"


def parted(tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model's tree as (what it has without LoRA, its adapters), each without branches that are empty."""
    plain: dict[str, Any] = {}
    adapters: dict[str, Any] = {}
    for name, below in tree.items():
        if name == LORA:
            adapters[name] = below
        elif isinstance(below, Mapping):
            parts = parted(below)
            for part, whole in zip(parts, (plain, adapters), strict=True):
                if part:
                    whole[name] = part
        else:
            plain[name] = below
    return plain, adapters


def joined(plain: Mapping[str, Any], adapters: Mapping[str, Any]) -> dict[str, Any]:
    """The whole tree that `parted` gave the two for; nothing is copied."""
    tree = dict(plain)
    for name, below in adapters.items():
        tree[name] = joined(tree[name], below) if name in tree else below
    return tree


def adapters_by_weight(adapters: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """("blocks/layer_0/attention/query", {"a": ..., "b": ...}) of every adapted weight."""
    for name, below in adapters.items():
        if name == LORA:
            yield from ((f"{path}{weight}", pair) for weight, pair in below.items())
        else:
            yield from adapters_by_weight(below, f"{path}{name}/")


def trained_parameters(config: Gemma3Config, lora: LoraConfig) -> int:
    """Parameters of all adapters: rank * (in + out), summed over the targets of every layer."""
    D, F = config.model_dim, config.feed_forward_dim
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sizes: dict[Target, int] = {
        "query": D + queries,
        "key": D + keys,
        "value": D + keys,
        "output": queries + D,
        "gate": D + F,
        "up": D + F,
        "down": F + D,
    }
    return config.num_layers * lora.rank * sum(sizes[target] for target in lora.targets)


def check_adapters(adapters: Mapping[str, Any], config: Gemma3Config, lora: LoraConfig) -> None:
    """Refuses a tree of adapters (arrays or their shapes) that is not what the configuration says.

    Raises:
        ValueError: a target has no adapter, another weight has one, or their sizes are wrong.
    """
    pairs = dict(adapters_by_weight(adapters))
    found = {weight.rpartition("/")[2] for weight in pairs}
    count = sum(math.prod(leaf.shape) for pair in pairs.values() for leaf in pair.values())
    expected = trained_parameters(config, lora)
    if found != set(lora.targets) or count != expected:
        raise ValueError(
            f"adapters on {', '.join(sorted(found)) or 'nothing'} with {count:,} parameters, where "
            f"{lora.describe()} has {expected:,}"
        )
