"""Several token stores as one endless dataset: exact shares, in stages, shuffled anew every epoch.

Element i is a pure function of (configuration, i). schedule.py says which source gives it and which of that
source's elements it is; element k of a source is window `shuffle(seed, epoch)(k % windows)` of its epoch
k // windows. A source's seed comes from the mixture's seed and the source's name, so one source more or less
changes nobody's order. All rows are full windows, so shares of elements are shares of tokens.
"""

from __future__ import annotations

import difflib
import hashlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import grain
import numpy as np
from etils import epath

from sealion_jax.checks import check_number
from sealion_jax.data.packing.examples import ExamplesConfig, PackedExamples
from sealion_jax.data.packing.rows import PackedStore, Row
from sealion_jax.data.packing.windows import PackedWindows
from sealion_jax.data.schedule import SMALLEST_WEIGHT, Schedule
from sealion_jax.data.store.cache import CacheConfig
from sealion_jax.data.store.token_store import MANIFEST, TokenStore
from sealion_jax.errors import UserError
from sealion_jax.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One token store of a mixture, with its share: by `weight`, or by `multiplier`, in all sources alike."""

    name: str
    """How it is called in stages, tables and metrics; its order of documents depends on it."""
    store: str
    """The store's directory, local or gs://."""
    weight: float | None = None
    """Share of the tokens, relative to the other sources' weights."""
    multiplier: float | None = None
    """How often its tokens count, relative to the others: the share is unique tokens times this."""
    loss_weight: float = 1.0
    """What a learned token of it counts in the mean loss, relative to the others; not for pairs."""

    def __post_init__(self) -> None:
        if not self.name or not self.store:
            raise UserError("every source of a mixture needs a name and a store")
        if self.weight is not None and self.multiplier is not None:
            raise UserError(f"source {self.name} has a weight and a multiplier; give it one of them")
        for unit in ("weight", "multiplier"):
            _check_share(f"{unit} of source {self.name}", getattr(self, unit))
        check_number(f"the loss_weight of source {self.name}", self.loss_weight, above=0)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """From a step on, other weights; a source that is not named is absent, and goes on later where it was."""

    start_step: int
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_number("a stage's start_step", self.start_step, least=0, whole=True)
        for name, weight in self.weights.items():
            _check_share(f"weight of {name} in the stage from step {self.start_step}", weight)
        _check_any(self.weights.values(), f"the stage from step {self.start_step}")


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Sources, and how their shares change over a run.

    The sources' own weights or multipliers hold from step 0 to the first stage; where a stage starts at step
    0 there are none. A single source needs neither.
    """

    sources: tuple[SourceConfig, ...]
    stages: tuple[StageConfig, ...] = ()
    seed: int = 0
    examples: ExamplesConfig = field(default_factory=ExamplesConfig)
    """How rows are made of stores of chats and pairs."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    """Where what was read of stores in buckets is kept on each machine."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("a mixture needs at least one source")
        for unit in ("name", "store"):
            _check_distinct([getattr(source, unit) for source in self.sources], unit)
        self._check_shares()
        starts = [stage.start_step for stage in self.stages]
        if starts != sorted(set(starts)):
            raise UserError(f"stages start at steps {starts}; each must start after the one before it")
        names = [source.name for source in self.sources]
        for stage in self.stages:
            for name in stage.weights:
                if name not in names:
                    raise UserError(
                        f"the stage from step {stage.start_step} names the source {name}, which the mixture "
                        f"does not have{_did_you_mean(name, names)}"
                    )

    def _check_shares(self) -> None:
        weighted = [source.name for source in self.sources if source.weight is not None]
        multiplied = [source.name for source in self.sources if source.multiplier is not None]
        bare = [s.name for s in self.sources if s.weight is None and s.multiplier is None]
        if self.stages and self.stages[0].start_step == 0:
            if weighted or multiplied:
                raise UserError(
                    f"a stage starts at step 0, so the shares of sources {', '.join(weighted or multiplied)} "
                    "would never be used; remove them, or start the stage later"
                )
            return
        if weighted and multiplied:
            raise UserError(
                f"sources {', '.join(weighted)} have weights and {', '.join(multiplied)} multipliers; "
                "a mixture is by weight or by multiplier, not both"
            )
        if bare and len(self.sources) > 1:
            raise UserError(f"sources {', '.join(bare)} need a weight, or all sources a multiplier")
        if weighted:
            _check_any([source.weight or 0 for source in self.sources], "the mixture")
        if multiplied:
            _check_any([source.multiplier or 0 for source in self.sources], "the mixture")


def _check_share(what: str, share: float | None) -> None:
    if share is not None:
        check_number(f"the {what}", share, least=0)


def _check_any(shares: Iterable[float], where: str) -> None:
    if not any(share > 0 for share in shares):
        raise UserError(f"all weights of {where} are 0; give at least one source more")


def _check_distinct(values: Sequence[str], unit: str) -> None:
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise UserError(
            f"sources with the same {unit}: {', '.join(twice)}; list each once, with a larger share instead"
        )


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; it has {', '.join(known)}"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an element of a mixture comes from."""

    source: int
    epoch: int
    window: int


class Mixture(grain.MapDataset[Row]):
    """Rows of several sources in one endless order. Random access; threads may share it.

    A row is that of the source's window, and `source`, an int32: the source's index.
    """

    def __init__(
        self, config: MixtureConfig, sources: Sequence[PackedStore], *, global_batch_size: int
    ) -> None:
        """
        Args:
            sources: the packed stores of `config.sources`, in their order.
            global_batch_size: rows of a step; stages start at multiples of it.
        """
        super().__init__()
        self.config = config
        self.sources = tuple(sources)
        self.global_batch_size = global_batch_size
        self.names = tuple(source.name for source in config.sources)
        self.schedule = Schedule(_stages(config, self.sources, global_batch_size))
        self._orders = [
            grain.MapDataset.range(len(windows))
            .seed(_seed(config.seed, name))
            .shuffle()
            .repeat(reseed_each_epoch=True)
            for name, windows in zip(self.names, self.sources, strict=True)
        ]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        return self.row(index)

    def row(self, element: int) -> Row:
        """Tokens, targets, masks and source of an element."""
        place = self.locate(element)
        row = self.sources[place.source].row(place.window)
        weight = self.config.sources[place.source].loss_weight
        if weight != 1:
            row = {**row, "loss_mask": row["loss_mask"] * np.float32(weight)}
        return {**row, "source": np.int32(place.source)}

    def locate(self, element: int) -> Place:
        """Source, epoch of that source, and window of an element."""
        source, cursor = self.schedule.locate(element)
        window = self._orders[source][cursor]
        assert window is not None
        return Place(source=source, epoch=cursor // len(self.sources[source]), window=int(window))

    def with_sources(self, sources: Sequence[PackedStore]) -> Mixture:
        """The same mixture of other views of the same stores."""
        return Mixture(self.config, sources, global_batch_size=self.global_batch_size)

    def repeats_from_step(self, source: int) -> int | None:
        """The step, to within a few rows, at which a source begins its second epoch; None if never."""
        element = self.schedule.reached(source, len(self.sources[source]))
        return None if element is None else element // self.global_batch_size


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "little")


def _stages(
    config: MixtureConfig, sources: Sequence[PackedStore], global_batch_size: int
) -> list[tuple[int, list[Fraction]]]:
    """(first element, exact weights that sum to 1) of every stage."""
    stages = []
    if not config.stages or config.stages[0].start_step > 0:
        shares = [
            _exact(s.multiplier) * windows.unique_tokens if s.multiplier is not None else _exact(s.weight)
            for s, windows in zip(config.sources, sources, strict=True)
        ]
        stages.append((0, _normalised(shares, config, "the mixture")))
    for stage in config.stages:
        shares = [_exact(stage.weights.get(source.name, 0)) for source in config.sources]
        where = f"the stage from step {stage.start_step}"
        stages.append((stage.start_step * global_batch_size, _normalised(shares, config, where)))
    return stages


def _exact(share: float | None) -> Fraction:
    # By its decimal digits: 0.0275 is meant to be 11/400, not the binary number nearest to it.
    return Fraction(1) if share is None else Fraction(str(share))


def _normalised(shares: Sequence[Fraction], config: MixtureConfig, where: str) -> list[Fraction]:
    total = sum(shares)
    for share, source in zip(shares, config.sources, strict=True):
        if 0 < share < total * SMALLEST_WEIGHT:
            raise UserError(
                f"source {source.name} has a share of {float(share / total):.1e} in {where}; shares below "
                f"{float(SMALLEST_WEIGHT):.0e} cannot be kept exactly: raise it, or leave the source out"
            )
    return [share / total for share in shares]


def open_mixture(
    config: MixtureConfig,
    *,
    sequence_length_tokens: int,
    global_batch_size: int,
    tokenizer: Tokenizer,
) -> Mixture:
    """The mixture of the stores that `config` names, of texts and chats, or of pairs.

    Raises:
        UserError: a store is missing, not whole, empty, or made with another tokenizer; it is named. Pairs
            are mixed with something else.
    """
    stores = [_open(source, tokenizer, config.cache) for source in config.sources]
    packed = [
        _pack(source, store, config, sequence_length_tokens)
        for source, store in zip(config.sources, stores, strict=True)
    ]
    pairs = [rows for rows in packed if isinstance(rows, PackedExamples) and rows.store.kind == "pairs"]
    if pairs:
        if len(pairs) < len(packed):
            kinds = [f"{s.name} ({store.kind})" for s, store in zip(config.sources, stores, strict=True)]
            raise UserError(f"pairs are mixed with pairs alone; the sources are {', '.join(kinds)}")
        places = max(rows.places for rows in pairs)
        packed = [rows.with_pairs(places=places) for rows in pairs]
    return Mixture(config, packed, global_batch_size=global_batch_size)


def _pack(
    source: SourceConfig, store: TokenStore, config: MixtureConfig, sequence_length_tokens: int
) -> PackedWindows | PackedExamples:
    if store.kind == "text":
        return PackedWindows(store, sequence_length_tokens)
    if store.kind == "pairs" and source.loss_weight != 1:
        raise UserError(
            f"source {source.name} has a loss_weight, and holds pairs, whose loss is a mean over pairs; "
            "give it another weight (its share) instead"
        )
    return PackedExamples(store, sequence_length_tokens, config.examples)


def _open(source: SourceConfig, tokenizer: Tokenizer, cache: CacheConfig) -> TokenStore:
    if not (epath.Path(source.store) / MANIFEST).exists():
        raise UserError(
            f"source {source.name}: there is no token store at {source.store}{_nearest_store(source.store)}; "
            "make it with python -m sealion_jax.prepare"
        )
    store = TokenStore.open(source.store, cache=cache)
    try:
        store.require_tokenizer(tokenizer.fingerprint)
    except UserError as error:
        raise UserError(f"source {source.name}: {error}") from None
    return store


def _nearest_store(path: str) -> str:
    folder = epath.Path(path).parent
    if not folder.is_dir():
        return ""
    stores = [child.name for child in folder.iterdir() if (child / MANIFEST).exists()]
    close = difflib.get_close_matches(epath.Path(path).name, stores, n=1)
    return f" (did you mean {folder / close[0]}?)" if close else ""
