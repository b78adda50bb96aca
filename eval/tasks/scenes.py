"""Questions about the project's own generated scenes, in VQA v2's file format."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from eval.task import BARE, LLAVA, Example, checked
from eval.tasks.vqav2 import VqaV2

# The files name pictures by number, as VQA v2's do; the number is the split's, then the picture's.
_PICTURE = re.compile(r"COCO_(?:train|valid|heldout)_(\d{12})\.jpg")
_OF_A_SPLIT = 10_000_000


class Scenes(VqaV2):
    """Scored as VQA v2 is."""

    name = "scenes"
    prompts = (LLAVA, BARE)

    def load_examples(
        self, questions: Path | None, annotations: Path | None, images: Path | None = None
    ) -> list[Example]:
        """Reads VQA v2's files; pictures are called as the generator calls them (`000012.png`)."""
        examples = [
            dataclasses.replace(example, image=_own_name(example.image))
            for example in super().load_examples(questions, annotations)
        ]
        return checked(examples, images, Path(str(questions)))


def _own_name(image: str | None) -> str | None:
    match = _PICTURE.fullmatch(image or "")
    return f"{int(match[1]) % _OF_A_SPLIT:06d}.png" if match else image
