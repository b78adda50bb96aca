"""Writes a split of scenes to disk: pictures, captions, conversations, VQA v2 questions, labels."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bootstrap.scenes.draw import draw_scene
from bootstrap.scenes.questions import AnswerBalance, Question, ask
from bootstrap.scenes.scene import Scene, build_scene
from bootstrap.scenes.text import caption, chat_record
from bootstrap.scenes.vocabulary import CLASS_NAMES

_LICENSE = {"url": "https://www.apache.org/licenses/LICENSE-2.0", "name": "Apache License 2.0"}
_DATE = "2026-11-22 00:00:00"


def file_name(scene: Scene) -> str:
    """Name of a scene's picture."""
    return f"{scene.index:06d}.png"


def encode_png(scene: Scene, size: int) -> bytes:
    """The picture of a scene as a PNG file."""
    buffer = io.BytesIO()
    draw_scene(scene, size).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def vqa_records(
    split: str, asked: Iterable[tuple[Scene, list[Question]]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Question file and annotation file in the official VQA v2 form.

    Args:
        split: Name of the split, which becomes `data_subtype`.
        asked: Scenes with their questions.

    Returns:
        The contents of `questions.json` and `annotations.json`; every question has ten equal answers, and
        `question_type` is our kind of question.
    """
    questions: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for scene, items in asked:
        for number, item in enumerate(items):
            ids = {"image_id": scene.image_id, "question_id": scene.image_id * 100 + number}
            questions.append(
                {"image_id": ids["image_id"], "question": item.text, "question_id": ids["question_id"]}
            )
            answers = [
                {"answer": item.answer, "answer_confidence": "yes", "answer_id": answer_id}
                for answer_id in range(1, 11)
            ]
            annotations.append(
                {
                    "question_type": item.kind,
                    "multiple_choice_answer": item.answer,
                    "answers": answers,
                    "answer_type": item.answer_type,
                    **ids,
                }
            )
    info = {
        "description": f"Generated scenes, split {split}.",
        "url": "",
        "version": "1.0",
        "year": 2026,
        "contributor": "sparse-vlm",
        "date_created": _DATE,
    }
    shared = {"info": info, "data_type": "scenes", "data_subtype": split, "license": _LICENSE}
    return {**shared, "task_type": "Open-Ended", "questions": questions}, {
        **shared,
        "annotations": annotations,
    }


def caption_record(scenes: list[Scene], size: int) -> dict[str, Any]:
    """Content of `captions.json`, in COCO's caption form."""
    images = [
        {"id": scene.image_id, "file_name": file_name(scene), "width": size, "height": size}
        for scene in scenes
    ]
    annotations = [
        {"id": number, "image_id": scene.image_id, "caption": caption(scene)}
        for number, scene in enumerate(scenes)
    ]
    return {"images": images, "annotations": annotations}


def write_split(
    folder: Path,
    split: str,
    count: int,
    seed: int,
    size: int = 96,
    questions_per_scene: int | None = None,
    shard_size: int = 0,
    on_picture: Callable[[], object] = lambda: None,
) -> dict[str, int]:
    """Writes one split into an existing folder.

    Args:
        folder: Where to write; the caller makes the whole atomic.
        split: `train`, `valid` or `heldout`.
        count: How many scenes.
        seed: Seed of the world.
        size: Side of the pictures in pixels.
        questions_per_scene: At most that many questions a scene; None asks one of every kind.
        shard_size: Pictures per webdataset shard under `shards/`; 0 writes no shards.
        on_picture: Called after each picture.

    Returns:
        How many pictures and questions were written.
    """
    (folder / "images").mkdir(parents=True)
    scenes = [build_scene(seed, index, split) for index in range(count)]
    balance = AnswerBalance()
    asked = [(scene, ask(scene, balance, questions_per_scene)) for scene in scenes]
    questions, annotations = vqa_records(split, asked)
    chats = [
        chat_record(scene, file_name(scene), [(item.text, item.answer) for item in items])
        for scene, items in asked
    ]
    labels = {
        "classes": CLASS_NAMES,
        "labels": {file_name(scene): scene.label for scene in scenes},
    }
    for name, content in {
        "captions.json": caption_record(scenes, size),
        "chat.json": chats,
        "questions.json": questions,
        "annotations.json": annotations,
        "labels.json": labels,
    }.items():
        (folder / name).write_text(json.dumps(content) + "\n", encoding="utf-8")
    tar: tarfile.TarFile | None = None
    for position, scene in enumerate(scenes):
        picture = encode_png(scene, size)
        (folder / "images" / file_name(scene)).write_bytes(picture)
        if shard_size:
            if position % shard_size == 0:
                tar = _next_shard(folder, tar, position // shard_size)
            assert tar is not None
            _add_sample(tar, scene, picture)
        on_picture()
    if tar is not None:
        tar.close()
    return {"pictures": count, "questions": len(questions["questions"])}


def _next_shard(folder: Path, tar: tarfile.TarFile | None, number: int) -> tarfile.TarFile:
    if tar is not None:
        tar.close()
    (folder / "shards").mkdir(exist_ok=True)
    return tarfile.open(folder / "shards" / f"{number:05d}.tar", "w")


def _add_sample(tar: tarfile.TarFile, scene: Scene, picture: bytes) -> None:
    """Adds picture, caption and label under one key; fixed times make equal seeds give equal bytes."""
    for ending, content in (
        ("png", picture),
        ("txt", caption(scene).encode()),
        ("cls", str(scene.label).encode()),
    ):
        entry = tarfile.TarInfo(f"{scene.index:06d}.{ending}")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
