"""Generated scenes: pictures whose whole truth is known, for a first result without a download."""

from bootstrap.scenes.draw import draw_scene
from bootstrap.scenes.scene import PrintedText, Scene, SceneObject, build_scene
from bootstrap.scenes.text import caption, chat_record
from bootstrap.scenes.vocabulary import CLASS_NAMES, HELDOUT_PAIRS

__all__ = [
    "CLASS_NAMES",
    "HELDOUT_PAIRS",
    "PrintedText",
    "Scene",
    "SceneObject",
    "build_scene",
    "caption",
    "chat_record",
    "draw_scene",
]
