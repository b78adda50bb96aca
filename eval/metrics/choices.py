"""Reading the letter of a multiple-choice answer, under the rules of four scorers."""

from __future__ import annotations

import re
from collections.abc import Mapping

LETTERS = "ABCDE"
_THE_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")
_ANSWER_IS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def read_scienceqa(answer: str, num_choices: int) -> str:
    """LLaVA's rule for ScienceQA: the letter alone, "B. …", or one "The answer is B."; "" otherwise."""
    if answer in tuple(LETTERS):
        letter = answer
    elif len(answer) >= 3 and answer[0] in LETTERS and answer[1:3] == ". ":
        letter = answer[0]
    else:
        found = _THE_ANSWER_IS.findall(answer)
        letter = found[0] if len(found) == 1 else ""
    return letter if letter and letter in LETTERS[:num_choices] else ""


def read_first_letter(answer: str) -> str:
    """lmms-eval's rule for SEED-Bench: the first character of the stripped answer, upper case."""
    return answer.strip()[:1].upper()


def read_mmbench(answer: str, choices: Mapping[str, str]) -> str:
    """VLMEvalKit's rule without a judge: one letter that stands alone, or one option's text in the answer.

    Args:
        answer: The answer.
        choices: Letter to option text, without options that the question lacks.

    Returns:
        The letter, "Z" for an answer that declines, "" where VLMEvalKit would ask a language model.
    """
    return _find_letter(answer, choices) or _find_option_text(answer, choices)


def _find_letter(answer: str, choices: Mapping[str, str]) -> str:
    if "Failed to obtain answer via API" in answer:
        return ""
    if any(refusal in answer for refusal in _REFUSALS):
        return "Z"
    words = answer.translate(_SEPARATORS).split()
    standing = [letter for letter in choices if letter in words]
    if len(standing) == 1 and words.index(standing[0]) > len(words) - 5:
        return standing[0]
    if not standing and "Z" in words:
        return "Z"
    match = _ANSWER_IS.search(answer)
    if match and match.group(1).upper() in choices:
        return match.group(1).upper()
    return ""


def _find_option_text(answer: str, choices: Mapping[str, str]) -> str:
    answer = answer.lower()
    if len(answer) > 2 * sum(len(text) for text in choices.values()):
        return ""
    named = [letter for letter, text in choices.items() if text.lower() in answer]
    return named[0] if len(named) == 1 else ""
