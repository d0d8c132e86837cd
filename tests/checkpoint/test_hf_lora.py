"""Adapters merged with their base on the way out: the numbers, what else goes out, bases that are gone."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sealion_jax import cli, convert
from sealion_jax.checkpoint import arrays, hf_import, lora
from sealion_jax.checkpoint.digests import write_digests
from sealion_jax.checkpoint.hf import export_hf, import_hf
from sealion_jax.checkpoint.hf_assets import CHAT_TEMPLATE_FILE
from sealion_jax.checkpoint.hf_weights import HfWeights
from sealion_jax.checkpoint.layout import write_assets
from sealion_jax.errors import UserError
from sealion_jax.model.lora import LoraConfig, trained_parameters
from sealion_jax.tokenizer import Tokenizer
from tests.checkpoint.adapters import EVERYTHING, SOME, assert_merged, changes, write_adapters
from tests.checkpoint.hf_models import (
    CONFIG,
    F32,
    TEXT_VERSION_4,
    TEXT_VERSION_5,
    D,
    H,
    N,
    assert_same_tensors,
    multimodal,
    random_tensors,
    read_directory,
    text_shapes,
    write_directory,
    write_step,
)
from tests.checkpoint.test_hf_roundtrip import mixed_tensors, with_head
from tests.tiny_text import tiny_tokenizer

TEMPLATE = b"{{ bos_token }}{{ messages[0]['content'] }}"
MULTIMODAL = "language_model.model."


def imported(hf: Path) -> Path:
    import_hf(hf, hf.parent / "imported")
    return hf.parent / "imported"


def text(folder: Path) -> Path:
    tensors = with_head(random_tensors(text_shapes("model.")))
    return write_directory(folder / "hf", TEXT_VERSION_5, tensors)


def mixed(folder: Path) -> Path:
    return write_directory(folder / "hf", multimodal(TEXT_VERSION_4), mixed_tensors(), num_shards=2)


BASES: dict[str, tuple[Callable[[Path], Path], LoraConfig, str]] = {
    "text, bfloat16": (text, EVERYTHING, "model."),
    "multimodal, mixed dtypes": (mixed, SOME, MULTIMODAL),
    "multimodal, imported": (lambda folder: imported(mixed(folder)), EVERYTHING, MULTIMODAL),
    "from scratch, float32": (lambda folder: write_step(folder / "base", CONFIG, {}), EVERYTHING, "model."),
}


@pytest.mark.parametrize("case", BASES)
def test_an_export_is_the_base_and_the_product_of_the_adapters(case: str, tmp_path: Path) -> None:
    make, config, prefix = BASES[case]
    base = make(tmp_path)
    step = write_adapters(tmp_path / "step", base, config)
    done, plain = export_hf(step, tmp_path / "out"), export_hf(base, tmp_path / "plain")
    assert done == dataclasses.replace(plain, path=done.path)
    change = changes(step, config, prefix=prefix)
    assert len(change) == CONFIG.num_layers * len(config.targets)
    assert_merged(read_directory(tmp_path / "out"), read_directory(tmp_path / "plain"), change)
    for file in (tmp_path / "plain").glob("*.json"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_adapters_on_adapters_are_all_merged(tmp_path: Path) -> None:
    base = text(tmp_path)
    first = write_adapters(tmp_path / "first", base, SOME)
    second = write_adapters(tmp_path / "second", first, EVERYTHING, seed=6)
    export_hf(second, tmp_path / "out")
    both = changes(second, EVERYTHING, prefix="model.")
    for name, change in changes(first, SOME, prefix="model.").items():
        both[name] = both[name] + change
    assert_merged(read_directory(tmp_path / "out"), read_directory(base), both)


def test_the_dtype_can_be_chosen(tmp_path: Path) -> None:
    base = mixed(tmp_path)
    step = write_adapters(tmp_path / "step", base, SOME)
    export_hf(step, tmp_path / "out", dtype="float32")
    wide = {
        name: array.astype(F32) if name.startswith("language_model.") else array
        for name, array in read_directory(base).items()
    }
    assert_merged(read_directory(tmp_path / "out"), wide, changes(step, SOME, prefix=MULTIMODAL))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))[0]


@pytest.mark.parametrize("is_tuned_on_chats", [False, True])
def test_all_else_goes_out_as_from_a_full_checkpoint_that_began_there(
    is_tuned_on_chats: bool, tiny: Tokenizer, tmp_path: Path
) -> None:
    files = {
        "tokenizer.model": tiny.model_bytes,
        "chat_template.json": b'{"chat_template": "old"}',
        "generation_config.json": b'{"eos_token_id": 1}',
        "preprocessor_config.json": b"{ }",
        "LICENSE": b"terms",
    }
    config = {**multimodal(TEXT_VERSION_5), "eos_token_id": 1}
    base = write_directory(tmp_path / "hf", config, mixed_tensors(), files=files)
    own = {"tokenizer.model": tiny.model_bytes}
    if is_tuned_on_chats:
        own[CHAT_TEMPLATE_FILE] = TEMPLATE
    full = imported(base)
    write_assets(full, own)
    write_digests(full)
    step = write_adapters(tmp_path / "step", base, EVERYTHING, assets=own)
    done, expected = export_hf(step, tmp_path / "out"), export_hf(full, tmp_path / "expected")
    assert done.notes == expected.notes and len(done.notes) == is_tuned_on_chats
    names = {str(file.relative_to(tmp_path / "expected")) for file in (tmp_path / "expected").rglob("*")}
    assert names == {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*")}
    assert ("chat_template.jinja" in names) is is_tuned_on_chats
    for name in names - {"model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def test_parts_alone_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the base one layer's matrix or rows of the embedding, of the adapters one layer's; each once."""
    step = write_adapters(tmp_path / "step", text(tmp_path), EVERYTHING)
    base_parts, adapter_parts = [], []

    def counted(original: Callable, parts: list[int]) -> Callable:
        def read(*args: Any, **kwargs: Any) -> np.ndarray:
            part = original(*args, **kwargs)
            parts.append(part.size)
            return part

        return read

    monkeypatch.setattr(HfWeights, "read", counted(HfWeights.read, base_parts))
    monkeypatch.setattr(lora, "read_leaf", counted(lora.read_leaf, adapter_parts))
    for module, name in ((hf_import, "PART_BYTES"), (arrays, "CHUNK_BYTES")):
        monkeypatch.setattr(module, name, 64 * D * 2)
    export_hf(step, tmp_path / "out")
    written = read_directory(tmp_path / "out")
    assert sum(base_parts) == sum(array.size for array in written.values())
    assert max(base_parts) == D * N * H < written["lm_head.weight"].size / 10
    assert sum(adapter_parts) == trained_parameters(CONFIG, EVERYTHING)
    assert max(adapter_parts) == N * H * EVERYTHING.rank


def run(*argv: object) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        cli.run(convert.main, [str(word) for word in argv])
    return stopped.value.code


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a base, adapters on it)."""
    folder = tmp_path_factory.mktemp("adapted")
    base = mixed(folder)
    return base, write_adapters(folder / "step", base, EVERYTHING)


@pytest.mark.parametrize("command", ["to-hf", "to-peft"])
def test_a_base_that_moved_is_named(
    command: str, adapted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, step = adapted
    assert run(command, step, tmp_path / "expected", *named(command)) == 0
    assert f"{step}: LoRA of rank 3 on query, key, value, output, gate, up, down, on {base}" in (
        capsys.readouterr().out
    )
    moved = shutil.move(base, tmp_path / "moved")
    try:
        assert run(command, step, tmp_path / "out", *named(command)) == 2
        told = capsys.readouterr().err
        assert f"what they stand on cannot be read at {base}" in told and "--base DIR" in told
        assert not (tmp_path / "out").exists()
        assert run(command, step, tmp_path / "out", "--base", moved, *named(command)) == 0
    finally:
        shutil.move(moved, base)
    assert_same_tensors(read_directory(tmp_path / "out"), read_directory(tmp_path / "expected"))


def named(command: str) -> list[str]:
    return ["--base-name", "a/name"] if command == "to-peft" else []


@pytest.mark.parametrize("command", ["to-hf", "to-peft"])
def test_another_base_is_refused(
    command: str, adapted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One whose weights are others by a bit, in what is trained or is not."""
    other = Path(shutil.copytree(adapted[0], tmp_path / "other"))
    file = other / "model-00001-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert run(command, adapted[1], tmp_path / "out", "--base", other, *named(command)) == 2
    told = capsys.readouterr().err
    assert f"what lies at {other} is not what they were trained on" in told and "Traceback" not in told
    assert not (tmp_path / "out").exists()


def test_a_base_for_what_has_no_adapters_is_refused(adapted: tuple[Path, Path], tmp_path: Path) -> None:
    base, step = adapted
    full = write_step(tmp_path / "full", CONFIG, {})
    for checkpoint in (base, full):
        with pytest.raises(UserError, match=rf"holds no adapters \(LoRA\) that would stand on {step}"):
            convert.main(["to-hf", str(checkpoint), str(tmp_path / "out"), "--base", str(step)])
    assert not (tmp_path / "out").exists()


def test_verify_compares_the_merged_model(
    adapted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", minversion="5")
    pytest.importorskip("torch")
    moved = shutil.copytree(adapted[0], tmp_path / "moved")
    aside = shutil.move(adapted[0], tmp_path / "aside")
    try:
        assert run("to-hf", adapted[1], tmp_path / "out", "--verify", "--base", moved) == 0
    finally:
        shutil.move(aside, adapted[0])
    assert "verify: agrees with Transformers" in capsys.readouterr().out
