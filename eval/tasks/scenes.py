"""Questions about the project's own generated scenes, in VQA v2's file format."""

from __future__ import annotations

from eval.task import LLAVA
from eval.tasks.vqav2 import VqaV2


class Scenes(VqaV2):
    """Scored as VQA v2 is."""

    name = "scenes"
    prompts = (LLAVA,)
