"""The VQA family's answer normalisation and soft accuracy.

Three scorers share it and differ in when they use it:
VQA v2 (github.com/GT-Vision-Lab/VQA, vqaEval.py) normalises only where the ten people disagree;
VizWiz (vizwiz.org, vqaEval.py) normalises the model's answer always and the people's never, and its table of
contractions has typographic apostrophes;
TextVQA (facebookresearch/mmf, EvalAIAnswerProcessor) normalises both always, after a step of its own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {
    word: str(number)
    for number, words in enumerate(
        ("none zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
    for word in words.split()
}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The official pattern also looks behind, with a typing error that makes the look-behind match always.
_PERIOD = re.compile(r"\.(?!\d)")
# re.UNICODE stands where re.sub expects a count, so the official scorers remove this many periods at most.
_MAX_PERIODS = int(re.UNICODE)
_COMMA_VQA = re.compile(r"\d,\d")
_COMMA_MMF = re.compile(r"(?<=\d),+(?=\d)")

_ONE_APOSTROPHE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
    how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock
    oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's
    something'd something'll that's there'd there're there's they'd they'll they're they've 'twas
    wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
    who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_MORE_APOSTROPHES = """
    couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've
    somebody'd've someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've
    y'all'd've y'all'll you'd've
"""


def _contractions() -> dict[str, str]:
    """Spellings that lack one apostrophe, and what they stand for."""
    table = {whole.replace("'", ""): whole for whole in _ONE_APOSTROPHE.split()}
    for whole in _MORE_APOSTROPHES.split():
        for place, letter in enumerate(whole):
            if letter == "'":
                table[whole[:place] + whole[place + 1 :]] = whole
    table["somebody'd"] = "somebodyd"  # the official table has this one the wrong way round
    return table


_CONTRACTIONS = _contractions()
_STRAIGHT = frozenset(["aint", "arent", "cant", "couldve", "couldnt", "weve", "wheres", "whove"])


def _vizwiz_contractions() -> dict[str, str]:
    """The same with typographic apostrophes, where VizWiz's table has them."""
    table = {}
    for spelling, whole in _CONTRACTIONS.items():
        if spelling in _STRAIGHT:
            table[spelling] = whole
        else:
            half = spelling in ("couldn'tve", "hadn'tve")
            table[spelling if half else spelling.replace("'", "’")] = whole.replace("'", "’")
    return table


_VIZWIZ_CONTRACTIONS = _vizwiz_contractions()


def strip_punctuation(text: str, comma: re.Pattern[str] = _COMMA_VQA) -> str:
    """Removes punctuation marks, or puts a space where one stood between letters; decimal points stay."""
    out = text
    has_thousands = comma.search(text) is not None
    for mark in _PUNCTUATION:
        if mark not in text:
            continue
        apart = has_thousands or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if apart else " ")
    return _PERIOD.sub("", out, count=_MAX_PERIODS)


def normalise_words(text: str, contractions: Mapping[str, str] = _CONTRACTIONS) -> str:
    """Lower case, digits for number words, no articles, apostrophes in contractions, single spaces."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in words if word not in _ARTICLES)


def flatten(text: str) -> str:
    """Line breaks and tabs become spaces; outer white space goes."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 16)
def normalise(text: str) -> str:
    """VQA v2's normalisation of a flattened answer."""
    return normalise_words(strip_punctuation(text))


@lru_cache(maxsize=1 << 16)
def normalise_evalai(text: str) -> str:
    """The EvalAI processor's: TextVQA's scorer uses it, and LLaVA's scripts before every VQA submission."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise_words(strip_punctuation(flatten(text), _COMMA_MMF))


def as_submitted(key: str, answers: Mapping[str, str], as_written: Collection[str]) -> str:
    """An answer as it is submitted; empty where there is none.

    Args:
        key: Of its question.
        answers: By the key of their question.
        as_written: Keys of those that have been through the EvalAI processor, whose result would not stay as
            it is under it ("thats" becomes "that's", and that "that 's").
    """
    answer = answers.get(key, "")
    return answer if key in as_written else normalise_evalai(answer)


def leave_one_out(matches: Sequence[bool]) -> float:
    """Mean over the people of min(1, matching answers of the others / 3).

    Args:
        matches: For every person, whether the model gave their answer.
    """
    total = sum(matches)
    shares = [min(1.0, float(total - match) / 3) for match in matches]
    return float(sum(shares)) / len(shares)


def vqa_accuracy(answer: str, people: Sequence[Mapping[str, Any]]) -> tuple[float, str]:
    """VQA v2's soft accuracy of one answer, and the answer as it was compared.

    Args:
        answer: The answer as submitted.
        people: The annotation's "answers": objects with "answer" and usually "answer_id".
    """
    answer = flatten(answer)
    given = [flatten(str(person["answer"])) for person in people]
    if len(set(given)) > 1:
        answer = normalise(answer)
        given = [normalise(text) for text in given]
    if len({person.get("answer_id") for person in people} - {None}) == len(people):
        return leave_one_out([text == answer for text in given]), answer
    # The official scorer leaves out everybody whose whole record equals the person's, not only the person:
    # without answer ids those are all who said the same with the same confidence.
    records = [{**person, "answer": text} for person, text in zip(people, given, strict=True)]
    shares = [
        min(
            1.0, float(sum(text == answer for text, r in zip(given, records, strict=True) if r != record)) / 3
        )
        for record in records
    ]
    return float(sum(shares)) / len(shares), answer


def vizwiz_accuracy(answer: str, people: Sequence[str]) -> tuple[float, str]:
    """VizWiz's soft accuracy: the people's answers are taken as they stand in the file."""
    answer = normalise_words(strip_punctuation(flatten(answer)), _VIZWIZ_CONTRACTIONS)
    return leave_one_out([text == answer for text in people]), answer


def textvqa_accuracy(answer: str, people: Sequence[str]) -> tuple[float, str]:
    """TextVQA's soft accuracy."""
    answer = normalise_evalai(answer)
    return leave_one_out([normalise_evalai(text) == answer for text in people]), answer
