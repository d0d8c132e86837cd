"""The root of a run's configuration, and its JSON form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sealion_jax.checkpoint.orbax import CheckpointConfig
from sealion_jax.checks import check_number
from sealion_jax.compiler import CompilerConfig
from sealion_jax.config_tree import check_types, from_plain, to_plain
from sealion_jax.data.mixture import MixtureConfig
from sealion_jax.errors import UserError
from sealion_jax.evaluation.config import EvaluationConfig
from sealion_jax.generation.config import SamplesConfig
from sealion_jax.model.config import ComputeConfig, Gemma3Config
from sealion_jax.model.lora import LoraConfig
from sealion_jax.objectives.causal_lm import CausalLMConfig
from sealion_jax.objectives.preference_config import PreferenceConfig
from sealion_jax.optimizer import OptimizerConfig, learning_rate_schedule
from sealion_jax.sharding import MeshConfig
from sealion_jax.training.config import LoggingConfig
from sealion_jax.training.spikes import SpikeConfig, check_reachable
from sealion_jax.watching import WatchConfig

FINGERPRINTS = "fingerprints"
"""Of config.json, beside the fields: what the inputs held that some of them name."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides what a run computes; a recipe is a function that returns one."""

    name: str
    """Of the recipe; names the default run directory."""
    tokenizer: str
    """A SentencePiece `.model` file or a Hugging Face directory, local or gs://; the stores' own."""
    data: MixtureConfig
    """Which token stores are read, and how much of each."""
    sequence_length_tokens: int
    """Positions in a row of the batch."""
    global_batch_size: int
    """Rows in a step, over all devices and microbatches."""
    steps: int
    """Updates in the whole run."""
    model: Gemma3Config | None = None
    """Shapes of the model; None takes those of `init_from`."""
    init_from: str | None = None
    """Weights to start from: a run, a step's directory or a Hugging Face directory; None draws them."""
    objective: CausalLMConfig | PreferenceConfig = field(default_factory=CausalLMConfig)
    """What is learned: the next token (of texts, of the assistant's words in chats), or preferences."""
    lora: LoraConfig | None = None
    """Trains low-rank adapters, and leaves the weights of `init_from` as they are; None trains them all."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """Precision and what is recomputed."""
    microbatches: int = 1
    """Parts that a global batch is computed in, one after another: less memory, the same numbers.

    More where the devices' rows do not divide by it, and fewer where a device has fewer rows.
    """
    rows_per_device: int | None = None
    """Most rows that a device computes at a time: a batch takes more microbatches on fewer devices.

    None leaves it to `microbatches`, which is otherwise the least number of parts.
    """
    compiler: CompilerConfig = field(default_factory=CompilerConfig)
    """Sets of compiler flags, for GPUs and TPUs."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW, its schedule and clipping."""
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    """Losses that jump: what is one, and whether its update is left out or the run goes back."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Devices along each axis; -1 takes what is left."""
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    """How often state is saved, and how much of it is kept."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out texts, chats or pairs, measured before, during and after."""
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    """Prompts that the model answers before, during and after, for people to read."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """How often a step's numbers are written down."""
    watch: WatchConfig = field(default_factory=WatchConfig)
    """Heartbeats, and when a process is taken to be dead or a step to be hung."""
    seed: int = 0
    """Of freshly drawn weights. The data has its own: `data.seed`."""
    run_dir: str | None = None
    """Where the run lives, a folder or gs://; `--run-dir` goes before it, None is `runs/<name>`."""

    def __post_init__(self) -> None:
        check_types(self, TrainConfig)
        for name in ("sequence_length_tokens", "global_batch_size", "steps", "microbatches"):
            check_number(name, getattr(self, name), least=1, whole=True)
        if self.rows_per_device is not None:
            check_number("rows_per_device", self.rows_per_device, least=1, whole=True)
        if not self.name or "/" in self.name:
            raise UserError(f"name {self.name!r} must not be empty or have a slash: it names a folder")
        check_number("seed", self.seed, least=0, below=2**63, whole=True)
        self._check_batch()
        self._check_model()
        self._check_names()
        learning_rate_schedule(self.optimizer.schedule, self.steps)
        check_reachable(
            self.spikes,
            interval_steps=self.checkpoints.interval_steps,
            keep_last=self.checkpoints.keep_last,
        )

    def _check_batch(self) -> None:
        if self.global_batch_size % self.microbatches:
            below = self.global_batch_size // self.microbatches * self.microbatches
            above = below + self.microbatches
            raise UserError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of microbatches "
                f"({self.microbatches}); try {f'{below} or {above}' if below else above}"
            )

    def _check_model(self) -> None:
        if self.model is None and self.init_from is None:
            raise UserError("give model (its shapes) or init_from (a checkpoint that has them)")
        if self.lora is not None and self.init_from is None:
            raise UserError(
                "lora needs init_from: adapters stand on the weights of a checkpoint, which they do not "
                "hold; name one there, or set lora to None to train all weights from scratch"
            )
        if self.sequence_length_tokens < 2:
            raise UserError("sequence_length_tokens must be at least 2: a token and the one to predict")
        if self.model is not None and self.sequence_length_tokens > self.model.max_context_tokens:
            raise UserError(
                f"sequence_length_tokens ({self.sequence_length_tokens}) is more than the model's context "
                f"(model.max_context_tokens, {self.model.max_context_tokens})"
            )

    def _check_names(self) -> None:
        """A term of the loss is reported as loss/<term>, and the loss of a source as loss/<source>."""
        if isinstance(self.objective, PreferenceConfig):
            terms = {loss.name for loss in self.objective.losses}
            for source in self.data.sources:
                if source.name in terms:
                    raise UserError(
                        f"a source is called {source.name}, as is a term of the loss: both would be "
                        f"reported as loss/{source.name}; give the source another name"
                    )


def to_json(config: TrainConfig, *, fingerprints: Mapping[str, str] | None = None) -> str:
    """The configuration as a run directory's config.json has it, with what its inputs hold if given."""
    plain = to_plain(config, TrainConfig)
    if fingerprints is not None:
        plain[FINGERPRINTS] = dict(fingerprints)
    return json.dumps(plain, indent=2, ensure_ascii=False) + "\n"


def from_json(text: str) -> TrainConfig:
    """The configuration that `to_json` gave the text for.

    Raises:
        UserError: the text is not JSON, or not a TrainConfig's; names the field.
    """
    plain = _object(text)
    plain.pop(FINGERPRINTS, None)
    try:
        return from_plain(plain, TrainConfig)
    except UserError as error:
        raise UserError(f"config.json: {error}") from error


def read_fingerprints(text: str) -> dict[str, str]:
    """The fingerprints that `to_json` was given; none where the text has none."""
    return from_plain(_object(text).get(FINGERPRINTS, {}), dict[str, str], path=FINGERPRINTS)


def _object(text: str) -> dict[str, Any]:
    try:
        plain = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"config.json is not JSON: {error}") from error
    if not isinstance(plain, dict):
        raise UserError(f"config.json holds a {type(plain).__name__}, not an object")
    return plain
