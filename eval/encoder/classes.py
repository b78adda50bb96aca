"""Names of classes, prompt templates, and which label a class folder stands for."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from eval.answers import InputError, name_some, read_json
from eval.encoder.pictures import Pictures

# The prompts of CLIP's authors for CIFAR-10 and CIFAR-100.
_LOOKS = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
_CIFAR_TEMPLATES = tuple(
    template
    for article in ("a", "the")
    for template in (
        *(f"a {look}photo of {article} {{}}." for look in _LOOKS),
        *(f"a photo of {article} {size} {{}}." for size in ("small", "big")),
    )
)
_WNID = re.compile(r"n\d{8}")
TEMPLATE_SETS = ("imagenet", "simple", "cifar")


@dataclass(frozen=True)
class Classes:
    """What a picture may show.

    Attributes:
        names: In the order of the labels.
        templates: Prompts, with "{}" for the name.
        folders: Names of class folders in the order of the labels, where the class list has its own
            (ImageNet's WordNet ids).
    """

    names: tuple[str, ...]
    templates: tuple[str, ...]
    folders: tuple[str, ...] = ()


def load_classes(source: str, templates: str | None = None) -> Classes:
    """Class names and prompt templates.

    Args:
        source: "imagenet" for open_clip's names and its 80 templates, or a JSON file with "classes" and
            "templates".
        templates: One of `TEMPLATE_SETS`, instead of the source's own.

    Raises:
        InputError: If the file holds neither, or the set is unknown.
    """
    if source == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES
        from timm.data import ImageNetInfo

        folders = tuple(ImageNetInfo("imagenet-1k").label_names())
        return Classes(tuple(IMAGENET_CLASSNAMES), template_set(templates or "imagenet"), folders)
    path = Path(source)
    table = read_json(path)
    wanted = ("classes",) if templates else ("classes", "templates")
    if not isinstance(table, dict) or not all(_texts(table.get(name)) for name in wanted):
        raise InputError(f"{path} must hold {' and '.join(wanted)}, each a list of texts.")
    own = template_set(templates) if templates else tuple(table["templates"])
    wrong = [template for template in own if "{}" not in template]
    if wrong:
        raise InputError(f"{path}: these templates have no {{}} for the class name: {', '.join(wrong)}.")
    return Classes(tuple(table["classes"]), own)


def classes_of(pictures: Pictures, templates: str | None = None) -> Classes:
    """The classes that the pictures' folders (or CIFAR's files) name themselves.

    Raises:
        InputError: If they name none.
    """
    if pictures.classes is None:
        raise InputError("Name the classes: --classes imagenet, or --classes FILE.json.")
    names = tuple(name.replace("_", " ") for name in pictures.classes)
    if names and all(_WNID.fullmatch(name) for name in names):
        raise InputError(f"{pictures.source} has WordNet ids for names; pass --classes imagenet.")
    return Classes(names, template_set(templates or pictures.prompts))


def template_set(name: str) -> tuple[str, ...]:
    """Prompts by name: open_clip's 80 or 7 for ImageNet, or the 18 of CLIP's authors for CIFAR.

    Raises:
        InputError: If there is no such set.
    """
    if name not in TEMPLATE_SETS:
        raise InputError(f"There is no template set {name!r}; there are {', '.join(TEMPLATE_SETS)}.")
    if name == "cifar":
        return _CIFAR_TEMPLATES
    from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    chosen = OPENAI_IMAGENET_TEMPLATES if name == "imagenet" else SIMPLE_IMAGENET_TEMPLATES
    return tuple(template("{}") for template in chosen)


def label_map(pictures: Pictures, classes: Classes) -> tuple[list[int], str]:
    """Which class each label of the pictures stands for.

    Args:
        pictures: With labels.
        classes: The classes that are asked for.

    Returns:
        Place among the classes of each label, and a note for the reader where names could not tell.

    Raises:
        InputError: If labels have no class.
    """
    if pictures.classes is None:
        top = max(pictures.labels or (0,))
        if top >= len(classes.names):
            raise InputError(f"Label {top} has no class: there are {len(classes.names)}.")
        return list(range(top + 1)), ""
    if [*map(_plain, pictures.classes)] == [*map(_plain, classes.names)]:  # two may have one name
        return list(range(len(classes.names))), ""
    for known in (classes.folders, classes.names):
        places = _unique_places(known)
        found = [places.get(_plain(name)) for name in pictures.classes]
        if all(place is not None for place in found):
            return [place for place in found if place is not None], ""
        if any(place is not None for place in found):
            strange = [n for n, place in zip(pictures.classes, found, strict=True) if place is None]
            twice = [name for name in strange if _plain(name) in map(_plain, known)]
            if twice:
                raise InputError(
                    f"Several classes have the same name ({name_some(twice)}), which does not tell one from "
                    f"the other in {pictures.source}; name class folders by number."
                )
            raise InputError(
                f"{len(strange)} of the {len(found)} classes of {pictures.source} are none of those "
                f"named ({name_some(strange)})."
            )
    numbers = [int(name) for name in pictures.classes if name.isascii() and name.isdigit()]
    if len(numbers) == len(pictures.classes) and len(numbers) < len(classes.names) and min(numbers) == 0:
        if max(numbers) >= len(classes.names):
            raise InputError(f"Class folder {max(numbers)} has no class: there are {len(classes.names)}.")
        return (
            numbers,
            f"the class folders of {pictures.source} are taken to be the numbers of classes, from 0",
        )
    if len(pictures.classes) != len(classes.names):
        raise InputError(
            f"{pictures.source} has {len(pictures.classes)} classes, none of which is among the "
            f"{len(classes.names)} that were named ({name_some(pictures.classes, 3)} against "
            f"{name_some(classes.names, 3)})."
        )
    return list(range(len(classes.names))), (
        f"the class folders of {pictures.source}, in the order of their names, are taken to be the classes "
        "as listed"
    )


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).replace("_", " ").strip().casefold()


def _unique_places(names: tuple[str, ...]) -> dict[str, int]:
    """Place of each name that comes once."""
    plain = [_plain(name) for name in names]
    counts = Counter(plain)
    return {name: place for place, name in enumerate(plain) if counts[name] == 1}


def _texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
