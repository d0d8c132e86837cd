"""A worker that takes the training step of Transformers' Gemma 3 with PyTorch's AdamW."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch._dynamo.exc import BackendCompilerFailed
from turns import Built, Job, serve

TRIED_STEPS = 2
"""Of each kind before the fastest is taken; the first of them warms up."""


class Kind(NamedTuple):
    """How the model is computed."""

    attention: str
    compiled: bool = False


KINDS = (Kind("sdpa"), Kind("eager"), Kind("sdpa", compiled=True))


def load(job: Job, attention: str) -> Any:
    """The model in float32, with the job's weights or drawn ones."""
    if job.weights is not None:
        return transformers.Gemma3ForCausalLM.from_pretrained(
            job.weights, dtype=torch.float32, attn_implementation=attention, local_files_only=True
        )
    config = transformers.Gemma3TextConfig(**hf_config(job, attention))
    with torch.device("cuda" if job.on_gpu else "cpu"):
        return transformers.Gemma3ForCausalLM(config)


def hf_config(job: Job, attention: str) -> dict[str, Any]:
    """The job's model in Transformers' words."""
    model = job.model
    layers, each = model["num_layers"], model.get("layers_per_block", 6)
    full = {"rope_type": "default", "rope_theta": 1_000_000.0}
    if factor := model.get("global_rope_factor"):
        full |= {"rope_type": "linear", "factor": factor}
    return {
        "attn_implementation": attention,
        "vocab_size": model["vocab_size"],
        "hidden_size": model["model_dim"],
        "num_hidden_layers": layers,
        "num_attention_heads": model["num_heads"],
        "num_key_value_heads": model["num_kv_heads"],
        "head_dim": model["head_dim"],
        "intermediate_size": model["feed_forward_dim"],
        "query_pre_attn_scalar": model.get("query_scale_dim", 256),
        "sliding_window": model.get("sliding_window_tokens", 1024),
        "layer_types": ["sliding_attention" if (k + 1) % each else "full_attention" for k in range(layers)],
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    }


def make_step(job: Job, kind: Kind) -> Callable[[], float]:
    """A step of the job of one kind, with its model and its optimizer."""
    device = torch.device("cuda" if job.on_gpu else "cpu")
    model = load(job, kind.attention).to(device).train()
    if job.options.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    call = torch.compile(model) if kind.compiled else model
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    norms = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": job.weight_decay}, {"params": norms, "weight_decay": 0.0}],
        lr=job.learning_rate,
        betas=(job.beta1, job.beta2),
        eps=job.epsilon,
        fused=True,
    )
    arrays = {name: torch.from_numpy(array).long().to(device) for name, array in job.read_batch().items()}
    # Documents are told from positions that begin again; without any, attention may take a shorter way.
    positions = arrays["positions"] if bool((arrays["segment_ids"] > 1).any()) else None

    def step() -> float:
        with torch.autocast("cuda", torch.bfloat16, enabled=job.on_gpu):
            out = call(
                input_ids=arrays["tokens"],
                position_ids=positions,
                labels=arrays["targets"],
                shift_labels=arrays["targets"],
                use_cache=False,
            )
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if job.on_gpu:
            torch.cuda.synchronize()
        return float(out.loss.detach())

    return step


def fastest(job: Job) -> Kind:
    """The kind that takes the least time for a step of this job."""
    seconds = {}
    for kind in KINDS:
        with contextlib.suppress(BackendCompilerFailed):  # without a C++ compiler there is no compiled kind
            step = make_step(job, kind)
            for _ in range(TRIED_STEPS):
                before = time.perf_counter()
                step()
                seconds[kind] = time.perf_counter() - before
    return min(seconds, key=seconds.__getitem__)


def build(job: Job) -> Built:
    """The step of the fastest kind; on a GPU with SDPA as it is, since long rows have no memory for more."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    kind = Kind("sdpa") if job.on_gpu else fastest(job)
    settings = f"attention {kind.attention}, fused AdamW"
    if kind.compiled:
        settings += ", torch.compile"
    if job.on_gpu:
        settings += ", bfloat16 autocast"
    if job.options.get("checkpointing"):
        settings += ", gradient checkpointing"
    return Built(
        step=make_step(job, kind),
        versions={"transformers": transformers.__version__, "torch": torch.__version__},
        settings=settings,
        same_weights=job.weights is not None,
        peak_bytes=lambda: torch.cuda.max_memory_allocated() if job.on_gpu else None,
    )


if __name__ == "__main__":
    serve(build)
