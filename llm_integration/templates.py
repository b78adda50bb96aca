"""Chat templates, in Jinja, as tokenizers and processors carry them.

Every template is led by a few lines that turn messages made of parts (pictures and text) into messages made
of text with ``<image>`` marks, so that templates written for text alone serve pictures too. A template that
wants its messages in parts, as those of transformers' own LLaVAs do, is led by lines that do the reverse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from transformers import GenerationConfig
from transformers.utils.chat_template_utils import render_jinja_template

IMAGE_MARK = "<image>"
_ANSWER = "answer"

_FLATTEN = """\
{%- set ns = namespace(flat=[], text='') -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set ns.text = message['content'] -%}
{%- else -%}
{%- set ns.text = '' -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{%- set ns.text = ns.text + part['text'] -%}
{%- elif part['type'] in ['image', 'image_url'] -%}{%- set ns.text = ns.text + '<image>\\n' -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set ns.flat = ns.flat + [{'role': message['role'], 'content': ns.text}] -%}
{%- endfor -%}
{%- set messages = ns.flat -%}
"""

_SPLIT = """\
{%- set ns = namespace(split=[], parts=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is not string -%}
{%- set ns.parts = message['content'] -%}
{%- elif '<image>' not in message['content'] -%}
{%- set ns.parts = [{'type': 'text', 'text': message['content']}] -%}
{%- else -%}
{%- set ns.parts = [] -%}
{%- for piece in message['content'].split('<image>') -%}
{%- if not loop.first -%}{%- set ns.parts = ns.parts + [{'type': 'image'}] -%}{%- endif -%}
{%- if piece.strip('\\n') -%}
{%- set ns.parts = ns.parts + [{'type': 'text', 'text': piece.strip('\\n')}] -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set ns.split = ns.split + [{'role': message['role'], 'content': ns.parts}] -%}
{%- endfor -%}
{%- set messages = ns.split -%}
"""

# The llava package has the text behind a picture tokenised by itself, and SentencePiece begins each text with
# a space.
_SPACE = """\
{%- set ns.flat = [] -%}
{%- for message in messages -%}
{%- set text = message['content'] | replace('<image>', '<image> ') -%}
{%- set ns.flat = ns.flat + [{'role': message['role'], 'content': text}] -%}
{%- endfor -%}
{%- set messages = ns.flat -%}
"""

# Answers of benchmarks and of LLaVA's data come without thinking aloud; templates that can do both (Qwen3)
# then close the thoughts in the prompt, and not in what is learned.
_NO_THOUGHTS = "{%- set enable_thinking = false -%}\n"

# Llama 3's later templates say what day it is. A prompt that is another one every day is neither that of
# training nor that of yesterday's half of a run; the day is the one that they name where none is to be had.
_ONE_DAY = "{%- set date_string = '26 Jul 2024' -%}\n"

# LLaVA 1.5's conversation format; the sentence is part of the format that its checkpoints were trained with.
_VICUNA_V1 = """\
{%- if messages and messages[0]['role'] == 'system' -%}
{{- messages[0]['content'] + ' ' -}}
{%- else -%}
{{- "A chat between a curious user and an artificial intelligence assistant. The assistant gives " -}}
{{- "helpful, detailed, and polite answers to the user's questions. " -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{- 'USER: ' + message['content'] + ' ' -}}
{%- elif message['role'] == 'assistant' -%}{{- 'ASSISTANT: ' + message['content'] + eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""

# LLaVA's projector alignment: the picture and its caption, the instruction is dropped.
_PLAIN = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{- '<image>' * (message['content'].split('<image>') | length - 1) -}}
{%- elif message['role'] == 'assistant' -%}{{- message['content'] + '\\n' -}}
{%- endif -%}
{%- endfor -%}
"""

_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

TEMPLATES: Mapping[str, str] = MappingProxyType(
    {"vicuna_v1": _FLATTEN + _VICUNA_V1, "plain": _FLATTEN + _PLAIN, "chatml": _FLATTEN + _CHATML}
)
"""Templates by name."""

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
"""What a tokenizer must hold as single tokens for ``chatml``."""


def build_template(name: str, own: str | Mapping[str, str] | None = None) -> str:
    """The Jinja text of a template.

    Args:
        name: a key of :data:`TEMPLATES`, or ``"own"``.
        own: the tokenizer's or processor's own template, for ``"own"``; of several by name (Hermes has one
            for tools, too) the one called ``default``.

    Raises:
        ValueError: for an unknown name, or ``"own"`` where there is none.
    """
    if name == "own":
        if isinstance(own, Mapping):
            if "default" not in own:
                raise ValueError(
                    f"template 'own': of the tokenizer's chat templates ({', '.join(own)}) none is called "
                    f"default; name one of {', '.join(TEMPLATES)}"
                )
            own = own["default"]
        if not own:
            raise ValueError(
                f"template 'own': the tokenizer has no chat template; name one of {', '.join(TEMPLATES)}"
            )
        if own.startswith((_FLATTEN, _SPLIT)):
            return own
        lead = _SPLIT if _wants_parts(own) else _FLATTEN
        lead += _NO_THOUGHTS if "enable_thinking" in own else ""
        return lead + (_ONE_DAY if "strftime_now" in own and "date_string" in own else "") + own
    if name not in TEMPLATES:
        raise ValueError(f"unknown template {name!r}; known are {', '.join(TEMPLATES)} and 'own'")
    return TEMPLATES[name]


def space_pictures(template: str) -> str:
    """A template of :func:`build_template` that writes a space behind each picture.

    One that wants messages in parts stays as it is: its own lines write what stands behind a picture.
    """
    if not template.startswith(_FLATTEN):
        return template
    return _FLATTEN + _SPACE + template.removeprefix(_FLATTEN)


def _wants_parts(own: str) -> bool:
    """Whether a template leaves a message's text out unless that comes as a list of parts."""
    special: dict[str, Any] = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "")
    for messages, in_parts in zip(_turns(), (False, True), strict=True):
        try:
            rendered: Any = render_jinja_template([messages], chat_template=own, **special)
        except Exception:  # templates raise whatever they like
            continue
        if _ANSWER in rendered[0][0]:
            return in_parts
    return False


def _turns() -> list[list[dict[str, Any]]]:
    """A question and an answer: as text, and in parts."""
    said = (("user", "?"), ("assistant", _ANSWER))
    return [
        [{"role": role, "content": text} for role, text in said],
        [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said],
    ]


def find_end(tokenizer: Any, template: str | None) -> int | None:
    """The special token that a template puts behind an answer, which a model tuned with it learns to say.

    Args:
        tokenizer: of the language model.
        template: the Jinja text; None for none.

    Returns:
        Its id, or None if answers end without one.
    """
    if template is None:
        return None
    for messages in _turns():
        try:
            text = str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
        except Exception:  # templates raise whatever they like
            continue
        if _ANSWER in text:
            _, last = end_of_answer(text, text.rindex(_ANSWER), list_specials(tokenizer))
            return None if last is None else int(tokenizer.convert_tokens_to_ids(last))
    return None


def check_heard(tokenizer: Any, template: str | None) -> None:
    """See that what a user asks is in the prompt: ``plain``, for the alignment of a projector, leaves it out.

    Raises:
        ValueError: if it is not.
    """
    probe = "xylophone"  # in no template's own words
    for content in (probe, [{"type": "text", "text": probe}]):
        messages = [{"role": "user", "content": content}]
        try:
            prompt = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except Exception:  # a template raises whatever it likes for what it does not take
            continue
        if probe in str(prompt).lower():
            return
    raise ValueError(
        "the model's chat template leaves out what is asked, as `plain` does, which is for stage=align: "
        "assemble it with another --template, or tune it with another data.template"
    )


def find_stop(tokenizer: Any, template: str | None) -> int | None:
    """Where answers are over: the token that :func:`find_end` finds, or else the end of a sequence."""
    end, last = find_end(tokenizer, template), tokenizer.eos_token_id
    return end if end is not None or last is None else int(last)


def list_specials(tokenizer: Any) -> list[str]:
    """A tokenizer's special tokens, but for the image mark."""
    specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(specials - {IMAGE_MARK})


def end_of_answer(text: str, start: int, specials: Sequence[str]) -> tuple[int, str | None]:
    """Where an answer that begins at ``start`` ends, and the special token that ends it.

    That is behind the last special token of its turn; at the end of the text, and None, if there is none.
    """
    places = [(text.rfind(token, start) + len(token), token) for token in specials if token in text[start:]]
    return max(places, default=(len(text), None))


def add_end(settings: GenerationConfig, end: int | None) -> None:
    """Let generation stop at a token, beside those at which it stops already."""
    ends = settings.eos_token_id
    listed = list(ends) if isinstance(ends, (list, tuple)) else [ends] if ends is not None else []
    if end is not None and end not in listed:
        settings.eos_token_id = sorted({*listed, end})
