"""Greedy generation against Transformers' own, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sealion_jax.generation.config import SamplingConfig
from sealion_jax.generation.generator import Generator
from sealion_jax.model.config import ComputeConfig
from sealion_jax.model.gemma3 import binder
from sealion_jax.sharding import MeshConfig, make_mesh

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.model.gemma3_reference import reference_model, to_tree  # noqa: E402 (needs torch)
from tests.model.test_transformers_parity import CONFIGS  # noqa: E402 (needs torch)

NEW = 200


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of PyTorch's cost more than they gain where a token is a few small products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_two_hundred_tokens_are_those_of_transformers(name: str) -> None:
    """Prompts below, at and above the window, in one batch here and each alone there; float32."""
    config = CONFIGS[name]
    window = config.sliding_window_tokens
    rng = np.random.default_rng(14)
    prompts = [rng.integers(1, config.vocab_size, size=n).tolist() for n in (2, window, 2 * window + 5)]
    model = reference_model(config, seed=3)
    with torch.no_grad():  # of either sign: else a token is the likeliest to follow itself
        drawn = torch.randn(config.model_dim, generator=torch.Generator().manual_seed(0))
        model.model.norm.weight.copy_(drawn - 1)
    params: Any = jax.tree.map(
        jnp.asarray, to_tree({name: p.detach() for name, p in model.named_parameters()}, config)
    )
    generator = Generator(
        binder(config, compute=ComputeConfig(dtype="float32", remat="none")),
        make_mesh(MeshConfig(), jax.devices()[:1]),
        config=config,
        sampling=SamplingConfig(),
        stop_ids=(),
        batch_size=len(prompts),
    )
    ours = generator.generate(params, prompts, max_new_tokens=NEW)
    for prompt, completion in zip(prompts, ours, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.stack(theirs.logits)[:, 0].topk(2).values
        # Rounding cannot have decided: the likeliest is ahead by ten times what the two may differ.
        assert (best[:, 0] - best[:, 1]).min() > 1e-3
        expected = theirs.sequences[0, len(prompt) :].tolist()
        assert list(completion.ids) == expected
        assert len(set(expected)) > 40
