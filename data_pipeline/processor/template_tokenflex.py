"""The Jinja chat template that an exported processor carries."""

import json

from .prompt_tokenflex import DEFAULT_SYSTEM, MARKERS

_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' and SYSTEM -%}
{{ '<|im_start|>system\\n' + SYSTEM + '<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}BEFORE_PARTS
{%- for part in message['content'] -%}
{{ '<image>' if part['type'] == 'image' else part['text'] }}AFTER_PART
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""
_BEFORE_PARTS = """
{%- set said = namespace(text=false) -%}"""
# A text comes with a delimiter in front where `protect` has made it safe.
_AFTER_PART = """
{%- if part['type'] != 'image' -%}
{%- set said.text = true -%}
{%- elif message['role'] == 'user' and not said.text and not (loop.nextitem is defined
 and loop.nextitem['type'] != 'image'
 and loop.nextitem['text'].lstrip('\\ufdd0').startswith('\\n')) -%}
{{ '\\n' }}
{%- endif -%}"""


def chatml_template(system: str = DEFAULT_SYSTEM, image_newline: bool = False) -> str:
    """The Jinja chat template of training.

    system: what is said where a conversation has no system turn of its own; empty: nothing.
    image_newline: whether each image at the beginning of a user's turn is followed by a line end
        (unless the text begins with one), as in the prompts of the released Ristretto.

    ValueError if `system` holds a marker.
    """
    for marker in MARKERS:
        if marker in system:
            raise ValueError(
                f"system holds {marker}, which is a marker of the prompt; leave it out"
            )
    template = _TEMPLATE.replace("BEFORE_PARTS", _BEFORE_PARTS if image_newline else "")
    template = template.replace("AFTER_PART", _AFTER_PART if image_newline else "")
    return template.replace("SYSTEM", json.dumps(system, ensure_ascii=False))
