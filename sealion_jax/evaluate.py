"""`python -m sealion_jax.evaluate CHECKPOINT --data FILE... --output OUT.json`: how well a model knows texts.

Loss, perplexity and bits per byte of each file and each language in it, and each document's log-probability.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from sealion_jax import cli
from sealion_jax.errors import UserError

if TYPE_CHECKING:
    from etils import epath

    from sealion_jax.evaluation.perplexity import EvaluationSet, Score

_SUFFIX = re.compile(r"\.jsonl(\.gz|\.zst)?$")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What to evaluate, on what, and how."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """A run directory (its newest good step), a step's directory, or a Hugging Face directory."""
    data: tuple[str, ...]
    """JSONL files (also .gz or .zst) of {"text", "lang", "id"} rows; each is a set, named by its file."""
    output: str
    """JSON file to write: metrics of each set and language, and each document's log-probability."""
    tokenizer: str | None = None
    """A .model file or a Hugging Face directory, where the checkpoint's own is not wanted or missing."""
    context_tokens: int = 2048
    """Window in which documents are scored; longer ones in strides of half of it."""
    batch_size: int = 8
    """Rows of `context_tokens` a forward pass."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Of weights and activations."""
    max_documents: int | None = None
    """Of each file, only so many documents from its start."""
    mesh_tensor: int = 1
    """Devices that a layer is split over; the rest split the parameters and the batch."""
    names: tuple[str, ...] = field(default=())
    """Names for the sets, in the order of --data, instead of the files' names."""

    def __post_init__(self) -> None:
        if self.context_tokens < 2:
            raise UserError(f"--context-tokens is {self.context_tokens}; it must be at least 2")
        for name in ("batch_size", "max_documents", "mesh_tensor"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def main(argv: Sequence[str]) -> None:
    """Parses, scores every file, writes the result and shows it."""
    options = cli.parse(EvaluateOptions, argv, prog="python -m sealion_jax.evaluate", description=__doc__)
    sets = _name_sets(options)

    import jax
    from etils import epath

    output = epath.Path(options.output)
    if jax.process_index() == 0:
        _check_writable(output)

    from sealion_jax.checkpoint.weights import open_weights
    from sealion_jax.evaluation.config import EvaluationConfig
    from sealion_jax.evaluation.perplexity import Scorer, load_sets
    from sealion_jax.hardware import set_matmul_precision
    from sealion_jax.model.config import ComputeConfig
    from sealion_jax.model.gemma3 import abstract_params, binder, parameter_axes
    from sealion_jax.sharding import MeshConfig, activation_layout, make_mesh, param_shardings, with_shardings
    from sealion_jax.tokenizer import Tokenizer

    set_matmul_precision(options.dtype)
    weights = open_weights(options.checkpoint)
    tokenizer = Tokenizer.load(options.tokenizer or weights.tokenizer_path)
    if tokenizer.vocab_size > weights.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the model only {weights.config.vocab_size} "
            "embeddings; give the model's own with --tokenizer"
        )
    mesh = make_mesh(MeshConfig(tensor=options.mesh_tensor))
    context = min(options.context_tokens, weights.config.max_context_tokens)
    loaded = load_sets(
        EvaluationConfig(sets=sets, max_documents=options.max_documents), tokenizer, context=context
    )
    abstract = abstract_params(weights.config, options.dtype)
    shardings = param_shardings(abstract, parameter_axes(weights.config), mesh)
    params = weights.load(with_shardings(abstract, shardings))
    scorer = Scorer(
        binder(
            weights.config,
            compute=ComputeConfig(dtype=options.dtype, remat="none"),
            constrain=activation_layout(mesh),
        ),
        mesh,
        batch_size=options.batch_size,
        row_length=context,
        eos_id=tokenizer.eos_id,
    )
    result: dict = {
        "checkpoint": str(weights.path),
        "tokenizer": tokenizer.fingerprint,
        "context_tokens": context,
        "sets": {},
        "documents": [],
    }
    with cli.Progress(sum(len(one.rows) for one in loaded), "evaluate", unit="row") as progress:
        for one in loaded:
            scores = scorer.score(params, one, on_rows=progress.update)
            result["sets"][one.name] = _metrics(one, scores)
            result["documents"] += _documents(one, scores)
    if jax.process_index() == 0:
        print(_table(result["sets"]))
        _write(output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"\n{len(result['documents'])} documents' log-probabilities are in {output}")


def _metrics(one: EvaluationSet, scores: Sequence[Score]) -> dict:
    """A set's metrics, in all and by language, as the output has them."""
    from sealion_jax.evaluation.perplexity import Score, by_language

    parts = by_language(one.documents, scores)
    return {
        **sum(scores, Score()).metrics(),
        "by_language": {language: score.metrics() for language, score in parts.items()},
    }


def _documents(one: EvaluationSet, scores: Sequence[Score]) -> list[dict]:
    """A line for each document of a set, as the output has them."""
    return [
        {
            "set": one.name,
            "id": document.id,
            "lang": document.language,
            "log_prob": -score.nats,
            "eos_log_prob": -score.eos_nats,
            "tokens": score.tokens,
            "bytes": score.num_bytes,
        }
        for document, score in zip(one.documents, scores, strict=True)
    ]


def _check_writable(output: epath.Path) -> None:
    """UserError unless a file can be written there: found now, not after the work. Leaves nothing behind."""
    with _writing(output) as new:
        if output.is_dir():
            raise IsADirectoryError("it is a directory, not the name of a JSON file")
        new.write_text("")


def _write(output: epath.Path, text: str) -> None:
    with _writing(output) as new:
        new.write_text(text)
        new.replace(output)


@contextlib.contextmanager
def _writing(output: epath.Path) -> Iterator[epath.Path]:
    """A file beside the output, to be filled and renamed; it and the folders made for it go if it is not."""
    new = output.parent / f"{output.name}.new"
    # In a bucket there are no folders to be made.
    parents = () if "://" in str(output) else Path(output).parents
    folders = list(itertools.takewhile(lambda folder: not os.path.exists(folder), parents))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield new
    except Exception as error:  # a bucket's client raises errors of its own
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write --output {output}: {reason}; choose another place") from error
    finally:
        with contextlib.suppress(Exception):
            new.unlink(missing_ok=True)
        for folder in folders:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _name_sets(options: EvaluateOptions) -> dict[str, str]:
    names = options.names or tuple(_SUFFIX.sub("", PurePath(file).name) for file in options.data)
    if len(names) != len(options.data):
        raise UserError(f"--names gives {len(names)} names for {len(options.data)} files; give one for each")
    if len(set(names)) < len(names):
        raise UserError(
            f"two sets would have the same name ({', '.join(names)}); tell them apart with --names"
        )
    return dict(zip(names, options.data, strict=True))


def _table(sets: dict[str, dict]) -> str:
    lines = [
        f"{'set':<28} {'lang':<8} {'bits/byte':>9} {'perplexity':>11} {'loss':>7} {'tokens':>10} "
        f"{'documents':>9}"
    ]
    for name, numbers in sets.items():
        groups = [("all", numbers)] if len(numbers["by_language"]) != 1 else []
        for language, row in [*groups, *numbers["by_language"].items()]:
            lines.append(
                f"{name[:28]:<28} {language[:8]:<8} {row['bits_per_byte']:>9.4f} {row['perplexity']:>11.2f} "
                f"{row['loss']:>7.4f} {row['tokens']:>10,} {row['documents']:>9,}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
