"""Ask a model about many pictures, without anybody at the keyboard.

``python -m llm_integration.batch --model LLAVA_DIR --prompt "What is it?" --images FOLDER --out FILE.jsonl``

``--images`` takes pictures and folders of them; ``--questions FILE.jsonl`` has a question a line instead,
``{"image": ..., "question": ...}``. The answers are JSON lines in the order of the questions. The same
command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from sparse_vlm.atomic import write_atomic
from sparse_vlm.fingerprint import sample_files
from sparse_vlm.lines import append_lines, cut_unfinished, read_lines

from .asked import Asked, find_pictures, read_questions
from .assemble import DTYPES
from .generate import Chat, load_chat
from .load import load_llava_config, read_json
from .replies import answer_many
from .result import base_of

# What an answer depends on, of the files that a model is read from.
_READ = (".safetensors", ".json", ".jinja", ".model", ".txt")
_NAMED = 5  # pictures that could not be read, in the closing message


class AnswerFile:
    """A file of answers that appears when it is whole.

    Until then they are in ``NAME.part``, a line a question, in order; ``NAME.run.json`` says what they depend
    on.

    Args:
        path: the file.
        facts: what the answers depend on.
        total: questions.

    Raises:
        ValueError: if the place holds something else, or answers that depend on other things.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], total: int) -> None:
        self.path = path
        self.part = path.with_name(f"{path.name}.part")
        self.total = total
        record = path.with_name(f"{path.name}.run.json")
        there = [file for file in (self.path, self.part) if file.exists()]
        if not record.is_file():
            if there:
                raise ValueError(f"{there[0]} is there already, and not of this command: name another --out")
        else:
            before = read_json(record)
            changed = [name for name in facts if name != "model" and before.get(name) != facts[name]]
            if there and changed:
                raise ValueError(
                    f"{there[0]} holds answers of another run ({', '.join(changed)} changed since): name "
                    "another --out, or delete it"
                )
        write_atomic(record, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        if self.part.is_file():
            cut_unfinished(self.part)

    @property
    def finished(self) -> bool:
        """Whether every question has been asked."""
        return self.path.is_file()

    def count(self, batch: int) -> int:
        """Questions that need not be asked again: whole batches, so that a restart asks the same together."""
        if not self.part.is_file():
            return 0
        lines = self.part.read_bytes().splitlines(keepends=True)
        done = len(lines) if len(lines) >= self.total else len(lines) // batch * batch
        if done < len(lines):
            write_atomic(self.part, b"".join(lines[:done]))
        return done

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add the next lines."""
        append_lines(self.part, rows)

    def finish(self) -> list[dict[str, Any]]:
        """Put the file in its place; returns its lines."""
        if not self.finished:
            if not self.part.is_file():  # no question at all
                self.part.touch()
            self.part.replace(self.path)
        return read_lines(self.path)


def describe_run(
    model: Path, asked: Sequence[Asked], max_new_tokens: int, temperature: float, seed: int, dtype: str | None
) -> dict[str, Any]:
    """What the answers depend on: a sample of the model's files, questions, sizes of pictures, and settings.

    Raises:
        ValueError: if there is no model.
    """
    load_llava_config(base_of(model))
    folders = dict.fromkeys((model, base_of(model)))
    files = [
        file for folder in folders for file in folder.rglob("*") if file.suffix in _READ and file.is_file()
    ]
    listed = json.dumps([question.row for question in asked], ensure_ascii=False)
    sizes = [
        [file.stat().st_size if file.is_file() else None for file in question.pictures] for question in asked
    ]
    return {
        "model": str(model.resolve()),
        "files": sample_files(files),
        "questions": hashlib.sha256(listed.encode("utf-8", "surrogatepass")).hexdigest(),
        "pictures": hashlib.sha256(json.dumps(sizes).encode()).hexdigest(),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "dtype": dtype,
    }


def ask(
    chat: Chat,
    asked: Sequence[Asked],
    answers: AnswerFile,
    batch: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """Ask the questions that have no answer yet, with a bar that says how fast it goes.

    Args:
        chat: the model.
        asked: all questions.
        answers: where answers go.
        batch: questions at once.
        max_new_tokens: longest answer.
        temperature: see :func:`llm_integration.replies.answer_many`.
        seed: the same.

    Returns:
        How fast it went, in words.
    """
    done = answers.count(batch)
    tokens, skipped, began = 0, 0, time.perf_counter()
    seconds, rate = 0.0, ""
    with tqdm(total=len(asked), initial=done, unit="question", disable=None) as bar:
        questions = [(question.pictures, question.row["question"]) for question in asked[done:]]
        replies = answer_many(questions, chat, batch, max_new_tokens, temperature, seed, done)
        for start in range(done, len(asked), batch):
            part = asked[start : start + batch]
            rows = []
            for question, answer in zip(part, islice(replies, len(part)), strict=True):
                end = {"answer": answer.text} if answer.skipped is None else {"skipped": answer.skipped}
                rows.append({**question.row, **end})
                tokens += answer.new_tokens
                skipped += answer.skipped is not None
            answers.add(rows)
            bar.update(len(part))
            seconds = max(time.perf_counter() - began, 1e-9)
            rate = f"{tokens / seconds:.1f} tokens/s"
            bar.set_postfix_str(rate + (f", {skipped} skipped" if skipped else ""))
    now = len(asked) - done
    return f"asked {now} questions in {seconds:.1f} s: {now / max(seconds, 1e-9):.2f} a second, {rate}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llm_integration.batch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="LLaVA directory, or the result of a run")
    parser.add_argument("--images", type=Path, nargs="+", help="pictures, and folders of pictures")
    parser.add_argument("--prompt", help="what every picture is asked")
    parser.add_argument(
        "--questions",
        type=Path,
        help='JSON lines {"image": ..., "question": ...}; pictures lie in --images FOLDER, or beside it',
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON lines to write")
    parser.add_argument("--batch", type=int, default=8, help="questions at once (default 8)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 for the likeliest token every time")
    parser.add_argument("--seed", type=int, default=0, help="of answers that are drawn (default 0)")
    parser.add_argument("--device", help="by default the first GPU where there is one")
    parser.add_argument("--dtype", choices=list(DTYPES), help="precision (default: the checkpoint's)")
    options = parser.parse_args(arguments)
    if not 0 <= options.temperature < math.inf:
        parser.error(f"--temperature must be 0 or more, got {options.temperature}")
    for name in ("batch", "max_new_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(options, name)}")
    if (options.prompt is None) == (options.questions is None):
        parser.error("say --prompt TEXT with --images, or --questions FILE.jsonl")
    if options.prompt is not None and not options.images:
        parser.error("--prompt is asked about pictures: name them, or their folder, with --images")
    transformers_logging.disable_progress_bar()
    try:
        if options.questions is None:
            asked = find_pictures(options.images, options.prompt)
        else:
            asked = read_questions(options.questions, options.images)
        settings = (options.max_new_tokens, options.temperature, options.seed)
        facts = describe_run(options.model, asked, *settings, options.dtype)
        answers = AnswerFile(options.out, facts, len(asked))
        if answers.finished:
            print(f"{options.out} is finished already: {len(asked)} questions")
            return
        if answers.count(options.batch) < len(asked):
            dtype = DTYPES[options.dtype] if options.dtype else None
            chat = load_chat(options.model, options.device, dtype)
            print(ask(chat, asked, answers, options.batch, *settings))
        rows = answers.finish()
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        print(f"stopped: the same command goes on behind the last answer of {options.out}", file=sys.stderr)
        raise SystemExit(130) from None
    bad = [row["skipped"] for row in rows if "skipped" in row]
    print(f"wrote {options.out}: {len(rows) - len(bad)} answers, skipped questions: {len(bad)}")
    for sentence in bad[:_NAMED]:
        print(f"skipped: {sentence}", file=sys.stderr)
    if len(bad) > _NAMED:
        print(f'skipped: {len(bad) - _NAMED} more, see "skipped" in {options.out}', file=sys.stderr)
    if rows and len(bad) == len(rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
