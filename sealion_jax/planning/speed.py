"""How fast a step can be: the times of its matmuls, memory traffic and network, and what they bound."""

from __future__ import annotations

from dataclasses import dataclass

from sealion_jax.model.config import ATTENTION, Gemma3Config
from sealion_jax.model.flops import flops_per_token
from sealion_jax.objectives.preference_config import PreferenceConfig
from sealion_jax.planning.estimate import Estimate
from sealion_jax.planning.topology import Topology
from sealion_jax.recipe import TrainConfig
from sealion_jax.sharding import mesh_shape

LOGITS_TOKENS_AT_ONCE = 1024
"""With room for the logits of so many tokens, their gradient is taken with them and not computed again."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Times of a step in seconds at peak rates, and what follows of them."""

    flops_per_token: float
    """Of the model, forward and backward; by these MFU is counted."""
    recomputed_flops_per_token: float
    """Done again in the backward pass, to keep less."""
    quantized_flops_per_token: float
    """Of both, those of products in eight bits, which have a peak of their own."""
    tokens_per_step: int
    matmul: float
    memory: float
    network: float
    peak_flops_per_second: float
    """Of all chips together, in bfloat16: by this MFU is counted."""

    @property
    def bound_by(self) -> str:
        """Which of the three takes longest."""
        times = {"matmul": self.matmul, "memory": self.memory, "network": self.network}
        return max(times, key=lambda name: times[name])

    @property
    def step_overlapped(self) -> float:
        """If the longest of the three hides the others."""
        return max(self.matmul, self.memory, self.network)

    @property
    def step_in_turn(self) -> float:
        """If nothing hides anything."""
        return self.matmul + self.memory + self.network

    def mfu(self, step_seconds: float) -> float:
        """Of a step that takes so long: the model's operations as a share of what the chips could do."""
        return self.flops_per_token * self.tokens_per_step / step_seconds / self.peak_flops_per_second

    def tokens_per_second(self, step_seconds: float) -> float:
        """All chips together."""
        return self.tokens_per_step / step_seconds


def speed_of(
    config: TrainConfig, model: Gemma3Config, topology: Topology, estimate: Estimate
) -> Speed | None:
    """The times of a step; None of one that does not fit, so that there is no program."""
    if estimate.traffic is None or estimate.memory_traffic_bytes is None:
        return None
    tokens = config.global_batch_size * config.sequence_length_tokens
    peak = topology.num_chips * topology.chip.flops_per_second
    useful = flops_per_token(model, config.sequence_length_tokens, frozen=config.lora is not None)
    tensor = mesh_shape(config.mesh, topology.num_devices)["tensor"]
    again = recomputed_flops_per_token(config, model, tensor=tensor)
    quantized = quantized_flops_per_token(config, model)
    in_eight_bits = 0.0
    if quantized:  # and so the chip has a peak for it, see `check_compute`
        rate = topology.chip.eight_bits[config.compute.quantization]
        in_eight_bits = quantized / (topology.num_chips * rate)
    device_rate = topology.chip.hbm_gb_per_s * 1e9 / topology.chip.devices
    return Speed(
        flops_per_token=useful,
        recomputed_flops_per_token=again,
        quantized_flops_per_token=quantized,
        tokens_per_step=tokens,
        matmul=tokens * ((useful + again - quantized) / peak + in_eight_bits),
        memory=estimate.memory_traffic_bytes / device_rate,
        network=sum(sum(row.seconds) for row in estimate.traffic),
        peak_flops_per_second=peak,
    )


def recomputed_flops_per_token(config: TrainConfig, model: Gemma3Config, *, tensor: int = 1) -> float:
    """Operations a token that the backward pass repeats: layers' forward pass, but for what is kept of it by
    name, and the logits, unless there is room to take their gradient at once, which preferences never do.

    Args:
        tensor: devices that the vocabulary is split over.
    """
    V = model.vocab_size
    logits = 2.0 * V * model.model_dim
    again = 0.0
    if config.compute.remat in ("layer", "block"):
        forward = flops_per_token(model, config.sequence_length_tokens, backward=False)
        products = _products_with_weights(model)
        weights = model.num_layers * sum(products.values())
        products[ATTENTION] = (forward - logits - weights) / model.num_layers
        kept = {*config.compute.keep, *config.compute.offload}
        again = forward - logits - model.num_layers * sum(products[name] for name in kept)
    has_room = config.compute.logits_bytes_per_device >= LOGITS_TOKENS_AT_ONCE * V / tensor * 4
    at_once = has_room and not isinstance(config.objective, PreferenceConfig)
    return again if at_once else again + logits


def quantized_flops_per_token(config: TrainConfig, model: Gemma3Config) -> float:
    """Operations a token in eight bits: layers' products with weights, forward, to their inputs, and those
    that the backward pass repeats; not the weights' gradients, see `arithmetic`."""
    if config.compute.quantization == "none":
        return 0.0
    products = _products_with_weights(model)
    once = sum(products.values())
    again = 0.0
    if config.compute.remat in ("layer", "block"):
        kept = {*config.compute.keep, *config.compute.offload}
        again = sum(flops for name, flops in products.items() if name not in kept)
    return model.num_layers * (2 * once + again)


def _products_with_weights(model: Gemma3Config) -> dict[str, float]:
    """Operations a token of a layer's products forward, by the results' names."""
    D, H = model.model_dim, model.head_dim
    return {
        **dict.fromkeys(("query", "output"), 2.0 * D * H * model.num_heads),
        **dict.fromkeys(("key", "value"), 2.0 * D * H * model.num_kv_heads),
        **dict.fromkeys(("gate", "up", "down"), 2.0 * D * model.feed_forward_dim),
    }
