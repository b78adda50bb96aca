"""Our models under lmms-eval's own command, and what our engine says about the same questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; see make test-lmms")

from eval.config import BenchmarkSettings, RunSettings
from eval.run import run
from eval.tasks import load_task

from .conftest import CATEGORIES, PARAGRAPHS, QUIZ, Lab

TASKS = {"random": "local_pope_random", "popular": "local_pope_pop", "adversarial": "local_pope_adv"}
ALL = "local_pope"
RATES = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "f1_score"}


class Theirs:
    """What lmms-eval left: figures in percent, and samples in the order of the questions."""

    def __init__(self, output: str, folder: Path) -> None:
        found = sorted(folder.rglob("*_results.json"))
        assert len(found) == 1, f"lmms-eval wrote {len(found)} results:\n{output[-5000:]}"
        self.results: dict[str, Any] = json.loads(found[0].read_text(encoding="utf-8"))
        self.folder = found[0].parent

    def figure(self, task: str, name: str) -> float:
        return 100 * float(self.results["results"][task][f"pope_{name},none"])

    def samples(self, task: str) -> list[dict[str, Any]]:
        (path,) = self.folder.glob(f"*_samples_{task}.jsonl")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return sorted(rows, key=lambda row: row["doc_id"])


@pytest.fixture(scope="module")
def theirs(lab: Lab) -> Theirs:
    return Theirs(*lab.lmms_eval("theirs", "--batch_size", "4", tasks=",".join([*TASKS.values(), ALL])))


@pytest.fixture(scope="module")
def settings(lab: Lab) -> RunSettings:
    files = BenchmarkSettings("pope", annotations=lab.labels, images=lab.pictures)
    out = lab.folder / "ours"
    # One question at a time, where lmms-eval asks four; as many new tokens as its definition allows.
    return RunSettings(lab.model, files, out, protocol="lmms-eval", batch=1, max_new_tokens=128, device="cpu")


@pytest.fixture(scope="module")
def ours(settings: RunSettings) -> Any:
    """Our engine's outcome."""
    return run(settings)


@pytest.fixture(scope="module")
def rows(ours: Any, settings: RunSettings) -> list[dict[str, Any]]:
    """Our engine's answers, in the order of QUIZ."""
    lines = (settings.out / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_quiz_has_every_kind_of_answer(rows: list[dict[str, Any]]) -> None:
    assert [row["text"] for row in rows] == [said for *_, said in QUIZ]
    strict = {(label, said.lower() if said.lower() in ("yes", "no") else "") for *_, label, said in QUIZ}
    assert len(strict) == 6


def test_the_same_prompts_and_the_same_answers(theirs: Theirs, rows: list[dict[str, Any]]) -> None:
    samples = [sample for category in CATEGORIES for sample in theirs.samples(TASKS[category])]
    assert [sample["input"] for sample in samples] == [row["prompt"] for row in rows]
    said = [sample["filtered_resps"] for sample in samples]
    assert said == [row["text"].split("\n\n")[0] for row in rows]
    # lmms-eval asks to stop at an empty line; nothing else makes a difference.
    assert [row["text"] for row, other in zip(rows, said, strict=True) if row["text"] != other] == [
        PARAGRAPHS
    ]
    assert [sample["filtered_resps"] for sample in theirs.samples(ALL)] == said
    counts = [sample["token_counts"][0] for sample in samples]
    same = [count["output_tokens"] == row["new_tokens"] for count, row in zip(counts, rows, strict=True)]
    assert same == [row["text"] != PARAGRAPHS for row in rows]


@pytest.mark.parametrize("category", ["random", "adversarial"])
@pytest.mark.parametrize("name", RATES)
def test_the_same_scores(theirs: Theirs, ours: Any, category: str, name: str) -> None:
    mine = ours.figures[f"strict/{category}/{name}"]
    assert theirs.figure(TASKS[category], RATES[name]) == pytest.approx(mine.value, abs=1e-9)
    assert mine.n == sum(row[0] == category for row in QUIZ)


@pytest.mark.parametrize("name", RATES)
def test_an_answer_of_paragraphs_is_the_whole_difference(theirs: Theirs, ours: Any, name: str) -> None:
    task = load_task("pope")
    cut = [
        task.judge(example, ours.matched.answers[example.key].split("\n\n")[0]) for example in ours.examples
    ]
    figures = task.aggregate(cut)
    theirs_says = theirs.figure(TASKS["popular"], RATES[name])
    assert theirs_says == pytest.approx(figures[f"strict/popular/{name}"].value, abs=1e-9)
    if name == "accuracy":
        assert theirs_says == pytest.approx(ours.figures["strict/popular/accuracy"].value + 100 / 4)


def test_their_yes_ratio_counts_labels_and_ours_answers(theirs: Theirs, ours: Any) -> None:
    for category, task in TASKS.items():
        labels = [label for group, _, _, label, _ in QUIZ if group == category]
        said = [said.lower() for group, *_, said in QUIZ if group == category]
        assert theirs.figure(task, "yes_ratio") == pytest.approx(100 * labels.count("yes") / len(labels))
        mine = ours.figures[f"strict/{category}/yes_ratio"].value
        assert mine == pytest.approx(100 * said.count("yes") / len(said))


def test_their_one_task_for_all_pools_and_our_mean_averages(theirs: Theirs, ours: Any) -> None:
    right = sum(said.split("\n\n")[0].lower() == label for *_, label, said in QUIZ)
    assert theirs.figure(ALL, "accuracy") == pytest.approx(100 * right / len(QUIZ))
    means = [theirs.figure(task, "f1_score") for task in TASKS.values()]
    assert theirs.figure(ALL, "f1_score") != pytest.approx(sum(means) / 3)


@pytest.mark.slow
def test_two_processes_give_the_same(lab: Lab, theirs: Theirs) -> None:
    launcher = [
        "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines",
        "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"
    ]  # fmt: skip
    output, folder = lab.lmms_eval("two", "--batch_size", "2", tasks=ALL, launcher=launcher)
    two = Theirs(output, folder)
    assert two.results["results"][ALL] == theirs.results["results"][ALL]
    assert [s["filtered_resps"] for s in two.samples(ALL)] == [
        s["filtered_resps"] for s in theirs.samples(ALL)
    ]
