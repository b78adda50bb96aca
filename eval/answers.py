"""Reading stored answers, and finding the question that each of them answers."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.task import Example

LONG_ANSWER = 1_000  # characters
_WORD = re.compile(r"\w+")
_MARK = re.compile("[?\uff1f]")  # the full-width one, too
_ID_FIELDS = ("question_id", "questionId", "image", "index", "id")
_TEXT_FIELDS = ("text", "answer", "prediction")


class InputError(ValueError):
    """Something is wrong with a file or an option; the message says what, where, and what would be right."""


@dataclass(frozen=True)
class AnswerRecord:
    """One stored answer.

    Attributes:
        question_id: As in the file; None where the file has none.
        text: The answer.
        as_written: True if the field's name says that it is in a submission format and not raw model text.
        prompt: The prompt or question stored with it, if any.
        place: Where it stands, for messages ("line 7").
        position: Its number in the file, from 0.
    """

    question_id: int | str | None
    text: str
    as_written: bool = False
    prompt: str | None = None
    place: str = ""
    position: int = 0


@dataclass(frozen=True)
class AnswerFile:
    """The readable answers of a file, and the lines of it that are not whole."""

    records: tuple[AnswerRecord, ...]
    damaged: tuple[str, ...] = ()


@dataclass(frozen=True)
class Matched:
    """Answers by example key, and everything about them that is not as it should be.

    Attributes:
        answers: Example key to answer.
        as_written: Keys whose answer is in a submission format.
        missing: Keys of examples without an answer.
        unknown: Identifiers of answers to questions that were not asked.
        repeated: Keys answered more than once, always alike.
        empty: Keys whose answer has no visible character.
        long: Keys whose answer has more than `LONG_ANSWER` characters.
        foreign: Keys whose answer has letters of another script than Latin.
        reworded: Keys whose stored prompt does not hold the question.
        damaged: Places in the file that could not be read.
    """

    answers: Mapping[str, str]
    as_written: frozenset[str] = frozenset()
    missing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    long: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    reworded: tuple[str, ...] = ()
    damaged: tuple[str, ...] = field(default=())


def name_some(names: Sequence[object], limit: int = 5) -> str:
    """The first few names for a message: "a, b, c and 12 more"."""
    shown = ", ".join(str(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def read_text(path: Path) -> str:
    """Reads UTF-8 text, with or without a byte order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"The file {path} does not exist.") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder, and a file is needed.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}).") from None


def read_json(path: Path) -> Any:
    """Reads a JSON document.

    Raises:
        InputError: If it is none, or cannot be read (nested too deep, a number of too many digits).
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}).") from None


def read_json_or_lines(path: Path, damaged: list[str] | None = None, distinct_keys: bool = False) -> Any:
    """Reads a JSON document, or one JSON object a line, whichever the file holds.

    Args:
        path: The file; its suffix is not looked at (POPE's `.json` files hold lines).
        damaged: Receives the lines that are not whole; None makes such a line an error.
        distinct_keys: True refuses an object in which a key comes twice.

    Returns:
        The document, or the list of the lines' objects.

    Raises:
        InputError: If the file holds neither, or cannot be read.
    """
    text = read_text(path)
    hook = _distinct(path) if distinct_keys else None
    try:
        content = json.loads(text, object_pairs_hook=hook)
        # A file of one line looks like a document; only a row has a question id.
        return _Lines([(1, content)]) if isinstance(content, dict) and "question_id" in content else content
    except InputError:
        raise
    except ValueError as error:
        first = text.lstrip().split("\n", 1)[0].strip()
        try:
            lines = isinstance(json.loads(first), dict)
        except ValueError:
            lines = damaged is not None and first.startswith("{") and "\n" in text.strip()
        if not lines:
            raise InputError(f"{path} is neither JSON nor JSON lines ({error}).") from None
    rows = []
    # Only "\n" ends a line: an answer may hold U+2028 and the like.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            # SEED-Bench's own answer files have a comma after each object.
            rows.append((number, json.loads(line.strip().removesuffix(","))))
        except ValueError:
            if damaged is None:
                raise InputError(
                    f"Line {number} of {path} is not whole JSON; was its writer killed?"
                ) from None
            damaged.append(f"line {number}")
    return _Lines(rows)


class _Lines(list[Any]):
    """The objects of a JSON lines file; `numbers` are their lines."""

    def __init__(self, rows: Iterable[tuple[int, Any]]) -> None:
        rows = list(rows)
        super().__init__(row for _, row in rows)
        self.numbers = [number for number, _ in rows]


def load_answers(path: Path) -> AnswerFile:
    """Reads an answer file: LLaVA's JSON lines, VQA results JSON, GQA predictions, MM-Vet's mapping, or MME's
    folder of text files.

    Raises:
        InputError: If the file is none of these, or an answer is not text.
    """
    if path.is_dir():
        return _load_mme_folder(path)
    damaged: list[str] = []
    content = read_json_or_lines(path, damaged, distinct_keys=True)
    if isinstance(content, dict):
        if any(name in content for name in _ID_FIELDS):
            content = [content]
        elif content and all(isinstance(value, str) for value in content.values()):
            content = [{"question_id": key, "text": value} for key, value in content.items()]
        else:
            raise InputError(
                f"{path} is one JSON object and not an answer file; expected lines with "
                '"question_id" and "text", or a list of them.'
            )
    if not isinstance(content, list):
        raise InputError(f"{path} holds no list of answers.")
    numbers = content.numbers if isinstance(content, _Lines) else None
    records = []
    for position, row in enumerate(content):
        place = f"line {numbers[position]}" if numbers else f"answer {position + 1}"
        records.append(_record(row, path, place, position))
    return AnswerFile(tuple(records), tuple(damaged))


def _record(row: Any, path: Path, place: str, position: int) -> AnswerRecord:
    if not isinstance(row, dict):
        raise InputError(f"{place.capitalize()} of {path} is not an object with a question id and an answer.")
    text_field = next((name for name in _TEXT_FIELDS if name in row), None)
    if text_field is None:
        raise InputError(
            f"{place.capitalize()} of {path} has no answer: expected a field "
            + ", ".join(f'"{name}"' for name in _TEXT_FIELDS)
            + "."
        )
    text = row[text_field]
    if not isinstance(text, str):
        raise InputError(
            f'{place.capitalize()} of {path}: "{text_field}" must be text, and is {json.dumps(text)[:60]}.'
        )
    identifier = next((row[name] for name in _ID_FIELDS if name in row), None)
    if identifier is not None and (isinstance(identifier, bool) or not isinstance(identifier, int | str)):
        raise InputError(f"{place.capitalize()} of {path}: the question id must be a number or text.")
    if row.get("round_id"):
        raise InputError(
            f"{place.capitalize()} of {path} is round {row['round_id']} of a question whose options were "
            "turned in memory; only files with one round a question can be scored."
        )
    prompt = row.get("prompt", row.get("question"))
    return AnswerRecord(
        identifier, text, text_field != "text", prompt if isinstance(prompt, str) else None, place, position
    )


def _load_mme_folder(folder: Path) -> AnswerFile:
    """One `category.txt` a category, with lines of picture, question, gold answer, answer."""
    records: list[AnswerRecord] = []
    damaged: list[str] = []
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise InputError(f"{folder} holds no text files; expected MME's category.txt files.")
    for file in files:
        for number, line in enumerate(read_text(file).split("\n"), start=1):
            if not line:
                continue
            cells = line.split("\t")
            place = f"line {number} of {file.name}"
            if len(cells) != 4:
                damaged.append(place)
                continue
            identifier = f"{file.stem}/{cells[0]}"
            records.append(AnswerRecord(identifier, cells[3], True, cells[1], place, len(records)))
    return AnswerFile(tuple(records), tuple(damaged))


def match_answers(
    examples: Sequence[Example], file: AnswerFile, keys_of: Callable[[AnswerRecord], Sequence[str]]
) -> Matched:
    """Finds the example of every answer.

    Args:
        examples: All questions that were asked.
        file: The answers.
        keys_of: The task's `record_keys`.

    Raises:
        InputError: If a question has two different answers, or no answer belongs to any question, or stored
            prompts ask other questions of the same numbers.
    """
    index: dict[str, str | None] = {}
    for example in examples:
        for alias in example.aliases:
            index[alias] = None if alias in index else example.key
    index.update({example.key: example.key for example in examples})
    twins: dict[str, list[str]] = {}
    for example in examples:
        if example.twin:
            twins.setdefault(example.twin, []).append(example.key)
    found: dict[str, AnswerRecord] = {}
    unknown: list[str] = []
    repeated: dict[str, None] = {}
    conflicts: dict[str, str] = {}
    for record in file.records:
        key = next((index[k] for k in keys_of(record) if index.get(k) is not None), None)
        if key is None:
            unknown.append(str(record.question_id) if record.question_id is not None else record.place)
            continue
        if key in found:
            key = next((twin for twin in twins.get(key, ()) if twin not in found), key)
        if key in found:
            repeated[key] = None
            if found[key].text != record.text:
                conflicts[key] = f"{record.question_id} ({found[key].place} and {record.place})"
        found[key] = record
    for first, others in twins.items():
        if first in found:
            found.update({other: found[first] for other in others if other not in found})
    if conflicts:
        raise InputError(
            f"{len(conflicts)} questions have two different answers: {name_some(list(conflicts.values()))}; "
            "each question needs one."
        )
    if not found:
        several = [k for record in file.records for k in keys_of(record) if k in index and index[k] is None]
        if several:
            raise InputError(
                f"{len(several)} answers have numbers that stand for several questions each "
                f"({name_some(several)}): give the question file that they were made with, too (--questions)."
            )
        raise InputError(
            f"None of the {len(file.records)} answers belongs to any of the {len(examples)} questions "
            f"({name_some(unknown)} against {name_some([e.question_id for e in examples])}); "
            "are they of another split or benchmark?"
        )
    shared = {key for first, rest in twins.items() for key in (first, *rest)}
    reworded = _check_prompts(examples, found, shared)
    answers = {example.key: found[example.key].text for example in examples if example.key in found}
    return Matched(
        answers=answers,
        as_written=frozenset(key for key, record in found.items() if record.as_written),
        missing=tuple(e.key for e in examples if e.key not in found and not e.optional),
        unknown=tuple(unknown),
        repeated=tuple(repeated),
        empty=tuple(key for key, text in answers.items() if not text.strip()),
        long=tuple(key for key, text in answers.items() if len(text) > LONG_ANSWER),
        foreign=tuple(key for key, text in answers.items() if has_foreign_letters(text)),
        reworded=reworded,
        damaged=file.damaged,
    )


def _check_prompts(
    examples: Sequence[Example], found: Mapping[str, AnswerRecord], shared: Collection[str]
) -> tuple[str, ...]:
    """Sees that answers that say what was asked belong to those questions, whatever key found them.

    A prompt may wrap its question as it likes, in options, hints, OCR tokens and instructions.

    Args:
        examples: All questions.
        found: The answers, by the key of their question.
        shared: Keys of questions whose one number and answers are several questions'.

    Returns:
        Keys whose prompt does not hold their question, nor another one that was asked.

    Raises:
        InputError: If a prompt asks another of the questions, or more than half do not hold theirs.
    """
    asked = {words for example in examples for words in _questions_in(example.question)}
    told = 0
    others: list[tuple[Example, AnswerRecord]] = []
    strangers: list[tuple[Example, AnswerRecord]] = []
    for example in examples:
        record, own = found.get(example.key), _questions_in(example.question)
        if record is None or not record.prompt or not own or example.key in shared:
            continue
        told += 1
        known = (*own, _words(example.llava_prompt)) if example.llava_prompt else own
        if not any(words in _words(record.prompt) for words in known):
            strangers.append((example, record))
            if any(words in asked for line in record.prompt.split("\n") for words in _questions_in(line)):
                others.append((example, record))
    refused = others or (strangers if 2 * len(strangers) > told else [])
    if refused:
        example, record = refused[0]
        raise InputError(
            f"{len(refused)} of {told} answers were given to other questions of the same numbers "
            f"({record.place}: {record.prompt!r}, where question {example.question_id} is "
            f"{example.question!r}): give the question file that they were made with (--questions), or leave "
            '"prompt" out of lines that ask the same in other words.'
        )
    return tuple(example.key for example, _ in strangers)


def _questions_in(text: str) -> tuple[str, ...]:
    """What a text asks, as `_words` has it: up to its first question mark, and the last line that has one.

    The instruction behind a question may be another one in a prompt, and so may the context before it.
    """
    lines = [line for line in text.split("\n") if _MARK.search(line)]
    parts = dict.fromkeys(_words(_MARK.split(part)[0]) for part in (text, *lines[-1:]))
    return tuple(part for part in parts if part.strip())


def _words(text: str) -> str:
    """Lower-case words between single spaces, and one at either end, so that words are found whole."""
    return f" {' '.join(_WORD.findall(text.lower()))} "


def has_foreign_letters(text: str) -> bool:
    """Whether a text has letters of another script than Latin."""
    if text.isascii():
        return False
    return any(
        c.isalpha() and not unicodedata.name(c, "").startswith(("LATIN", "FULLWIDTH LATIN")) for c in text
    )


def _distinct(path: Path) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice = [key for key, count in counts.items() if count > 1]
            raise InputError(f"{path} has {len(twice)} keys twice ({name_some(twice)}).")
        return made

    return build
