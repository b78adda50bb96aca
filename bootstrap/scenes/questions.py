"""Questions about a scene, well-posed by construction and balanced so that guessing does not pay."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import permutations

from bootstrap.scenes.scene import Scene, SceneObject, build_scene
from bootstrap.scenes.vocabulary import COLORS, SHAPES, TEXTURES, plural, with_article

MAX_COUNT = 3
"""Counting questions have answers 0 to `MAX_COUNT`; higher counts are too rare to balance."""
_MIN_OFFSET = 0.15
_MIN_RATIO = 1.3
_PARTNER_STEP = 7919


@dataclass(frozen=True)
class Question:
    """A question, its answer, its kind and how many answers a guesser would have to choose from."""

    text: str
    answer: str
    kind: str
    choices: int

    @property
    def answer_type(self) -> str:
        """`yes/no`, `number` or `other`, as VQA v2 has it."""
        if self.answer in ("yes", "no"):
            return "yes/no"
        return "number" if self.answer.isdigit() else "other"


@dataclass
class AnswerBalance:
    """Counts what was asked before, so that every wording gets all of its answers equally often."""

    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    totals: Counter[str] = field(default_factory=Counter)

    def pick(self, rng: random.Random, candidates: list[Question]) -> Question:
        """Takes the candidate whose answer is furthest behind, and counts it."""
        candidates = list(candidates)
        rng.shuffle(candidates)
        chosen = min(candidates, key=self._lead)
        for key in (self._key(chosen), chosen.text):
            self.asked[key, chosen.answer] += 1
            self.totals[key] += 1
        return chosen

    @staticmethod
    def _key(question: Question) -> str:
        return f"{question.kind}/{question.choices}"

    def _lead(self, question: Question) -> float:
        """How far the answer is ahead of an equal share: over the kind, and within this very wording."""

        def lead(key: str) -> float:
            return self.asked[key, question.answer] - self.totals[key] / question.choices

        return lead(self._key(question)) + 2.0 * lead(question.text)


def _unique(scene: Scene, **wanted: str) -> list[SceneObject]:
    return [
        thing for thing in scene.objects if all(getattr(thing, key) == value for key, value in wanted.items())
    ]


def _named_once(scene: Scene) -> list[SceneObject]:
    """The objects that `color shape` points out without doubt."""
    names = Counter(thing.name for thing in scene.objects)
    return [thing for thing in scene.objects if names[thing.name] == 1]


def _partner(scene: Scene) -> Scene:
    """Another scene of the same split: what is absent is asked about as often as what is present."""
    return build_scene(scene.seed, scene.index + _PARTNER_STEP, scene.split)


def existence(scene: Scene) -> Iterator[Question]:
    """Is there a red circle?"""
    # The balance decides between yes and no; names of the partner make no-questions as plausible.
    present = {thing.name for thing in scene.objects}
    for name in sorted(present | {thing.name for thing in _partner(scene).objects}):
        yield Question(f"Is there {with_article(name)}?", "yes" if name in present else "no", "existence", 2)


def counting(scene: Scene) -> Iterator[Question]:
    """How many stars are there?"""
    for shape in SHAPES:
        count = len(_unique(scene, shape=shape))
        if count <= MAX_COUNT:
            yield Question(f"How many {plural(shape)} are there?", str(count), "counting", MAX_COUNT + 1)
    for color in COLORS:
        count = len(_unique(scene, color=color))
        if count <= MAX_COUNT:
            yield Question(f"How many {color} objects are there?", str(count), "counting", MAX_COUNT + 1)


def attributes(scene: Scene) -> Iterator[Question]:
    """What color is the star? What shape is the red object? What is the pattern of the red star?"""
    for thing in scene.objects:
        if len(_unique(scene, shape=thing.shape)) == 1:
            yield Question(f"What color is the {thing.shape}?", thing.color, "attribute", len(COLORS))
        if len(_unique(scene, color=thing.color)) == 1:
            yield Question(f"What shape is the {thing.color} object?", thing.shape, "attribute", len(SHAPES))
    for thing in _named_once(scene):
        text = f"Is the {thing.name} solid, striped, dotted or checked?"
        yield Question(text, thing.texture, "attribute", len(TEXTURES))


def comparison(scene: Scene) -> Iterator[Question]:
    """Is the red circle bigger than the blue star? Are there more stars than rings?"""
    for first, second in permutations(_named_once(scene), 2):
        ratio = first.radius / second.radius
        if max(ratio, 1 / ratio) >= _MIN_RATIO:
            answer = "yes" if ratio > 1 else "no"
            yield Question(f"Is the {first.name} bigger than the {second.name}?", answer, "comparison", 2)
    present = sorted({thing.shape for thing in scene.objects})
    for one, other in permutations(present, 2):
        difference = len(_unique(scene, shape=one)) - len(_unique(scene, shape=other))
        if difference:
            answer = "yes" if difference > 0 else "no"
            yield Question(f"Are there more {plural(one)} than {plural(other)}?", answer, "comparison", 2)


def spatial(scene: Scene) -> Iterator[Question]:
    """Is the red circle to the left of the blue star?"""
    for first, second in permutations(_named_once(scene), 2):
        for words, offset in (
            ("to the left of", second.x - first.x),
            ("to the right of", first.x - second.x),
            ("above", second.y - first.y),
            ("below", first.y - second.y),
        ):
            if abs(offset) >= _MIN_OFFSET:
                answer = "yes" if offset > 0 else "no"
                yield Question(f"Is the {first.name} {words} the {second.name}?", answer, "spatial", 2)


def reading(scene: Scene) -> Iterator[Question]:
    """What word is written? What number is written?"""
    if scene.printed is not None:
        kind = scene.printed.kind
        choices = 24 if kind == "word" else 100
        yield Question(f"What {kind} is written in the picture?", scene.printed.text, "reading", choices)


KINDS: dict[str, Callable[[Scene], Iterator[Question]]] = {
    "existence": existence,
    "counting": counting,
    "attribute": attributes,
    "comparison": comparison,
    "spatial": spatial,
    "reading": reading,
}


def ask(scene: Scene, balance: AnswerBalance, count: int | None = None) -> list[Question]:
    """At most one question of each kind about a scene.

    Args:
        scene: What is asked about.
        balance: Remembers earlier answers; use one for all scenes of a split, in order.
        count: Keep that many kinds, drawn at random; None keeps all that the scene allows.
    """
    rng = random.Random(f"questions/{scene.seed}/{scene.split}/{scene.index}")
    kinds = list(KINDS)
    rng.shuffle(kinds)
    asked: list[Question] = []
    for kind in kinds:
        candidates = list(KINDS[kind](scene))
        if candidates and (count is None or len(asked) < count):
            asked.append(balance.pick(rng, candidates))
    return asked
