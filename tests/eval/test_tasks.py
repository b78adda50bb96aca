"""Every benchmark on small files in the form it is distributed in: examples, prompts, judge, figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from eval.answers import AnswerRecord, InputError, load_answers, match_answers
from eval.engine import build_asks
from eval.intervals import Figure, wilson_interval
from eval.task import LLAVA, LMMS_EVAL, Example, Task, hash_question
from eval.tasks import list_tasks, load_task

WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def put(path: Path, content: Any, lines: bool = False) -> Path:
    text = "".join(f"{json.dumps(row)}\n" for row in content) if lines else json.dumps(content)
    path.write_text(content if isinstance(content, str) else text, encoding="utf-8")
    return path


def figures_of(task: Task, examples: list[Example], answers: dict[str, str]) -> dict[str, Figure]:
    return task.aggregate([task.judge(e, answers[e.key]) for e in examples])


def people(*answers: str) -> list[dict[str, Any]]:
    return [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(answers, start=1)]


@pytest.mark.parametrize("name", list_tasks())
def test_every_task_loads_by_name(name: str) -> None:
    assert load_task(name).name == name
    assert load_task(name.upper().replace("_", "-")).name == name


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"no benchmark 'textqva'; did you mean 'textvqa'"):
        load_task("textqva")


@pytest.mark.parametrize("name", list_tasks())
def test_every_task_needs_a_file_and_refuses_one_that_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needed"):
        load_task(name).load_examples(None, None)
    with pytest.raises(InputError, match=r"does not exist"):
        load_task(name).load_examples(tmp_path / "no.json", tmp_path / "no.json")


@pytest.mark.parametrize("name", list_tasks())
def test_an_unknown_prompt_protocol_is_refused(name: str) -> None:
    task = load_task(name)
    with pytest.raises(InputError, match=r"no prompt protocol 'llava'; it has 'llava-1.5'"):
        task.prompt(Example("1", 1, "q", None), "llava")
    if LMMS_EVAL not in task.prompts:
        with pytest.raises(InputError, match=r"no prompt protocol 'lmms-eval'"):
            task.prompt(Example("1", 1, "q", None), LMMS_EVAL)


CHOICES = {"hint": "Two lamps.", "options": {"A": "red", "B": "blue"}, "ocr_tokens": ["GPS", "on"]}
VIZWIZ = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
# Written by hand from LLaVA's question files and lmms-eval 0.7.3's task definitions.
PROMPTS = {
    "vqav2": ["Is the GPS on?" + WORD] * 2,
    "gqa": ["Is the GPS on?" + WORD] * 2,
    "pope": ["Is the GPS on?" + WORD] * 2,
    "mme": ["Is the GPS on?" + WORD] * 2,
    "textvqa": [
        "Is the gps on?\nReference OCR token: GPS, on" + WORD,
        "Is the gps on?" + WORD,
    ],
    "vizwiz": ["Is the gps on?" + VIZWIZ + WORD] * 2,
    "scienceqa": ["Context: Two lamps.\nIs the GPS on?\nA. red\nB. blue" + LETTER] * 2,
    "seedbench": ["Is the GPS on?\nA. red\nB. blue" + LETTER] * 2,
    "mmbench": [
        "Two lamps.\nIs the GPS on?\nA. red\nB. blue" + LETTER,
        "Two lamps. Is the GPS on? There are several options:\nA. red\nB. blue\n" + LETTER,
    ],
    "mmvet": [
        "Is the GPS on?",
        "First please perform reasoning, and think step by step to provide best answer to the following "
        "question: \n\nIs the GPS on?",
    ],
    "daquar": ["Is the GPS on?" + WORD, "Is the GPS on?"],
    "easy_vqa": ["Is the GPS on?" + WORD, "Is the GPS on?"],
    "scenes": ["Is the GPS on?" + WORD, "Is the GPS on?"],
}


@pytest.mark.parametrize("name", list_tasks())
def test_prompts_are_those_of_their_protocol(name: str) -> None:
    task = load_task(name)
    question = "Is the GPS on?" + (" Please answer yes or no." if name == "mme" else "")
    example = Example("1", 1, question, "a.jpg", choices=("red", "blue"), facts=CHOICES)
    assert [task.prompt(example, protocol) for protocol in task.prompts] == PROMPTS[name]
    stored = Example("1", 1, "q", None, llava_prompt="as stored", choices=("a",), facts=CHOICES)
    assert task.prompt(stored, LLAVA) == "as stored"


def test_a_benchmark_that_does_not_say_what_it_is_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="the benchmark Mine has no scorer and no primary"):
        type("Mine", (Task,), {"name": "mine"})


def vqa_files(tmp_path: Path, subset: str = "val2014") -> tuple[Path, Path]:
    questions = [{"question_id": n, "image_id": 42, "question": f"q{n}"} for n in (1, 2)]
    annotations = [
        {
            "question_id": 1,
            "answers": people(*["dog"] * 9, "a dog"),
            "answer_type": "other",
            "question_type": "what",
        },
        {"question_id": 2, "answers": people(*["yes"] * 10), "answer_type": "yes/no", "question_type": "is"},
    ]
    return (
        put(tmp_path / "q.json", {"questions": questions, "data_subtype": "val2014"}),
        put(tmp_path / "a.json", {"annotations": annotations, "data_subtype": subset}),
    )


def test_vqav2(tmp_path: Path) -> None:
    task = load_task("vqav2")
    examples = task.load_examples(*vqa_files(tmp_path))
    assert examples[0].image == "COCO_val2014_000000000042.jpg"
    made = figures_of(task, examples, {"1": "A Dog.", "2": "Yes"})
    assert made["accuracy"].value == 100.0
    assert made["answer_type/yes/no"].n == 1
    assert made["question_type/what"].detail
    # The same words in a results file are compared as they stand, since all ten people agree.
    assert task.judge(examples[1], "Yes", as_written=True).score == 0.0
    assert task.submission(examples, {"1": "A Dog.", "2": "Yes"}) == (
        ".json",
        b'[{"question_id": 1, "answer": "dog"}, {"question_id": 2, "answer": "yes"}]',
    )
    # The server takes whole sets only.
    assert task.submission(examples, {"2": "Yes"}) == (
        ".json",
        b'[{"question_id": 1, "answer": ""}, {"question_id": 2, "answer": "yes"}]',
    )


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        (None, '"annotations" must be a list of rows'),
        ([{"question_id": 1, "image_id": 1.5, "answers": []}], "annotation 1"),
        ([3], "annotation 1"),
    ],
)
def test_vqav2_refuses_damaged_annotations_alone(tmp_path: Path, annotations: Any, message: str) -> None:
    path = put(tmp_path / "a.json", {"annotations": annotations})
    with pytest.raises(InputError, match=f"(?i){message}"):
        load_task("vqav2").load_examples(None, path)


def test_vqav2_refuses_the_annotations_of_another_split(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"questions of val2014, and .* the answers of train2014"):
        load_task("vqav2").load_examples(*vqa_files(tmp_path, "train2014"))
    lines = [{"question_id": n, "image": "x.jpg", "text": "q" + WORD} for n in (1, 7, 8)]
    llava = put(tmp_path / "l.jsonl", lines, lines=True)
    with pytest.raises(InputError, match=r"2 of 3 questions .* have no annotation .* \(7, 8\)"):
        load_task("vqav2").load_examples(llava, tmp_path / "a.json")


def test_a_question_asked_twice_and_a_missing_picture_are_refused(tmp_path: Path) -> None:
    questions, annotations = vqa_files(tmp_path)
    with pytest.raises(InputError, match=r"1 pictures of .* \(COCO_val2014_000000000042.jpg\)"):
        load_task("scenes").load_examples(questions, annotations, tmp_path)
    rows = [{"question_id": 1, "image_id": 42, "question": "q"}] * 2
    with pytest.raises(InputError, match=r"asks 1 questions more than once \(1\)"):
        load_task("scenes").load_examples(put(tmp_path / "q2.json", {"questions": rows}), annotations)


def test_gqa(tmp_path: Path) -> None:
    kinds = {"structural": "query", "semantic": "obj"}
    rows = {
        "10": {"question": "What?", "imageId": "n1", "answer": "t-shirt", "isBalanced": True, "types": kinds},
        "11": {"question": "Is it?", "imageId": "n1", "answer": "yes", "types": {"structural": "verify"}},
        "12": {"question": "Dropped?", "imageId": "n1", "answer": "yes", "isBalanced": False},
    }
    gold = put(tmp_path / "testdev_balanced_questions.json", rows)
    task = load_task("gqa")
    examples = task.load_examples(gold, gold)
    assert [e.key for e in examples] == ["10", "11"]
    made = figures_of(task, examples, {"10": "T-shirt.", "11": "no"})
    assert {name: f.value for name, f in made.items() if not f.detail} == {
        "accuracy": 50,
        "open": 100,
        "binary": 0,
    }
    assert task.judge(examples[0], "T-shirt", as_written=True).score == 0.0
    llava = put(
        tmp_path / "l.jsonl", [{"question_id": "11", "image": "n1.jpg", "text": "Is it?" + WORD}], lines=True
    )
    assert task.load_examples(llava, gold)[0].question == "Is it?"
    listed = put(tmp_path / "rows.json", [{"id": key, **row} for key, row in rows.items()])
    assert [e.key for e in task.load_examples(listed, listed)] == ["10", "11"]
    # Asked is what the question file names, in whatever form.
    some = put(tmp_path / "some.json", [{"id": "11", **rows["11"]}])
    assert [e.key for e in task.load_examples(some, gold)] == ["11"]
    bare = put(tmp_path / "bare.json", [{"id": "10", "question": "What?", "imageId": "n1"}])
    assert [e.key for e in task.load_examples(bare, gold)] == ["10"]
    for odd in ({"a": 1}, '"a"', 3):
        with pytest.raises(InputError, match=r"odd.json is no GQA question file"):
            task.load_examples(put(tmp_path / "odd.json", odd), gold)
    put(gold, '{"10": {"answer": "a"}, "10": {"answer": "b"}}')
    with pytest.raises(InputError, match=r"1 keys twice \(10\)"):
        task.load_examples(gold, gold)


def test_textvqa_finds_questions_by_picture_and_words(tmp_path: Path) -> None:
    rows = [
        {"question_id": 1, "image_id": "ab", "question": "what brand?", "answers": ["nokia"] * 10},
        {
            "question_id": 2,
            "image_id": "ab",
            "question": "what color?",
            "answers": ["red"] * 5 + ["blue"] * 5,
        },
    ]
    gold = put(tmp_path / "TextVQA_0.5.1_val.json", {"data": rows})
    task = load_task("textvqa")
    examples = task.load_examples(None, gold)
    prompts = [
        "What color?\nReference OCR token: a, b" + WORD,
        "What color?" + WORD,
        "Reference OCR token: a\nWhat color?" + WORD,
        "OCR tokens: a. Question: What color? Short answer:",
    ]
    for prompt in prompts:
        stored = put(
            tmp_path / "a.jsonl", [{"question_id": "ab", "prompt": prompt, "text": "Red"}], lines=True
        )
        assert match_answers(examples, load_answers(stored), task.record_keys).answers == {"2": "Red"}
    assert figures_of(task, examples, {"1": "Nokia", "2": "blue."})["accuracy"].value == 100.0
    llava = [{"question_id": "ab", "image": "ab.jpg", "text": prompts[0]}]
    assert (
        task.load_examples(put(tmp_path / "q.jsonl", llava, lines=True), gold)[0].llava_prompt == prompts[0]
    )
    llava[0]["question_id"] = "zz"
    with pytest.raises(InputError, match=r"1 of 1 questions .* are not in .* \(zz\)"):
        task.load_examples(put(tmp_path / "q.jsonl", llava, lines=True), gold)
    with pytest.raises(InputError, match=r"OCR tokens, which neither file holds"):
        task.prompt(examples[0])


def pope_files(tmp_path: Path) -> tuple[Path, Path]:
    questions = []
    for base, category in enumerate(("adversarial", "random")):
        labels = [
            {"question_id": n, "image": f"{n}.jpg", "text": f"Is there a {category} {n}?", "label": label}
            for n, label in enumerate(("yes", "no"), start=1)
        ]
        put(tmp_path / f"coco_pope_{category}.json", labels, lines=True)
        for row in labels:
            questions.append(
                {
                    "question_id": 100 * base + row["question_id"],
                    "image": row["image"],
                    "text": row["text"] + WORD,
                    "category": category,
                }
            )
    return put(tmp_path / "questions.jsonl", questions, lines=True), tmp_path


def test_pope(tmp_path: Path) -> None:
    task = load_task("pope")
    questions, folder = pope_files(tmp_path)
    examples = task.load_examples(questions, folder)
    assert [(e.key, e.category) for e in examples] == [
        ("101", "random"),
        ("102", "random"),
        ("1", "adversarial"),
        ("2", "adversarial"),
    ]
    made = figures_of(task, examples, {"101": "Yes", "102": "No", "1": "Yes", "2": ""})
    assert made["llava/random/f1"].value == 100.0
    assert made["llava/adversarial/yes_ratio"].value == 100.0
    assert made["strict/adversarial/yes_ratio"].value == 50.0
    assert made["llava/mean/accuracy"].value == 75.0
    assert made["llava/mean/accuracy"].low < 75.0 < made["llava/mean/accuracy"].high
    assert len(task.load_examples(questions, folder / "coco_pope_random.json")) == 2


def test_pope_answers_in_its_own_format_go_by_order(tmp_path: Path) -> None:
    task = load_task("pope")
    labels = pope_files(tmp_path)[1] / "coco_pope_random.json"
    examples = task.load_examples(None, labels)
    rows = [{"question": e.question, "answer": "no"} for e in examples]
    stored = load_answers(put(tmp_path / "own.json", rows, lines=True))
    assert set(match_answers(examples, stored, task.record_keys).answers) == {"random/1", "random/2"}
    rows.reverse()
    with pytest.raises(InputError, match=r"None of the 2 answers"):
        match_answers(examples, load_answers(put(tmp_path / "own.json", rows, lines=True)), task.record_keys)


def test_pope_refuses_label_files_of_another_version(tmp_path: Path) -> None:
    questions, folder = pope_files(tmp_path)
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    put(questions, [*rows[:3], rows[2]], lines=True)
    with pytest.raises(InputError, match=r"Random question 2 of .* not the same"):
        load_task("pope").load_examples(questions, folder)
    put(questions, rows[:3], lines=True)
    with pytest.raises(InputError, match=r"asks 1 random questions, and .* labels 2"):
        load_task("pope").load_examples(questions, folder)


def test_scienceqa(tmp_path: Path) -> None:
    problem = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "subject": "science"}
    problems = {"4": {**problem, "image": None}, "5": {**problem, "image": "image.png"}, "6": problem}
    put(tmp_path / "problems.json", problems)
    put(tmp_path / "pid_splits.json", {"test": ["4", "5"], "val": ["6"]})
    task = load_task("scienceqa")
    for source in (tmp_path, tmp_path / "problems.json"):
        examples = task.load_examples(None, source)
        assert [(e.key, e.image) for e in examples] == [("4", None), ("5", "5/image.png")]
    made = figures_of(task, examples, {"4": "A", "5": "B. b"})
    assert (made["accuracy"].value, made["img_accuracy"].value, made["img_accuracy"].n) == (50.0, 100.0, 1)
    judged = [task.judge(e, "B") for e in examples]
    assert task.units(judged) == {"5": 1.0}  # paired as the figure that is compared
    text = "<image>\nContext: A. is no option.\nWhich?\nA. a\nB. b\nor c"
    row = {"id": "5", "image": "5/image.png", "conversations": [{"value": text}, {"value": "B"}]}
    llava = put(tmp_path / "llava.json", [row])
    alone = task.load_examples(llava, None)[0]
    assert (alone.choices, alone.answers, alone.image) == (("a", "b\nor c"), ("B",), "5/image.png")
    assert task.prompt(alone) == text.removeprefix("<image>\n") + LETTER
    assert task.load_examples(llava, tmp_path)[0].choices == ("a", "b")


def test_mme_from_json_folder_and_release(tmp_path: Path) -> None:
    rows = []
    for number in (1, 2):
        for question, answer in (("Is it one?", "Yes"), ("Is it two?", "No")):
            rows.append(
                {
                    "category": "count",
                    "image_path": f"MME/count/000{number}.jpg",
                    "question": f"{question} Please answer yes or no.",
                    "answer": answer,
                }
            )
    task = load_task("mme")
    from_json = task.load_examples(None, put(tmp_path / "mme.json", rows))
    (tmp_path / "tool").mkdir()
    (tmp_path / "release/count/questions_answers_YN").mkdir(parents=True)
    lines = "".join(
        f"000{n}.jpg\t{r['question']}\t{r['answer']}\n" for n, r in zip((1, 1, 2, 2), rows, strict=True)
    )
    (tmp_path / "tool/count.txt").write_text(lines)
    for number in (1, 2):
        text = "".join(f"{r['question']}\t{r['answer']}\n" for r in rows[:2])
        (tmp_path / f"release/count/questions_answers_YN/000{number}.txt").write_text(text)
    for folder in ("tool", "release"):
        assert [e.key for e in task.load_examples(None, tmp_path / folder)] == [e.key for e in from_json]
    stored = [
        {"question_id": f"count/000{n}.jpg", "prompt": r["question"].split(" Please")[0] + WORD, "text": said}
        for n, r, said in zip((1, 1, 2, 2), rows, ("Yes", "No", "Yes, it is", "Unsure"), strict=True)
    ]
    matched = match_answers(
        from_json, load_answers(put(tmp_path / "a.jsonl", stored, lines=True)), task.record_keys
    )
    made = figures_of(task, from_json, dict(matched.answers))
    assert made["count/accuracy"].value == 75.0
    assert made["count/accuracy_plus"].value == 50.0
    assert (made["count"].value, made["perception"].value) == (125.0, 125.0)
    assert made["perception"].protocol.endswith("1 of 10 subtasks")
    # As eval.run stores them: by key, since two questions share an id.
    own = [
        {"question_id": e.key, "prompt": e.question, "text": said}
        for e, said in zip(from_json, ("Yes", "No", "Yes", "Yes"), strict=True)
    ]
    stored_own = load_answers(put(tmp_path / "own.jsonl", own, lines=True))
    assert dict(match_answers(from_json, stored_own, task.record_keys).answers) == {
        row["question_id"]: row["text"] for row in own
    }
    with pytest.raises(InputError, match=r"1 pictures .* do not have two questions"):
        task.load_examples(None, put(tmp_path / "odd.json", rows[:3]))


def mmbench_file(tmp_path: Path, answers: bool = True) -> Path:
    rows = ["index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\tl2-category\tsplit"]
    for index, options, answer in (
        (1, "red\tblue\t\t", "A"),
        (1_000_001, "blue\tred\t\t", "B"),
        (2, "x\ty\tz\tNone", "C"),
    ):
        rows.append(f"{index}\tWhich?\tnan\t{options}\t{answer if answers else ''}\tcolour\tperception\tdev")
    path = tmp_path / "mmbench.tsv"
    path.write_text("\n".join(rows))
    return path


def test_mmbench_is_right_only_if_every_rotation_is(tmp_path: Path) -> None:
    task = load_task("mmbench")
    examples = task.load_examples(mmbench_file(tmp_path), None)
    assert examples[2].choices == ("x", "y", "z")
    made = figures_of(task, examples, {"1": "A", "1000001": "A", "2": "C"})
    assert (made["circular"].value, made["vanilla"].value) == (50.0, 100.0)
    made = figures_of(task, examples, {"1": "A", "1000001": "red", "2": "C"})
    assert made["circular"].value == 100.0
    # A question with an unanswered rotation has no circular score.
    judged = [task.judge(e, "A") for e in examples if e.key != "1000001"]
    assert task.units(judged) == {"2": 0.0}


def test_mmbench_writes_a_workbook(tmp_path: Path) -> None:
    import zipfile

    task = load_task("mmbench")
    examples = task.load_examples(mmbench_file(tmp_path, answers=False), None)
    assert all(not e.answers for e in examples)
    made = task.submission(examples, {"1": "A & <B>\ud83d"})  # half of a character, which no file holds
    assert made is not None
    (tmp_path / "s.xlsx").write_bytes(made[1])
    with zipfile.ZipFile(tmp_path / "s.xlsx") as archive:
        sheet = archive.read("xl/worksheets/sheet1.xml").decode()
    assert "prediction" in sheet
    assert "A &amp; &lt;B&gt;" in sheet
    assert 'r="A3"><v>1000001</v>' in sheet


def test_vizwiz(tmp_path: Path) -> None:
    rows = [
        {"image": "VizWiz_val_00000007.jpg", "question": "What?", "answers": people(*["unanswerable"] * 10)},
        {"image": "VizWiz_val_00000008.jpg", "question": "Who?", "answers": people(*["the dog"] * 10)},
    ]
    task = load_task("vizwiz")
    examples = task.load_examples(None, put(tmp_path / "val.json", rows))
    made = figures_of(
        task, examples, {e.key: text for e, text in zip(examples, ("Unanswerable", "dog"), strict=True)}
    )
    assert (made["accuracy"].value, made["accuracy_both_sides"].value) == (50.0, 100.0)
    llava = [{"question_id": 0, "image": rows[1]["image"], "text": "Who?" + VIZWIZ + WORD}]
    asked = task.load_examples(put(tmp_path / "q.jsonl", llava, lines=True), tmp_path / "val.json")
    assert (asked[0].answers[0], asked[0].aliases[0]) == ("the dog", "0")
    hidden = task.load_examples(tmp_path / "q.jsonl", None)
    assert task.submission(hidden, {rows[1]["image"]: "The Dog."}) == (
        ".json",
        b'[{"image": "VizWiz_val_00000008.jpg", "answer": "dog"}]',
    )


def test_seedbench_scores_videos_only_where_answered(tmp_path: Path) -> None:
    options = {f"choice_{letter}": letter for letter in "abcd"}
    rows = [
        {
            "question_id": "1",
            "question": "q",
            "answer": "A",
            "data_type": "image",
            "question_type_id": 1,
            **options,
        },
        {
            "question_id": "v1",
            "question": "q",
            "answer": "B",
            "data_type": "video",
            "question_type_id": 10,
            **options,
        },
    ]
    types = {"Scene Understanding": 1, "Action": 10}
    task = load_task("seedbench")
    examples = task.load_examples(None, put(tmp_path / "S.json", {"questions": rows, "question_type": types}))
    made = figures_of(task, examples[:1], {"1": "A."})
    assert set(made) == {"image", "image_first_letter", "type/Scene Understanding"}
    assert (made["image"].value, made["image_first_letter"].value) == (0.0, 100.0)
    assert figures_of(task, examples, {"1": "A", "v1": "C"})["all"].value == 50.0
    assert (
        match_answers(
            examples, load_answers(put(tmp_path / "a", [{"question_id": 1, "text": "A"}])), task.record_keys
        ).missing
        == ()
    )


def test_seedbench_questions_without_a_gold_answer_are_refused(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "A", "data_type": "image", "question_type_id": 1}
    row |= {f"choice_{letter}": letter for letter in "abcd"}
    gold = put(tmp_path / "S.json", {"questions": [{"question_id": "1", **row}], "question_type": {"x": 1}})
    asked = [{"question_id": n, "image": f"{n}.jpg", "text": "q"} for n in ("1", "2", "3")]
    with pytest.raises(InputError, match=r"2 of 3 questions of .*q.jsonl are not in the .* \(2, 3\)"):
        load_task("seedbench").load_examples(put(tmp_path / "q.jsonl", asked, lines=True), gold)


def test_seedbench_is_asked_about_the_pictures_that_llavas_file_names(tmp_path: Path) -> None:
    common = {"question": "q", "answer": "A", **{f"choice_{letter}": letter for letter in "abcd"}}
    rows = [
        {"question_id": "1", "data_type": "image", "data_id": "7_8", "question_type_id": 1, **common},
        {"question_id": "v1", "data_type": "video", "data_id": "x.mp4", "question_type_id": 10, **common},
    ]
    source = put(tmp_path / "S.json", {"questions": rows, "question_type": {"Scene": 1, "Action": 10}})
    asked = [
        {"question_id": "1", "image": "SEED-Bench-image/7_8", "text": "q"},
        {"question_id": "v1", "image": "SEED-Bench-video-image/x.png", "text": "q"},
    ]
    task = load_task("seedbench")
    assert [e.image for e in task.load_examples(None, source)] == ["7_8", None]
    examples = task.load_examples(put(tmp_path / "q.jsonl", asked, lines=True), source)
    assert [e.image for e in examples] == ["SEED-Bench-image/7_8", None]
    # A video is not asked about without anything to see, which would be scored like the others.
    asks = build_asks(task, examples, LLAVA, "none", 0)
    assert [ask.image for ask in asks] == ["SEED-Bench-image/7_8"]


@pytest.mark.parametrize("right", [True, False])
def test_a_subtask_of_mme_that_is_all_right_or_all_wrong_is_no_certainty(right: bool, tmp_path: Path) -> None:
    rows = [
        {"category": "color", "image_path": f"color/{n}.jpg", "question": f"Is it {word}?", "answer": answer}
        for n in range(30)
        for word, answer in (("red", "Yes"), ("blue", "No"))
    ]
    task = load_task("mme")
    examples = task.load_examples(None, put(tmp_path / "mme.json", rows))
    said = {e.key: e.answers[0] if right else "?" for e in examples}
    made = figures_of(task, examples, said)["color"]
    low, high = wilson_interval(30 * right, 30)
    assert (made.value, made.method) == (200.0 * right, "wilson over pictures")
    assert (made.low, made.high) == (pytest.approx(200 * low), pytest.approx(200 * high))


def mme_of(subtasks: dict[str, str], path: Path) -> tuple[Task, list[Example], dict[str, str]]:
    """MME with 30 pictures a subtask, and an answer to each of its questions: "right", "wrong", "yes",
    "mixed" (a third of the pictures wrong)."""
    rows = [
        {"category": name, "image_path": f"{name}/{n}.jpg", "question": f"Is it {word}?", "answer": answer}
        for name in subtasks
        for n in range(30)
        for word, answer in (("red", "Yes"), ("blue", "No"))
    ]
    task = load_task("mme")
    examples = task.load_examples(None, put(path, rows))
    said = {}
    for place, example in enumerate(examples):
        how = subtasks[example.category]
        wrong = how == "wrong" or (how == "mixed" and place // 2 % 3 == 0)
        said[example.key] = "?" if wrong else "yes" if how == "yes" else example.answers[0]
    return task, examples, said


def test_mme_of_a_model_that_always_says_yes_is_no_certainty(tmp_path: Path) -> None:
    made = figures_of(*mme_of({"color": "yes"}, tmp_path / "mme.json"))["color"]
    share = wilson_interval(0, 30)[1]
    # Others could have had none right, or both: 0 or 200 points where these have 50.
    assert (made.value, made.method) == (50.0, "wilson over pictures")
    assert (made.low, made.high) == pytest.approx((50 - 50 * share, 50 + 150 * share))


def test_mmes_totals_are_no_certainty_where_subtasks_are_all_right_or_all_wrong(tmp_path: Path) -> None:
    right = figures_of(*mme_of({"color": "right", "count": "right"}, tmp_path / "a.json"))
    total, part = right["perception"], right["color"]
    assert (total.value, total.n, total.high) == (400.0, 120, 400.0)
    assert total.low == pytest.approx(400 - math.sqrt(2) * (200 - part.low))
    assert total.method == "subtasks' intervals"
    # Nor is a subtask without a mistake left out of the width of a total that has some.
    mixed = figures_of(*mme_of({"color": "right", "count": "mixed", "OCR": "wrong"}, tmp_path / "b.json"))
    total, count = mixed["perception"], mixed["count"]
    assert count.method == "bootstrap over pictures"
    assert total.value - total.low == pytest.approx(math.hypot(200 - part.low, count.value - count.low))
    assert total.high - total.value == pytest.approx(math.hypot(mixed["OCR"].high, count.high - count.value))


def test_seedbench_says_what_its_question_file_leaves_out(tmp_path: Path) -> None:
    common = {"question": "q", "answer": "A", **{f"choice_{letter}": letter for letter in "abcd"}}
    rows = [{"question_id": str(n), "data_type": "image", "question_type_id": 1, **common} for n in range(3)]
    rows.append({"question_id": "v", "data_type": "video", "question_type_id": 10, **common})
    gold = put(tmp_path / "S.json", {"questions": rows, "question_type": {"Scene": 1}})
    asked = [{"question_id": n, "image": f"{n}.jpg", "text": "q"} for n in ("1", "v")]
    task = load_task("seedbench")
    examples = task.load_examples(put(tmp_path / "q.jsonl", asked, lines=True), gold)
    made = figures_of(task, examples, {"1": "A", "v": "A"})
    assert made["image"].protocol == f"{task.scorer}, 2 annotated ones not in the question file"
    assert made["video"].protocol == task.scorer
    assert figures_of(task, task.load_examples(None, gold)[:1], {"0": "A"})["image"].protocol == task.scorer


def test_mmvet_writes_the_graders_file(tmp_path: Path) -> None:
    task = load_task("mmvet")
    rows = [{"question_id": 0, "image": "v1_0.png", "text": "What is x?"}]
    examples = task.load_examples(put(tmp_path / "q.jsonl", rows, lines=True), None)
    found = match_answers(examples, load_answers(put(tmp_path / "a", rows)), task.record_keys).answers
    assert task.submission(examples, found) == (".json", b'{\n  "v1_0": "What is x?"\n}')
    with pytest.raises(InputError, match=r"graded by its own evaluator"):
        task.judge(examples[0], "x")


def test_daquar_compares_sets(tmp_path: Path) -> None:
    path = tmp_path / "data_eval.csv"
    path.write_text('question,answer,image_id\nwhat is it,"night_stand, lamp",image3\nhow many,4,image3\n')
    task = load_task("daquar")
    examples = task.load_examples(path, None)
    assert examples[0].image == "image3.jpg"
    made = figures_of(task, examples, {"0": "Lamp, night stand.", "1": "5"})
    assert (made["accuracy"].value, made["several_answers"].value, made["one_answer"].value) == (
        50.0,
        100.0,
        0.0,
    )


def test_easy_vqa(tmp_path: Path) -> None:
    rows = [["what shape?", "circle", 3], ["is it red?", "no", 3], ["what color?", "teal", 4]]
    task = load_task("easy_vqa")
    examples = task.load_examples(put(tmp_path / "q.json", rows), None)
    made = figures_of(task, examples, {"0": "Circle.", "1": "yes", "2": "teal"})
    assert [round(made[name].value) for name in ("accuracy", "shape", "yes_no", "colour")] == [
        67,
        100,
        0,
        100,
    ]
    assert task.record_keys(AnswerRecord(2, "x")) == ("2",)


def test_generated_scenes_find_their_pictures(tmp_path: Path) -> None:
    from bootstrap.scenes.write import write_split

    write_split(tmp_path / "heldout", "heldout", 2, seed=0, size=32)
    folder = tmp_path / "heldout"
    files = folder / "questions.json", folder / "annotations.json", folder / "images"
    examples = load_task("scenes").load_examples(*files)
    assert {example.image for example in examples} == {"000000.png", "000001.png"}


@pytest.mark.parametrize("hint", ["", "nan", "None", None])
def test_mmbench_shows_no_hint_that_is_none(hint: str | None) -> None:
    example = Example("1", 1, "Which?", "a.jpg", facts={"hint": hint, "options": {"A": "red", "B": "blue"}})
    assert load_task("mmbench").prompt(example, LLAVA) == "Which?\nA. red\nB. blue" + LETTER


def test_a_question_is_the_same_in_all_files_of_its_benchmark(tmp_path: Path) -> None:
    problem = {
        "question": "Which is red?", "choices": ["a rose", "a lemon"], "answer": 0, "hint": "Two of them.",
        "image": "image.png", "split": "test", "lecture": "", "solution": "",
    }  # fmt: skip
    said = "<image>\nContext: Two of them.\nWhich is red?\nA. a rose\nB. a lemon"
    turns = [{"from": "human", "value": said}, {"from": "gpt", "value": "A"}]
    row = {"id": "7", "image": "7/image.png", "conversations": turns}
    gold = put(tmp_path / "problems.json", {"7": problem})
    put(tmp_path / "pid_splits.json", {"test": ["7"]})
    task = load_task("scienceqa")
    (plain,) = task.load_examples(gold, gold)
    (llava,) = task.load_examples(put(tmp_path / "llava.json", [row]), None)
    assert plain.question != llava.question
    assert hash_question(plain) == hash_question(llava)
    put(gold, {"7": {**problem, "question": "Which is green?"}})
    assert hash_question(plain) != hash_question(task.load_examples(gold, gold)[0])
