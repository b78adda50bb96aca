"""Answers that others stored, against files that differ a little from the official ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.answers import InputError
from eval.rescore import main as rescore
from eval.task import SHORT_ANSWER
from eval.tasks import load_task


def put(path: Path, content: Any, lines: bool = False) -> Path:
    text = "".join(f"{json.dumps(row)}\n" for row in content) if lines else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def mme_records(pictures: int) -> list[dict[str, str]]:
    return [
        {
            "category": "landmark",
            "image_path": f"landmark/images/{number:02d}.jpg",
            "question": f"Is this {place}? Please answer yes or no.",
            "answer": answer,
        }
        for number in range(pictures)
        for place, answer in (("a bridge", "Yes"), ("a museum", "No"))
    ]


def mme_answers(pictures: int, ending: str = SHORT_ANSWER) -> list[dict[str, str]]:
    return [
        {
            "question_id": row["image_path"],
            "prompt": row["question"].replace(" Please answer yes or no.", "") + ending,
            "text": row["answer"],
        }
        for row in mme_records(pictures)
    ]


@pytest.mark.parametrize(
    "ending", [SHORT_ANSWER, "", " Please answer yes or no.", "  Please answer yes or no." + SHORT_ANSWER]
)
def test_mme_answers_find_their_question_whatever_instruction_follows_it(tmp_path: Path, ending: str) -> None:
    gold = put(tmp_path / "mme.json", mme_records(2))
    stored = put(tmp_path / "a.jsonl", mme_answers(2, ending), lines=True)
    made = tmp_path / "made.json"
    words = ["--task", "MME", "--annotations", str(gold), "--answers", str(stored), "--json", str(made)]
    assert rescore(words) == 0
    assert json.loads(made.read_text())["figures"]["perception"]["value"] == 200.0


def test_mmes_questions_without_a_gold_answer_are_left_out_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Copies of MME lack a few pictures that LLaVA's question file asks about."""
    gold = put(tmp_path / "mme.json", mme_records(29))
    answers = mme_answers(30)
    answers[-1]["text"] = "Yes"  # wrong, and not counted
    stored = put(tmp_path / "a.jsonl", answers, lines=True)
    asked = [{"question_id": row["question_id"], "text": row["prompt"]} for row in answers]
    questions = put(tmp_path / "q.jsonl", asked, lines=True)
    made = tmp_path / "made.json"
    words = ["--task", "mme", "--questions", str(questions), "--annotations", str(gold)]
    assert rescore([*words, "--answers", str(stored), "--json", str(made)]) == 0
    printed = capsys.readouterr().out
    assert (
        "2 questions without a gold answer, left out of every figure: landmark/29 Is this a bridge?"
        in printed
    )
    assert "answered: 58 of 58 questions" in printed
    content = json.loads(made.read_text())
    assert (content["figures"]["landmark"]["value"], content["figures"]["landmark"]["n"]) == (200.0, 58)
    assert content["coverage"]["unlabelled"]["count"] == 2
    with pytest.raises(InputError, match=r"40 of 60 questions .* are not in"):
        load_task("mme").load_examples(questions, put(tmp_path / "other.json", mme_records(10)))


def test_vqav2s_annotations_alone_are_enough_for_scoring_and_not_for_asking(tmp_path: Path) -> None:
    people = [{"answer": "dog", "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)]
    rows = [
        {"question_id": n, "image_id": 9, "answers": people, "answer_type": "other", "question_type": "what"}
        for n in (1, 2)
    ]
    gold = put(tmp_path / "gold.json", {"annotations": rows, "data_subtype": "val2014"})
    stored = put(
        tmp_path / "r.json", [{"question_id": 1, "answer": "dog"}, {"question_id": 2, "answer": "cat"}]
    )
    made = tmp_path / "made.json"
    words = ["--task", "vqav2", "--answers", str(stored), "--json", str(made)]
    for named in (["--annotations", str(gold)], ["--questions", str(gold), "--annotations", str(gold)]):
        assert rescore([*words, *named]) == 0
        assert json.loads(made.read_text())["figures"]["accuracy"]["value"] == 50.0
    task = load_task("vqav2")
    example = task.load_examples(None, gold)[0]
    assert example.image == "COCO_val2014_000000000009.jpg"
    with pytest.raises(InputError, match="Nothing says what question 1 of vqav2 is; give its question file"):
        task.prompt(example)


def test_gqa_as_a_list_of_records_with_pictures(tmp_path: Path) -> None:
    rows = [{"question_id": 7, "image": "n1.jpg", "question": "Is it?", "answer": "yes"}]
    gold = put(tmp_path / "testdev_balanced_questions.json", rows)
    example = load_task("gqa").load_examples(gold, gold)[0]
    assert (example.key, example.image, example.answers) == ("7", "n1.jpg", ("yes",))
    with pytest.raises(InputError, match=r'Question 7 of .* lacks "image"'):
        load_task("gqa").load_examples(None, put(gold, [{k: rows[0][k] for k in rows[0] if k != "image"}]))
