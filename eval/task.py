"""What a benchmark is to this package: examples, a prompt, a judge, and figures with their intervals."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.answers import AnswerRecord, InputError, name_some
from eval.intervals import Figure, grouped_figure

LLAVA = "llava-1.5"
LMMS_EVAL = "lmms-eval"
BARE = "bare"
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Example:
    """One question of a benchmark.

    Attributes:
        key: Unique name of the example within its benchmark.
        question_id: The identifier the benchmark's own files and submission formats use.
        question: The bare question, without any instruction to the model.
        image: File name below the picture folder; None for a question without a picture.
        answers: Gold answers; empty where the benchmark keeps them on a server.
        choices: Options of a multiple-choice question, in the order of their letters.
        category: The group its score is reported under.
        llava_prompt: The prompt in LLaVA's own question file, if the example was read from one.
        optional: Scored if answered, not missed if not (SEED-Bench's video questions).
        aliases: Other keys an answer file may know the example by.
        twin: Key of an earlier question with the same id. The file's n-th answer to that id is to the n-th of
            them, and one answer alone is to all.
        facts: What only this benchmark's scorer needs.
    """

    key: str
    question_id: int | str
    question: str
    image: str | None
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    category: str = ""
    llava_prompt: str | None = None
    optional: bool = False
    aliases: tuple[str, ...] = ()
    twin: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgement:
    """What a scorer made of one answer.

    Attributes:
        key: The example's key.
        score: In 0 ... 1, under the benchmark's own rule.
        parsed: What the scorer read out of the answer.
        category: The example's category.
        facts: What this benchmark's `aggregate` needs besides.
        picture: The example's: questions about one picture are not independent. Empty where the scorer was
            asked about an answer alone.
    """

    key: str
    score: float
    parsed: str
    category: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    picture: str = ""


def score_figure(
    judgements: Sequence[Judgement],
    protocol: str = "",
    detail: bool = False,
    scores: Sequence[float] | None = None,
) -> Figure:
    """Mean score in percent, with the interval of :func:`eval.intervals.grouped_figure` over pictures.

    Args:
        judgements: Of the questions.
        protocol: The scoring rule, printed beside the figure.
        detail: True for a breakdown that the printed table leaves to the JSON file.
        scores: Others than the judgements' own, one each.
    """
    scores = [judgement.score for judgement in judgements] if scores is None else scores
    groups = [(j.picture, "" if j.picture else j.key) for j in judgements]
    return grouped_figure(scores, groups, protocol, detail)


def hash_question(example: Example) -> str:
    """Of its last line and gold answers: keys may be the numbers of rows, which every file has.

    Files of one benchmark differ in what stands before the question (ScienceQA's context).
    """
    last = next(reversed(example.question.strip().lower().splitlines()), "")
    known = [" ".join(last.split()), list(example.answers)]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]


class Task(ABC):
    """A benchmark. One subclass a file in `eval/tasks`.

    Attributes:
        name: How the command line calls it.
        scorer: The rule behind the figures, printed beside each of them.
        primary: The figure that stands for the benchmark when one number is wanted.
        empty_reads: What the official rule makes of an empty answer.
        prompts: Prompt protocols that are known to be those of their source.
    """

    name: str
    scorer: str
    primary: str
    empty_reads: str = "wrong"
    prompts: tuple[str, ...] = (LLAVA, LMMS_EVAL)

    def __init_subclass__(cls) -> None:
        """Sees that a benchmark says what it is before anything is asked, and not when figures are written.

        Raises:
            TypeError: If it does not; names what is missing.
        """
        super().__init_subclass__()
        missing = [name for name in ("name", "scorer", "primary") if not hasattr(cls, name)]
        if missing:
            words = " and no ".join(missing)
            raise TypeError(f"the benchmark {cls.__name__} has no {words}; see eval.task.Task")

    @abstractmethod
    def load_examples(
        self, questions: Path | None, annotations: Path | None, images: Path | None = None
    ) -> list[Example]:
        """Reads the benchmark's files as they are distributed.

        Args:
            questions: The question file, official or LLaVA's; None where the annotations hold the questions.
            annotations: The file or folder with the gold answers; None where there are none.
            images: Picture folder. If given, every picture must be in it.

        Raises:
            InputError: If a file is missing, of another split, damaged, or names pictures that are not there.
        """

    @abstractmethod
    def judge(self, example: Example, answer: str, as_written: bool = False) -> Judgement:
        """Scores one answer.

        Args:
            example: An example of this task with gold answers.
            answer: The answer.
            as_written: True if it comes from a file in the benchmark's own submission format. False for a
                model's raw text, which goes through the same conversion as LLaVA's scripts put it through.
        """

    @abstractmethod
    def aggregate(self, judgements: Sequence[Judgement]) -> dict[str, Figure]:
        """Turns judgements into named figures, each with n and a 95 % interval."""

    def prompt(self, example: Example, protocol: str = LLAVA) -> str:
        """The text shown to the model, without the image token and the chat template.

        Raises:
            InputError: If this benchmark does not have the protocol.
        """
        if protocol not in self.prompts:
            known = " and ".join(repr(name) for name in self.prompts)
            raise InputError(f"{self.name} has no prompt protocol {protocol!r}; it has {known}.")
        if not example.question and example.llava_prompt is None:
            raise InputError(
                f"Nothing says what question {example.question_id} of {self.name} is; give its question file."
            )
        if protocol == BARE:
            return example.question
        if protocol == LLAVA:
            return self.llava_prompt(example) if example.llava_prompt is None else example.llava_prompt
        return self.lmms_prompt(example)

    def llava_prompt(self, example: Example) -> str:
        """LLaVA-1.5's prompt, for an example that was not read from LLaVA's own question file."""
        return example.question + SHORT_ANSWER

    def lmms_prompt(self, example: Example) -> str:
        """lmms-eval's prompt (checked against release 0.7.3)."""
        return example.question + SHORT_ANSWER

    def record_keys(self, record: AnswerRecord) -> tuple[str, ...]:
        """Keys or aliases under which an answer's example may be found, the most exact first."""
        return (str(record.question_id),) if record.question_id is not None else ()

    def units(self, judgements: Sequence[Judgement]) -> dict[str, float]:
        """The independent units of the primary accuracy and their scores, for paired comparisons."""
        return {judgement.key: judgement.score for judgement in judgements}

    def groups(self, judgements: Sequence[Judgement]) -> dict[str, str]:
        """The picture of each unit, where units of one picture go together; empty where they are alone."""
        pictures = {judgement.key: judgement.picture for judgement in judgements if judgement.picture}
        return pictures if len(set(pictures.values())) < len(pictures) else {}

    def submission(
        self, examples: Sequence[Example], answers: Mapping[str, str], as_written: Collection[str] = ()
    ) -> tuple[str, bytes] | None:
        """The file to upload where a server or a judge scores: its suffix and content, or None.

        Args:
            examples: All questions.
            answers: By the key of their question.
            as_written: Keys of those that are in the submission's form already, and stay as they are.
        """
        return None


def choose_answer(answers: Sequence[str]) -> str:
    """What a model is taught to say: the answer most people gave; of several the one that was given first.

    Args:
        answers: Gold answers, one or more.
    """
    return Counter(answers).most_common(1)[0][0]


def find_missing_pictures(examples: Sequence[Example], images: Path) -> list[str]:
    """Names of the pictures that the examples need and the folder does not have, each once."""
    if not images.is_dir():
        raise InputError(f"The picture folder {images} does not exist.")
    wanted = dict.fromkeys(example.image for example in examples if example.image is not None)
    return [name for name in wanted if not (images / name).is_file()]


def checked(examples: list[Example], images: Path | None, source: Path) -> list[Example]:
    """Returns the examples after the checks that every benchmark needs.

    Raises:
        InputError: If there are none, if two share a key, or if pictures are missing.
    """
    if not examples:
        raise InputError(f"{source} holds no questions.")
    seen: set[str] = set()
    repeated: dict[str, None] = {}
    for example in examples:
        if example.key in seen:
            repeated[example.key] = None
        seen.add(example.key)
    if repeated:
        raise InputError(
            f"{source} asks {len(repeated)} questions more than once ({name_some(list(repeated))}); "
            "each must be there once."
        )
    if images is not None:
        missing = find_missing_pictures(examples, images)
        if missing:
            raise InputError(
                f"{len(missing)} pictures of {source} are not in {images} ({name_some(missing)})."
            )
    return examples
