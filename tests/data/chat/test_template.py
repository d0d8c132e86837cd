"""The chat template in Transformers gives the ids and masks of our renderer, for real chats and made ones."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, assume, given, settings

from sealion_jax.checkpoint.hf_tokenizer import bare_settings
from sealion_jax.data.chat.conversation import AssistantTurn, Conversation, Preference, UserTurn
from sealion_jax.data.chat.rendering import loss_mask, render_chat, render_prompt
from sealion_jax.data.chat.rows import chat_from_fields, preference_from_fields, prompt_from_fields
from sealion_jax.data.chat.template import CHAT_TEMPLATE
from sealion_jax.tokenizer import Tokenizer
from tests.data.chat.test_rendering import (
    ASSISTANT,
    CALLING,
    RESULT,
    USER,
    WEATHER,
    WITH_TOOLS,
    conversations,
    spells_control,
)
from tests.tiny_text import tiny_tokenizer

MOST_SPACES = 31  # in one piece; SentencePiece and Transformers cut longer runs differently


def exported(tokenizer: Tokenizer, folder: Path) -> Any:
    """Transformers' tokenizer of an export with the template."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5")
    (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    (folder / "tokenizer_config.json").write_bytes(bare_settings(tokenizer))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))[0]


@pytest.fixture(scope="module")
def theirs(tiny: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return exported(tiny, tmp_path_factory.mktemp("exported"))


def applied(theirs: Any, messages: list[dict], tools: list[dict] | None) -> tuple[list[int], list[int]]:
    """Transformers' ids and its mask of what the assistant says."""
    out = theirs.apply_chat_template(
        messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
    )
    return out["input_ids"], out["assistant_masks"]


def assert_same(theirs: Any, chat: Conversation, row: dict[str, Any], tokenizer: Tokenizer) -> None:
    rendered = render_chat(chat, tokenizer)
    ids, mask = applied(theirs, row["messages"], row.get("tools"))
    assert ids == rendered.ids.tolist()
    assert mask == loss_mask(rendered).tolist()


CALLS = [
    {
        "type": "function",
        "id": name,
        "function": {"name": name, "arguments": {"q": [None, True, 2.0, "é<b>"]}},
    }
    for name in ("a", "b", "weather")
]
ROWS: list[dict[str, Any]] = [
    {"messages": [USER, ASSISTANT]},
    {"messages": [USER, ASSISTANT, USER, ASSISTANT, USER], "tools": []},
    {"messages": [{"role": "system", "content": "\u3000Be\n\nbrief. \n"}, USER, ASSISTANT]},
    {"messages": [{"role": "system", "content": " "}, USER, ASSISTANT], "tools": [WEATHER]},
    WITH_TOOLS,
    {"messages": [USER, {**ASSISTANT, "tool_calls": CALLS}, RESULT | {"tool_call_id": "a"}, ASSISTANT]},
    {"messages": [USER, {**ASSISTANT, "content": "", "tool_calls": [CALLS[0]["function"]]}]},
    {
        "messages": [
            USER,
            {"role": "assistant", "tool_calls": CALLS},
            *[{"role": "tool", "content": " x "}] * 3,
        ]
    },
    {
        "messages": [USER, CALLING, RESULT, CALLING, RESULT, ASSISTANT],
        "tools": [WEATHER, {"function": WEATHER}],
    },
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": t} for t in (" a", "b ")]},
            ASSISTANT,
        ]
    },
    {
        "messages": [
            USER,
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": [1, "é"]}'}]},
        ]
    },
]


@pytest.mark.parametrize("row", ROWS)
def test_every_form_of_row(theirs: Any, tiny: Tokenizer, row: dict[str, Any]) -> None:
    assert_same(theirs, chat_from_fields(row), row, tiny)


@pytest.mark.parametrize(
    "messages", [[USER], [USER, ASSISTANT, USER], [USER, CALLING, RESULT], WITH_TOOLS["messages"][:4]]
)
def test_generation_prompts(theirs: Any, tiny: Tokenizer, messages: list[dict]) -> None:
    tools = [WEATHER]
    ids = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True)["input_ids"]
    prompt = prompt_from_fields({"messages": messages, "tools": tools})
    assert ids == render_prompt(prompt, tiny).tolist()


def as_row(chat: Conversation) -> dict[str, Any]:
    """The row that gives this conversation."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": chat.system}] if chat.system else []
    for turn in chat.turns:
        if isinstance(turn, UserTurn):
            messages.append({"role": "user", "content": turn.text})
        elif isinstance(turn, AssistantTurn):
            calls = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in turn.calls]
            messages.append({"role": "assistant", "content": turn.text, "tool_calls": calls})
        else:
            messages += [{"role": "tool", "content": result} for result in turn.results]
    return {"messages": messages, "tools": [json.loads(tool) for tool in chat.tools]}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(chat=conversations())
def test_made_conversations(theirs: Any, tiny: Tokenizer, chat: Conversation) -> None:
    assume(
        chat.has_answer and not spells_control(str(chat), tiny) and " " * (MOST_SPACES + 1) not in str(chat)
    )
    row = as_row(chat)
    assert chat_from_fields(row) == chat
    assert_same(theirs, chat, row, tiny)


def test_arguments_as_a_string_are_written_as_they_are(theirs: Any, tiny: Tokenizer) -> None:
    """The one difference: Jinja cannot read JSON."""
    row = {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a":1}'}]}]}
    assert '"parameters": {"a":1}}<end_of_turn>' in theirs.decode(applied(theirs, row["messages"], None)[0])
    assert '"parameters": {"a": 1}}<end_of_turn>' in tiny.decode(render_chat(chat_from_fields(row), tiny).ids)


def test_images_keep_their_place(theirs: Any) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "What is it? "}]
    text = theirs.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<bos><start_of_turn>user\n<start_of_image>What is it?<end_of_turn>\n<start_of_turn>model\n"
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER, USER], "a user message follows user"),
        ([ASSISTANT], "an assistant message is first"),
        ([USER, ASSISTANT, ASSISTANT], "or follows another"),
        ([USER, ASSISTANT, RESULT], "no tool call before it"),
        ([USER, CALLING, RESULT, RESULT], "no tool call before it"),
        ([USER, CALLING, USER, RESULT], "no tool call before it"),
        ([USER, CALLING, USER, ASSISTANT, RESULT], "no tool call before it"),
        ([USER, CALLING, RESULT, USER], "a user message follows tool"),
        ([USER, {"role": "system", "content": "x"}], "Unknown role"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "a part of type audio"),
    ],
)
def test_what_the_template_refuses(theirs: Any, messages: list[dict], message: str) -> None:
    with pytest.raises(Exception, match=message):
        theirs.apply_chat_template(messages, tokenize=False)


def shared_rows(folder: Path, *, most: int | None = None) -> Iterator[tuple[str, dict, Conversation]]:
    """Every conversation of the shared data, or the first few of each file: its place, row and turns."""
    files = [*sorted((folder / "sft").glob("*.jsonl")), *sorted((folder / "dpo").glob("*.jsonl"))]
    assert len(files) == 11
    for file in files:
        for number, line in enumerate(file.read_text("utf-8").splitlines()[:most], 1):
            row = json.loads(line)
            place = f"{file.name}:{number}"
            if "messages" in row:
                yield place, row, chat_from_fields(row)
            else:
                pair: Preference = preference_from_fields(row)
                for name, chat in (("chosen", pair.chosen), ("rejected", pair.rejected)):
                    yield place, {"messages": row["prompt"] + row[name]}, chat


def test_a_few_real_chats(shared_data: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(shared_data / "tokenizer" / "standin_gemma3_layout_16k.model")
    theirs = exported(tokenizer, tmp_path)
    for _, row, chat in shared_rows(shared_data, most=10):
        if not set_aside(row, tokenizer):
            all_learned = Conversation(turns=chat.turns, system=chat.system, tools=chat.tools)
            assert_same(theirs, all_learned, row, tokenizer)


def set_aside(row: dict, tokenizer: Tokenizer) -> str | None:
    """Why Transformers need not give our ids for this row."""
    text = json.dumps([row["messages"], row.get("tools")], ensure_ascii=False)
    if spells_control(text, tokenizer):
        return "spell a control token"
    return f"more than {MOST_SPACES} spaces in a row" if " " * (MOST_SPACES + 1) in text else None


@pytest.mark.slow
def test_every_shared_conversation_under_gemma_s_tokenizer(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Tokenizer.load(shared_data / "tokenizer" / "gemma3_262k.model")
    theirs = exported(tokenizer, tmp_path)
    plain = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    counts: collections.Counter[str] = collections.Counter()
    for place, row, chat in shared_rows(shared_data):
        rendered = render_chat(chat, tokenizer)
        said = [tokenizer.decode(rendered.ids[start:stop]) for start, stop in rendered.assistant_spans]
        answers = [message for message in row["messages"] if message["role"] == "assistant"]
        for text, message in zip(said, answers, strict=True):
            assert text.endswith("<end_of_turn>"), place
            if not message.get("tool_calls"):
                assert text == message["content"].strip() + "<end_of_turn>", place
        reason = set_aside(row, tokenizer)
        counts[reason or "compared"] += 1
        if reason is None:
            ids, mask = applied(theirs, row["messages"], row.get("tools"))
            assert ids == rendered.ids.tolist(), place
            everyone = Conversation(turns=chat.turns, system=chat.system, tools=chat.tools)
            assert mask == loss_mask(render_chat(everyone, tokenizer)).tolist(), place
        elif "spaces" in reason:
            text = theirs.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
            assert [tokenizer.bos_id, *plain.encode(text.removeprefix("<bos>"))] == rendered.ids.tolist(), (
                place
            )
    with capsys.disabled():
        aside = {reason: number for reason, number in counts.items() if reason != "compared"}
        print(f"\n{counts['compared']} conversations have Transformers' ids and masks; set aside: {aside}")
    assert counts["compared"] > 11_000 and sum(aside.values()) < 20
