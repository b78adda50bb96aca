"""Turns a benchmark's training questions into LLaVA's chat JSON, with the prompts it is evaluated with.

python -m eval.to_chat --task daquar --questions data_train.csv --out chat.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.answers import InputError
from eval.outputs import check_output, write_output
from eval.task import BARE, LLAVA, LMMS_EVAL, Example, Task, choose_answer
from eval.tasks import list_tasks, load_task
from llm_integration.templates import IMAGE_MARK


def build_records(task: Task, examples: Sequence[Example], protocol: str, turns: int) -> list[dict[str, Any]]:
    """Conversations with gold answers, the picture before the first question.

    Args:
        task: The benchmark.
        examples: Its questions.
        protocol: The prompt around a question, as in an evaluation.
        turns: Questions about one picture that share a conversation, at most.

    Returns:
        Records in LLaVA's format, in the order of their first question.

    Raises:
        InputError: If an example has no gold answer, or a question holds an image mark.
    """
    open_records: dict[str, dict[str, Any]] = {}
    records: list[dict[str, Any]] = []
    for example in examples:
        question = task.prompt(example, protocol)
        if not example.answers:
            raise InputError(f"Question {example.key} of {task.name} has no gold answer to learn from.")
        if IMAGE_MARK in question:
            raise InputError(f"Question {example.key} of {task.name} holds an {IMAGE_MARK} mark.")
        place = example.image or f"no picture, {example.key}"
        record = open_records.get(place)
        if record is None:
            record = {"id": f"{task.name}-{example.key}", "conversations": []}
            if example.image is not None:
                record["image"] = example.image
                question = f"{IMAGE_MARK}\n{question}"
            open_records[place] = record
            records.append(record)
        record["conversations"] += [
            {"from": "human", "value": question},
            {"from": "gpt", "value": choose_answer(example.answers)},
        ]
        if len(record["conversations"]) >= 2 * turns:
            del open_records[place]
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m eval.to_chat", description=__doc__.split("\n")[0])
    parser.add_argument("--task", required=True, help=", ".join(list_tasks()))
    parser.add_argument("--questions", type=Path, help="question file, official or LLaVA's")
    parser.add_argument("--annotations", type=Path, help="file or folder with the gold answers")
    parser.add_argument("--images", type=Path, help="check that every picture is in this folder")
    parser.add_argument("--protocol", choices=(LLAVA, LMMS_EVAL, BARE), default=LLAVA, help="prompt")
    parser.add_argument("--turns", type=int, default=1, help="questions about a picture in one conversation")
    parser.add_argument("--out", type=Path, required=True, help="chat JSON to write")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    try:
        if options.turns < 1:
            raise InputError("--turns must be at least 1.")
        check_output(options.out, "--out", (options.questions, options.annotations))
        task = load_task(options.task)
        everything = task.load_examples(options.questions, options.annotations, options.images)
        # As an evaluation does: what would be about a video is not asked without it.
        examples = [e for e in everything if e.image is not None or not e.optional]
        if len(examples) < len(everything):
            left_out = len(everything) - len(examples)
            print(f"{left_out} questions without a picture are left out", file=sys.stderr)
        records = build_records(task, examples, options.protocol, options.turns)
        text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
        write_output(options.out, text, "--out")
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {len(examples)} questions in {len(records)} conversations")
    return 0


if __name__ == "__main__":
    sys.exit(main())
