"""`python -m sealion_jax.generate CHECKPOINT... --prompt TEXT... | --chat FILE`: what models write.

Without --prompt and --chat: a conversation on the terminal. With several checkpoints, their answers to each
prompt, one below the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from sealion_jax import cli
from sealion_jax.errors import UserError
from sealion_jax.generation.config import Format, SamplingConfig

if TYPE_CHECKING:
    from sealion_jax.data.inputs.rows import Record, Skipped
    from sealion_jax.generation.loading import FoundModel
    from sealion_jax.generation.prompts import Asking, Question


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Whom to ask, what, and how answers are drawn."""

    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run directories (their newest good steps), steps' directories, or Hugging Face directories."""
    prompt: tuple[str, ...] = ()
    """User's messages to answer, or with --raw texts to continue."""
    chat: str | None = None
    """JSONL file (also .gz or .zst) of {"prompt"} or {"messages"} rows, with "tools" where there are any."""
    output: str | None = None
    """JSONL file for rows with their answers; run again, it is gone on with. Without it they are shown."""
    overwrite: bool = False
    """Begin --output anew."""
    format: Literal["auto", "chat", "raw"] = "auto"
    """Gemma 3's chat, or text after <bos>. auto: chat for --chat, or where there is a chat template."""
    raw: bool = False
    """Short for --format raw."""
    system: str = ""
    """System text of chats that have none of their own."""
    drop_last_answer: bool = False
    """Where a conversation of --chat ends with an answer, have it written anew."""
    max_new_tokens: int = 256
    """Longest answer."""
    temperature: float = 0.0
    """0: the likeliest token, always."""
    top_k: int | None = None
    """Draw only from so many of the likeliest tokens."""
    top_p: float | None = None
    """Draw only from the likeliest tokens that together have this probability."""
    min_p: float | None = None
    """Draw only from tokens with this share of the likeliest one's probability."""
    seed: int = 0
    """Of the draws."""
    batch_size: int = 8
    """Prompts at a time."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Of matrices, activations and cache; norms are float32."""
    mesh_tensor: int = 1
    """Devices that a layer is split over; the rest split the parameters and the batch."""
    tokenizer: str | None = None
    """A .model file or a Hugging Face directory, where the checkpoint's own is not wanted or missing."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "mesh_tensor"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if not self.checkpoints:
            raise UserError("no checkpoint; name one before the options: a run, a step's directory, ...")
        if self.prompt and self.chat is not None:
            raise UserError("--prompt and --chat cannot go together; choose one of them")
        if self.raw and self.format == "chat":
            raise UserError("--raw and --format chat contradict each other; choose one of them")
        if self.drop_last_answer and self.chat is None:
            raise UserError("--drop-last-answer is about the rows of --chat; give a file there")
        asks = bool(self.prompt) or self.chat is not None
        if self.output is not None and (not asks or len(self.checkpoints) > 1):
            raise UserError("--output is for one checkpoint and --prompt or --chat; give these")
        if self.output is not None and "://" in self.output:
            raise UserError(f"--output {self.output}: only local files can be appended to; give one")
        if not asks and len(self.checkpoints) > 1:
            raise UserError(
                "a conversation is with one checkpoint; give --prompt or --chat to compare several"
            )
        self.sampling()

    def sampling(self) -> SamplingConfig:
        """How tokens are drawn."""
        return SamplingConfig(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
        )

    def asking(self, template: Format) -> Asking:
        """How a model is asked whose checkpoint suggests the format `template`."""
        from sealion_jax.generation.prompts import Asking

        chosen = "raw" if self.raw else self.format
        if chosen == "auto":
            chosen = template if self.chat is None else "chat"
        return Asking(format=chosen, system=self.system, drop_last_answer=self.drop_last_answer)


def main(argv: Sequence[str]) -> None:
    """Parses, and answers a file, prompts, or a person."""
    options = cli.parse(GenerateOptions, argv, prog="python -m sealion_jax.generate", description=__doc__)
    if options.output is not None:
        _write_answers(options, Path(options.output))
    elif options.prompt or options.chat is not None:
        _show_answers(options)
    else:
        _talk(options)


def _write_answers(options: GenerateOptions, output: Path) -> None:
    """Appends each row with its answer to the output, from where it ends."""
    from sealion_jax.generation.answers import ANSWER_FIELDS, AnswersFile
    from sealion_jax.generation.loading import find_model

    rows = _rows(options, reserved=ANSWER_FIELDS)
    found = find_model(options.checkpoints[0], tokenizer=options.tokenizer)
    asking = options.asking(found.format)
    questions = _questions(rows, options, found, asking)
    with contextlib.closing(
        AnswersFile(output, _record(options, found, asking), overwrite=options.overwrite)
    ) as answers:
        left = questions[answers.count :]
        if left:
            done = answers.count
            with cli.Progress(len(questions), "generate", unit="row", initial=done) as progress:
                for part, new in _answers(left, options, found, asking):
                    answers.append(
                        {**question.fields, **row} for question, row in zip(part, new, strict=True)
                    )
                    progress.update(len(part))
    print(f"{output}: {len(questions)} answers" + ("" if left else ", nothing was left to do"))


def _show_answers(options: GenerateOptions) -> None:
    """Prints each prompt, and below it what every checkpoint answers; of a single answer only the text."""
    from sealion_jax.generation.answers import title, told
    from sealion_jax.generation.loading import find_model

    rows = _rows(options)
    titles: dict[int, str] = {}
    shown: dict[int, list[tuple[str, dict[str, Any]]]] = {}
    for checkpoint in options.checkpoints:
        found = find_model(checkpoint, tokenizer=options.tokenizer)
        asking = options.asking(found.format)
        questions = _questions(rows, options, found, asking)
        with cli.Progress(len(questions), checkpoint, unit="row") as progress:
            for part, new in _answers(questions, options, found, asking):
                for question, answer in zip(part, new, strict=True):
                    titles[question.number] = title(question.fields)
                    shown.setdefault(question.number, []).append((checkpoint, answer))
                progress.update(len(part))
    if [len(answers) for answers in shown.values()] == [1]:
        (((_, answer),),) = shown.values()
        print(told(answer))
        return
    for number, answers in sorted(shown.items()):
        print(f"> {titles[number]}\n")
        for checkpoint, answer in answers:
            name = f"{checkpoint}: " if len(options.checkpoints) > 1 else ""
            print(f"[{name}{answer['tokens']} tokens, {answer['stopped']}]\n{told(answer)}\n")


def _talk(options: GenerateOptions) -> None:
    """Answers what is typed, until it ends."""
    with contextlib.suppress(ImportError):  # lines can be edited and called back, where Python has it
        import readline  # noqa: F401

    from sealion_jax.generation.loading import find_model
    from sealion_jax.generation.talk import HELP, PIECE_TOKENS, Talk

    found = find_model(options.checkpoints[0], tokenizer=options.tokenizer)
    asking = options.asking(found.format)
    model = found.load(dtype=options.dtype, mesh_tensor=options.mesh_tensor)
    kind = "a chat" if asking.format == "chat" else "each line is continued"
    print(f"{found.weights.path}: {kind}; {HELP}", file=sys.stderr)
    Talk(
        model=model,
        generator=model.generator(options.sampling(), batch_size=1, piece_tokens=PIECE_TOKENS),
        asking=asking,
        max_new_tokens=options.max_new_tokens,
        ask=lambda: input("> "),
        say=lambda text: print(text, end="", flush=True),
    ).run()


def _rows(options: GenerateOptions, *, reserved: Sequence[str] = ()) -> list[Record | Skipped]:
    """The rows of the file, or one for each --prompt; none of them has a field that is `reserved`."""
    from sealion_jax.data.inputs.rows import Record
    from sealion_jax.generation.prompts import read_rows

    if options.chat is None:
        return [Record(fields={"prompt": text}, line=n) for n, text in enumerate(options.prompt, start=1)]
    rows = list(read_rows(options.chat))
    for row in rows:
        taken = [name for name in reserved if isinstance(row, Record) and name in row.fields]
        if taken:
            raise UserError(
                f"{options.chat}:{row.line}: the row has the field {taken[0]!r} already, which its answer "
                "would replace; rename it"
            )
    return rows


def _questions(
    rows: Sequence[Record | Skipped], options: GenerateOptions, found: FoundModel, asking: Asking
) -> list[Question]:
    from sealion_jax.generation.prompts import questions

    return questions(
        rows,
        found.tokenizer,
        asking,
        source="--prompt " if options.chat is None else f"{options.chat}:",
        max_new_tokens=options.max_new_tokens,
        max_context_tokens=found.weights.config.max_context_tokens,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )


def _answers(
    questions: Sequence[Question], options: GenerateOptions, found: FoundModel, asking: Asking
) -> Iterator[tuple[Sequence[Question], list[dict[str, Any]]]]:
    """The questions, batch by batch, with what is added to their rows."""
    from sealion_jax.generation.answers import answer_fields

    model = found.load(dtype=options.dtype, mesh_tensor=options.mesh_tensor)
    generator = model.generator(options.sampling(), batch_size=options.batch_size)
    for first in range(0, len(questions), generator.batch_size):
        part = questions[first : first + generator.batch_size]
        completions = generator.generate(
            model.params,
            [question.ids for question in part],
            max_new_tokens=options.max_new_tokens,
            numbers=[question.number for question in part],
        )
        yield part, [answer_fields(each, found.tokenizer, asking.format) for each in completions]


def _record(options: GenerateOptions, found: FoundModel, asking: Asking) -> dict[str, Any]:
    """All that answers depend on, as JSON."""
    from sealion_jax.data import files

    rows = json.dumps(options.prompt).encode() if options.chat is None else files.read_bytes(options.chat)
    return {
        "weights_sha256": found.weights.fingerprint(),
        "tokenizer_sha256": found.tokenizer.fingerprint,
        "rows_sha256": hashlib.sha256(rows).hexdigest(),
        **dataclasses.asdict(asking),
        **dataclasses.asdict(options.sampling()),
        "max_new_tokens": options.max_new_tokens,
        "dtype": options.dtype,
    }


if __name__ == "__main__":
    cli.run(main)
