"""The Jinja chat template that an export carries: `rendering` in the words of Transformers.

`tokenizer.apply_chat_template(messages, tools=tools)` gives the ids of `render_chat`, and with
`return_assistant_tokens_mask=True` the mask of `loss_mask` for all assistant turns. So it is for every
conversation that `rows` takes, but for

- messages that spell a control token: Transformers makes it one. With `sanitize_control_tokens=True` it cuts
  it as text, but not always into the same pieces;
- `arguments` given as a string: Jinja cannot read JSON, so it is written as it is. Ours spells it anew, as it
  does an object, with a space after commas and colons. (vLLM makes an object of it before it applies a
  template.)

Where a message has an image part, Gemma 3's image token is put, as in the model's own template.
"""

from __future__ import annotations

import json

from sealion_jax.data.chat.format import CALL_SEPARATOR, RESULT_CLOSING, RESULT_OPENING, TOOLS_INTRODUCTION

# A minus at every tag: no output depends on how an engine treats the whitespace around them.
# vLLM looks for a loop over the content of a `message` to learn that images may be among its parts, hence the
# macro's parameter.
_TEMPLATE = """\
{#- Gemma 3 chats with tools. Texts are stripped. System text and tools stand in the first user turn. -#}
{%- macro text_of(message) -%}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- elif message['content'] is defined and message['content'] is not none -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'text' -%}
                {{- part['text'] -}}
            {%- elif part['type'] == 'image' -%}
                {{- '<start_of_image>' -}}
            {%- else -%}
                {{- raise_exception('Neither text nor image: a part of type ' + part['type']) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set state = namespace(preamble='', before='', calls=0) -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set system = text_of(messages[0]) | trim -%}
    {%- if system -%}
        {%- set state.preamble = system + '\\n\\n' -%}
    {%- endif -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- if tools -%}
    {%- set state.preamble = state.preamble + @TOOLS_INTRODUCTION@ + '[' -%}
    {%- for tool in tools -%}
        {%- set function = tool['function'] if tool['function'] is mapping else tool -%}
        {%- set state.preamble = state.preamble + (', ' if not loop.first else '') + (function | tojson) -%}
    {%- endfor -%}
    {%- set state.preamble = state.preamble + ']\\n\\n' -%}
{%- endif -%}
{%- for message in turns -%}
    {%- set text = text_of(message) | trim -%}
    {%- if message['role'] == 'user' -%}
        {%- if state.before not in ['', 'assistant'] -%}
            {{- raise_exception('Roles must alternate: a user message follows ' + state.before) -}}
        {%- endif -%}
        {{- '<start_of_turn>user\\n' + state.preamble + text + '<end_of_turn>\\n' -}}
        {%- set state.preamble = '' -%}
    {%- elif message['role'] == 'assistant' -%}
        {%- if state.before not in ['user', 'tool'] -%}
            {{- raise_exception('Roles must alternate: an assistant message is first, or follows another') -}}
        {%- endif -%}
        {{- '<start_of_turn>model\\n' -}}
        {%- set state.calls = 0 -%}
        {%- generation -%}
        {{- text -}}
        {%- if message['tool_calls'] -%}
            {{- '\\n\\n' if text else '' -}}
            {%- for tool_call in message['tool_calls'] -%}
                {%- set call = tool_call['function'] if tool_call['function'] is mapping else tool_call -%}
                {{- '{"name": ' + (call['name'] | tojson) + ', "parameters": ' -}}
                {{- call['arguments'] if call['arguments'] is string else call['arguments'] | tojson -}}
                {{- '}' + (@CALL_SEPARATOR@ if not loop.last else '') -}}
                {%- set state.calls = loop.length -%}
            {%- endfor -%}
        {%- endif -%}
        {{- '<end_of_turn>' -}}
        {%- endgeneration -%}
        {{- '\\n' -}}
    {%- elif message['role'] == 'tool' -%}
        {%- if state.calls == 0 or state.before not in ['assistant', 'tool'] -%}
            {{- raise_exception('A tool message has no tool call before it') -}}
        {%- endif -%}
        {%- set state.calls = state.calls - 1 -%}
        {{- '\\n' if state.before == 'tool' else '<start_of_turn>user\\n' -}}
        {{- @RESULT_OPENING@ + text + @RESULT_CLOSING@ -}}
        {%- if loop.last or turns[loop.index]['role'] != 'tool' -%}
            {{- '<end_of_turn>\\n' -}}
        {%- endif -%}
    {%- else -%}
        {{- raise_exception('Unknown role, or a system message that is not the first: ' + message['role']) -}}
    {%- endif -%}
    {%- set state.before = message['role'] -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""


def _filled() -> str:
    literals = {
        "@TOOLS_INTRODUCTION@": TOOLS_INTRODUCTION,
        "@CALL_SEPARATOR@": CALL_SEPARATOR,
        "@RESULT_OPENING@": RESULT_OPENING,
        "@RESULT_CLOSING@": RESULT_CLOSING,
    }
    template = _TEMPLATE
    for mark, text in literals.items():
        template = template.replace(mark, json.dumps(text))
    return template


CHAT_TEMPLATE = _filled()
"""The template's text, for `chat_template.jinja`."""
