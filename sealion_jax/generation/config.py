"""How tokens are chosen, and which samples a training run shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from sealion_jax.checks import check_number
from sealion_jax.errors import UserError

Format = Literal["chat", "raw"]
"""A prompt is a user's message in Gemma 3's chat format, or a text to be continued after <bos>."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen; rules apply in the order of these fields."""

    temperature: float = 0.0
    """Logits are divided by it. 0 is greedy: the largest logit, of equal ones the first."""
    top_k: int | None = None
    """Only so many tokens of the largest logits."""
    top_p: float | None = None
    """Only the most probable tokens that together have this probability."""
    min_p: float | None = None
    """Only tokens with at least this share of the largest probability."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, least=0)
        check_number("seed", self.seed, least=0, below=2**32, whole=True)
        if self.top_k is not None:
            check_number("top_k", self.top_k, least=1, whole=True)
        for name in ("top_p", "min_p"):
            share = getattr(self, name)
            if share is not None:
                check_number(name, share, above=0)
                if share > 1:
                    raise UserError(f"{name} must be at most 1, not {share!r}")
        idle = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.temperature == 0 and idle:
            raise UserError(
                f"temperature 0 takes the likeliest token, so {' and '.join(idle)} would have no effect; "
                "give a temperature above 0, such as 1"
            )


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """What a model in training is asked to write, now and then, for people to read."""

    prompts: tuple[str, ...] = ()
    """Empty: no samples."""
    interval_steps: int = 0
    """Steps between samples; 0: only before the first step and after the last."""
    max_new_tokens: int = 64
    format: Format = "raw"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        check_number("samples.interval_steps", self.interval_steps, least=0, whole=True)
        check_number("samples.max_new_tokens", self.max_new_tokens, least=1, whole=True)
        if self.format not in get_args(Format):
            raise UserError(f"samples.format must be chat or raw, not {self.format!r}")
        blank = [number for number, prompt in enumerate(self.prompts) if not prompt.strip()]
        if self.format == "chat" and blank:
            raise UserError(
                f"samples.prompts[{blank[0]}] is blank; in the chat format a prompt is a user's message"
            )
