"""Runs a model over a benchmark and scores its answers.

python -m eval.run configs/eval/pope.yaml model=DIR key.sub=value ...
torchrun --nproc-per-node 8 -m eval.run configs/eval/pope.yaml model=DIR
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from bootstrap.lock import LOCK_FILE, lock_directory
from eval.answers import InputError, name_some, read_json
from eval.compare import SCORES
from eval.config import FILES, WEIGHTS, RunSettings, load_settings
from eval.device import choose_device
from eval.engine import (
    SKIPPED,
    AnswerStore,
    Model,
    ask_all,
    build_asks,
    count_too_long,
    count_visual_tokens,
    match_own,
)
from eval.model import load_answerer
from eval.provenance import describe_origin
from eval.rescore import Rescored, format_report, score_answers, to_json
from eval.task import Task, find_missing_pictures
from eval.tasks import load_task
from llm_integration.result import base_of
from sparse_vlm.atomic import write_atomic
from sparse_vlm.fingerprint import hash_file
from sparse_vlm.settings import settings_to_dict

_ReadT = TypeVar("_ReadT", dict[str, Any], list[Any])

CONFIG = "config.json"
ORIGINS = "origins.json"  # one entry for each start that asked questions
# What may differ when a run is taken up again: nothing an answer depends on.
_FREE = ("out", "batch", "device", "max_bad_pictures")
_WEIGHTS = (".safetensors", ".bin", ".pt")
# What a model is read from, beside its weights.
_READ = (
    *("config.json", "generation_config.json", "run.json", "adapter_config.json", "processor_config.json"),
    *("preprocessor_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "chat_template.*"),
)


def run(settings: RunSettings, words: Sequence[str] = (), model: Model | None = None) -> Rescored | None:
    """Runs a model over a benchmark, or goes on with a run that was cut short.

    Args:
        settings: What to run.
        words: The command line, for the provenance.
        model: A loaded model, in place of `settings.model`, which then only names it.

    Returns:
        Figures and coverage; None on all processes but the first.

    Raises:
        InputError: If files, settings or an earlier run in the same folder do not fit.
    """
    task = load_task(settings.task.name)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    out, device = settings.out, choose_device(settings.device)
    files = settings.task
    examples = task.load_examples(files.questions, files.annotations)[: settings.limit]
    asks = build_asks(task, examples, settings.protocol, settings.floor, settings.seed)
    needs_pictures = any(ask.image is not None for ask in asks)
    if needs_pictures and files.images is None:
        raise InputError(f"{task.name} asks about pictures: name their folder as task.images.")
    if files.images is not None and not settings.max_bad_pictures and needs_pictures:
        missing = find_missing_pictures(examples, files.images)
        if missing:
            raise InputError(
                f"{len(missing)} pictures of {task.name} are not in {files.images} "
                f"({name_some(missing)}); max_bad_pictures=N leaves out up to N of them."
            )
    store = AnswerStore(out, rank)
    with _group(world) as barrier, ExitStack() as stack:
        if rank == 0:
            _open_folder(out, stack)
            known = (hash_weights(settings.model), hash_files(settings.model)) if model is None else ()
            claim(out, settings, *known)
            cut = store.repair()
            if cut:
                print(f"{cut} unfinished line(s) cut off; asked again", file=sys.stderr)
        barrier()
        if not store.finished:
            if rank == 0:
                _note_origin(settings, words, device)
            answerer = model or load_answerer(
                settings.model, settings.max_new_tokens, settings.precision, device
            )
            ask_all(
                answerer,
                str(settings.model),
                asks,
                files.images,
                store,
                settings.batch,
                settings.max_bad_pictures,
                (rank, world),
                rank == 0,
            )
            barrier()
            if rank == 0:
                store.finish(asks)
    if rank:
        return None
    skipped = (out / SKIPPED).is_file()
    outcome = score_answers(task, examples, match_own(asks, out), str(out), allow_missing=skipped)
    _write_scores(task, settings, outcome, words, device)
    return outcome


def hash_weights(model: Path) -> str | None:
    """SHA-256 of a model's weight files, of those below a result too; None where there are none."""
    if not model.is_dir():
        return None
    folders = dict.fromkeys((model, base_of(model)))
    files = [file for folder in folders for file in sorted(folder.rglob("*")) if file.suffix in _WEIGHTS]
    if not files:
        return None
    listed = "".join(f"{file.name} {hash_file(file)}\n" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()


def hash_files(model: Path) -> dict[str, str] | None:
    """SHA-256 of a model's configuration, processor, tokenizer and template files, by name."""
    if not model.is_dir():
        return None
    folders = {model: "", **({} if base_of(model) == model else {base_of(model): "base/"})}
    return {
        f"{prefix}{file.name}": hash_file(file)
        for folder, prefix in folders.items()
        if folder.is_dir()  # a base that is gone is named where it is read
        for file in sorted(folder.iterdir())
        if file.is_file() and any(file.match(pattern) for pattern in _READ)
    }


def _open_folder(out: Path, stack: ExitStack) -> None:
    """Makes the run's folder, and keeps other runs out of it while this one goes on.

    Raises:
        InputError: If it cannot be made, holds something else than a run, or another run is at work in it.
    """
    if not (out / CONFIG).is_file() and out.is_dir() and _holds_more(out):
        raise InputError(f"{out} is not empty and holds no run; name another folder with out=….")
    try:
        out.mkdir(parents=True, exist_ok=True)
        stack.enter_context(lock_directory(out))
    except OSError as error:
        raise InputError(f"The run's folder {out} cannot be used: {error.strerror or error}.") from None
    except ValueError as error:
        raise InputError(str(error)) from None


def _holds_more(out: Path, *known: str) -> bool:
    """Whether a folder has something else than the lock and the files that are known."""
    return any(entry.name not in (LOCK_FILE, *known) for entry in out.iterdir())


def claim(
    out: Path, settings: RunSettings, weights: str | None = None, files: dict[str, str] | None = None
) -> None:
    """Writes the run's settings into its folder, or sees that they are those of the run in it.

    Args:
        out: The folder.
        settings: Of the run.
        weights: Hash of the model's weights; None where it is not known.
        files: Hashes of its other files by name; None where they are not known.

    Raises:
        InputError: If they are not; names the keys.
    """
    ours = _to_plain(settings)
    if weights is not None:
        ours[WEIGHTS] = weights
    if files is not None:
        ours[FILES] = files
    path = out / CONFIG
    begun = path.is_file() and _holds_more(out, CONFIG, ORIGINS)
    if begun:
        theirs = _read_json(path, dict)
        if theirs.get(WEIGHTS, weights) != weights and weights is not None:
            raise InputError(
                f"{out} holds answers of other weights than {settings.model} has now; name another folder "
                "with out=…."
            )
        there: Any = theirs.get(FILES, files)
        if files is not None and there != files:
            other = [name for name in {**there, **files} if there.get(name) != files.get(name)]
            raise InputError(
                f"{out} holds answers of {settings.model} as it was before {name_some(other)} changed; name "
                "another folder with out=…."
            )
        for known in (WEIGHTS, FILES):
            ours.pop(known, None)
        changed = [key for key in ours if key not in _FREE and theirs.get(key) != ours[key]]
        if changed:
            what = ", ".join(f"{key}: {theirs.get(key)!r} there, {ours[key]!r} here" for key in changed)
            raise InputError(
                f"{out} holds a run with other settings ({what}); name another folder with out=…."
            )
        return
    (out / ORIGINS).unlink(missing_ok=True)  # of a start that failed before the first answer
    write_atomic(path, json.dumps(ours, indent=1))


def _read_json(path: Path, kind: type[_ReadT]) -> _ReadT:
    """A file of the run's folder.

    Raises:
        InputError: If it is not as the run wrote it.
    """
    content = read_json(path)
    if not isinstance(content, kind):
        raise InputError(f"{path} is not what a run writes there; name another folder with out=….")
    return content


def _to_plain(settings: RunSettings) -> dict[str, Any]:
    return dict(json.loads(json.dumps(settings_to_dict(settings), default=str)))


def _note_origin(settings: RunSettings, words: Sequence[str], device: Any) -> None:
    """Writes down where the answers of this start come from, beside those of earlier starts."""
    path = settings.out / ORIGINS
    earlier = _read_json(path, list) if path.is_file() else []
    origin = describe_origin("eval.run", words, _to_plain(settings), device)
    write_atomic(path, json.dumps([*earlier, origin], indent=1))


def _read_origin(settings: RunSettings, words: Sequence[str], device: Any) -> dict[str, Any]:
    """Where the answers come from, whenever they are scored: the last start that asked, and those before."""
    path = settings.out / ORIGINS
    if not path.is_file():
        _note_origin(settings, words, device)
    *earlier, origin = _read_json(path, list)
    if earlier:
        kept = ("commit", "date", "device")
        origin["earlier_starts"] = [{key: one[key] for key in kept} for one in earlier]
    return dict(origin)


def _write_scores(
    task: Task, settings: RunSettings, outcome: Rescored, words: Sequence[str], device: Any
) -> None:
    plain = _to_plain(settings)
    names = ("questions", "annotations", "images")
    files = {name: plain["task"][name] for name in names}
    content = {
        **to_json(outcome, files),
        "protocol": settings.protocol,
        "model": str(settings.model),
        "floor": None if settings.floor == "none" else settings.floor,
        "visual_tokens": count_visual_tokens(settings.out),
        "prompts_too_long": count_too_long(settings.out),
        "provenance": _read_origin(settings, words, device),
    }
    write_atomic(settings.out / SCORES, json.dumps(content, indent=1, ensure_ascii=False))
    made = task.submission(outcome.examples, outcome.matched.answers, outcome.matched.as_written)
    if made is not None:
        suffix, submission = made
        write_atomic(settings.out / f"submission{suffix}", submission)


@contextmanager
def _group(world: int) -> Iterator[Callable[[], Any]]:
    """A barrier between the processes that a launcher started; nothing where there is one."""
    if world == 1:
        yield lambda: None
        return
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", timeout=timedelta(hours=12))
    try:
        yield dist.barrier
    finally:
        if own:
            dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m eval.run", description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path, help="YAML file, for instance one of configs/eval/")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.sub=value", help="settings on top of the file"
    )
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words)
    settings: RunSettings | None = None
    try:
        settings = load_settings(options.config, options.overrides)
        outcome = run(settings, words)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if settings is None:
            return 130
        print(f"stopped: the same command goes on behind the last answer in {settings.out}", file=sys.stderr)
        return 130
    if outcome is not None:
        floor = "" if settings.floor == "none" else f", floor: {settings.floor}"
        print(f"{outcome.task.name}, {settings.protocol} prompts{floor}: {settings.model}")
        print(format_report(outcome))
        long = count_too_long(settings.out)
        if long:
            print(
                f"{long} prompts alone filled all positions of the language model: what was answered to them "
                'is of no use (in answers.jsonl they have "too_long")'
            )
        print(f"visual tokens a question: {count_visual_tokens(settings.out):.1f}; run: {settings.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
