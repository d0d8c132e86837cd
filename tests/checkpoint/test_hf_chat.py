"""Exports of what was tuned on chats: in Transformers their template gives the ids of training."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sealion_jax.checkpoint.digests import write_digests
from sealion_jax.checkpoint.hf import export_hf, import_hf
from sealion_jax.checkpoint.hf_assets import CHAT_TEMPLATE_FILE
from sealion_jax.checkpoint.hf_chat import with_stops, with_stops_in_config
from sealion_jax.checkpoint.hf_tokenizer import stop_ids
from sealion_jax.checkpoint.layout import write_assets
from sealion_jax.data.chat.conversation import Conversation
from sealion_jax.data.chat.rendering import render_prompt
from sealion_jax.data.chat.rows import chat_from_fields, prompt_from_fields
from sealion_jax.data.chat.template import CHAT_TEMPLATE
from sealion_jax.tokenizer import Tokenizer
from tests.checkpoint.hf_models import (
    CONFIG,
    TEXT_VERSION_4,
    V,
    multimodal,
    random_tensors,
    text_shapes,
    write_directory,
    write_step,
)
from tests.checkpoint.test_hf_transformers import load, made_by_transformers
from tests.data.chat.test_rendering import ASSISTANT, CALLING, RESULT, USER, WEATHER, WITH_TOOLS
from tests.data.chat.test_template import ROWS, assert_same, set_aside, shared_rows
from tests.tiny_text import tiny_tokenizer

transformers: Any = pytest.importorskip("transformers", minversion="5")
torch: Any = pytest.importorskip("torch")

OURS = CHAT_TEMPLATE.encode()
THEIRS = "{{ bos_token }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
END_OF_TURN, WORD = 106, 300


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))[0]


def tokenizer_of(directory: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)


def tuned(step: Path, target: Path) -> Path:
    """A copy of a step's directory, as a run that was tuned on chats saves it."""
    shutil.copytree(step, target)
    write_assets(target, {CHAT_TEMPLATE_FILE: OURS})
    write_digests(target)
    return target


def small_files(directory: Path) -> dict[str, bytes]:
    """Everything but the weights."""
    files = [path for path in directory.rglob("*") if path.is_file() and ".safetensors" not in path.name]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def objects(files: dict[str, bytes], *names: str) -> list[dict[str, Any]]:
    return [json.loads(files[name]) for name in names]


# Trained from scratch: no Hugging Face directory stands behind it.


@pytest.fixture(scope="module")
def fresh(tiny: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fresh")
    assets = {"tokenizer.model": tiny.model_bytes, CHAT_TEMPLATE_FILE: OURS}
    assert not export_hf(write_step(folder / "step", CONFIG, assets), folder / "out").notes
    return folder / "out"


@pytest.fixture(scope="module")
def fresh_tokenizer(fresh: Path) -> Any:
    return tokenizer_of(fresh)


@pytest.mark.parametrize("row", ROWS)
def test_every_form_of_row(fresh_tokenizer: Any, tiny: Tokenizer, row: dict[str, Any]) -> None:
    assert_same(fresh_tokenizer, chat_from_fields(row), row, tiny)


@pytest.mark.parametrize("messages", [[USER], [USER, CALLING, RESULT], WITH_TOOLS["messages"][:4]])
def test_prompts(fresh_tokenizer: Any, tiny: Tokenizer, messages: list[dict]) -> None:
    ids = fresh_tokenizer.apply_chat_template(messages, tools=[WEATHER], add_generation_prompt=True)
    prompt = prompt_from_fields({"messages": messages, "tools": [WEATHER]})
    assert ids["input_ids"] == render_prompt(prompt, tiny).tolist()


def test_a_model_trained_from_scratch_stops_where_a_turn_ends(fresh: Path) -> None:
    files = small_files(fresh)
    assert files[CHAT_TEMPLATE_FILE] == OURS
    config, generation = objects(files, "config.json", "generation_config.json")
    assert config["eos_token_id"] == generation["eos_token_id"] == [1, END_OF_TURN]


@pytest.mark.parametrize(
    ("model", "vocab_size", "most"),
    [
        ("standin_gemma3_layout_16k.model", 16_384, 4),
        pytest.param("gemma3_262k.model", 262_144, 100, marks=pytest.mark.slow),
    ],
)
def test_real_chats(model: str, vocab_size: int, most: int, shared_data: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(shared_data / "tokenizer" / model)
    assets = {"tokenizer.model": tokenizer.model_bytes, CHAT_TEMPLATE_FILE: OURS}
    config = dataclasses.replace(CONFIG, vocab_size=vocab_size)
    export_hf(write_step(tmp_path / "step", config, assets), tmp_path / "out")
    theirs = tokenizer_of(tmp_path / "out")
    compared = 0
    for _, row, chat in shared_rows(shared_data, most=most):
        if not set_aside(row, tokenizer):
            everyone = Conversation(turns=chat.turns, system=chat.system, tools=chat.tools)
            assert_same(theirs, everyone, row, tokenizer)
            compared += 1
    assert compared > 10 * most


# Begun from a Hugging Face directory that has a template of its own.


@pytest.fixture(scope="module", params=["text", "multimodal"])
def source(request: Any, tiny: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Transformers saves it, with the template among the tokenizer's settings."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "bare").mkdir()
    (folder / "bare/tokenizer.model").write_bytes(tiny.model_bytes)
    settings = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "model_max_length": 10**30}
    (folder / "bare/tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = tokenizer_of(folder / "bare")
    tokenizer.chat_template = THEIRS
    made_by_transformers(request.param, folder / "hf")
    tokenizer.save_pretrained(folder / "hf", save_jinja_files=False)
    (folder / "hf/tokenizer.model").write_bytes(tiny.model_bytes)
    assert json.loads((folder / "hf/tokenizer_config.json").read_text())["chat_template"] == THEIRS
    return folder / "hf"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exports:
    """What one source becomes."""

    source: Path
    untuned: Path
    tuned: Path
    tuned_again: Path
    notes: tuple[str, ...]
    """Of the tuned one."""


@pytest.fixture(scope="module")
def exports(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Exported as it came, exported as tuned, and the latter imported, tuned and exported once more."""
    folder = tmp_path_factory.mktemp("exports")
    import_hf(source, folder / "step")
    assert not export_hf(folder / "step", folder / "untuned").notes
    done = export_hf(tuned(folder / "step", folder / "tuned step"), folder / "tuned")
    import_hf(folder / "tuned", folder / "step of tuned")
    again = tuned(folder / "step of tuned", folder / "tuned step again")
    assert not export_hf(again, folder / "tuned again").notes
    return Exports(
        source=source,
        untuned=folder / "untuned",
        tuned=folder / "tuned",
        tuned_again=folder / "tuned again",
        notes=done.notes,
    )


def test_without_tuning_the_source_s_template_stays(exports: Exports) -> None:
    assert small_files(exports.untuned) == small_files(exports.source)
    told = tokenizer_of(exports.untuned).apply_chat_template([USER, ASSISTANT], tokenize=False)
    assert told == f"<bos>[{USER['content']}][{ASSISTANT['content']}]"


def test_tuning_puts_our_template_for_the_source_s(exports: Exports, tiny: Tokenizer) -> None:
    theirs = tokenizer_of(exports.tuned)
    assert theirs.chat_template == CHAT_TEMPLATE
    for row in ROWS:
        assert_same(theirs, chat_from_fields(row), row, tiny)
    assert exports.notes == (
        "the source's chat template (tokenizer_config.json) is left out: the checkpoint was tuned with "
        "the one in chat_template.jinja",
    )


def test_tuning_changes_nothing_else_but_the_stops(exports: Exports) -> None:
    before, after = small_files(exports.source), small_files(exports.tuned)
    assert after.pop(CHAT_TEMPLATE_FILE) == OURS
    changed = ["config.json", "generation_config.json", "tokenizer_config.json"]
    assert sorted(name for name in before if after.pop(name) != before[name]) == changed and not after
    config, generation, settings = objects(before, *changed)
    stops = {"eos_token_id": [1, END_OF_TURN]}
    assert generation["eos_token_id"] == 1
    del settings["chat_template"]
    if "text_config" in config:
        assert config["text_config"]["eos_token_id"] == 1
        config["text_config"] |= stops
    assert objects(small_files(exports.tuned), *changed) == [config | stops, generation | stops, settings]


def test_generation_stops_at_the_end_of_a_turn_only_if_tuned(exports: Exports) -> None:
    def answer(directory: Path) -> list[int]:
        """What a model says that is made to say two words and the end of its turn, again and again."""
        prompt = torch.tensor([[2, WORD, WORD]])
        said = load(directory).generate(
            prompt,
            do_sample=False,
            max_new_tokens=8,
            prefix_allowed_tokens_fn=lambda _, ids: [WORD if len(ids) % 3 < 2 else END_OF_TURN],
        )
        return said[0, 3:].tolist()

    turn = [WORD, WORD, END_OF_TURN]
    assert answer(exports.source) == [*turn, *turn, *turn][:8]
    assert answer(exports.tuned) == turn


def test_an_export_comes_back(exports: Exports, tmp_path: Path) -> None:
    """With further tuning on chats, without any, and as a Hugging Face directory whose dtype is changed."""
    expected = small_files(exports.tuned)
    assert small_files(exports.tuned_again) == expected
    import_hf(exports.tuned, tmp_path / "step")
    export_hf(tmp_path / "step", tmp_path / "out")
    assert small_files(tmp_path / "out") == expected
    export_hf(exports.tuned, tmp_path / "float32", dtype="float32")
    changed = small_files(tmp_path / "float32")
    assert {name for name in expected if changed[name] != expected[name]} <= {"config.json"}
    assert json.loads(changed["config.json"])["eos_token_id"] == [1, END_OF_TURN]


# Every place in which a template may be.

PREPROCESSOR = b'{ "image_mean": [0.5]}'
PLACES = {
    "chat_template.jinja": b"old",
    "chat_template.json": b'{"chat_template": "old"}',
    "additional_chat_templates/tool_use.jinja": b"old",
    "processor_config.json": b'{"chat_template": "old", "image_seq_length": 256}',
    "preprocessor_config.json": PREPROCESSOR,
    "tokenizer_config.json": '{"pad_token": "ค", "chat_template": [{"name": "a", "template": "b"}]}'.encode(),
    "generation_config.json": b'{"top_p": 0.95, "eos_token_id": [106, 7]}',
    "LICENSE": b"terms",
}


def with_all_places(tokenizer: bytes, folder: Path) -> Path:
    """The tuned step of a source with templates in all places."""
    tensors = random_tensors(text_shapes("language_model.model."))
    config = {**multimodal(TEXT_VERSION_4), "eos_token_id": 1}
    source = write_directory(folder / "hf", config, tensors, files={**PLACES, "tokenizer.model": tokenizer})
    import_hf(source, folder / "step")
    return tuned(folder / "step", folder / "tuned")


def test_no_other_template_is_left(tiny: Tokenizer, tmp_path: Path) -> None:
    step = with_all_places(tiny.model_bytes, tmp_path)
    done = export_hf(step, tmp_path / "out")
    assert done.notes == (
        "the source's chat template (additional_chat_templates/tool_use.jinja, chat_template.jinja, "
        "chat_template.json, processor_config.json, tokenizer_config.json) is left out: the checkpoint was "
        "tuned with the one in chat_template.jinja",
    )
    files = small_files(tmp_path / "out")
    assert files.pop(CHAT_TEMPLATE_FILE) == OURS
    assert files.pop("LICENSE") == b"terms" and files.pop("preprocessor_config.json") == PREPROCESSOR
    assert files.pop("tokenizer.model") == tiny.model_bytes
    assert {name: json.loads(content) for name, content in files.items()} == {
        "config.json": {**multimodal(TEXT_VERSION_4), "eos_token_id": [1, 106]},
        "generation_config.json": {"top_p": 0.95, "eos_token_id": [1, 106, 7]},
        "processor_config.json": {"image_seq_length": 256},
        "tokenizer_config.json": {"pad_token": "ค"},
    }
    read, _ = transformers.Gemma3Processor.get_processor_dict(tmp_path / "out")
    assert read["chat_template"] == CHAT_TEMPLATE
    # As it came, Transformers refuses it; and without the oldest file it takes the processor's.
    (tmp_path / "hf/chat_template.json").unlink()
    read, _ = transformers.Gemma3Processor.get_processor_dict(tmp_path / "hf")
    assert read["chat_template"] == "old"


def test_another_tokenizer_than_the_source_s(tiny: Tokenizer, tmp_path: Path) -> None:
    """Its settings have no template in them, so there is none to leave out there."""
    larger, _ = tiny_tokenizer(tmp_path, vocab_size=V)
    step = with_all_places(larger.model_bytes, tmp_path)
    write_assets(step, {"tokenizer.model": tiny.model_bytes})
    write_digests(step)
    done = export_hf(step, tmp_path / "out")
    assert len(done.notes) == 2 and "trained with another tokenizer" in done.notes[0]
    assert "processor_config.json) is left out" in done.notes[1]
    theirs = tokenizer_of(tmp_path / "out")
    assert_same(theirs, chat_from_fields(WITH_TOOLS), WITH_TOOLS, tiny)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (None, [1, 106]),
        (1, [1, 106]),
        (106, [1, 106]),
        ([1], [1, 106]),
        ([1, 106], [1, 106]),
        ([106, 1], [106, 1]),
        ([50, 1], [1, 106, 50]),
    ],
)
def test_stops_are_added_to_those_that_are_there(found: object, expected: list[int]) -> None:
    content = {"top_k": 64, "eos_token_id": found}
    assert with_stops(content, [1, 106]) == {"top_k": 64, "eos_token_id": expected}
    assert content["eos_token_id"] == found
    assert with_stops({}, [1, 106]) == {"eos_token_id": [1, 106]}
    outer = {"model_type": "gemma3", "text_config": {"eos_token_id": found}, "eos_token_id": 1}
    inner = {"eos_token_id": None if found is None else expected}
    assert with_stops_in_config(outer, [1, 106]) == {
        "model_type": "gemma3",
        "text_config": inner,
        "eos_token_id": [1, 106],
    }


def test_stops_are_the_tokenizer_s(tiny: Tokenizer) -> None:
    assert stop_ids(tiny) == stop_ids(None) == [1, 106]
