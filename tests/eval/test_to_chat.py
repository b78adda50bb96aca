"""Benchmarks' questions as training conversations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.task import Example, choose_answer
from eval.tasks import load_task
from eval.to_chat import build_records, main
from llm_integration.data import parse_record

CSV = """question,answer,image_id
what is red,bag,image1
how many,3,image2
what is big,"bed, lamp",image1
"""


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "train.csv"
    path.write_text(CSV)
    return path


def test_daquar_becomes_llavas_records(questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "chat.json"
    assert main(["--task", "daquar", "--questions", str(questions), "--out", str(out)]) == 0
    records = [parse_record(raw, "r") for raw in json.loads(out.read_text())]
    assert [record.pictures for record in records] == [("image1.jpg",), ("image2.jpg",), ("image1.jpg",)]
    task = load_task("daquar")
    for record, example in zip(records, task.load_examples(questions, None), strict=True):
        user, model = record.messages
        assert user["content"] == "<image>\n" + task.prompt(example)
        assert model["content"] == example.answers[0]


def test_questions_about_one_picture_share_a_conversation(questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "chat.json"
    words = ["--task", "daquar", "--questions", str(questions), "--out", str(out)]
    assert main([*words, "--turns", "2", "--protocol", "bare"]) == 0
    first, second = (parse_record(raw, "r") for raw in json.loads(out.read_text()))
    said = [message["content"] for message in first.messages]
    assert said == ["<image>\nwhat is red", "bag", "what is big", "bed, lamp"]
    assert len(second.messages) == 2
    assert main([*words, "--turns", "1"]) == 0
    assert len(json.loads(out.read_text())) == 3


def test_the_answer_of_most_people() -> None:
    assert choose_answer(("red", "blue", "blue", "red", "red")) == "red"
    assert choose_answer(("red", "blue")) == "red"


def test_questions_about_videos_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"question_id": n, "question": f"q {n}?", "answer": "B", "data_type": kind, "data_id": f"{n}.jpg"}
        | {f"choice_{letter}": letter for letter in "abcd"}
        for n, kind in enumerate(("image", "video", "image"))
    ]
    file, out = tmp_path / "SEED.json", tmp_path / "chat.json"
    file.write_text(json.dumps({"questions": rows}))
    assert main(["--task", "seedbench", "--annotations", str(file), "--out", str(out)]) == 0
    assert [record["image"] for record in json.loads(out.read_text())] == ["0.jpg", "2.jpg"]
    assert "1 questions without a picture are left out" in capsys.readouterr().err


def test_what_cannot_be_learned_from_is_refused(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = load_task("daquar")
    with pytest.raises(ValueError, match="Question 7 of daquar has no gold answer"):
        build_records(task, [Example("7", 7, "what", "a.jpg")], "bare", 1)
    with pytest.raises(ValueError, match="holds an <image> mark"):
        build_records(task, [Example("7", 7, "what <image>", "a.jpg", ("x",))], "bare", 1)
    words = ["--task", "daquar", "--questions", str(questions), "--out", str(tmp_path / "c.json")]
    assert main([*words, "--turns", "0"]) == 2
    assert main([*words, "--out", str(tmp_path)]) == 2
    whole = questions.read_bytes()
    assert main([*words, "--out", str(questions)]) == 2
    assert questions.read_bytes() == whole
    assert main([*words, "--protocol", "lmms-eval"]) == 2
    assert main([*words, "--images", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert "at least 1" in printed
    assert f"--out {tmp_path} is a folder; name a file." in printed
    assert f"--out {questions} is named for something else, too; name another file." in printed
    assert "no prompt protocol 'lmms-eval'" in printed
    assert "image1.jpg" in printed
    assert not (tmp_path / "c.json").exists()
