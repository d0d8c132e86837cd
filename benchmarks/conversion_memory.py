"""How much memory and time a conversion takes, both ways, for a checkpoint of random weights.

    python benchmarks/conversion_memory.py                 # 4B's shapes in bfloat16, 8.6 GB; 27 GB of disk
    python benchmarks/conversion_memory.py --size tiny     # seconds

Makes a sharded multimodal checkpoint, converts it and converts it back, each in a process of its own whose
anonymous memory (RssAnon of /proc/PID/status: what cannot be given back by dropping file pages) is read every
20 ms, and compares every tensor of the result with the first one by its hash. Prints a table, writes JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from sealion_jax.checkpoint.hf_config import fresh_hf_config
from sealion_jax.checkpoint.hf_names import name_table
from sealion_jax.checkpoint.safetensors_stream import SafetensorsFolder
from sealion_jax.checkpoint.safetensors_write import NewTensor, write_shards
from sealion_jax.model import config as sizes

SAMPLE_SECONDS = 0.02
MODELS = {
    "tiny": sizes.Gemma3Config(
        vocab_size=4096,
        num_layers=8,
        model_dim=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        feed_forward_dim=512,
    ),
    "1b": sizes.gemma3_1b(),
    "4b": sizes.gemma3_4b(),
}
VISION_LAYERS, VISION_DIM, VISION_MLP = 27, 1152, 4304
PREFIX = "language_model.model."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=MODELS, default="4b")
    parser.add_argument(
        "--folder", help="where the checkpoints are made, and removed again; default a temporary one"
    )
    parser.add_argument("--output", default="conversion_memory.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        source, step, result = folder / "source", folder / "step", folder / "result"
        make_checkpoint(source, options.size)
        rows = [
            measure("from-hf", ["from-hf", str(source), str(step)]),
            measure("to-hf", ["to-hf", str(step), str(result)]),
        ]
        stored = SafetensorsFolder.open(source)
        largest = max(tensor.nbytes for tensor in stored.tensors.values())
        total = sum(tensor.nbytes for tensor in stored.tensors.values())
        equal = digests(stored) == digests(SafetensorsFolder.open(result))
    limit = 2e9 + largest
    print(f"Gemma 3 {options.size}, {total / 1e9:.2f} GB in bfloat16, largest tensor {largest / 1e9:.2f} GB")
    print(f"limit for anonymous memory: 2 GB + largest tensor = {limit / 1e9:.2f} GB\n")
    print("| command | seconds | MB/s | peak anonymous memory, GB | within the limit |")
    print("|---|---:|---:|---:|---|")
    for row in rows:
        row["megabytes_per_second"] = total / 1e6 / row["seconds"]
        row["within_limit"] = row["peak_anonymous_bytes"] < limit
        print(
            f"| {row['command']} | {row['seconds']:.0f} | {row['megabytes_per_second']:.0f} | "
            f"{row['peak_anonymous_bytes'] / 1e9:.2f} | {'yes' if row['within_limit'] else 'NO'} |"
        )
    print(f"\nround trip bit-equal: {'yes' if equal else 'NO'}")
    report = {"size": options.size, "bytes": total, "largest_tensor_bytes": largest, "limit_bytes": limit}
    Path(options.output).write_text(json.dumps({**report, "bit_equal": equal, "rows": rows}, indent=1) + "\n")
    if not (equal and all(row["within_limit"] for row in rows)):
        raise SystemExit(1)


def make_checkpoint(folder: Path, size: str) -> None:
    """A multimodal checkpoint as Transformers 4 writes it; its numbers are one random block, repeated."""
    config = MODELS[size]
    folder.mkdir()
    block = np.random.default_rng(0).normal(0, 0.02, 2**23).astype(ml_dtypes.bfloat16)
    shapes = {name: entry.their_shape for entry in name_table(config, PREFIX) for name in entry.names}
    for layer in range(VISION_LAYERS if size == "4b" else 1):
        prefix = f"vision_tower.vision_model.encoder.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.{part}_proj.weight": (VISION_DIM, VISION_DIM)
            for part in ("q", "k", "v", "out")
        }
        shapes |= {
            f"{prefix}.mlp.fc1.weight": (VISION_MLP, VISION_DIM),
            f"{prefix}.mlp.fc2.weight": (VISION_DIM, VISION_MLP),
        }

    def tensor(name: str, shape: tuple[int, ...], number: int) -> NewTensor:
        def parts() -> Iterator[np.ndarray]:
            left, start = int(np.prod(shape)), 7919 * number % block.size  # no two tensors alike
            while left:
                part = block[start : start + left]
                yield part
                left, start = left - part.size, 0

        return NewTensor(name=name, dtype="BF16", shape=shape, parts=parts)

    tensors = [tensor(name, shape, k) for k, (name, shape) in enumerate(shapes.items())]
    write_shards(folder, tensors, max_shard_bytes=5_000_000_000)
    ids = {"bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0}
    text = fresh_hf_config(config, dtype="bfloat16", ids=ids)
    content = {"model_type": "gemma3", "torch_dtype": "bfloat16", "text_config": text}
    (folder / "config.json").write_text(json.dumps(content))


def measure(command: str, arguments: list[str]) -> dict:
    """Runs a conversion; its wall time and the most anonymous memory it was seen with."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "sealion_jax.convert", *arguments])
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise SystemExit(f"{command} failed with exit code {process.returncode}")
    return {"command": command, "seconds": time.perf_counter() - begun, "peak_anonymous_bytes": peak}


def anonymous_bytes(process_id: int) -> int:
    """RssAnon of a process, 0 when it has ended."""
    try:
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def digests(folder: SafetensorsFolder) -> dict[str, str]:
    """Shape, dtype and hash of every tensor."""
    found = {}
    for name, tensor in folder.tensors.items():
        digest = hashlib.sha256(f"{tensor.dtype} {tensor.shape}".encode())
        for part in folder.raw(name):
            digest.update(part.data)
        found[name] = digest.hexdigest()
    return found


if __name__ == "__main__":
    main()
