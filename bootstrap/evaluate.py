"""Agreement with the teacher on held-out pictures."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sparse_vlm.draw import draw_rois
from sparse_vlm.encoder import SparseFormer
from sparse_vlm.settings_words import describe_value

from .config import HeldoutSettings
from .data import (
    AnySource,
    DataConfig,
    PictureSource,
    SkippedPictures,
    find_shared,
    open_source,
    read_in_order,
)
from .data.decode import BadPictureError, decode_picture
from .data.folder import FolderSource
from .teacher import Teacher

_MAX_PIXELS = 80_000_000
# Pictures whose similarities to all others are held at once: those of 50,000 to each other are 10 GB.
_COMPARED_AT_ONCE = 1024

_log = logging.getLogger(__name__)


class HeldOut:
    """Held-out pictures, what the teacher says about them, and how to score a student on them.

    Nearest-label agreement needs labels. A teacher with a text side and a class file labels by the nearest
    class text (zero-shot), a classifier by its largest logit; of any other teacher there is none.

    Args:
        settings: which pictures and labels.
        teacher: the teacher.
        training: what the student is trained on; the held-out pictures must not be in it.
        workers: processes that decode; 0 decodes in this process.

    Raises:
        ValueError: if pictures, truth or classes do not fit together.
    """

    def __init__(
        self,
        settings: HeldoutSettings,
        teacher: Teacher,
        training: AnySource | None = None,
        workers: int = 0,
    ) -> None:
        if settings.source is None:
            raise ValueError("heldout.source names no pictures")
        self.settings = settings
        self.workers = workers
        self.transform = teacher.spec.transform
        source = _open(settings)
        if not isinstance(source, PictureSource):
            raise ValueError(
                f"heldout.source {settings.source!r} is a stream; held-out pictures must lie on this disk"
            )
        shared = find_shared(source, training) if training is not None else None
        if shared is not None:
            raise ValueError(
                f"heldout.source {settings.source!r} and data.source share {shared}: held-out pictures are "
                "never trained on, so name pictures for one of them that are not in the other"
            )
        self.source = source
        self.indices = choose_evenly(len(source), settings.limit)
        self.skipped = SkippedPictures(source.title)
        self.kept: list[int] = []
        self.teacher_pooled = self._look_with_teacher(teacher)
        if self.skipped.total:
            _log.warning("held-out figures are of %d pictures: %s", len(self.kept), self.skipped.summary())
        self.rows = {index: row for row, index in enumerate(self.kept)}
        self.labels, self.label_kind = _choose_labels(settings, teacher)
        self.truth = self._read_truth()

    def _look_with_teacher(self, teacher: Teacher) -> Tensor:
        pooled = []
        with self._bar("teacher, held-out") as bar:
            for batch in self._batches(self.skipped):
                self.kept += batch.indices.tolist()
                seen = teacher(batch.images.to(teacher.device)).pooled
                if seen is not None:
                    pooled.append(seen.float().cpu())
                bar.update(len(batch.indices))
        if not pooled:
            raise ValueError(f"heldout.source {self.settings.source!r}: no picture could be decoded")
        return torch.cat(pooled)

    def _bar(self, what: str) -> Any:
        return tqdm(total=len(self.indices), unit="pic", desc=what, leave=False, disable=None)

    def _batches(self, skipped: SkippedPictures | None = None) -> Any:
        return read_in_order(
            self.source, self.transform, self.settings.batch_size, self.workers, self.indices, skipped
        )

    @torch.inference_mode()
    def score(self, encoder: SparseFormer, num_tokens: int | None = None) -> dict[str, float]:
        """Figures of an encoder.

        Args:
            encoder: in any mode; put back into it afterwards.
            num_tokens: tokens per picture, class token included.

        Returns:
            ``cosine`` (mean over pictures), ``retrieval`` (share of pictures whose embedding is nearest to
            the teacher's of the same picture), where the teacher names classes ``agreement`` (share of
            pictures with the teacher's label) and, where the truth is known, ``top1``, ``teacher_top1`` and
            ``kept``, their ratio; last ``pictures``, how many they are of.

        Raises:
            ValueError: if no picture can be read any more.
        """
        rows, pooled = self._look_with(encoder, num_tokens)
        wanted = self.teacher_pooled[rows]
        nearest = _find_nearest(pooled, F.normalize(self.teacher_pooled, dim=-1))
        figures = {
            "cosine": float(F.cosine_similarity(pooled, wanted, dim=-1).mean()),
            "retrieval": float((nearest == rows).float().mean()),
        }
        if self.label_kind == "retrieval":
            return {**figures, "pictures": len(rows)}
        ours, theirs = self._label(pooled), self._label(wanted)
        figures["agreement"] = float((ours == theirs).float().mean())
        if self.truth is not None:
            truth = self.truth[rows]
            figures["top1"] = float((ours == truth).float().mean())
            figures["teacher_top1"] = float((theirs == truth).float().mean())
            figures["kept"] = figures["top1"] / figures["teacher_top1"] if figures["teacher_top1"] else 0.0
        return {**figures, "pictures": len(rows)}

    def _look_with(self, encoder: SparseFormer, num_tokens: int | None) -> tuple[Tensor, Tensor]:
        """The encoder's embeddings, and which rows of the teacher's they belong to.

        Pictures are read anew each time, so one that the teacher saw may be gone, or the other way round.
        """
        was_training = encoder.training
        encoder.eval()
        rows: list[int] = []
        pooled = []
        skipped = SkippedPictures(self.source.title)
        with self._bar("student, held-out") as bar:
            for batch in self._batches(skipped):
                known = [place for place, index in enumerate(batch.indices.tolist()) if index in self.rows]
                if known:
                    rows += [self.rows[int(batch.indices[place])] for place in known]
                    images = batch.images[known].to(encoder.device)
                    pooled.append(encoder(images, num_tokens).pooled.float().cpu())
                bar.update(len(batch.indices))
        encoder.train(was_training)
        if not pooled:
            raise ValueError(
                f"heldout.source {self.settings.source!r}: none of its {len(self.kept)} pictures can be read "
                "any more; put them back and run the command again, which goes on from the newest checkpoint"
            )
        if len(rows) < len(self.kept):
            _log.warning(
                "these held-out figures are of %d pictures and not of %d, others cannot be read any more: %s",
                len(rows),
                len(self.kept),
                skipped.summary(),
            )
        return torch.tensor(rows), torch.cat(pooled)

    def _label(self, pooled: Tensor) -> Tensor:
        if self.labels is None:
            return pooled.argmax(dim=-1)
        return _find_nearest(pooled, self.labels)

    def _read_truth(self) -> Tensor | None:
        truth = self.settings.truth
        names = [self.source.name(index) for index in self.kept]
        if truth == "none":
            return None
        if self.label_kind == "retrieval":
            raise ValueError(
                f"heldout.truth={truth!r} needs a teacher that names classes: one with a classifier, or "
                "with a text side and heldout.classes"
            )
        if truth == "index_prefix":
            names = [_bare(name) for name in names]
            strange = [name for name in names if not re.match(r"[0-9]+_", name)]
            if strange:
                raise ValueError(
                    "heldout.truth='index_prefix' expects file names like 207_golden_retriever.jpg, found "
                    f"{strange[0]!r}"
                )
            return self._check_truth(names, [int(name.split("_")[0]) for name in names])
        if truth == "folders":
            numbers = self._number_folders()
            return self._check_truth(names, [numbers[name.split("/")[0]] for name in names])
        table = _read_json(truth, "heldout.truth")
        table = table.get("labels", table) if isinstance(table, dict) else table
        if not isinstance(table, dict):
            raise ValueError(
                f"heldout.truth={truth} must be a JSON object from file names to class numbers, or hold one "
                f"under 'labels'; found a {type(table).__name__}"
            )
        keys = [name if name in table else _bare(name) for name in names]
        missing = [name for name, key in zip(names, keys, strict=True) if key not in table]
        if missing:
            raise ValueError(
                f"heldout.truth={truth} says nothing about {len(missing)} pictures, such as {missing[0]!r}"
            )
        shared = [key for key, count in Counter(keys).items() if count > 1]
        if shared:
            raise ValueError(
                f"heldout.truth={truth}: {shared[0]!r} is the name of several pictures; name each by its "
                "path below the folder"
            )
        return self._check_truth(names, [table[key] for key in keys])

    def _number_folders(self) -> dict[str, int]:
        """The class of each folder of pictures: its place in the order of their names.

        Raises:
            ValueError: if there are not as many as classes: places would mean nothing.
        """
        source, classes = self.source, self._count_classes()
        places = {source.name(index).rpartition("/")[0].split("/")[0] for index in range(len(source))}
        if not isinstance(source, FolderSource):
            found = "is no folder"
        elif "" in places:
            found = "has pictures that lie in none"
        else:
            found = f"has {len(places)}"
        if found != f"has {classes}":
            raise ValueError(
                f"heldout.truth='folders' needs a folder with {classes} folders of pictures, one for each "
                f"class in the order of their names, and heldout.source {source.title!r} {found}"
            )
        return {place: number for number, place in enumerate(sorted(places))}

    def _count_classes(self) -> int:
        return self.teacher_pooled.shape[1] if self.labels is None else len(self.labels)

    def _check_truth(self, names: Sequence[str], numbers: Sequence[Any]) -> Tensor:
        """One class number for each picture.

        Raises:
            ValueError: for what is no class number of the teacher's.
        """
        classes = self._count_classes()
        # A number may be text, as in lists that spreadsheets wrote.
        numbers = [int(n) if isinstance(n, str) and n.isascii() and n.isdigit() else n for n in numbers]
        for name, number in zip(names, numbers, strict=True):
            if type(number) is not int or not 0 <= number < classes:
                raise ValueError(
                    f"heldout.truth={self.settings.truth}: the class of {name!r} must be a whole number from "
                    f"0 to {classes - 1}, and is {number!r}"
                )
        return torch.tensor(numbers)

    def picture(self, path: str | None) -> Image.Image:
        """The photograph for RoI pictures: a file, or by default the first held-out picture.

        Raises:
            ValueError: if the file is none.
        """
        if not path:
            return decode_picture(self.source.read(self.kept[0]), _MAX_PIXELS)
        try:
            return decode_picture(Path(path).read_bytes(), _MAX_PIXELS)
        except (OSError, BadPictureError) as error:
            raise ValueError(f"figure={path} is no picture that can be read: {error}") from error


def choose_evenly(count: int, limit: int) -> list[int]:
    """At most ``limit`` of ``count`` places, evenly spaced: of class folders, some of every class."""
    if count <= limit:
        return list(range(count))
    return [place * count // limit for place in range(limit)]


def _find_nearest(embeddings: Tensor, units: Tensor) -> Tensor:
    """Which row of ``units`` (n, E), each of length 1, each row of ``embeddings`` (B, E) has the largest
    cosine with: (B,)."""
    parts = F.normalize(embeddings, dim=-1).split(_COMPARED_AT_ONCE)
    return torch.cat([(part @ units.T).argmax(dim=-1) for part in parts])


@torch.inference_mode()
def draw_focus(encoder: SparseFormer, picture: Image.Image) -> Image.Image:
    """The photograph as the encoder sees it, with every token's RoI and points, a panel per step."""
    was_training = encoder.training
    encoder.eval()
    images = encoder.transform(picture).unsqueeze(0).to(encoder.device)
    focus = encoder.focus(images)
    encoder.train(was_training)
    return draw_rois(
        encoder.transform.crop(picture),
        [rois[0] for rois in focus.rois],
        [points[0] for points in focus.points],
    )


def _open(settings: HeldoutSettings) -> AnySource:
    """The held-out source; what is wrong with it is said in the names of its own settings."""
    try:
        return open_source(
            DataConfig(
                settings.source or "", kind=settings.kind, split=settings.split, column=settings.column
            )
        )
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(re.sub(r"\bdata\.(?=source|kind|split|column)", "heldout.", str(error))) from None


def _bare(name: str) -> str:
    """A picture's file name, as its source calls the picture: a path, or "row 5 (path)"."""
    row = re.fullmatch(r"row \d+ \((.*)\)", name)
    return Path(row.group(1) if row else name).name


def _read_json(path: str, key: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{key}={path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{key}={path} is no JSON: {error}") from None


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _choose_labels(settings: HeldoutSettings, teacher: Teacher) -> tuple[Tensor | None, str]:
    """Class embeddings (n, E), or None where the embedding is itself a row of logits; and their kind."""
    if settings.classes is not None:
        if not teacher.has_text:
            raise ValueError(
                f"heldout.classes needs a teacher with a text side and its tokenizer; {teacher.spec.name} "
                "has none"
            )
        table = _read_json(settings.classes, "heldout.classes")
        if not isinstance(table, dict) or not {"classes", "templates"} <= table.keys():
            found = sorted(table) if isinstance(table, dict) else f"a {type(table).__name__}"
            raise ValueError(
                f"heldout.classes={settings.classes} must hold 'classes' and 'templates', found {found}"
            )
        for key in ("classes", "templates"):
            if not _are_texts(table[key]):
                raise ValueError(
                    f"heldout.classes={settings.classes}: {key!r} must be a list of texts, found "
                    f"{describe_value(table[key])}"
                )
        bare = [template for template in table["templates"] if "{}" not in template]
        if bare:
            raise ValueError(
                f"heldout.classes={settings.classes}: the template {bare[0]!r} has no {{}} where the class "
                "belongs"
            )
        rows = []
        for name in table["classes"]:
            texts = teacher.encode_text([template.replace("{}", name) for template in table["templates"]])
            rows.append(F.normalize(F.normalize(texts.float().cpu(), dim=-1).mean(dim=0), dim=-1))
        return torch.stack(rows), "zero-shot"
    if teacher.spec.names_classes and not teacher.has_text:
        return None, "classifier"
    return None, "retrieval"
