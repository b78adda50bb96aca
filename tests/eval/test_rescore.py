"""The rescoring and comparing commands, end to end on files."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.compare import compare_groups, compare_scores
from eval.compare import main as compare
from eval.intervals import bootstrap_mean, grouped_figure
from eval.report import main as report
from eval.rescore import main as rescore


def put(path: Path, rows: list[dict[str, Any]], tail: str = "") -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + tail, encoding="utf-8")
    return path


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    """An easy-VQA question file with ten questions."""
    path = tmp_path / "questions.json"
    path.write_text(json.dumps([[f"is it {n}?", "yes", n] for n in range(10)]))
    return path


def answers(*texts: str) -> list[dict[str, Any]]:
    return [{"question_id": n, "text": text} for n, text in enumerate(texts)]


def test_prints_a_table_and_writes_json(
    quiz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = put(
        tmp_path / "a.jsonl", [*answers(*["yes"] * 7, "no", "", "нет"), {"question_id": 77, "text": "yes"}]
    )
    made = tmp_path / "out/scores.json"
    arguments = [
        "--task",
        "easy-vqa",
        "--questions",
        str(quiz),
        "--answers",
        str(stored),
        "--json",
        str(made),
    ]
    assert rescore(arguments) == 0
    printed = capsys.readouterr().out
    assert "accuracy     70.00%      39.68 ...  89.22       10  exact match (wilson)" in printed
    assert "answered: 10 of 10 questions" in printed
    assert "1 answers to questions that were not asked, left out: 77" in printed
    assert "1 empty answers, which the rule reads as wrong: 8" in printed
    assert "1 answers with letters of another script than Latin: 9" in printed
    content = json.loads(made.read_text())
    assert content["figures"]["accuracy"]["value"] == 70.0
    assert content["units"]["7"] == 0.0
    assert content["coverage"]["unknown"] == {"count": 1, "first": ["77"]}
    origin = content.pop("provenance")
    assert origin["command"].startswith("python -m eval.rescore --task easy-vqa")
    assert len(origin["config_sha256"]) == 64
    assert rescore(arguments) == 0
    assert {**json.loads(made.read_text()), "provenance": None} == {**content, "provenance": None}


def test_answers_whose_prompt_asks_something_else_are_refused_or_named(
    quiz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """easy-VQA's ids are places in its file, which every file of answers has."""
    rows = [{**row, "prompt": f"Is it {row['question_id']}?"} for row in answers(*["yes"] * 10)]
    words = ["--task", "easy_vqa", "--questions", str(quiz), "--answers", str(tmp_path / "a.jsonl")]
    rows[3]["prompt"] = "Tell whether it is 3."
    put(tmp_path / "a.jsonl", rows)
    assert rescore([*words, "--json", str(tmp_path / "made.json")]) == 0
    said = "1 answers whose stored prompt does not hold their question, scored like all others: 3"
    assert said in capsys.readouterr().out
    coverage = json.loads((tmp_path / "made.json").read_text())["coverage"]
    assert coverage["reworded"] == {"count": 1, "first": ["3"]}
    rows[3]["prompt"] = "is it 4?"
    put(tmp_path / "a.jsonl", rows)
    assert rescore(words) == 2
    assert (
        "1 of 10 answers were given to other questions of the same numbers (line 4: 'is it 4?', where "
        "question 3 is 'is it 3?')" in capsys.readouterr().err
    )


def test_holes_are_refused_or_scored_around(
    quiz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = put(tmp_path / "a.jsonl", answers(*["yes"] * 8), '{"question_id": 8, "te')
    arguments = ["--task", "easy_vqa", "--questions", str(quiz), "--answers", str(stored)]
    assert rescore(arguments) == 2
    error = capsys.readouterr().err
    assert "2 of 10 questions have no answer in" in error
    assert "(8, 9); not whole: line 9" in error
    assert rescore([*arguments, "--allow-missing"]) == 0
    printed = capsys.readouterr().out
    assert "100.00%" in printed
    assert "answered: 8 of 10 questions" in printed
    assert "every figure is over the answered questions only" in printed
    assert "only (--allow-missing)" not in printed  # eval.run, which has no such option, says it too
    assert "1 lines that are not whole, left out: line 9" in printed


def test_wrong_calls_end_with_one_sentence(
    quiz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = str(put(tmp_path / "a.jsonl", answers(*["yes"] * 10)))
    common = ["--questions", str(quiz), "--answers", stored]
    assert rescore(["--task", "easyvqu", *common]) == 2
    assert capsys.readouterr().err.startswith(
        "error: There is no benchmark 'easyvqu'; did you mean 'easy_vqa'?"
    )
    assert rescore(["--task", "easy_vqa", *common, "--submission", str(tmp_path / "s.json")]) == 2
    assert "has no submission format" in capsys.readouterr().err
    assert not (tmp_path / "s.json").exists()


def test_writes_submissions_where_the_gold_answers_are_hidden(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {
            "question_id": 5,
            "image": "v.jpg",
            "text": "What?\nAnswer the question using a single word or phrase.",
        }
    ]
    questions = put(tmp_path / "q.jsonl", rows)
    stored = put(tmp_path / "a.jsonl", [{"question_id": 5, "text": "A Dog."}])
    common = ["--task", "vqav2", "--questions", str(questions), "--answers", str(stored)]
    assert rescore(common) == 2
    assert "Pass --submission FILE" in capsys.readouterr().err
    assert rescore([*common, "--submission", str(tmp_path / "s.xlsx")]) == 2
    assert "submission is a .json file" in capsys.readouterr().err
    assert rescore([*common, "--submission", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text()) == [{"question_id": 5, "answer": "dog"}]


def test_compares_two_runs(quiz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = []
    for name, texts in (("a", ["yes"] * 4 + ["no"] * 6), ("b", ["no"] + ["yes"] * 9)):
        stored = put(tmp_path / f"{name}.jsonl", answers(*texts))
        made.append(tmp_path / name / "scores.json")
        assert (
            rescore(
                [
                    "--task",
                    "easy_vqa",
                    "--questions",
                    str(quiz),
                    "--answers",
                    str(stored),
                    "--json",
                    str(made[-1]),
                ]
            )
            == 0
        )
    capsys.readouterr()
    assert compare([str(made[0].parent), str(made[1]), "--json", str(tmp_path / "c.json")]) == 0
    printed = capsys.readouterr().out
    assert "B - A  +50.00 points" in printed
    assert "only A right: 1, only B right: 6, McNemar exact p = 0.125" in printed
    assert json.loads((tmp_path / "c.json").read_text())["p"] == 0.125

    short = json.loads(made[0].read_text())
    del short["units"]["9"]
    other = tmp_path / "short.json"
    other.write_text(json.dumps(short))
    assert compare([str(made[1]), str(other)]) == 2
    assert "1 questions were answered by one of the runs only" in capsys.readouterr().err
    assert compare([str(made[1]), str(other), "--allow-missing"]) == 0
    assert "1 questions that only one of the runs answered were left out" in capsys.readouterr().out
    other.write_text(json.dumps({**short, "task": "gqa"}))
    assert compare([str(made[1]), str(other)]) == 2
    assert "The runs differ in task: 'easy_vqa' and 'gqa'" in capsys.readouterr().err
    for score in ("1", None, 40, float("nan")):
        other.write_text(json.dumps({**short, "units": {**short["units"], "3": score}}))
        assert compare([str(made[1]), str(other)]) == 2
        assert (
            f"short.json: units.3 must be a score of 0 to 1, and is {json.dumps(score)}."
            in capsys.readouterr().err
        )
    other.write_text("{}")
    assert compare([str(made[1]), str(other)]) == 2
    assert "was it written by eval.rescore?" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["vqav2", "textvqa", "vizwiz", "gqa"])
def test_what_is_in_a_submissions_form_is_submitted_as_it_stands(task: str, tmp_path: Path) -> None:
    """EvalAI's processor would make "that 's it" of "that's it"."""
    written = ["that's it", "Dog's", "10:30, 11:00", "No."]
    images = [f"VizWiz_val_{n:08d}.jpg" for n in range(4)]
    people = [[{"answer": text, "answer_id": n} for n in range(10)] for text in written]
    if task == "vqav2":
        rows: Any = {"questions": [{"question_id": n, "image_id": n, "question": "q?"} for n in range(4)]}
        gold: Any = {"annotations": [{"question_id": n, "answers": people[n]} for n in range(4)]}
    elif task == "textvqa":
        gold = [
            {"question_id": n, "image_id": str(n), "question": "q?", "answers": [text] * 10}
            for n, text in enumerate(written)
        ]
        rows = gold = {"data": gold}
    elif task == "vizwiz":
        rows = gold = [
            {"image": i, "question": "q?", "answers": p} for i, p in zip(images, people, strict=True)
        ]
    else:
        rows = gold = {
            str(n): {"question": "q?", "imageId": "1", "answer": text} for n, text in enumerate(written)
        }
    (tmp_path / "q.json").write_text(json.dumps(rows))
    (tmp_path / "a.json").write_text(json.dumps(gold))
    names = {"vizwiz": ("image", "answer"), "gqa": ("questionId", "prediction")}
    key, field = names.get(task, ("question_id", "answer"))
    numbers: Any = images if task == "vizwiz" else [str(n) if task == "gqa" else n for n in range(4)]
    stored = [{key: number, field: text} for number, text in zip(numbers, written, strict=True)]
    files = ["--questions", f"{tmp_path}/q.json", "--annotations", f"{tmp_path}/a.json"]
    answered = tmp_path / "stored.json"
    figures = []
    for _ in range(2):  # what is written is read again
        answered.write_text(json.dumps(stored))
        made, again = tmp_path / "made.json", tmp_path / "again.json"
        words = ["--task", task, *files, "--answers", str(answered), "--json", str(made)]
        assert rescore([*words, "--submission", str(again)]) == 0
        figures.append(json.loads(made.read_text())["figures"]["accuracy"]["value"])
        assert json.loads(again.read_text()) == stored
        stored = json.loads(again.read_text())
    # VizWiz's rule normalises the answer and leaves the people's as they are.
    assert figures == [25.0 if task == "vizwiz" else 100.0] * 2


def test_questions_that_are_asked_again_are_compared_by_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "pope"
    labels.mkdir()
    for name in ("random", "popular", "adversarial"):  # one question a picture, in every category
        rows = [
            {"question_id": n, "image": f"{n}.jpg", "text": f"Is there a {n}?", "label": "yes"}
            for n in range(20)
        ]
        put(labels / f"coco_pope_{name}.json", rows)
    made = []
    for wrong in (0, 6):
        said = [
            {"question_id": f"{name}/{n}", "text": "No" if n < wrong else "Yes"}
            for name in ("random", "popular", "adversarial")
            for n in range(20)
        ]
        stored = put(tmp_path / f"{wrong}.jsonl", said)
        made.append(tmp_path / f"{wrong}.json")
        words = ["--task", "pope", "--annotations", str(labels), "--answers", str(stored)]
        assert rescore([*words, "--json", str(made[-1])]) == 0
    capsys.readouterr()
    low, high = (100 * end for end in bootstrap_mean([-1.0] * 6 + [0.0] * 14))
    assert compare([*map(str, made), "--json", str(tmp_path / "c.json")]) == 0
    told = capsys.readouterr().out
    assert f"-30.00 points, 95 % {low:+.2f} ... {high:+.2f} (paired bootstrap over pictures)" in told
    assert "McNemar's test is for independent questions" in told
    written = json.loads((tmp_path / "c.json").read_text())
    assert (written["n"], written["p"], written["grouped"]) == (60, None, True)
    page, plain = tmp_path / "r.html", tmp_path / "r.md"
    assert report([*map(str, made), "-o", str(page), "--markdown", str(plain)]) == 0
    assert "pictures drawn: no McNemar test" in page.read_text()
    ends = f"\u2212{-low:.1f}, \u2212{-high:.1f}"
    assert f"6: \u221230.0 points \\[{ends}\\] against 0, n = 60." in plain.read_text()  # no "less" besides
    short = json.loads(made[1].read_text())
    del short["units"]["popular/3"]
    made[1].write_text(json.dumps(short))
    assert compare([*map(str, made), "--allow-missing"]) == 0
    assert "1 questions that only one of the runs answered were left out" in capsys.readouterr().out
    for groups in ([], {"random/1": 1}):
        made[1].write_text(json.dumps({**short, "unit_groups": groups}))
        assert compare([*map(str, made)]) == 2
        assert "6.json: unit_groups must be an object of pictures by question." in capsys.readouterr().err


def _easy_vqa(folder: Path, pictures: int, each: int, right: Callable[[int, int], bool]) -> list[str]:
    """Words of `eval.rescore` for so many questions a picture."""
    folder.mkdir()
    rows = [[f"is it {n}?", "yes", picture] for picture in range(pictures) for n in range(each)]
    (folder / "questions.json").write_text(json.dumps(rows))
    said = [
        {"question_id": number, "text": "yes" if right(*divmod(number, each)) else "no"}
        for number in range(len(rows))
    ]
    stored = put(folder / "answers.jsonl", said)
    return ["--task", "easy_vqa", "--questions", str(folder / "questions.json"), "--answers", str(stored)]


def test_questions_about_one_picture_are_not_taken_for_independent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    together, alone = tmp_path / "together.json", tmp_path / "alone.json"
    assert (
        rescore([*_easy_vqa(tmp_path / "a", 40, 5, lambda picture, _: picture < 20), "--json", str(together)])
        == 0
    )
    assert (
        rescore([*_easy_vqa(tmp_path / "b", 40, 1, lambda picture, _: picture < 20), "--json", str(alone)])
        == 0
    )
    capsys.readouterr()
    of_five, of_one = (json.loads(path.read_text()) for path in (together, alone))
    for name in ("accuracy", "yes_no"):
        wide, single = of_five["figures"][name], of_one["figures"][name]
        assert (wide["method"], wide["n"]) == ("bootstrap over pictures", 200)
        assert (single["method"], single["n"]) == ("wilson", 40)
        # Five answers that always agree say no more than one.
        assert wide["high"] - wide["low"] == pytest.approx(single["high"] - single["low"], rel=0.1)
    assert len(set(of_five["unit_groups"].values())) == 40
    assert of_one["unit_groups"] == {}
    assert compare([str(together), str(together)]) == 0
    assert "(paired bootstrap over pictures)" in capsys.readouterr().out
    assert compare([str(alone), str(alone)]) == 0
    assert "McNemar exact p" in capsys.readouterr().out


def test_no_output_takes_the_place_of_a_file_that_is_read(
    quiz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = put(tmp_path / "a.jsonl", answers(*["yes"] * 10))
    words = ["--task", "easy_vqa", "--questions", str(quiz), "--answers", str(stored)]
    made = tmp_path / "made.json"
    assert rescore([*words, "--json", str(made)]) == 0
    kept = {path: path.read_bytes() for path in (stored, quiz, made)}
    again = str(tmp_path / "new" / ".." / "a.jsonl")  # the same file by another name
    assert rescore([*words, "--json", again]) == 2
    assert rescore([*words, "--submission", str(quiz)]) == 2
    assert rescore([*words, "--json", str(made), "--submission", str(made)]) == 2
    assert compare([str(made), str(made), "--json", str(made)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {said} is named for something else, too; name another file."
        for said in (f"--json {again}", f"--submission {quiz}", f"--json {made}", f"--json {made}")
    ]
    assert {path: path.read_bytes() for path in kept} == kept


def test_outputs_that_cannot_be_written_are_said_before_the_work(
    quiz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = str(put(tmp_path / "a.jsonl", answers(*["yes"] * 10)))
    words = ["--task", "easy_vqa", "--questions", str(quiz), "--answers", stored]
    made = tmp_path / "made.json"
    assert rescore([*words, "--json", str(made)]) == 0
    capsys.readouterr()
    below_a_file = f"{stored}/deep/x.json"
    for path, said in ((tmp_path, "is a folder; name a file."), (below_a_file, "cannot be written")):
        for option in ("--json", "--submission"):
            assert rescore([*words, option, str(path)]) == 2
            printed = capsys.readouterr()
            assert f"error: {option} {path} {said}" in printed.err
            assert printed.out == ""
        assert compare([str(made), str(made), "--json", str(path)]) == 2
        printed = capsys.readouterr()
        assert f"error: --json {path} {said}" in printed.err
        assert printed.out == ""
    assert rescore([*words, "--json", str(tmp_path / "new" / "folder" / "x.json")]) == 0

    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "the disk is full")

    monkeypatch.setattr("eval.outputs.write_atomic", full)
    assert rescore([*words, "--json", str(made)]) == 2
    assert f"error: --json {made} cannot be written: the disk is full." in capsys.readouterr().err


def test_runs_of_other_question_files_are_not_compared(
    quiz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keys may be the numbers of rows, which all files have."""
    stored = str(put(tmp_path / "a.jsonl", answers(*["yes"] * 10)))
    rows = json.loads(quiz.read_text())
    made = {}
    for name, content in {
        "a": rows,
        "question": [["is it anything else?", *row[1:]] if row[2] == 3 else row for row in rows],
        "gold": [[row[0], "no", row[2]] if row[2] == 4 else row for row in rows],
        "spaces": [[row[0].upper().replace(" ", "  "), *row[1:]] for row in rows],
    }.items():
        questions = tmp_path / f"{name}.json"
        questions.write_text(json.dumps(content))
        made[name] = tmp_path / name / "scores.json"
        words = ["--task", "easy_vqa", "--questions", str(questions), "--answers", stored]
        assert rescore([*words, "--json", str(made[name])]) == 0
    capsys.readouterr()
    for name, number in (("question", 3), ("gold", 4)):
        assert compare([str(made["a"]), str(made[name])]) == 2
        error = capsys.readouterr().err
        assert "1 questions of the same keys are others in the two runs" in error
        assert f"({number})" in error
        assert compare([str(made[name]), str(made[name])]) == 0
    assert compare([str(made["a"]), str(made["spaces"])]) == 0
    old = json.loads(made["gold"].read_text())
    del old["question_hashes"]  # of a version that did not write them
    made["gold"].write_text(json.dumps(old))
    assert compare([str(made["a"]), str(made["gold"])]) == 0


def test_groups_of_unequal_size_are_compared_by_question() -> None:
    """One picture with eight captions, two with one."""
    first, second, groups = [1] * 8 + [0, 0], [0] * 8 + [1, 1], [0] * 8 + [1, 2]
    made = compare_groups(first, second, groups)
    assert (made.n, made.first, made.second, made.difference) == (10, 80.0, 20.0, pytest.approx(-60.0))
    assert made.p is None
    rng = np.random.default_rng(1)
    sums, counts = np.array([-8, 1, 1]), np.array([8, 1, 1])
    drawn = rng.integers(0, 3, (20_000, 3))
    low, high = np.percentile(100 * sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    assert (made.low, made.high) == (pytest.approx(low, abs=1), pytest.approx(high, abs=1))
    figure = grouped_figure(first, groups)
    assert figure.value == 80.0
    assert (figure.low, figure.high) == (0.0, 100.0)


def test_soft_scores_have_no_mcnemar_test() -> None:
    made = compare_scores({"a": 0.3, "b": 1.0}, {"a": 0.6, "b": 1.0})
    assert (made.p, made.only_first, round(made.difference, 6)) == (None, None, 15.0)


@pytest.mark.real_data
def test_llavas_stored_pope_answers_give_the_published_figures(tmp_path: Path) -> None:
    default = Path(__file__).resolve().parents[2] / "../shared/data"
    folder = Path(os.environ.get("SPARSE_VLM_REAL_DATA", default)) / "pope"
    if not folder.is_dir():
        pytest.skip("no POPE files: set SPARSE_VLM_REAL_DATA to the folder of real data")
    made = tmp_path / "pope.json"
    files = ["--questions", f"{folder}/questions.jsonl", "--annotations", str(folder)]
    stored = f"{folder}/answers_llava-v1.5-13b.jsonl"
    assert rescore(["--task", "pope", *files, "--answers", stored, "--json", str(made)]) == 0
    figures = json.loads(made.read_text())["figures"]
    for rule in ("llava", "strict"):
        f1 = [
            round(figures[f"{rule}/{name}/f1"]["value"], 1) for name in ("random", "popular", "adversarial")
        ]
        assert f1 == [87.1, 86.2, 84.5]
