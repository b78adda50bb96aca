"""Answer files: every form that is read, and everything that can be wrong with one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eval.answers import (
    AnswerFile,
    AnswerRecord,
    InputError,
    load_answers,
    match_answers,
    name_some,
    read_json,
    read_json_or_lines,
)
from eval.task import OPTION_LETTER, SHORT_ANSWER, Example

EXAMPLES = [Example(str(n), n, f"question {n}", None, answers=("yes",)) for n in range(4)]


def write(path: Path, content: Any) -> Path:
    text = content if isinstance(content, str) else "".join(f"{json.dumps(row)}\n" for row in content)
    path.write_text(text, encoding="utf-8")
    return path


def by_id(record: AnswerRecord) -> tuple[str, ...]:
    return (str(record.question_id),)


def answers_of(*rows: tuple[int, str]) -> AnswerFile:
    return AnswerFile(tuple(AnswerRecord(key, text, place=f"line {key}") for key, text in rows))


def test_reads_llava_lines_results_json_predictions_and_mappings(tmp_path: Path) -> None:
    lines = load_answers(write(tmp_path / "a.jsonl", [{"question_id": 1, "prompt": "p", "text": "Yes"}]))
    assert lines.records[0].prompt == "p"
    assert (lines.records[0].question_id, lines.records[0].text, lines.records[0].as_written) == (
        1,
        "Yes",
        False,
    )
    results = load_answers(write(tmp_path / "a.json", json.dumps([{"question_id": 1, "answer": "yes"}])))
    assert results.records[0].as_written
    gqa = load_answers(write(tmp_path / "g.json", json.dumps([{"questionId": "7", "prediction": "yes"}])))
    assert (gqa.records[0].question_id, gqa.records[0].as_written) == ("7", True)
    graded = load_answers(write(tmp_path / "m.json", json.dumps({"v1_0": "x", "v1_1": "y"})))
    assert [r.question_id for r in graded.records] == ["v1_0", "v1_1"]


def test_reads_mmes_text_folder(tmp_path: Path) -> None:
    write(tmp_path / "count.txt", "1.jpg\tAre there two?\tYes\tYes\n1.jpg\tAre there three?\tNo\n")
    file = load_answers(tmp_path)
    assert [r.question_id for r in file.records] == ["count/1.jpg"]
    assert file.damaged == ("line 2 of count.txt",)


def test_a_half_written_line_is_named_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(
        path,
        '{"question_id": 1, "text": "a"}\n{"question_id": 2, "te\n{"question_id": 3, "text": "b"}\n{"quest',
    )
    file = load_answers(path)
    assert [r.question_id for r in file.records] == [1, 3]
    assert file.damaged == ("line 2", "line 4")
    assert file.records[1].place == "line 3"


def test_lines_may_end_in_a_comma(tmp_path: Path) -> None:
    """SEED-Bench publishes its answers so."""
    path = write(
        tmp_path / "a.json", '{"question_id": "1", "prediction": "A"},\n{"question_id": "2", "predi\n'
    )
    file = load_answers(path)
    assert [(r.question_id, r.text) for r in file.records] == [("1", "A")]
    assert file.damaged == ("line 2",)


def test_a_line_separator_inside_an_answer_does_not_end_the_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        '{"question_id": 1, "text": "a\u2028b\u0085c"}\n{"question_id": 2, "text": ""}\n',
    )
    assert [r.text for r in load_answers(path).records] == ["a\u2028b\u0085c", ""]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hello", "neither JSON nor JSON lines"),
        ('[{"question_id": 1}]', "has no answer"),
        ('[{"question_id": 1, "text": 5}]', 'Answer 1 of .*"text" must be text, and is 5'),
        ('[{"question_id": 1, "text": null}]', "must be text, and is null"),
        ('[{"question_id": [1], "text": "a"}]', "must be a number or text"),
        ("[1]", "is not an object"),
        ("3", "holds no list of answers"),
        ('{"questions": []}', "not an answer file"),
        ('{"question_id": 1, "round_id": 2, "text": "A"}', "round 2"),
    ],
)
def test_refuses_what_is_no_answer_file(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_answers(write(tmp_path / "a.json", content))


def test_refuses_missing_files_folders_and_bytes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_answers(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="no text files"):
        load_answers(tmp_path)
    (tmp_path / "b").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(InputError, match="not UTF-8"):
        load_answers(tmp_path / "b")


def test_counts_missing_unknown_repeated_empty_long_and_foreign() -> None:
    file = answers_of((0, ""), (1, "собака" * 300), (2, "yes"), (2, "yes"), (9, "yes"), (8, "Café"))
    matched = match_answers(EXAMPLES, file, by_id)
    assert matched.missing == ("3",)
    assert matched.unknown == ("9", "8")
    assert matched.repeated == ("2",)
    assert matched.empty == ("0",)
    assert matched.long == matched.foreign == ("1",)


def test_accents_are_latin() -> None:
    assert match_answers(EXAMPLES, answers_of((0, "Café ½ über 5€")), by_id).foreign == ()


def test_two_different_answers_to_one_question_are_refused() -> None:
    with pytest.raises(InputError, match=r"1 questions have two different answers: 2 \(line 2 and line 2\)"):
        match_answers(EXAMPLES, answers_of((2, "yes"), (2, "no")), by_id)


def test_answers_to_other_questions_of_the_same_numbers_are_refused() -> None:
    def told(*prompts: str | None) -> AnswerFile:
        return AnswerFile(
            tuple(AnswerRecord(n, "yes", prompt=p, place=f"line {n}") for n, p in enumerate(prompts))
        )

    numbered = [replace(example, key=f"split/{example.key}", aliases=(example.key,)) for example in EXAMPLES]
    mine = [f" QUESTION  {n}\nAnswer in one word." for n in range(4)]
    assert len(match_answers(numbered, told(*mine), by_id).answers) == 4
    assert len(match_answers(numbered, told("reworded", "too", *mine[2:]), by_id).answers) == 4
    assert len(match_answers(numbered, told(None, None, *mine[2:]), by_id).answers) == 4
    with pytest.raises(
        InputError,
        match=r"3 of 4 answers were given to other .*line 1: 'cats', where question 1 is 'question 1'",
    ):
        match_answers(numbered, told(mine[0], "cats", "dogs", "birds"), by_id)
    # Nor are they taken under a question's own key.
    assert len(match_answers(EXAMPLES, told(*mine), by_id).answers) == 4
    with pytest.raises(InputError, match=r"4 of 4 answers were given to other questions"):
        match_answers(EXAMPLES, told("a", "b", "c", "d"), by_id)


def test_an_answer_to_another_question_of_the_benchmark_is_refused_alone() -> None:
    """Whatever key found it, and however its question is wrapped."""

    def told(*prompts: str) -> AnswerFile:
        return AnswerFile(
            tuple(AnswerRecord(n, "yes", prompt=p, place=f"line {n}") for n, p in enumerate(prompts))
        )

    animals = ("cat", "dog", "cow", "hen")
    questions = [replace(e, question=f"Is there a {a}?") for e, a in zip(EXAMPLES, animals, strict=True)]
    right = [f"Is there a {animal}?{SHORT_ANSWER}" for animal in animals]
    assert match_answers(questions, told(*right), by_id).reworded == ()
    swapped = f"Context: in a field\nis there a dog? There are several options:\nA. yes{OPTION_LETTER}"
    with pytest.raises(
        InputError, match=r"1 of 4 answers were given .*line 2: .* where question 2 is 'Is there a cow\?'"
    ):
        match_answers(questions, told(*right[:2], swapped, right[3]), by_id)
    # The same in other words is no other question, and is said; most of them are no chance.
    cow = "Do you see a cow?"
    assert match_answers(questions, told(*right[:2], cow, right[3]), by_id).reworded == ("2",)
    with pytest.raises(InputError, match=r"3 of 4 .* or leave \"prompt\" out of lines that ask the same in"):
        match_answers(questions, told(right[0], "Do you see a dog?", cow, "Do you see a hen?"), by_id)


@pytest.mark.parametrize(
    ("question", "prompt"),
    [
        ("what does it say?", "OCR tokens: A, B. Question: What does it say? Short answer:"),
        ("what does it say", "What does it say\nReference OCR token: IS, THERE, A, CAT?" + SHORT_ANSWER),
        ("What's this?", "what’s  this?\nAnswer in one word."),
        ("Which is red?", "<image>\nContext: Is one green? Two of them.\nWhich is red?\nA. a\nB. b"),
        ("Context: Is one green?\nWhich is red?", "Which is red?\nA. a\nB. b" + OPTION_LETTER),
        ("Is it here? Please answer yes or no.", "Is it here?" + SHORT_ANSWER),
        ("这是什么\uff1f请回答。", "这是什么\uff1f\n请直接回答选项字母。"),
        ("Why?", "First, think step by step to answer: \n\nWhy?"),
        ("???", "anything"),
        ("as the gold file has it", "As LLaVA's file has it.\nAnd so on."),
    ],
)
def test_a_prompts_wrapping_makes_no_other_question(question: str, prompt: str) -> None:
    asked = replace(EXAMPLES[0], question=question, llava_prompt="As LLaVA's file has it.")
    other = replace(EXAMPLES[1], question="Is there a cat?")
    file = AnswerFile((AnswerRecord(0, "yes", prompt=prompt),))
    assert match_answers([asked, other], file, by_id).reworded == ()


@pytest.mark.parametrize(("question", "prompt"), [("Is it 1?", "Is it 12?"), ("Art here?", "Part here?")])
def test_a_question_is_found_in_whole_words(question: str, prompt: str) -> None:
    asked = [replace(EXAMPLES[0], question=question), *EXAMPLES[1:]]
    rest = tuple(AnswerRecord(n, "yes", prompt=f"question {n}") for n in (1, 2, 3))
    file = AnswerFile((AnswerRecord(0, "yes", prompt=prompt), *rest))
    assert match_answers(asked, file, by_id).reworded == ("0",)


def test_prompts_under_a_number_that_two_questions_have_are_not_held_against_either() -> None:
    """SEED-Bench's 49914: one answer is both questions'."""
    first = Example("7", 7, "Is it red?", None, answers=("A",))
    second = replace(first, key="7#2", question="Is it blue?", twin="7")
    file = AnswerFile((AnswerRecord(7, "A", prompt="Is it red?"),))
    matched = match_answers([first, second], file, by_id)
    assert (dict(matched.answers), matched.reworded) == ({"7": "A", "7#2": "A"}, ())


def test_numbers_that_stand_for_several_questions_are_no_other_split() -> None:
    twice = [Example(f"{part}/1", 1, "q", None, aliases=("1",)) for part in ("a", "b")]
    with pytest.raises(
        InputError, match=r"1 answers have numbers that stand for several questions each \(1\)"
    ):
        match_answers(twice, answers_of((1, "yes"), (7, "no")), by_id)


def test_answers_to_another_split_are_refused() -> None:
    with pytest.raises(InputError, match="None of the 2 answers belongs to any of the 4 questions"):
        match_answers(EXAMPLES, answers_of((10, "yes"), (11, "no")), by_id)


def test_an_alias_of_two_examples_finds_neither() -> None:
    twins = [Example("a/1", 1, "", None, aliases=("1",)), Example("b/1", 1, "", None, aliases=("1",))]
    matched = match_answers([*twins, EXAMPLES[0]], answers_of((1, "x"), (0, "y")), by_id)
    assert matched.unknown == ("1",)


def test_optional_examples_are_not_missed() -> None:
    video = Example("v", "v", "", None, optional=True)
    assert match_answers([EXAMPLES[0], video], answers_of((0, "yes")), by_id).missing == ()


def test_name_some() -> None:
    assert name_some([1, 2]) == "1, 2"
    assert name_some(range(8)) == "0, 1, 2, 3, 4 and 3 more"


def test_only_answers_that_tell_their_question_are_held_against_it() -> None:
    def told(*prompts: str | None) -> AnswerFile:
        return AnswerFile(tuple(AnswerRecord(n, "yes", prompt=p) for n, p in enumerate(prompts)))

    numbered = [replace(example, key=f"split/{example.key}", aliases=(example.key,)) for example in EXAMPLES]
    assert len(match_answers(numbered, told(None, None, None, "question 3"), by_id).answers) == 4
    with pytest.raises(InputError, match="2 of 2 answers were given to other questions"):
        match_answers(numbered, told(None, None, "cats", "dogs"), by_id)
    silent = [replace(example, question="") for example in numbered[:2]] + numbered[2:]
    with pytest.raises(InputError, match="2 of 2 answers were given to other questions"):
        match_answers(silent, told("cats", "dogs", "cats", "dogs"), by_id)


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "1" * 5000])
def test_what_json_cannot_be_read_is_said_in_a_sentence(content: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"scores\.json is not JSON \("):
        read_json(path)


def test_a_number_of_too_many_digits_is_no_json_line(tmp_path: Path) -> None:
    digits = "1" * 5000
    path = write(tmp_path / "a.jsonl", f'{{"question_id": 1}}\n{{"question_id": {digits}}}\n')
    with pytest.raises(InputError, match=r"Line 2 of .*a\.jsonl is not whole JSON"):
        read_json_or_lines(path)
    path.write_text(digits)
    with pytest.raises(InputError, match="is neither JSON nor JSON lines"):
        read_json_or_lines(path)
