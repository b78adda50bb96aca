"""What can be wrong with files, in every benchmark: counted and named, or refused, never scored silently."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from eval.rescore import main as rescore
from eval.task import SHORT_ANSWER
from eval.tasks import list_tasks

N = 4  # questions of each benchmark below


@dataclass
class Case:
    """A small benchmark: its files by their option, right answers to all of it, its pictures, one figure."""

    task: str
    files: dict[str, Path]
    answers: list[dict[str, Any]]
    pictures: list[str]
    figure: str

    def run(
        self, folder: Path, answers: list[dict[str, Any]], *more: str, tail: str = ""
    ) -> tuple[int, dict]:
        """Rescores; the exit status, and what was written."""
        stored = lines(folder / "answers.jsonl", answers, tail)
        made = folder / "made.json"
        made.unlink(missing_ok=True)
        words = ["--task", self.task, "--answers", str(stored), "--json", str(made), *more]
        words += [word for option, path in self.files.items() for word in (f"--{option}", str(path))]
        if self.task == "mmvet":
            words += ["--submission", str(folder / "submission.json")]
        status = rescore(words)
        return status, json.loads(made.read_text()) if made.exists() else {}


def lines(path: Path, rows: list[dict[str, Any]], tail: str = "") -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + tail, encoding="utf-8")
    return path


def document(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def numbered(texts: list[str]) -> list[dict[str, Any]]:
    return [{"question_id": n, "text": text} for n, text in enumerate(texts)]


def vqa(folder: Path, name: str) -> Case:
    people = [{"answer": "red", "answer_confidence": "yes", "answer_id": n} for n in range(10)]
    asked = [{"question_id": n, "image_id": n, "question": f"q {n}?"} for n in range(N)]
    gold = [
        {"question_id": n, "answers": people, "answer_type": "other", "question_type": "q"} for n in range(N)
    ]
    files = {
        "questions": document(folder / "q.json", {"questions": asked, "data_subtype": "val2014"}),
        "annotations": document(folder / "a.json", {"annotations": gold, "data_subtype": "val2014"}),
    }
    pictures = [f"COCO_val2014_{n:012d}.jpg" for n in range(N)]
    return Case(name, files, numbered(["red"] * N), pictures, "accuracy")


def gqa(folder: Path) -> Case:
    gold = {
        str(n): {"question": f"q {n}?", "imageId": f"n{n}", "answer": "red", "isBalanced": True}
        for n in range(N)
    }
    files = {"questions": document(folder / "testdev.json", gold)}
    return Case("gqa", files, numbered(["Red"] * N), [f"n{n}.jpg" for n in range(N)], "accuracy")


def textvqa(folder: Path) -> Case:
    rows = [
        {"question_id": 50 + n, "image_id": f"i{n}", "question": f"q {n}?", "answers": ["red"] * 10}
        for n in range(N)
    ]
    answers = [{"question_id": f"i{n}", "prompt": f"Q {n}?{SHORT_ANSWER}", "text": "red"} for n in range(N)]
    files = {"annotations": document(folder / "val.json", {"data": rows})}
    return Case("textvqa", files, answers, [f"i{n}.jpg" for n in range(N)], "accuracy")


def pope(folder: Path) -> Case:
    gold = folder / "pope"
    gold.mkdir()
    rows = [
        {"question_id": n, "image": f"{n}.jpg", "text": f"Is there a cat {n}?", "label": ("yes", "no")[n % 2]}
        for n in range(N)
    ]
    lines(gold / "coco_pope_random.json", rows)
    answers = numbered(["Yes", "No"] * 2)
    return Case("pope", {"annotations": gold}, answers, [f"{n}.jpg" for n in range(N)], "llava/mean/accuracy")


def scienceqa(folder: Path) -> Case:
    def turns(n: int) -> list[dict[str, str]]:
        return [{"from": "human", "value": f"<image>\nq {n}?\nA. x\nB. y"}, {"from": "gpt", "value": "B"}]

    rows = [{"id": str(n), "image": f"{n}/image.png", "conversations": turns(n)} for n in range(N)]
    files = {"questions": document(folder / "llava_test_CQM-A.json", rows)}
    return Case("scienceqa", files, numbered(["B"] * N), [f"{n}/image.png" for n in range(N)], "accuracy")


def mme(folder: Path) -> Case:
    rows, answers = [], []
    for n in range(N // 2):
        for question, answer in (("Is it red?", "Yes"), ("Is it blue?", "No")):
            picture = f"color/{n}.jpg"
            rows.append({"category": "color", "image_path": picture, "question": question, "answer": answer})
            answers.append({"question_id": picture, "prompt": question + SHORT_ANSWER, "text": answer})
    files = {"annotations": document(folder / "mme.json", rows)}
    return Case("mme", files, answers, [f"color/{n}.jpg" for n in range(N // 2)], "color/accuracy")


def mmbench(folder: Path) -> Case:
    table = ["index\tquestion\tA\tB\tanswer", *(f"{n}\tq {n}?\tx\ty\tB" for n in range(N))]
    path = folder / "dev.tsv"
    path.write_text("\n".join(table) + "\n")
    return Case(
        "mmbench", {"questions": path}, numbered(["B"] * N), [f"{n}.jpg" for n in range(N)], "circular"
    )


def vizwiz(folder: Path) -> Case:
    names = [f"VizWiz_val_{n:08d}.jpg" for n in range(N)]
    rows = [{"image": name, "question": "q?", "answers": [{"answer": "red"}] * 10} for name in names]
    files = {"annotations": document(folder / "val.json", rows)}
    return Case("vizwiz", files, numbered(["red"] * N), names, "accuracy")


def seedbench(folder: Path) -> Case:
    rows = [
        {
            "question_id": str(n),
            "question": "q?",
            "answer": "B",
            "data_type": "image",
            "data_id": f"p{n}",
            "question_type_id": 1,
            **{f"choice_{letter}": letter for letter in "abcd"},
        }
        for n in range(N)
    ]
    files = {
        "annotations": document(folder / "SEED.json", {"questions": rows, "question_type": {"Scene": 1}})
    }
    return Case("seedbench", files, numbered(["B"] * N), [f"p{n}" for n in range(N)], "image")


def mmvet(folder: Path) -> Case:
    rows = {f"v1_{n}": {"question": "q?", "imagename": f"{n}.png"} for n in range(N)}
    files = {"questions": document(folder / "mm-vet.json", rows)}
    return Case("mmvet", files, numbered(["red"] * N), [f"{n}.png" for n in range(N)], "")


def daquar(folder: Path) -> Case:
    path = folder / "eval.csv"
    path.write_text("question,answer,image_id\n" + "".join(f"q {n}?,red,image{n}\n" for n in range(N)))
    pictures = [f"image{n}.jpg" for n in range(N)]
    return Case("daquar", {"questions": path}, numbered(["red"] * N), pictures, "accuracy")


def easy_vqa(folder: Path) -> Case:
    files = {"questions": document(folder / "q.json", [[f"q {n}?", "red", n] for n in range(N)])}
    return Case("easy_vqa", files, numbered(["red"] * N), [f"{n}.png" for n in range(N)], "accuracy")


CASES: dict[str, Callable[[Path], Case]] = {
    "vqav2": lambda folder: vqa(folder, "vqav2"),
    "gqa": gqa,
    "textvqa": textvqa,
    "pope": pope,
    "scienceqa": scienceqa,
    "mme": mme,
    "mmbench": mmbench,
    "vizwiz": vizwiz,
    "seedbench": seedbench,
    "mmvet": mmvet,
    "daquar": daquar,
    "easy_vqa": easy_vqa,
    "scenes": lambda folder: vqa(folder, "scenes"),
}


def test_every_benchmark_is_here() -> None:
    assert list(CASES) == list_tasks()


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return CASES[request.param](tmp_path)


def value(case: Case, content: dict[str, Any]) -> float:
    """The figure in percent; MM-Vet has none."""
    return content["figures"][case.figure]["value"] if case.figure else 100.0


def test_right_answers_are_right(case: Case, tmp_path: Path) -> None:
    status, content = case.run(tmp_path, case.answers)
    assert (status, value(case, content)) == (0, 100.0)
    oddities = {name: part["count"] for name, part in content["coverage"].items() if isinstance(part, dict)}
    assert set(oddities.values()) == {0}


def test_a_question_without_an_answer(case: Case, tmp_path: Path, capsys: Any) -> None:
    assert case.run(tmp_path, case.answers[:-1])[0] == 2
    error = capsys.readouterr().err
    assert f"1 of {N} questions have no answer in" in error
    assert error.count("\n") == 1
    status, content = case.run(tmp_path, case.answers[:-1], "--allow-missing")
    assert (status, value(case, content), content["coverage"]["answered"]) == (0, 100.0, N - 1)
    assert f"answered: {N - 1} of {N} questions" in capsys.readouterr().out


def test_a_line_cut_off_by_a_kill(case: Case, tmp_path: Path, capsys: Any) -> None:
    half = json.dumps(case.answers[-1])[:-9]
    assert case.run(tmp_path, case.answers[:-1], tail=half)[0] == 2
    assert f"not whole: line {N}" in capsys.readouterr().err
    status, content = case.run(tmp_path, case.answers[:-1], "--allow-missing", tail=half)
    assert (status, value(case, content)) == (0, 100.0)
    assert f"1 lines that are not whole, left out: line {N}" in capsys.readouterr().out


def test_answers_to_questions_that_were_not_asked(case: Case, tmp_path: Path, capsys: Any) -> None:
    stranger = {**case.answers[0], "question_id": "color/777.jpg" if case.task == "mme" else 777}
    status, content = case.run(tmp_path, [*case.answers, stranger])
    assert (status, value(case, content), content["coverage"]["unknown"]["count"]) == (0, 100.0, 1)
    assert "1 answers to questions that were not asked, left out: " in capsys.readouterr().out
    assert case.run(tmp_path, [stranger])[0] == 2
    assert "are they of another split or benchmark?" in capsys.readouterr().err


def test_a_question_answered_twice(case: Case, tmp_path: Path, capsys: Any) -> None:
    status, content = case.run(tmp_path, [*case.answers, case.answers[0]])
    assert (status, value(case, content), content["coverage"]["repeated"]["count"]) == (0, 100.0, 1)
    other = {**case.answers[0], "text": "something else"}
    assert case.run(tmp_path, [*case.answers, other])[0] == 2
    assert "1 questions have two different answers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "kind"), [("", "empty"), (" \n", "empty"), ("красный", "non_latin"), ("红" * 2000, "long")]
)
def test_strange_answers_are_counted_and_named(case: Case, tmp_path: Path, text: str, kind: str) -> None:
    status, content = case.run(tmp_path, [{**case.answers[0], "text": text}, *case.answers[1:]])
    assert (status, content["coverage"][kind]["count"]) == (0, 1)
    assert len(content["coverage"][kind]["first"]) == 1
    if case.task == "pope":
        # LLaVA's rule calls everything a "yes" that has no "no", and the printed note says so.
        assert (value(case, content), content["figures"]["strict/mean/accuracy"]["value"]) == (100.0, 75.0)
    elif case.figure:
        assert value(case, content) == 75.0


def test_an_answer_file_without_answers(case: Case, tmp_path: Path, capsys: Any) -> None:
    assert case.run(tmp_path, [])[0] == 2
    error = capsys.readouterr().err
    assert "answers.jsonl" in error
    assert error.count("\n") == 1


def test_an_answer_that_is_no_text(case: Case, tmp_path: Path, capsys: Any) -> None:
    for strange in (None, 5, ["red"]):
        assert case.run(tmp_path, [{**case.answers[0], "text": strange}, *case.answers[1:]])[0] == 2
        assert '"text" must be text' in capsys.readouterr().err


def test_missing_pictures(case: Case, tmp_path: Path, capsys: Any) -> None:
    images = tmp_path / "images"
    names = case.pictures
    for name in names:
        (images / name).parent.mkdir(parents=True, exist_ok=True)
    for name in names[1:]:
        (images / name).write_bytes(b"")
    assert case.run(tmp_path, case.answers, "--images", str(images))[0] == 2
    error = capsys.readouterr().err
    assert "1 pictures of" in error
    assert names[0] in error
    (images / names[0]).write_bytes(b"")
    assert case.run(tmp_path, case.answers, "--images", str(images))[0] == 0


def fields_of(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place within JSON values; of a list, the first one."""
    keys: list[Any] = (
        list(value) if isinstance(value, dict) else [0] if isinstance(value, list) and value else []
    )
    inner = [place for key in keys for place in fields_of(value[key], (*before, key))]
    return [before, *inner] if before else inner


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("mmbench", "daquar")])
def test_whatever_is_damaged_in_a_benchmarks_files_is_no_traceback(
    name: str, tmp_path: Path, capsys: Any
) -> None:
    """Each field gone, or of another kind."""
    case = CASES[name](tmp_path)
    refused = 0
    for path in case.files.values():
        file = path if path.is_file() else next(path.iterdir())
        text = file.read_text()
        in_lines = file.parent.name == "pope"
        content = [json.loads(line) for line in text.splitlines()] if in_lines else json.loads(text)
        for place in fields_of(content):
            values: tuple[Any, ...] = ("gone", None, 5, [], {"a": 1})
            for new in values:
                made = inner = copy.deepcopy(content)
                for key in place[:-1]:
                    inner = inner[key]
                if new == "gone":
                    del inner[place[-1]]
                else:
                    inner[place[-1]] = new
                lines(file, made) if in_lines else document(file, made)
                status = case.run(tmp_path, case.answers)[0]
                error = capsys.readouterr().err
                assert (status, error.count("\n")) in ((0, 0), (2, 1)), (place, new)
                refused += status == 2
        file.write_text(text)
    assert refused > 5


TWICE = {
    "vqav2": ("questions", lambda rows: {**rows, "questions": [*rows["questions"], rows["questions"][0]]}),
    "gqa": ("questions", None),
    "textvqa": ("annotations", lambda rows: {"data": [*rows["data"], rows["data"][0]]}),
    "scienceqa": ("questions", lambda rows: [*rows, rows[0]]),
    "mme": ("annotations", lambda rows: [*rows, *rows[:2]]),
    "vizwiz": ("annotations", lambda rows: [*rows, rows[0]]),
    "mmvet": ("questions", None),
}


@pytest.mark.parametrize("name", list(TWICE))
def test_a_question_asked_twice(name: str, tmp_path: Path, capsys: Any) -> None:
    case = CASES[name](tmp_path)
    option, double = TWICE[name]
    path = case.files[option]
    text = path.read_text()
    if double is None:  # an object: the same key comes twice
        first = text[1 : text.index("}") + 1]
        path.write_text(f"{{{first}, {text[1:]}")
    else:
        document(path, double(json.loads(text)))
    assert case.run(tmp_path, case.answers)[0] == 2
    error = capsys.readouterr().err
    assert any(word in error for word in ("more than once", "twice", "do not have two questions each"))


@pytest.mark.parametrize(
    ("stored", "hits"),
    [
        ([("0", "B"), ("1", "B"), ("2", "B"), ("3", "B")], 4),  # one answer is to both
        ([("0", "B"), ("1", "B"), ("2", "B"), ("3", "B"), ("0", "C")], 5),  # each has its own
        ([("0", "C"), ("1", "B"), ("2", "B"), ("3", "B"), ("0", "B")], 3),
    ],
)
def test_seed_benchs_official_file_has_an_id_twice(
    stored: list[tuple[str, str]], hits: int, tmp_path: Path, capsys: Any
) -> None:
    case = CASES["seedbench"](tmp_path)
    table = json.loads(case.files["annotations"].read_text())
    other = {**table["questions"][0], "question": "another?", "answer": "C"}
    document(case.files["annotations"], {**table, "questions": [*table["questions"], other]})
    status, content = case.run(tmp_path, [{"question_id": key, "prediction": text} for key, text in stored])
    assert (status, content["figures"]["image"]["value"], content["figures"]["image"]["n"]) == (
        0,
        20 * hits,
        5,
    )
    assert "1 questions with the id of an earlier one, scored like all others: 0#2" in capsys.readouterr().out
    assert content["coverage"]["repeated"]["count"] == 0
    assert case.run(tmp_path, [{"question_id": "0", "prediction": text} for text in "BCD"])[0] == 2
    assert "1 questions have two different answers: 0 (line 1 and line 3)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vqav2", "have no annotation in"),
        ("gqa", "is it another split's file?"),
        ("textvqa", "is it another split's file?"),
        ("pope", "are not the same; the two files are of different versions"),
        ("mme", "is it another benchmark's file?"),
        ("vizwiz", "is it another split's file?"),
        ("seedbench", "None of the questions of"),
    ],
)
def test_annotations_of_another_split(name: str, said: str, tmp_path: Path, capsys: Any) -> None:
    """LLaVA's question file asks what the annotations do not know."""
    case = CASES[name](tmp_path)
    gold = case.files.get("annotations") or case.files["questions"]
    asked = [
        {
            "question_id": f"color/9{n}.jpg" if name == "mme" else 90 + n,
            "image": f"VizWiz_val_9{n}.jpg",
            "category": "random" if name == "pope" else "default",
            "text": f"Other {n}?{SHORT_ANSWER}",
        }
        for n in range(N)
    ]
    case.files = {"questions": lines(tmp_path / "llava.jsonl", asked), "annotations": gold}
    assert case.run(tmp_path, case.answers)[0] == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("vizwiz", {"question_id": 0, "image": "VizWiz_val_00000000.jpg", "text": f"q?{SHORT_ANSWER}"}),
        ("scienceqa", {"id": "0", "conversations": [{"value": "q?\nA. x\nB. y"}, {"value": "B"}]}),
        ("mmvet", {"question_id": 0, "text": "q?"}),
    ],
)
@pytest.mark.parametrize("annotated", [False, True])
def test_a_bad_row_of_llavas_file_is_named_with_its_file(
    name: str, row: dict[str, Any], annotated: bool, tmp_path: Path, capsys: Any
) -> None:
    case = CASES[name](tmp_path)
    gold = case.files.get("annotations") or case.files["questions"]
    if name == "scienceqa":
        problem = {"question": "q?", "choices": ["x", "y"], "answer": 1}
        gold = document(tmp_path / "problems.json", {"0": problem})
    kept = next(iter(row))
    bad = {key: value for key, value in row.items() if key == kept}
    asked = tmp_path / "asked.json"
    case.files = {"questions": document(asked, [row, {**bad, kept: row[kept]}])}
    if annotated:
        case.files["annotations"] = gold
    assert case.run(tmp_path, case.answers)[0] == 2
    said = capsys.readouterr().err
    assert "asked.json" in said
    assert " 2 " in said


def test_the_answers_of_another_split_of_vqa(tmp_path: Path, capsys: Any) -> None:
    case = CASES["vqav2"](tmp_path)
    table = json.loads(case.files["annotations"].read_text())
    document(case.files["annotations"], {**table, "data_subtype": "train2014"})
    assert case.run(tmp_path, case.answers)[0] == 2
    assert "the questions of val2014" in capsys.readouterr().err


def test_a_mapping_of_answers_with_a_question_twice(tmp_path: Path, capsys: Any) -> None:
    case = CASES["mmvet"](tmp_path)
    stored = tmp_path / "results.json"
    stored.write_text('{"v1_0": "a", "v1_1": "b", "v1_2": "c", "v1_3": "d", "v1_0": "e"}')
    words = ["--task", "mmvet", "--questions", str(case.files["questions"]), "--answers", str(stored)]
    assert rescore([*words, "--submission", str(tmp_path / "submission.json")]) == 2
    assert "has 1 keys twice (v1_0)" in capsys.readouterr().err
