"""Question files that several benchmarks share: LLaVA's JSON lines and the VQA v2 format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.answers import InputError, read_json_or_lines
from eval.shapes import MisfitError, Shape, identifier, maybe, text
from eval.task import OPTION_LETTER, SHORT_ANSWER

# What a row of LLaVA's question files may have besides.
LLAVA_ROW = {"image": maybe(text), "category": text}


@dataclass(frozen=True)
class Question:
    """A row of a question file; `llava_prompt` is set where the file holds LLaVA's prompts."""

    question_id: int | str
    text: str
    image: str | None = None
    category: str = ""
    llava_prompt: str | None = None


def bare_question(prompt: str) -> str:
    """LLaVA's prompt without its instruction line."""
    for ending in (SHORT_ANSWER, OPTION_LETTER):
        if prompt.endswith(ending):
            return prompt[: -len(ending)]
    return prompt


def is_llava_file(content: Any) -> bool:
    """Whether parsed content is LLaVA's question file: rows with "question_id", "text" and no gold answer."""
    return (
        isinstance(content, list)
        and bool(content)
        and isinstance(content[0], dict)
        and {"question_id", "text"} <= content[0].keys()
        and not content[0].keys() & {"label", "answer", "answers"}
    )


def llava_questions(content: list[dict[str, Any]], path: Path) -> list[Question]:
    """The rows of LLaVA's question file."""
    rows = []
    for number, row in enumerate(content, start=1):
        need(row, {"question_id": identifier, "text": text}, path, f"row {number}", LLAVA_ROW)
        prompt = row["text"]
        rows.append(
            Question(
                row["question_id"], bare_question(prompt), row.get("image"), row.get("category", ""), prompt
            )
        )
    return rows


def load_vqa_questions(path: Path, content: Any = None) -> list[Question]:
    """Reads VQA v2's question JSON, or LLaVA's question file for the same benchmark."""
    content = read_json_or_lines(path) if content is None else content
    if is_llava_file(content):
        return llava_questions(content, path)
    if isinstance(content, dict) and "questions" in content:
        subset = str(content.get("data_subtype", ""))
        rows = []
        for number, row in enumerate(rows_of(content, "questions", path), start=1):
            known = {"question_id": identifier, "question": text}
            maybe_known = {"image": maybe(text), "image_id": maybe(identifier)}
            need(row, known, path, f"question {number}", maybe_known)
            image = row.get("image") or coco_picture(row.get("image_id"), subset)
            rows.append(Question(row["question_id"], row["question"], image))
        return rows
    raise InputError(
        f"{path} is no question file: expected VQA v2's {{\"questions\": […]}} or LLaVA's lines with "
        '"question_id", "image" and "text".'
    )


def coco_picture(image_id: int | str | None, subset: str) -> str | None:
    """COCO's file name of a picture: `COCO_val2014_000000000042.jpg`."""
    if image_id is None or isinstance(image_id, str):
        return image_id
    if not subset:
        return f"{image_id:012d}.jpg"
    # test-dev questions ask about test2015 pictures.
    return f"COCO_{subset.replace('test-dev', 'test')}_{image_id:012d}.jpg"


def need(
    row: Any, shapes: Mapping[str, Shape], path: Path, place: str, optional: Mapping[str, Shape] | None = None
) -> None:
    """Sees that a row of a file is an object with fields of the right kinds.

    Args:
        row: The row.
        shapes: Fields it must have.
        path: The file, for the message.
        place: Where the row is in it, for the message.
        optional: Fields it may have.

    Raises:
        InputError: If it is not; names the file, the row and the field.
    """
    if not isinstance(row, dict):
        raise InputError(f"{place.capitalize()} of {path} is not an object.")
    for field, shape in {**shapes, **(optional or {})}.items():
        if field in row:
            try:
                shape(row[field], f'"{field}"')
            except MisfitError as error:
                raise InputError(f"{place.capitalize()} of {path}: {error}.") from None
        elif field in shapes:
            raise InputError(f'{place.capitalize()} of {path} lacks "{field}".')


def rows_of(content: Mapping[str, Any], field: str, path: Path) -> list[Any]:
    """The list in a field of a file's object.

    Raises:
        InputError: If it is none.
    """
    rows = content[field]
    if not isinstance(rows, list):
        raise InputError(f'{path}: "{field}" must be a list of rows.')
    return rows


def required(path: Path | None, what: str) -> Path:
    """The path, or an error that says which option is missing."""
    if path is None:
        raise InputError(f"{what} is needed.")
    return path
