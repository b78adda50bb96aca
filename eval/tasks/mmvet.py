"""MM-Vet: free answers that a language model grades; this package writes the file for the grader."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from eval.answers import AnswerRecord, InputError, read_json_or_lines
from eval.intervals import Figure
from eval.questions import is_llava_file, need, required
from eval.shapes import identifier, text
from eval.task import Example, Judgement, Task, checked

_STEP_BY_STEP = (
    "First please perform reasoning, and think step by step to provide best answer "
    "to the following question: \n\n"
)


class MmVet(Task):
    """No score here: `submission` writes {"v1_0": answer, …}."""

    name = "mmvet"
    scorer = "graded by MM-Vet's own evaluator"
    primary = ""

    def load_examples(
        self, questions: Path | None, annotations: Path | None, images: Path | None = None
    ) -> list[Example]:
        """Reads LLaVA's question lines, or the benchmark's `mm-vet.json`."""
        source = required(questions or annotations, "MM-Vet's question file (--questions)")
        content = read_json_or_lines(source, distinct_keys=True)
        examples = []
        if is_llava_file(content):
            for number, row in enumerate(content, start=1):
                need(row, {"question_id": identifier, "text": text}, source, f"row {number}", {"image": text})
                name = f"v1_{row['question_id']}"
                examples.append(
                    Example(
                        name,
                        row["question_id"],
                        row["text"],
                        row.get("image"),
                        llava_prompt=row["text"],
                        aliases=(str(row["question_id"]),),
                    )
                )
        elif isinstance(content, dict):
            for name, row in content.items():
                need(row, {"question": text, "imagename": text}, source, f"question {name}")
                alias = (name.removeprefix("v1_"),)
                examples.append(Example(name, name, row["question"], row["imagename"], aliases=alias))
        else:
            raise InputError(f"{source} is neither mm-vet.json nor LLaVA's question file for MM-Vet.")
        return checked(examples, images, source)

    def judge(self, example: Example, answer: str, as_written: bool = False) -> Judgement:
        raise InputError(
            "MM-Vet's answers are graded by its own evaluator; write the submission file for it."
        )

    def aggregate(self, judgements: Sequence[Judgement]) -> dict[str, Figure]:
        raise InputError(
            "MM-Vet's answers are graded by its own evaluator; write the submission file for it."
        )

    def record_keys(self, record: AnswerRecord) -> tuple[str, ...]:
        return (str(record.question_id),)

    def llava_prompt(self, example: Example) -> str:
        return example.question

    def lmms_prompt(self, example: Example) -> str:
        return _STEP_BY_STEP + example.question

    def submission(
        self, examples: Sequence[Example], answers: Mapping[str, str], as_written: Collection[str] = ()
    ) -> tuple[str, bytes] | None:
        graded = {e.key: answers[e.key] for e in examples if e.key in answers}
        return ".json", json.dumps(graded, indent=2).encode()
