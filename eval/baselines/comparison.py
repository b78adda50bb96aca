"""What the points of one comparison share: teacher, encoder, and the list of points."""

from __future__ import annotations

from typing import Any

from bootstrap.teacher import TeacherError, load_teacher
from eval.answers import InputError
from eval.baselines.config import ParetoSettings
from eval.baselines.points import Point
from eval.towers import OpenedVit, Tower, TowerError, build_tower
from sparse_vlm import load_encoder
from sparse_vlm.checkpoint import EncoderDirectoryError, load_provenance
from sparse_vlm.fingerprint import hash_tensors, hash_tower


class Comparison:
    """All that the points of one run share.

    Args:
        settings: The run's.

    Raises:
        InputError: If files, teacher and encoder do not belong together.
    """

    def __init__(self, settings: ParetoSettings) -> None:
        self.settings = settings
        try:
            teacher = load_teacher(settings.teacher, settings.teacher_weights)
            self.encoder = None if settings.encoder is None else load_encoder(settings.encoder)
        except (TeacherError, EncoderDirectoryError) as error:
            raise InputError(str(error)) from None
        self.teacher_hash = hash_tower(teacher.vision_state_dict())
        self.vit = OpenedVit(teacher)
        self.facts: dict[str, Any] = {"teacher_sha256": self.teacher_hash}
        self.encoder_hash: str | None = None
        if self.encoder is not None:
            self.facts["encoder_names_its_teacher"] = self._check_encoder()
            self.encoder_hash = hash_tensors(self.encoder.state_dict())
        self.points, self.skipped = self._list_points()

    def _check_encoder(self) -> bool:
        """Same pictures, same width, same teacher; whether the encoder itself says so."""
        assert self.encoder is not None
        assert self.settings.encoder is not None
        made_from = load_provenance(self.settings.encoder).get("teacher", {}).get("tower_sha256")
        if made_from is not None and made_from != self.teacher_hash:
            raise InputError(
                f"{self.settings.encoder} was bootstrapped from another teacher than {self.settings.teacher} "
                f"(tower_sha256 {made_from[:12]}…, here {self.teacher_hash[:12]}…); fair is the same teacher."
            )
        theirs, ours = self.vit.spec.transform, self.encoder.transform.config
        if theirs != ours or self.encoder.config.width != self.vit.spec.width:
            raise InputError(
                f"{self.settings.encoder} reads other pictures than the teacher, or is not as wide."
            )
        return made_from is not None

    def build(self, point: Point) -> Tower | None:
        """A point's tower; None for the model without pictures."""
        if point.method == "no-image":
            return None
        return build_tower(point.method, point.tokens, self.vit, self.encoder, point.seed)

    def _list_points(self) -> tuple[list[Point], list[str]]:
        """Points within reach, and what is not, with the reason."""
        settings = self.settings
        wanted = [("vit", self.vit.num_patches)] if "vit" in settings.methods else []
        others = [method for method in settings.methods if method != "vit"]
        wanted += [(method, count) for count in settings.tokens for method in others]
        wanted += [("no-image", 0)] if settings.floors else []
        points, skipped = [], []
        for method, count in wanted:
            of_all = [Point(method, count, seed) for seed in settings.training.seeds]
            try:
                self.build(of_all[0])
            except TowerError as error:
                skipped.append(f"{method} at {count} ({error})")
            else:
                points += of_all
        # Every point once, before any is trained with another seed.
        return sorted(points, key=lambda point: settings.training.seeds.index(point.seed)), skipped
