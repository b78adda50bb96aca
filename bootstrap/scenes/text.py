"""Captions and LLaVA conversations of a scene."""

from __future__ import annotations

import random
from typing import Any

from bootstrap.scenes.scene import Scene, SceneObject
from bootstrap.scenes.vocabulary import COUNT_WORDS, plural, with_article

_LEFT_RIGHT = ("on the left", "in the center", "on the right")
_TOP_BOTTOM = ("at the top", "in the middle", "at the bottom")


def side_words(thing: SceneObject) -> tuple[str, str]:
    """Where an object is: words for its column and for its row; the middle is 0.42 to 0.58 of the side."""
    return _LEFT_RIGHT[_band(thing.x)], _TOP_BOTTOM[_band(thing.y)]


def _band(value: float) -> int:
    return 0 if value < 0.42 else 2 if value > 0.58 else 1


def _main_phrase(rng: random.Random, scene: Scene) -> str:
    main = scene.main
    draw = rng.random()
    if draw < 0.15:
        phrase = with_article(main.name)
    elif draw < 0.3:
        phrase = f"a big {main.color} {main.shape}"
    else:
        phrase = f"a {main.texture} {main.color} {main.shape}"
    if rng.random() < 0.6:
        phrase += f" {rng.choice(side_words(main))}"
    return phrase


def _others_phrases(rng: random.Random, scene: Scene) -> list[str]:
    counts: dict[tuple[str, str], int] = {}
    for thing in scene.objects:
        if not thing.main:
            counts[thing.color, thing.shape] = counts.get((thing.color, thing.shape), 0) + 1
    phrases = [
        with_article(f"{color} {shape}") if count == 1 else f"{COUNT_WORDS[count]} {color} {plural(shape)}"
        for (color, shape), count in counts.items()
    ]
    rng.shuffle(phrases)
    return phrases


def caption(scene: Scene, variant: int = 0) -> str:
    """One sentence about a scene; the main object comes first.

    Args:
        scene: What to describe.
        variant: Picks one of many wordings; the same number always gives the same sentence.
    """
    rng = random.Random(f"caption/{scene.seed}/{scene.split}/{scene.index}/{variant}")
    text = _main_phrase(rng, scene)
    others = _others_phrases(rng, scene)
    if rng.random() < 0.2:
        text += f", {COUNT_WORDS[len(scene.objects)]} objects"
    elif others:
        shown = others[: rng.randint(1, min(2, len(others)))]
        text += " with " + " and ".join(shown)
    if scene.printed is not None and rng.random() < 0.7:
        spelled = " ".join(scene.printed.text) if scene.printed.kind == "number" else scene.printed.text
        text += f" and the {scene.printed.kind} {spelled}"
    return text


_REQUESTS = (
    "Describe the picture.",
    "What do you see?",
    "What is shown here?",
    "Give a short description of the image.",
)


def chat_record(scene: Scene, file_name: str, questions: list[tuple[str, str]]) -> dict[str, Any]:
    """A LLaVA conversation: a description, then the given questions with their answers.

    Args:
        scene: The scene in the picture.
        file_name: Name of the picture, relative to the image folder.
        questions: (question, answer) pairs.
    """
    rng = random.Random(f"chat/{scene.seed}/{scene.split}/{scene.index}")
    described = caption(scene)
    turns = [("human", rng.choice(_REQUESTS)), ("gpt", described[0].upper() + described[1:] + ".")]
    for question, answer in questions:
        turns += [("human", question), ("gpt", answer)]
    conversations = [{"from": who, "value": value} for who, value in turns]
    conversations[0]["value"] = "<image>\n" + conversations[0]["value"]
    return {"id": f"scene-{scene.image_id}", "image": file_name, "conversations": conversations}
