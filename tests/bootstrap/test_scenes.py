"""Scenes: reproducible, honest about held-out pairs, and drawn as described."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest

from bootstrap.scenes import CLASS_NAMES, HELDOUT_PAIRS, build_scene, caption, draw_scene
from bootstrap.scenes.scene import MAIN_RADIUS, SMALL_RADIUS
from bootstrap.scenes.vocabulary import COLORS, SHAPES


def scenes(split: str = "train", count: int = 150, seed: int = 3):
    return [build_scene(seed, index, split) for index in range(count)]


def test_a_scene_is_a_function_of_seed_split_and_index():
    assert build_scene(5, 7, "train") == build_scene(5, 7, "train")
    different = {build_scene(5, 7), build_scene(6, 7), build_scene(5, 8), build_scene(5, 7, "valid")}
    assert len(different) == 4


def test_the_world_of_a_seed_never_changes():
    # Frozen on purpose: shipped weights were trained on exactly this world.
    text = "\n".join(caption(scene) for scene in scenes(count=40, seed=0))
    places = ",".join(f"{thing.x:.9f}" for scene in scenes(count=40, seed=0) for thing in scene.objects)
    digest = hashlib.sha256((text + places).encode()).hexdigest()
    assert digest[:16] == "8ca5ea3f6b10e0ea"


def test_heldout_pairs_never_occur_in_training():
    assert len(HELDOUT_PAIRS) == len(SHAPES) == len({shape for shape, _ in HELDOUT_PAIRS})
    assert len({color for _, color in HELDOUT_PAIRS}) == len(COLORS)
    for split in ("train", "valid"):
        shown = {(thing.shape, thing.color) for scene in scenes(split, 400) for thing in scene.objects}
        assert not shown & HELDOUT_PAIRS
    assert {(scene.main.shape, scene.main.color) for scene in scenes("heldout")} == HELDOUT_PAIRS


def test_objects_stay_inside_and_visible():
    for scene in scenes():
        assert [thing.main for thing in scene.objects].count(True) == 1
        assert max(thing.radius for thing in scene.objects) == scene.main.radius >= MAIN_RADIUS[0]
        assert CLASS_NAMES[scene.label] == scene.main.name
        for position, thing in enumerate(scene.objects):
            assert thing.radius >= SMALL_RADIUS[0]
            assert thing.radius <= thing.x <= 1 - thing.radius
            assert thing.radius <= thing.y <= 1 - thing.radius
            for other in scene.objects[position + 1 :]:
                distance = math.hypot(thing.x - other.x, thing.y - other.y)
                assert distance >= 0.8 * (thing.radius + other.radius)


def test_the_picture_shows_the_main_object_in_its_color():
    solid = [
        scene for scene in scenes(count=200) if scene.main.texture == "solid" and scene.main.shape == "circle"
    ]
    assert solid
    for scene in solid:
        pixels = np.asarray(draw_scene(scene, 96), np.int64)
        row, column = int(scene.main.y * 96), int(scene.main.x * 96)
        # A neighbour may cover an edge, never the middle.
        assert np.abs(pixels[row, column] - np.array(scene.main.rgb)).max() <= 3


@pytest.mark.parametrize("size", [32, 96, 130])
def test_pictures_have_the_size_asked_for(size: int):
    picture = draw_scene(build_scene(0, 0), size)
    assert picture.size == (size, size)
    assert picture.mode == "RGB"
    assert picture.tobytes() == draw_scene(build_scene(0, 0), size).tobytes()


def test_every_shape_and_texture_looks_different():
    from dataclasses import replace

    from bootstrap.scenes.scene import TEXTURES

    scene = next(scene for scene in scenes() if scene.printed is None)
    drawn = set()
    for shape in SHAPES:
        for texture in TEXTURES:
            main = replace(scene.main, shape=shape, texture=texture)
            drawn.add(draw_scene(replace(scene, objects=(main,)), 96).tobytes())
    assert len(drawn) == len(SHAPES) * len(TEXTURES)


def test_captions_begin_with_the_main_object_and_are_true():
    for scene in scenes():
        words = caption(scene).replace(",", " ").split()
        assert scene.main.name in caption(scene).split(" with ")[0]
        if "number" in words:
            assert scene.printed is not None
            spelled = "".join(words[words.index("number") + 1 :])
            assert spelled == scene.printed.text
    varied = {caption(build_scene(0, 0), variant) for variant in range(12)}
    assert len(varied) > 4


def test_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match=r"Unknown split 'test'.*train, valid, heldout"):
        build_scene(0, 0, "test")
    with pytest.raises(ValueError, match="32 or more"):
        draw_scene(build_scene(0, 0), 16)
