"""What makes an export a chat model's: the template it was tuned with, alone, and a stop where a turn ends.

A source may hold templates in five places, and readers differ in which one they take: none is left but that
in `chat_template.jinja`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from etils import epath

from sealion_jax.checkpoint.hf_assets import (
    CHAT_TEMPLATE_FILE,
    CHAT_TEMPLATE_JSON,
    GENERATION_FILE,
    PROCESSOR_FILE,
    TEMPLATES,
)
from sealion_jax.checkpoint.hf_config import CONFIG_FILE, parse_json_object, text_config
from sealion_jax.checkpoint.hf_tokenizer import SETTINGS_FILE, json_bytes

TEMPLATE_KEY = "chat_template"
SETTINGS_FILES = (SETTINGS_FILE, PROCESSOR_FILE)
"""What may hold a template beside other things."""
STOPS_KEY = "eos_token_id"


def chat_files(
    template: bytes, stops: Sequence[int], source: Collection[str], *, read: Callable[[str], bytes]
) -> tuple[dict[str, bytes | None], list[str]]:
    """(files that differ from the source's, what the user should know) of a chat-tuned checkpoint's export.

    None stands for a file that is left out. config.json is not among them: see `with_stops_in_config`.

    Args:
        template: what goes into chat_template.jinja.
        stops: ids at which an answer ends.
        source: names of the source's files that would go out.
        read: gives the content of one of them.
    """
    files = without_templates(source, read=read)
    left_out = sorted(name for name in files if name != CHAT_TEMPLATE_FILE or read(name) != template)
    notes = []
    if left_out:
        notes.append(
            f"the source's chat template ({', '.join(left_out)}) is left out: the checkpoint was tuned with "
            f"the one in {CHAT_TEMPLATE_FILE}"
        )
    files[CHAT_TEMPLATE_FILE] = template
    if GENERATION_FILE in source:
        before = parse_json_object(read(GENERATION_FILE), GENERATION_FILE)
        content = with_stops(before, stops)
        if content != before:
            files[GENERATION_FILE] = json_bytes(content)
    return files, notes


def has_chat_template(files: Mapping[str, epath.Path]) -> bool:
    """Whether a checkpoint's files have a chat template, in any of the five places.

    Raises:
        UserError: settings that may hold one are not JSON.
    """
    settings = (name for name in SETTINGS_FILES if name in files)
    return any(map(_is_template, files)) or any(
        parse_json_object(files[name].read_bytes(), name).get(TEMPLATE_KEY) for name in settings
    )


def _is_template(name: str) -> bool:
    return name in (CHAT_TEMPLATE_FILE, CHAT_TEMPLATE_JSON) or name.startswith(f"{TEMPLATES}/")


def without_templates(source: Collection[str], *, read: Callable[[str], bytes]) -> dict[str, bytes | None]:
    """What is left of the source's files that hold a chat template, by name; None where nothing is.

    Transformers takes a template from processor_config.json rather than from chat_template.jinja, and one
    named "tool_use" rather than the default as soon as there are tools.
    """
    files: dict[str, bytes | None] = {name: None for name in source if _is_template(name)}
    for name in SETTINGS_FILES:
        content = parse_json_object(read(name), name) if name in source else {}
        if TEMPLATE_KEY in content:
            files[name] = json_bytes({key: value for key, value in content.items() if key != TEMPLATE_KEY})
    return files


def with_stops(content: dict[str, Any], stops: Sequence[int]) -> dict[str, Any]:
    """A generation_config.json's content with `stops` first among its eos_token_id, unless all are there."""
    found = content.get(STOPS_KEY)
    named = found if isinstance(found, list) else [] if found is None else [found]
    if all(stop in named for stop in stops):
        return content
    return {**content, STOPS_KEY: [*stops, *(stop for stop in named if stop not in stops)]}


def with_stops_in_config(content: dict[str, Any], stops: Sequence[int]) -> dict[str, Any]:
    """A config.json's content with `stops`: at its top, as the released chat models have them.

    Transformers 5 writes <eos> into the text_config of a multimodal model too; where it is, it is replaced.
    """
    changed = with_stops(content, stops)
    text = text_config(content, CONFIG_FILE)
    if text is content or text.get(STOPS_KEY) is None:
        return changed
    return {**changed, "text_config": with_stops(text, stops)}
