"""Vocabulary, tokenizer files and prompt lists of the small CLIP."""

from __future__ import annotations

import json
import random
from pathlib import Path

from bootstrap.scenes.vocabulary import (
    CLASS_NAMES,
    COLORS,
    COUNT_WORDS,
    SEEN_PAIRS,
    SHAPES,
    TEXTURES,
    WORDS,
    plural,
)
from sparse_vlm.atomic import write_atomic

CLASS_TEMPLATES = ("a {}", "a big {}", "a picture of a {}", "a {} in the center")
_START, _END, _PAD, _UNKNOWN = "<start_of_text>", "<end_of_text>", "<pad>", "<unknown>"


def vocabulary() -> list[str]:
    """Every token of the tokenizer; the end mark comes last, because open_clip pools at the largest id."""
    words = "a an and the with in on at of to is big small large something object objects picture image"
    words += " left right top bottom center middle word number , ."
    tokens = words.split()
    tokens += [*COLORS, *SHAPES, *(plural(shape) for shape in SHAPES), *TEXTURES, *COUNT_WORDS, *WORDS]
    tokens += [str(digit) for digit in range(10)]
    return [_PAD, _UNKNOWN, *dict.fromkeys(tokens), _START, _END]


def write_tokenizer(directory: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, one token a word, for open_clip's HFTokenizer."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    ids = {token: index for index, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=_UNKNOWN))
    # One article is enough for a class template such as "a {}" to fit every colour.
    one_article = normalizers.Replace(Regex(r"\ban\b"), "a")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), one_article])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Whitespace()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A {_END}", special_tokens=[(_START, ids[_START]), (_END, ids[_END])]
    )
    tokenizer.add_special_tokens([_PAD, _UNKNOWN, _START, _END])
    write_atomic(directory / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": _PAD, "unk_token": _UNKNOWN}
    names |= {"bos_token": _START, "eos_token": _END}
    write_atomic(directory / "tokenizer_config.json", json.dumps(names, indent=2) + "\n")


def write_zeroshot(directory: Path) -> None:
    """Writes `zeroshot.json`: class names in label order, templates, and which classes training never saw."""
    heldout = [index for index, name in enumerate(CLASS_NAMES) if tuple(name.split()[::-1]) not in SEEN_PAIRS]
    content = {"classes": CLASS_NAMES, "templates": CLASS_TEMPLATES, "heldout_classes": heldout}
    write_atomic(directory / "zeroshot.json", json.dumps(content, indent=2) + "\n")


def prompt_groups(rng: random.Random, pairs: bool = True) -> dict[str, list[str]]:
    """Lists of texts among which a picture has one right answer, in the wording drawn from `rng`.

    `pair` holds the seen (shape, colour) pairs in the order of `SEEN_PAIRS`; the other groups name one
    attribute of the main object, which is what lets a colour and a shape be put together for the first time.
    """
    template = rng.choice(CLASS_TEMPLATES)
    groups = {"pair": [template.format(f"{color} {shape}") for shape, color in SEEN_PAIRS]} if pairs else {}
    return groups | {
        "color": [rng.choice(("something {}", "a {} object")).format(color) for color in COLORS],
        "shape": [rng.choice(("a {}", "a big {}", "a picture of a {}")).format(shape) for shape in SHAPES],
        "texture": [rng.choice(("something {}", "a {} object")).format(texture) for texture in TEXTURES],
    }
