"""The command: what it says, what it leaves behind, and its exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from safetensors.numpy import load_file, save_file

from sealion_jax import cli, convert, evaluate
from sealion_jax.checkpoint import hf
from sealion_jax.checkpoint.arrays import read_leaf
from sealion_jax.errors import UserError
from sealion_jax.model.gemma3 import abstract_params
from tests.checkpoint.hf_models import (
    CONFIG,
    F32,
    TEXT_VERSION_4,
    assert_same_tensors,
    multimodal,
    random_tensors,
    read_directory,
    text_shapes,
    vision_shapes,
    write_directory,
)
from tests.commands import command_environment


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = text_shapes("language_model.model.") | vision_shapes("", "vision_tower.")
    folder = tmp_path_factory.mktemp("source") / "hf"
    return write_directory(folder, multimodal(TEXT_VERSION_4), random_tensors(shapes), num_shards=2)


@pytest.fixture(scope="module")
def step(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("step") / "step"
    hf.import_hf(source, folder)
    return folder


def run(*argv: object) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        cli.run(convert.main, [str(word) for word in argv])
    return stopped.value.code


def test_there_and_back(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("from-hf", source, tmp_path / "step") == 0
    said = capsys.readouterr().out
    assert f"{source}: Gemma 3, 8 layers, model dim 32, 4/2 heads of 16, vocabulary 704, " in said
    assert f"wrote {tmp_path / 'step'}: 129 tensors, " in said and "bfloat16" in said
    assert f"next: python -m sealion_jax.train RECIPE --init-from {tmp_path / 'step'}" in said

    shutil.copytree(tmp_path / "step", tmp_path / "run" / "checkpoints" / "12")
    for checkpoint in ("step", "run", "run/checkpoints/12"):
        out = tmp_path / f"out-{checkpoint.replace('/', '-')}"
        assert run("to-hf", tmp_path / checkpoint, out, "--max-shard-size", "0.1MB") == 0
        assert_same_tensors(read_directory(out), read_directory(source))
        assert f'next: AutoModelForCausalLM.from_pretrained("{out}")' in capsys.readouterr().out


def test_a_checkpoint_without_a_tokenizer_is_told_to_be_one(
    source: Path, step: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The source has none: the next command that is printed names one, and one without it is refused."""
    assert run("from-hf", source, tmp_path / "step") == 0
    assert f"sealion_jax.evaluate {tmp_path / 'step'} --tokenizer TOKENIZER --data" in capsys.readouterr().out
    (tmp_path / "text.jsonl").write_text('{"text": "selamat pagi"}\n')
    with pytest.raises(UserError, match="holds no tokenizer; name one with --tokenizer"):
        evaluate.main(
            [str(step), "--data", str(tmp_path / "text.jsonl"), "--output", str(tmp_path / "scores.json")]
        )


def test_a_hugging_face_directory_changes_its_dtype(source: Path, tmp_path: Path) -> None:
    assert run("to-hf", source, tmp_path / "out", "--dtype", "float32") == 0
    found, before = read_directory(tmp_path / "out"), read_directory(source)
    name = "language_model.model.layers.7.mlp.down_proj.weight"
    assert found[name].dtype == F32
    np.testing.assert_array_equal(found[name], before[name].astype(F32))
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "float32"


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no command": ([], "name a command: from-hf, to-hf or to-peft"),
    "unknown command": (["form-hf", "a", "b"], "unknown command 'form-hf'; did you mean from-hf?"),
    "unknown option": (
        ["to-hf", "{step}", "{out}", "--dtypes", "float32"],
        "unknown option --dtypes; did you mean --dtype?",
    ),
    "no DST": (["from-hf", "{source}"], "DST"),
    "no source": (
        ["from-hf", "{nothing}", "{out}"],
        "nothing has no config.json; expected a Hugging Face directory",
    ),
    "no checkpoint": (["to-hf", "{nothing}", "{out}"], "there is no checkpoint at"),
    "float16": (["to-hf", "{step}", "{out}", "--dtype", "float16"], "float16 overflows in Gemma 3"),
    "no size": (
        ["to-hf", "{step}", "{out}", "--max-shard-size", "big"],
        "--max-shard-size 'big' is not a size",
    ),
    "taken": (["to-hf", "{step}", "{source}"], "exists and is not empty; give another place"),
    "no adapters": (["to-peft", "{step}", "{out}"], "holds no adapters (LoRA), and PEFT's format holds"),
    "no adapters for a base": (["to-hf", "{step}", "{out}", "--base", "{source}"], "name no base"),
    "wrong tokenizer": (["from-hf", "{source}", "{out}", "--tokenizer", "{step}"], "has no tokenizer.model"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told_in_a_line(
    case: str, source: Path, step: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = MISTAKES[case]
    places = {"source": source, "step": step, "out": tmp_path / "out", "nothing": tmp_path / "nothing"}
    assert run(*(word.format(**places) for word in words)) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert len([line for line in said.splitlines() if not line.startswith("converting")]) <= 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["truncated", "missing", "unknown tensor"])
def test_a_damaged_source_is_2_and_leaves_nothing(
    damage: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    shard = broken / "model-00002-of-00002.safetensors"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "missing":
        shard.unlink()
    else:
        save_file(load_file(shard) | {"audio_tower.weight": np.zeros(3, F32)}, shard)
    assert run("from-hf", broken, tmp_path / "out") == 2
    said = capsys.readouterr().err
    expected = "audio_tower.weight" if damage == "unknown tensor" else shard.name
    assert expected in said and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("command", ["from-hf", "to-hf"])
def test_a_full_disk_is_2_and_leaves_nothing(command: str, source: Path, step: Path, tmp_path: Path) -> None:
    """The real command, which may write no file beyond 20 kB."""
    arguments = [command, str(source if command == "from-hf" else step), str(tmp_path / "out")]
    limited = (
        "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "runpy.run_module('sealion_jax.convert', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, *arguments],
        env=command_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert f"writing {tmp_path / 'out'} failed" in done.stderr or "writing a checkpoint failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_help_tells_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    said = capsys.readouterr().out
    assert all(words in said for words in ("from-hf SRC DST", "to-hf CHECKPOINT DST", "to-peft CHECKPOINT"))
    for command, option in (("to-hf", "--max-shard-size"), ("to-peft", "--base-name")):
        assert run(command, "--help") == 0
        assert option in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("2GiB", 2**31), ("4096", 4096), ("7B", 7)],
)
def test_sizes(text: str, expected: int) -> None:
    assert convert.parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "0", "-5GB", "5 XB", "1.2.3GB", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size; expected one such as 500MB or 5GB"):
        convert.parse_size(text)


def test_verify_tells_what_it_found(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", minversion="5")
    pytest.importorskip("torch")
    assert run("from-hf", source, tmp_path / "step", "--verify") == 0
    said = capsys.readouterr().out
    assert "verify: 72 tokens, largest difference of logits " in said
    assert "verify: agrees with Transformers" in said and "next: " in said
    assert run("to-hf", tmp_path / "step", tmp_path / "out", "--verify", "--dtype", "float32") == 0
    assert "verify: agrees with Transformers" in capsys.readouterr().out

    original = hf.export_hf

    def corrupting(*args: Any, **kwargs: Any) -> Any:
        done = original(*args, **kwargs)
        file = epath.Path(done.path) / "model.safetensors"
        tensors = load_file(file)
        tensors["language_model.model.layers.2.mlp.up_proj.weight"] *= 1.5
        save_file(tensors, file, metadata={"format": "pt"})
        return done

    monkeypatch.setattr(hf, "export_hf", corrupting)
    assert run("to-hf", tmp_path / "step", tmp_path / "wrong", "--verify") == 1
    said = capsys.readouterr().out
    assert "verify: FAILED, do not use the result" in said and "next: " not in said


def test_verify_without_transformers_is_told_before_anything_is_written(
    source: Path,
    step: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for arguments in (("from-hf", source), ("to-hf", step)):
        assert run(*arguments, tmp_path / "out", "--verify") == 2
        assert "pip install 'sealion_jax[hf]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[epath.Path]:
    """A bucket in memory, in place of Google's."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    monkeypatch.setattr(type(backend.fsspec_backend), "fs", lambda self, path: memory)
    yield epath.Path("gs://bucket")
    memory.store.clear()


def test_sources_and_results_may_be_in_a_bucket(
    source: Path, step: Path, bucket: epath.Path, tmp_path: Path
) -> None:
    for path in source.iterdir():
        (bucket / "hf" / path.name).write_bytes(path.read_bytes())
    hf.import_hf(bucket / "hf", tmp_path / "step")
    for name in ("blocks/layer_2/attention/value", "embedder/embedding"):
        assert read_leaf(tmp_path / "step", name).tobytes() == read_leaf(step, name).tobytes()
    params = hf.load_hf_params(bucket / "hf", abstract_params(CONFIG, jnp.float32))
    np.testing.assert_array_equal(
        params["rest"]["layer_1"]["mlp"]["up"], read_leaf(step, "rest/layer_1/mlp/up").astype(F32)
    )

    hf.export_hf(step, bucket / "out", max_shard_bytes=100_000)
    (tmp_path / "out").mkdir()
    for path in (bucket / "out").iterdir():
        (tmp_path / "out" / path.name).write_bytes(path.read_bytes())
    assert_same_tensors(read_directory(tmp_path / "out"), read_directory(source))
    with pytest.raises(ValueError, match="exists and is not empty"):
        hf.export_hf(step, bucket / "out")


@pytest.mark.slow
def test_the_memory_benchmark_runs(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "conversion_memory.py"
    output = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, script, "--size", "tiny", "--folder", tmp_path, "--output", output],
        env=command_environment() | {"PYTHONPATH": str(script.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert report["bit_equal"] is True and [row["command"] for row in report["rows"]] == ["from-hf", "to-hf"]
    # The libraries alone take tens of megabytes: less would mean that nothing was measured.
    assert all(3e7 < row["peak_anonymous_bytes"] < report["limit_bytes"] for row in report["rows"])
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
