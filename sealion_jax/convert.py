"""`python -m sealion_jax.convert from-hf SRC DST | to-hf CHECKPOINT DST | to-peft CHECKPOINT DST`.

Hugging Face's form and ours, and adapters in PEFT's.

Tensor by tensor, so that memory does not grow with the model. DST must not exist, or be empty; it gets its
name only when all of it is written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from sealion_jax import cli
from sealion_jax.config_tree import nearest
from sealion_jax.errors import UserError

if TYPE_CHECKING:
    from sealion_jax.checkpoint.hf import Conversion
    from sealion_jax.checkpoint.weights import Weights

PROG = "python -m sealion_jax.convert"
USAGE = f"""usage: {PROG} from-hf SRC DST [--tokenizer FILE] [--verify]
       {PROG} to-hf CHECKPOINT DST [--dtype float32|bfloat16] [--max-shard-size 5GB]
           [--base DIR] [--verify]
       {PROG} to-peft CHECKPOINT DST [--base DIR] [--base-name NAME]

from-hf reads a Hugging Face directory of Gemma 3 and writes a checkpoint that train, evaluate and to-hf take.
to-hf writes a checkpoint (a run directory, a step's directory, or a Hugging Face directory) as Transformers,
vLLM and llama.cpp read it; one of adapters (LoRA) merged with its base. to-peft writes the adapters alone, as
PEFT reads them. `{PROG} from-hf --help` tells the options.
"""


@dataclass(frozen=True, kw_only=True)
class FromHf:
    """Writes a Hugging Face directory of Gemma 3 as a checkpoint."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Hugging Face directory, local or gs://: config.json, safetensors, tokenizer files."""
    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The new checkpoint's directory."""
    tokenizer: str | None = None
    """Gemma's SentencePiece model, for a SRC that has only a tokenizer.json."""
    verify: bool = False
    """Compare logits with Transformers afterwards; needs the extra "hf" and memory for float32 weights."""


@dataclass(frozen=True, kw_only=True)
class ToHf:
    """Writes a checkpoint as a Hugging Face directory."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A run directory (its newest good step), a step's directory, or a Hugging Face directory."""
    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The new Hugging Face directory."""
    dtype: str | None = None
    """float32 or bfloat16, for all of the language model; by default as the source had each tensor."""
    max_shard_size: str = "5GB"
    """Largest safetensors file, such as 500MB or 5GB."""
    base: str | None = None
    """Of a checkpoint of adapters: where their base is now, if it has moved since they were trained."""
    verify: bool = False
    """Compare logits with Transformers afterwards; needs the extra "hf" and memory for float32 weights."""


@dataclass(frozen=True, kw_only=True)
class ToPeft:
    """Writes the adapters of a checkpoint, and not what they stand on, in PEFT's format."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A run directory (its newest good step) or a step's directory, of a run with LoRA."""
    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The new directory."""
    base: str | None = None
    """Where the adapters' base is now, if it has moved since they were trained."""
    base_name: str | None = None
    """The Hugging Face directory, or name on the Hub, that PEFT is to load the base from; by default the
    directory that the adapters were trained on."""


def main(argv: Sequence[str]) -> None:
    """Parses, converts, and says what to do next."""
    commands = {"from-hf": _from_hf, "to-hf": _to_hf, "to-peft": _to_peft}
    expected = "from-hf, to-hf or to-peft"
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        if not argv:
            raise UserError(f"name a command: {expected}")
        return
    if argv[0] not in commands:
        close = nearest(argv[0], list(commands))
        hint = f"; did you mean {close[0]}?" if close else f"; expected {expected}"
        raise UserError(f"unknown command {argv[0]!r}{hint}")
    commands[argv[0]](argv[1:])


def _from_hf(argv: Sequence[str]) -> None:
    options = cli.parse(FromHf, argv, prog=f"{PROG} from-hf")
    from sealion_jax.checkpoint import hf
    from sealion_jax.checkpoint.hf_config import describe
    from sealion_jax.checkpoint.layout import asset_paths
    from sealion_jax.checkpoint.weights import TOKENIZER_FILE

    weights = hf.HfWeights.open(options.src)
    if options.verify:
        _require_verification(weights.num_params)
    print(f"{options.src}: Gemma 3, {describe(weights.config)}, {size_text(weights.num_bytes)}")
    with cli.Progress(weights.num_bytes, "converting", unit="B") as shown:
        done = hf.import_hf(options.src, options.dst, tokenizer=options.tokenizer, on_bytes=shown.update)
    _tell(done)
    if options.verify:
        _verify(ours=options.dst, theirs=options.src)
    named = "" if TOKENIZER_FILE in asset_paths(options.dst) else " --tokenizer TOKENIZER"
    print(
        f"next: python -m sealion_jax.train RECIPE --init-from {options.dst}, "
        f"or python -m sealion_jax.evaluate {options.dst}{named} --data FILE --output OUT.json"
    )


def _to_hf(argv: Sequence[str]) -> None:
    options = cli.parse(ToHf, argv, prog=f"{PROG} to-hf")
    from sealion_jax.checkpoint import hf
    from sealion_jax.checkpoint.hf_export import check_dtype
    from sealion_jax.checkpoint.hf_exportable import Exportable
    from sealion_jax.checkpoint.weights import open_weights

    check_dtype(options.dtype)
    max_shard_bytes = parse_size(options.max_shard_size)
    weights = open_weights(options.checkpoint, base=options.base)
    source = Exportable.of(weights)
    if options.verify:
        _require_verification(source.num_params)
    total = sum(tensor.nbytes for tensor in source.tensors(options.dtype))
    print(f"{_described(weights)}: {size_text(total)} to write")
    with cli.Progress(total, "converting", unit="B") as shown:
        done = hf.export_hf(
            source, options.dst, dtype=options.dtype, max_shard_bytes=max_shard_bytes, on_bytes=shown.update
        )
    _tell(done)
    if options.verify:
        _verify(ours=weights, theirs=options.dst)
    print(f'next: AutoModelForCausalLM.from_pretrained("{options.dst}"), or vllm serve {options.dst}')


def _to_peft(argv: Sequence[str]) -> None:
    options = cli.parse(ToPeft, argv, prog=f"{PROG} to-peft")
    from sealion_jax.checkpoint import hf
    from sealion_jax.checkpoint.weights import open_weights

    weights = open_weights(options.checkpoint, base=options.base)
    done = hf.export_peft(weights, options.dst, base_name=options.base_name)
    print(_described(weights))
    _tell(done)
    print(f'next: AutoPeftModelForCausalLM.from_pretrained("{options.dst}"), which loads the base too')


def _described(weights: Weights) -> str:
    """Where a checkpoint is, and what it stands on."""
    if weights.adapters is None or weights.base is None:
        return str(weights.path)
    return f"{weights.path}: {weights.adapters.lora.describe()}, on {weights.base.path}"


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB", "2GiB" or a plain number; raises UserError for anything else."""
    match = re.fullmatch(r"([0-9.]+)\s*(?:([KMGT])(i?)B?|B)?", text, re.IGNORECASE)
    try:
        number = float(match[1]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or not number > 0:
        raise UserError(f"--max-shard-size {text!r} is not a size; expected one such as 500MB or 5GB")
    power = "KMGT".index(match[2].upper()) + 1 if match[2] else 0
    return max(1, int(number * (1024 if match[3] else 1000) ** power))


def size_text(count: int) -> str:
    """A number of bytes for people: "8.58 GB", "220 kB"."""
    unit, divisor = next(
        (u, d) for u, d in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= d or u == "kB"
    )
    return f"{count / divisor:.3g} {unit}"


def _tell(done: Conversion) -> None:
    print(f"wrote {done.path}: {done.num_tensors} tensors, {size_text(done.num_bytes)}, {done.dtype}")
    for note in done.notes:
        print(f"note: {note}")


def _require_verification(num_params: int) -> None:
    """Raises UserError, before any work, where there is no Transformers or not enough memory."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--verify needs Transformers and PyTorch ({error}): pip install 'sealion_jax[hf]', or leave it "
            "out"
        ) from None
    from sealion_jax.checkpoint.hf_verify import require_memory

    require_memory(num_params)


def _verify(*, ours: str | Weights, theirs: str) -> None:
    """Compares and tells; ends the process with 1 where logits differ, which no user's mistake can cause."""
    from sealion_jax.checkpoint.hf_verify import compare

    found = compare(ours, theirs)
    print(found.describe())
    if not found.agrees:
        raise SystemExit(cli.EXIT_FAILED)


if __name__ == "__main__":
    cli.run(main)
