"""Whether the files of a checkpoint have a chat template, in any of the places where one may be."""

from __future__ import annotations

from collections.abc import Mapping

from etils import epath

from sealion_jax.checkpoint.hf_config import parse_json_object

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
SETTINGS_FILE = "tokenizer_config.json"
SETTINGS_KEY = "chat_template"


def has_chat_template(files: Mapping[str, epath.Path]) -> bool:
    """Whether there is a template's own file, or one in the tokenizer's settings, as older exports have it.

    Raises:
        UserError: the settings are not JSON.
    """
    if any(name in files for name in TEMPLATE_FILES):
        return True
    if SETTINGS_FILE not in files:
        return False
    return bool(parse_json_object(files[SETTINGS_FILE].read_bytes(), SETTINGS_FILE).get(SETTINGS_KEY))
