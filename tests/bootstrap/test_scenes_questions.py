"""Questions about scenes: answered again from the ground truth, and not to be guessed."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict

import pytest

from bootstrap.scenes import build_scene
from bootstrap.scenes.questions import KINDS, AnswerBalance, Question, ask
from bootstrap.scenes.scene import Scene, SceneObject
from bootstrap.scenes.vocabulary import plural
from bootstrap.scenes.write import vqa_records


def asked(split: str, count: int) -> list[tuple[Scene, Question]]:
    balance = AnswerBalance()
    scenes = [build_scene(1, index, split) for index in range(count)]
    return [(scene, question) for scene in scenes for question in ask(scene, balance)]


def only(scene: Scene, name: str) -> SceneObject:
    found = [thing for thing in scene.objects if name in (thing.name, thing.shape, f"{thing.color} object")]
    assert len(found) == 1, f"{name} is not unique in scene {scene.index}"
    return found[0]


def answer_again(scene: Scene, text: str) -> str:
    """A second reading of the questions, written apart from the generator."""

    def yes(condition: bool) -> str:
        return "yes" if condition else "no"

    def count(words: str) -> int:
        return sum(words in (plural(thing.shape), f"{thing.color} objects") for thing in scene.objects)

    patterns = {
        r"Is there an? (.+)\?": lambda m: yes(any(thing.name == m[1] for thing in scene.objects)),
        r"How many (.+) are there\?": lambda m: str(count(m[1])),
        r"What color is the (.+)\?": lambda m: only(scene, m[1]).color,
        r"What shape is the (.+)\?": lambda m: only(scene, m[1]).shape,
        r"Is the (.+) solid, striped, dotted or checked\?": lambda m: only(scene, m[1]).texture,
        r"Is the (.+) bigger than the (.+)\?": lambda m: yes(
            only(scene, m[1]).radius > only(scene, m[2]).radius
        ),
        r"Are there more (.+) than (.+)\?": lambda m: yes(count(m[1]) > count(m[2])),
        r"Is the (.+) to the left of the (.+)\?": lambda m: yes(only(scene, m[1]).x < only(scene, m[2]).x),
        r"Is the (.+) to the right of the (.+)\?": lambda m: yes(only(scene, m[1]).x > only(scene, m[2]).x),
        r"Is the (.+) above the (.+)\?": lambda m: yes(only(scene, m[1]).y < only(scene, m[2]).y),
        r"Is the (.+) below the (.+)\?": lambda m: yes(only(scene, m[1]).y > only(scene, m[2]).y),
        r"What \w+ is written in the picture\?": lambda m: scene.printed and scene.printed.text,
    }
    for pattern, answer in patterns.items():
        match = re.fullmatch(pattern, text)
        if match:
            return answer(match)
    raise AssertionError(f"no reading of {text!r}")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_answer_follows_from_the_ground_truth(split: str):
    pairs = asked(split, 250)
    assert {question.kind for _, question in pairs} == set(KINDS)
    for scene, question in pairs:
        assert answer_again(scene, question.text) == question.answer, question.text


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_guessing_without_the_picture_is_near_chance(split: str):
    """A guesser per wording and per kind, fitted on the training questions, gains little over chance."""
    known: dict[str, Counter[str]] = defaultdict(Counter)
    for _, question in asked("train", 600):
        known[question.text][question.answer] += 1
        known[question.kind][question.answer] += 1
    hits: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    chance: dict[str, float] = defaultdict(float)
    other = asked(split, 400) if split == "heldout" else asked("valid", 400)
    for _, question in other:
        counts = known[question.text] or known[question.kind]
        hits[question.kind] += counts.most_common(1)[0][0] == question.answer
        totals[question.kind] += 1
        chance[question.kind] += 1 / question.choices
    for kind in totals:
        assert hits[kind] / totals[kind] < chance[kind] / totals[kind] + 0.12, kind


def test_answers_are_balanced_within_a_kind():
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _, question in asked("train", 300):
        answers[question.kind][question.answer] += 1
    for kind in ("existence", "comparison", "spatial", "counting"):
        counts = answers[kind].values()
        assert max(counts) - min(counts) <= 0.1 * sum(counts), (kind, answers[kind])


def test_records_have_the_official_form():
    scenes = [build_scene(0, index) for index in range(3)]
    balance = AnswerBalance()
    questions, annotations = vqa_records("train", [(scene, ask(scene, balance)) for scene in scenes])
    assert set(questions) == {"info", "task_type", "data_type", "data_subtype", "license", "questions"}
    assert set(annotations) == {"info", "data_type", "data_subtype", "license", "annotations"}
    assert all(set(item) == {"image_id", "question", "question_id"} for item in questions["questions"])
    ids = [item["question_id"] for item in questions["questions"]]
    assert ids == [item["question_id"] for item in annotations["annotations"]]
    assert len(set(ids)) == len(ids)
    for item in annotations["annotations"]:
        keys = {
            "question_type",
            "multiple_choice_answer",
            "answers",
            "image_id",
            "answer_type",
            "question_id",
        }
        assert set(item) == keys
        assert [answer["answer_id"] for answer in item["answers"]] == list(range(1, 11))
        assert item["answer_type"] in ("yes/no", "number", "other")
    assert json.loads(json.dumps(questions)) == questions


def test_a_limit_keeps_that_many_questions():
    scene = build_scene(0, 0)
    assert len(ask(scene, AnswerBalance(), 2)) == 2
    assert ask(scene, AnswerBalance(), 0) == []
