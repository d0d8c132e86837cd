"""`python -m sealion_jax.evaluate CHECKPOINT --data FILE... --output OUT.json`: how well a model knows texts.

Loss, perplexity and bits per byte of each file and each language in it, and each document's log-probability.
Of pairs, how often the chosen answer is the likelier, by itself and with --reference against another model.
"""

from __future__ import annotations

import contextlib
import functools
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

    from sealion_jax.checkpoint.weights import Weights
    from sealion_jax.evaluation.perplexity import EvaluationSet
    from sealion_jax.tokenizer import Tokenizer

_SUFFIX = re.compile(r"\.jsonl(\.gz|\.zst)?$")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What to evaluate, on what, and how."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """A run directory (its newest good step), a step's directory, or a Hugging Face directory."""
    data: tuple[str, ...]
    """JSONL files (also .gz or .zst); each is a set, named by its file, with rows of one kind: {"text"},
    {"messages"} or {"prompt", "completion"}, {"prompt", "chosen", "rejected"}; and "lang", "id"."""
    output: str
    """JSON file to write: metrics of each set and language, log-probabilities of each document or pair."""
    reference: str | None = None
    """A checkpoint whose log-probabilities those of pairs are compared with, such as the one that training
    began with. Its shapes may be others, its tokenizer not."""
    tokenizer: str | None = None
    """A .model file or a Hugging Face directory, where the checkpoint's own is not wanted or missing."""
    context_tokens: int = 2048
    """Window in which documents are scored; longer ones in strides of half of it."""
    batch_size: int = 8
    """Rows of `context_tokens` a forward pass."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Of weights and activations."""
    max_documents: int | None = None
    """Of each file, only so many texts, chats or pairs from its start."""
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
    from sealion_jax.evaluation.checkpoints import score_checkpoint
    from sealion_jax.evaluation.config import EvaluationConfig
    from sealion_jax.evaluation.perplexity import load_sets
    from sealion_jax.evaluation.report import report, tables
    from sealion_jax.hardware import set_matmul_precision
    from sealion_jax.model.config import ComputeConfig
    from sealion_jax.sharding import MeshConfig, make_mesh

    set_matmul_precision(options.dtype)
    weights = open_weights(options.checkpoint)
    reference = None if options.reference is None else open_weights(options.reference)
    tokenizer = _load_tokenizer(options, weights, reference)
    longest = [model.config.max_context_tokens for model in (weights, reference) if model is not None]
    context = min(options.context_tokens, *longest)
    loaded = load_sets(
        EvaluationConfig(sets=sets, max_documents=options.max_documents), tokenizer, context=context
    )
    compared = [] if reference is None else _sets_of_pairs(loaded)
    mesh = make_mesh(MeshConfig(tensor=options.mesh_tensor))
    with cli.Progress(sum(len(one.rows) for one in [*loaded, *compared]), "evaluate", unit="row") as progress:
        score = functools.partial(
            score_checkpoint,
            mesh=mesh,
            compute=ComputeConfig(dtype=options.dtype, remat="none"),
            batch_size=options.batch_size,
            context=context,
            eos_id=tokenizer.eos_id,
            on_rows=progress.update,
        )
        scores = score(weights, loaded)
        reference_scores = {} if reference is None else score(reference, compared)
    result = {
        "checkpoint": str(weights.path),
        **({} if reference is None else {"reference": str(reference.path)}),
        "tokenizer": tokenizer.fingerprint,
        "context_tokens": context,
        **report(loaded, scores, reference_scores),
    }
    if jax.process_index() == 0:
        print(tables(result["sets"]))
        _write(output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        counts = [f"{len(result[name])} {name}'" for name in ("documents", "pairs") if result[name]]
        print(f"\n{' and '.join(counts)} log-probabilities are in {output}")


def _load_tokenizer(options: EvaluateOptions, weights: Weights, reference: Weights | None) -> Tokenizer:
    """The tokenizer of both models; UserError where they have not the same, or no room for its pieces."""
    from sealion_jax.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(options.tokenizer or weights.tokenizer_path)
    for model in (weights, reference):
        if model is not None and tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} pieces, the model {model.path} only "
                f"{model.config.vocab_size} embeddings; give the model's own with --tokenizer"
            )
    if reference is not None and _has_other_tokenizer(reference, tokenizer, options):
        raise UserError(
            f"--reference {options.reference} has another tokenizer, so its log-probabilities do not compare "
            "with the model's; give a reference with the same one"
        )
    return tokenizer


def _has_other_tokenizer(reference: Weights, tokenizer: Tokenizer, options: EvaluateOptions) -> bool:
    """Whether the reference's own tokenizer is another; where it has none, --tokenizer is for both."""
    own = reference.tokenizer_fingerprint()
    if own is None and options.tokenizer is None:
        raise UserError(
            f"--reference {options.reference} holds no tokenizer to compare with the model's; name one for "
            "both with --tokenizer"
        )
    return own not in (None, tokenizer.fingerprint)


def _sets_of_pairs(sets: Sequence[EvaluationSet]) -> list[EvaluationSet]:
    """Those that a reference is for; UserError where there are none."""
    pairs = [one for one in sets if one.kind == "pairs"]
    if not pairs:
        raise UserError(
            "--reference is for pairs of answers, and no file of --data holds any; leave it out, or give a "
            "file with prompt, chosen and rejected in each row"
        )
    return pairs


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


if __name__ == "__main__":
    cli.run(main)
