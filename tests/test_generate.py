"""The command end to end on a tiny checkpoint: files of rows, prompts, several checkpoints, conversations."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

from sealion_jax import cli, generate
from sealion_jax.checkpoint import hf
from sealion_jax.checkpoint.weights import open_weights
from sealion_jax.data.chat.rendering import render_prompt
from sealion_jax.data.chat.rows import prompt_from_fields
from sealion_jax.generation.generator import Generator
from sealion_jax.generation.loading import find_model
from sealion_jax.tokenizer import Tokenizer, train_tokenizer
from tests.checkpoint.hf_models import TEXT_VERSION_4, random_tensors, text_shapes, write_directory
from tests.commands import command_environment, commands_in_this_process

TEXT = "user model air api angin bumi laut pasar nasi ikan kopi teh rumah jalan hujan sawah bukit desa?"
TEMPLATE = {"chat_template.jinja": b"{{ messages }}"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(
        [TEXT], vocab_size=550, path=tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    )


@pytest.fixture(scope="module")
def checkpoint(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of a random model of 256 tokens' context, without a chat template."""
    folder = tmp_path_factory.mktemp("checkpoint") / "hf"
    files = {"tokenizer.model": tokenizer.model_bytes}
    return write_directory(folder, TEXT_VERSION_4, random_tensors(text_shapes("model.")), files=files)


@pytest.fixture(scope="module", autouse=True)
def left_as_it_was(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What commands set for their whole process; and compiled steps that this module's commands share."""
    with commands_in_this_process(cache=tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command takes all devices; one compiles faster than eight."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)


def run(*words: object) -> int | str | None:
    """The exit code of the command, run in this process."""
    with pytest.raises(SystemExit) as stopped:
        cli.run(generate.main, [str(word) for word in words])
    return stopped.value.code


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six rows: the third is no JSON, the fifth has been answered."""
    answered = {"messages": [user("ikan?"), {"role": "assistant", "content": "ikan"}]}
    rows = [
        {"id": 1, "prompt": "nasi?"},
        {"id": 2, "messages": [{"role": "system", "content": "desa"}, user("laut?")]},
        None,
        {"id": 4, "messages": [user("kopi?"), {"role": "assistant", "content": "teh"}, user("air?")]},
        {"id": 5, **answered},
        {"id": 6, "prompt": "rumah jalan?"},
    ]
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(("{torn" if row is None else json.dumps(row)) + "\n" for row in rows))
    return path


def test_a_file_is_answered_and_gone_on_with(
    checkpoint: Path,
    chats: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cut off after any byte, the same command ends with the same file; other options are refused."""
    output = tmp_path / "out" / "answers.jsonl"
    words = [checkpoint, "--chat", chats, "--output", output, "--max-new-tokens", 20]
    words += ["--temperature", 1, "--top-k", 50, "--seed", 3, "--batch-size", 2]
    assert run(*words) == 0
    said = capsys.readouterr()
    assert f"{chats}:3: skipped, bad_json: " in said.err
    assert f"{chats}:5: skipped, roles_do_not_alternate: " in said.err
    assert f"{output}: 4 answers\n" in said.out
    rows = rows_of(output)
    assert [row["id"] for row in rows] == [1, 2, 4, 6]
    assert rows[1]["messages"][0] == {"role": "system", "content": "desa"}
    for row in rows:
        assert row["stopped"] in ("end_of_turn", "eos", "length") and 0 < row["tokens"] <= 20
        assert row["answer"] == row["answer"].strip()
    # As the function under the command answers one of them, alone.
    model = find_model(str(checkpoint)).load()
    tokenizer = model.tokenizer
    options = cli.parse(generate.GenerateOptions, [str(word) for word in words], prog="generate")
    ids = render_prompt(prompt_from_fields(rows[2]), tokenizer).tolist()
    (alone,) = model.generator(options.sampling(), batch_size=2).generate(
        model.params, [ids], max_new_tokens=20, numbers=[3]
    )
    assert tokenizer.decode(alone.text_ids).strip() == rows[2]["answer"]

    whole, asked = output.read_bytes(), []
    stream = Generator.stream

    def counted(self: Generator, params: object, prompts: list, **options: object) -> object:
        asked.append(len(prompts))
        return stream(self, params, prompts, **options)

    monkeypatch.setattr(Generator, "stream", counted)
    lines = whole.splitlines(keepends=True)
    for cut, left in ((len(whole), []), (len(lines[0]) + 5, [2, 1]), (0, [2, 2])):
        output.write_bytes(whole[:cut])
        asked.clear()
        assert run(*words) == 0
        assert asked == left and output.read_bytes() == whole
    assert "4 answers, nothing was left to do" in capsys.readouterr().out
    assert run(*words[:-1], 3) == 0  # how many at a time changes nothing

    for other in (["--seed", 4], ["--system", "bukit"], ["--drop-last-answer"], ["--max-new-tokens", 21]):
        assert run(*words, *other) == 2
    said = capsys.readouterr().err
    assert "seed was 3, now 4. Go on with the same options" in said
    assert output.read_bytes() == whole
    assert run(*words, "--drop-last-answer", "--overwrite") == 0
    assert [row["id"] for row in rows_of(output)] == [1, 2, 4, 5, 6]
    again = rows_of(output)
    assert [row["answer"] for row in again if row["id"] != 5] == [row["answer"] for row in rows]
    assert again[3]["messages"][-1] == {"role": "assistant", "content": "ikan"}


def test_several_checkpoints_answer_one_below_the_other(
    checkpoint: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each in its own format: the one with a chat template is asked, the others go on with the text."""
    shutil.copytree(checkpoint, tmp_path / "tuned")
    (tmp_path / "tuned" / "chat_template.jinja").write_bytes(TEMPLATE["chat_template.jinja"])
    hf.import_hf(checkpoint, tmp_path / "run" / "checkpoints" / "7")
    names = [str(checkpoint), str(tmp_path / "run"), str(tmp_path / "tuned")]
    assert run(*names, "--prompt", "nasi", "rumah jalan", "--max-new-tokens", 6) == 0
    told = capsys.readouterr().out
    blocks = re.split(r"^> (.*)\n\n", told, flags=re.MULTILINE)[1:]
    assert blocks[::2] == ["nasi", "rumah jalan"]
    for block in blocks[1::2]:
        answers = re.findall(
            r"^\[([^\n]*): (\d+) tokens, (\w+)\]\n(.*?)\n\n(?=\[|\Z)", block, flags=re.M | re.S
        )
        assert [name for name, *_ in answers] == names
        raw, same, tuned = (answer[1:] for answer in answers)
        assert raw == same != tuned

    assert run(checkpoint, "--prompt", "nasi", "--raw", "--max-new-tokens", 6) == 0
    alone = capsys.readouterr().out
    model = find_model(str(checkpoint)).load()
    options = generate.GenerateOptions(checkpoints=("x",))
    prompt = [tokenizer.bos_id, *tokenizer.encode("nasi")]
    (expected,) = model.generator(options.sampling(), batch_size=8).generate(
        model.params, [prompt], max_new_tokens=6
    )
    assert alone == tokenizer.decode(expected.text_ids) + "\n"
    assert tokenizer.decode(expected.text_ids) in blocks[1]


def test_a_conversation_on_a_pipe(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same answer as to a prompt; then it is known what was said."""
    assert run(checkpoint, "--prompt", "nasi?", "--format", "chat", "--max-new-tokens", 6) == 0
    answer = capsys.readouterr().out.strip()
    monkeypatch.setattr(sys, "stdin", io.StringIO("nasi?\n/reset\nnasi?\nnasi?\n"))
    assert run(checkpoint, "--format", "chat", "--max-new-tokens", 6) == 0
    said = capsys.readouterr()
    assert f"{checkpoint}: a chat; /reset" in said.err
    parts = [
        part.removesuffix("\n").removesuffix(" (stopped after 6 tokens)")
        for part in re.split(r"^> ", said.out, flags=re.MULTILINE)
    ]
    assert parts[:4] == ["", answer, "(a new conversation)", answer]
    assert len(parts) == 6 and parts[4] != answer and parts[5] == ""


MISTAKES: list[tuple[list[str], str]] = [
    ([], "no checkpoint; name one before the options"),
    (["m", "--prompt", "a", "--chat", "b"], "--prompt and --chat cannot go together"),
    (["m", "--prompt", "a", "--raw", "--format", "chat"], "contradict each other"),
    (["m", "--prompt", "a", "--drop-last-answer"], "--drop-last-answer is about the rows of --chat"),
    (["m", "n", "--chat", "a", "--output", "o"], "--output is for one checkpoint"),
    (["m", "--output", "o"], "--output is for one checkpoint"),
    (["m", "--chat", "a", "--output", "gs://b/o"], "only local files can be appended to"),
    (["m", "n"], "a conversation is with one checkpoint"),
    (["m", "--max-new-tokens", "0"], "--max-new-tokens is 0; it must be at least 1"),
    (["m", "--batch-size", "-1"], "--batch-size is -1; it must be at least 1"),
    (["m", "--temperature", "-1"], "temperature must be at least 0"),
    (["m", "--top-p", "0.9"], "top_p would have no effect; give a temperature above 0"),
    (["m", "--prompt", "a", "--temprature", "1"], "did you mean --temperature?"),
    (["m", "--prompt", "a"], "there is no checkpoint at"),
    (["m", "--chat", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
]


@pytest.mark.parametrize(("words", "told"), MISTAKES)
def test_mistakes_are_told_in_a_line(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Callable
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_rows_that_do_not_fit_are_told_with_their_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any weights are read, and nothing is left behind."""
    path, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    for rows, words, told in (
        ([{"prompt": "a", "answer": "b"}], [], "rows.jsonl:1: the row has the field 'answer' already"),
        ([{"prompt": "nasi " * 99}], ["--max-new-tokens", 200], "rows.jsonl:1: skipped, too_long: its "),
        ([{"prompt": "nasi"}], ["--raw", "--system", "desa"], "a system text is part of a chat"),
        ([{"messages": []}], [], "rows.jsonl: there is nothing that can be answered"),
    ):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert run(checkpoint, "--chat", path, "--output", output, *words) == 2
        assert told in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, False),
        (TEMPLATE, True),
        ({"chat_template.json": b'{"chat_template": "x"}'}, True),
        ({"tokenizer_config.json": b'{"chat_template": "x"}'}, True),
        ({"processor_config.json": b'{"chat_template": "x"}'}, True),
        ({"tokenizer_config.json": b'{"chat_template": null}'}, False),
        ({"tokenizer_config.json": b'{"add_bos_token": true}'}, False),
    ],
)
def test_a_chat_template_is_found_wherever_it_may_be(
    files: dict[str, bytes], expected: bool, checkpoint: Path, tmp_path: Path
) -> None:
    """In a Hugging Face directory, in a step that was made from it, and beside a step's tokenizer."""
    shutil.copytree(checkpoint, tmp_path / "hf")
    for name, content in files.items():
        (tmp_path / "hf" / name).write_bytes(content)
    assert open_weights(str(tmp_path / "hf")).has_chat_template is expected
    hf.import_hf(tmp_path / "hf", tmp_path / "step")
    assert open_weights(str(tmp_path / "step")).has_chat_template is expected


@pytest.mark.slow
def test_a_conversation_on_a_terminal(checkpoint: Path, tmp_path: Path) -> None:
    """In a process of its own: the answer comes after `> `, and Ctrl-D ends it."""
    master, slave = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "sealion_jax.generate",
        str(checkpoint),
        "--raw",
        "--max-new-tokens",
        "9",
    ]
    # A terminal that can do nothing special, so that nothing but text comes.
    environment = {**command_environment(), "TERM": "dumb"}
    process = subprocess.Popen(command, env=environment, stdin=slave, stdout=slave, stderr=subprocess.DEVNULL)
    os.close(slave)

    def read_until(ending: bytes, seconds: float = 120.0) -> bytes:
        shown, limit = b"", time.monotonic() + seconds
        while not shown.endswith(ending):
            assert select.select([master], [], [], max(0.0, limit - time.monotonic()))[0], shown
            shown += os.read(master, 4096)
        return shown

    try:
        assert read_until(b"> ") == b"> "
        os.write(master, b"nasi\n")
        answer = read_until(b"> ").decode()
        assert answer.startswith("nasi\r\n") and len(answer) > len("nasi\r\n\r\n> ")
        os.write(master, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(master)
