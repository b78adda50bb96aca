"""One point of a comparison: a tower at N, trained with one seed, and asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from eval.answers import InputError
from eval.baselines.config import ParetoSettings
from eval.baselines.data import Plan, Quiz
from eval.baselines.language import load_language
from eval.baselines.reader import Reader, hash_weights
from eval.baselines.teach import See, answer_all, measure_answers, train
from eval.engine import exchange_pictures
from eval.task import choose_answer
from eval.towers import Seen, Tower, join_seen

LOOK_BATCH = 32
# What has to be equal in every point of one seed, for their difference to be the tower's alone.
ALIKE = ("plan_sha256", "start_sha256", "training", "test_questions")


@dataclass(frozen=True)
class Point:
    """Where a result belongs.

    Attributes:
        method: Of `eval.towers.METHODS`, or "no-image".
        tokens: N; 0 without pictures.
        seed: Of this training.
    """

    method: str
    tokens: int
    seed: int

    @property
    def label(self) -> str:
        """Method and N."""
        return f"{self.method}-{self.tokens}" if self.tokens else self.method

    @property
    def name(self) -> str:
        """File name of the result."""
        return f"{self.label}-seed{self.seed}"


class Looker:
    """Looks at all pictures once for each kind of look, and keeps what was seen.

    Args:
        pixels: (n, 3, H, W).
    """

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels
        self._kept: dict[str, Seen] = {}

    @torch.no_grad()
    def see(self, tower: Tower) -> Seen:
        """What the tower's frozen half leaves behind, for all pictures."""
        key = tower.shared_look or f"{tower.name}-{tower.num_tokens}"
        if key not in self._kept:
            look = tower.look_for_all if tower.shared_look else tower.look
            self._kept[key] = join_seen([look(images) for images in self.pixels.split(LOOK_BATCH)])
        return self._kept[key]


def build_reader(settings: ParetoSettings, texts: Sequence[str], width: int, seed: int) -> Reader:
    """The same language model and projector every time."""
    llm, tokenizer = load_language(settings.language, texts, seed)
    return Reader(llm, tokenizer, width, seed)


def run_point(
    point: Point,
    tower: Tower | None,
    reader: Reader,
    plan: Plan,
    lookers: tuple[Looker, Looker],
    test: Quiz,
    settings: ParetoSettings,
    on_step: Callable[[float], object] = lambda loss: None,
) -> dict[str, Any]:
    """Trains and asks one tower.

    Args:
        point: Its place in the comparison.
        tower: The tower; None for a model without pictures.
        reader: Fresh projector and language model.
        plan: The batches.
        lookers: Of the training and of the test pictures.
        test: Questions to answer.
        settings: The comparison's.
        on_step: Called with every step's loss.

    Returns:
        The result, as JSON values.

    Raises:
        InputError: If the tower makes another number of tokens than its point says.
    """
    start = hash_weights(reader)
    teach, check = (None if tower is None else looker.see(tower) for looker in lookers)
    see_train, see_test = see_with(tower, teach), see_with(tower, check)
    probe = see_test(torch.tensor([0]))
    made = 0 if probe is None else probe.shape[1]
    if made != point.tokens:
        raise InputError(f"{point.label} made {made} tokens a picture, not {point.tokens}.")
    training = settings.training
    extra = torch.nn.Module() if tower is None else tower
    losses = train(reader, extra, see_train, plan, training, on_step)
    # A tower without anything to train gave fixed tokens; a trained one gives others now.
    see_test = see_with(tower, check)
    also = "" if tower is None or tower.trained == "nothing" else f", {tower.trained}"
    result = {
        **asdict(point),
        "trained": f"projector{', language model' if training.train_language else ''}{also}",
        "plan_sha256": plan.sha256,
        "start_sha256": start,
        "training": {k: v for k, v in asdict(training).items() if k != "seeds"},
        "test_questions": len(test.examples),
        "loss": {"first": _mean(losses[:20]), "last": _mean(losses[-20:])},
        **score(reader, test, see_test, settings),
    }
    if point.method == "vit" and settings.floors:
        wrong = exchange_pictures([example.image for example in test.examples], point.seed)
        result["random-picture"] = score(reader, test, see_test, settings, wrong)
    return result


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def see_with(tower: Tower | None, seen: Seen | None) -> See:
    """How pictures become visual tokens: made once by a tower that has nothing to train."""
    if tower is None or seen is None:
        return lambda rows: None
    if any(parameter.requires_grad for parameter in tower.parameters()):
        return lambda rows: tower.reduce(seen[rows])
    if type(tower).reduce is Tower.reduce:  # nothing is left to do
        return lambda rows: seen.tokens[rows]
    with torch.no_grad():
        starts = range(0, seen.tokens.shape[0], 256)
        made = torch.cat([tower.reduce(seen[start : start + 256]) for start in starts])
    return lambda rows: made[rows]


def score(
    reader: Reader,
    test: Quiz,
    see: See,
    settings: ParetoSettings,
    images: Sequence[str | None] | None = None,
) -> dict[str, Any]:
    """Answers, judged by the benchmark's own rule, and how surprising the right ones are.

    Args:
        reader: Trained projector and language model.
        test: The questions.
        see: Visual tokens of pictures by their numbers.
        settings: The comparison's.
        images: Other pictures than the questions' own.
    """
    numbers = {name: number for number, name in enumerate(test.pictures)}
    images = images or [example.image for example in test.examples]
    questions = [(e.question, numbers[str(i)]) for e, i in zip(test.examples, images, strict=True)]
    texts = answer_all(reader, questions, see, settings.max_new_tokens)
    judged = [test.task.judge(example, text) for example, text in zip(test.examples, texts, strict=True)]
    nats = measure_answers(
        reader, questions, [choose_answer(example.answers) for example in test.examples], see
    )
    keys = [example.key for example in test.examples]
    return {
        "figures": {name: figure.value for name, figure in test.task.aggregate(judged).items()},
        "units": test.task.units(judged),
        "nats": dict(zip(keys, nats, strict=True)),
        "answers": dict(zip(keys, texts, strict=True)),
    }


def check_alike(results: Sequence[dict[str, Any]]) -> None:
    """Sees that points of one seed differ in their tower only.

    Raises:
        InputError: If something else differs; names it and the points.
    """
    firsts: dict[int, dict[str, Any]] = {}
    for other in results:
        first = firsts.setdefault(other["seed"], other)
        for key in ALIKE:
            if other[key] != first[key]:
                names = [Point(r["method"], r["tokens"], r["seed"]).label for r in (first, other)]
                raise InputError(
                    f"{names[0]} and {names[1]} differ in {key} ({first[key]!r} and {other[key]!r}), so "
                    "their figures cannot be compared; delete the run's points and run it again."
                )
