"""A library's ViT state dict under canonical names, by the named tables and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .inherit_tables import LAYOUTS, REGISTERS, KeyStyle, Source, Stacked, read_source, source_keys

_MOST_LISTED = 8


class InheritanceError(ValueError):
    """A ViT whose weights a SparseFormer cannot take, with the reason."""


@dataclass(frozen=True)
class VisionWeights:
    """A ViT's tensors under canonical names.

    Attributes:
        tensors: canonical name -> tensor. Names are timm's inside a block (``blocks.3.attn.qkv.weight``);
            outside they are ``cls_token`` (1, 1, D), ``cls_position`` (1, 1, D; the class token's position
            embedding, where it has one), ``entry_norm.*``, ``norm.*``, ``proj.*`` (E, D) and ``pool.*``.
        sources: canonical name -> names in the state dict it came from.
        left_behind: names in the state dict that have no place in a SparseFormer -> why.
        style: the key style that was recognised, in words.
    """

    tensors: dict[str, Tensor]
    sources: dict[str, tuple[str, ...]]
    left_behind: dict[str, str]
    style: str

    @property
    def depth(self) -> int:
        """Blocks of the ViT."""
        return 1 + max(int(name.split(".")[1]) for name in self.tensors if name.startswith("blocks."))


def convert_vision_state_dict(
    state_dict: Mapping[str, Tensor], layout: str, patches: int | None = None
) -> VisionWeights:
    """Rename a library's ViT tensors to canonical names.

    Args:
        state_dict: of the vision model, or of a whole image-text model; text tensors are set aside.
        layout: a key of :data:`sparse_vlm.inherit_tables.LAYOUTS`.
        patches: of one picture, which tell whether the class token has a position; None for a square grid.

    Raises:
        InheritanceError: listing every missing and every unknown name at once.
    """
    style, names = _recognise(state_dict, layout)
    found = {name: state_dict[original] for name, original in names.vision.items()}
    entries: list[tuple[str, str, Source]] = [(name, name, source) for name, source in style.tower.items()]
    index = 0
    while any(name.startswith(style.blocks.format(i=index)) for name in found):
        for name, source in style.block.items():
            entries.append((f"blocks.{index}.{name}", name, _below(style.blocks.format(i=index), source)))
        index += 1
    result = VisionWeights({}, {}, dict(names.elsewhere), style.name)
    missing: list[str] = []
    used: set[str] = set()
    for canonical, kind, source in entries:
        keys = source_keys(source)
        absent = [key for key in keys if key not in found]
        if absent:
            if kind not in style.optional or len(absent) < len(keys):
                missing += absent
            continue
        used.update(keys)
        result.sources[canonical] = tuple(names.vision[key] for key in keys)
        result.tensors[canonical] = read_source(source, found)
    for name, original in names.vision.items():
        if name in style.left_behind:
            result.left_behind[original] = style.left_behind[name]
    strangers = [original for name, original in names.vision.items() if name not in used]
    unknown = [original for original in strangers if original not in result.left_behind] + names.unknown
    if missing or unknown:
        parts = [f"{len(missing)} missing: {listed(missing)}"] if missing else []
        parts += [f"{len(unknown)} unknown: {listed(unknown)}"] if unknown else []
        raise InheritanceError(f"not a plain ViT in the key style of {style.name}: {'; '.join(parts)}")
    if "cls_token" in result.tensors and style.position in found:
        position = _cls_position(found[style.position], found, style, patches)
        if position is not None:
            result.tensors["cls_position"] = position
            result.sources["cls_position"] = (names.vision[style.position],)
    return result


@dataclass(frozen=True)
class _Names:
    """Names of a state dict sorted by where they belong."""

    vision: dict[str, str]  # name without the root -> name
    elsewhere: dict[str, str]  # name -> reason
    unknown: list[str]


def _sort_names(state_dict: Mapping[str, Tensor], style: KeyStyle) -> _Names:
    names = _Names({}, {}, [])
    rooted = bool(style.root) and any(key.startswith(style.root) for key in state_dict)
    for key in state_dict:
        reasons = [why for prefix, why in style.elsewhere.items() if key.startswith(prefix)]
        if rooted and key.startswith(style.root):
            names.vision[key[len(style.root) :]] = key
        elif not rooted or key in style.beside:
            names.vision[key] = key
        elif reasons:
            names.elsewhere[key] = reasons[0]
        else:
            names.unknown.append(key)
    return names


def _recognise(state_dict: Mapping[str, Tensor], layout: str) -> tuple[KeyStyle, _Names]:
    """The key style of the layout that names most of the tensors."""
    if layout not in LAYOUTS:
        raise InheritanceError(f"unknown layout {layout!r}; known are {', '.join(sorted(LAYOUTS))}")

    def score(style: KeyStyle) -> int:
        block = style.blocks.format(i=0)
        wanted = {block + key for source in style.block.values() for key in source_keys(source)}
        wanted |= {key for source in style.tower.values() for key in source_keys(source)}
        return len(wanted & _sort_names(state_dict, style).vision.keys())

    style = max(LAYOUTS[layout], key=score)
    names = _sort_names(state_dict, style)
    block = style.blocks.format(i=0)
    if not any(name.startswith(block) for name in names.vision):
        wanted = block + source_keys(style.block["attn.qkv.weight"])[0]
        raise InheritanceError(
            f"no ViT block found among {len(state_dict)} tensors: the layout {layout!r} expects names like "
            f"{wanted!r}, got {listed(list(state_dict)[:3])}"
        )
    return style, names


def _below(prefix: str, source: Source) -> Source:
    """A block's table entry for the block whose names begin with ``prefix``."""
    if isinstance(source, str):
        return prefix + source
    if isinstance(source, Stacked):
        return Stacked(tuple(prefix + key for key in source.keys))
    raise TypeError(f"no block table entry is a {type(source).__name__}")


def _cls_position(
    positions: Tensor, found: Mapping[str, Tensor], style: KeyStyle, patches: int | None
) -> Tensor | None:
    """The class token's own position embedding (1, 1, D); some ViTs embed positions of patches only."""
    positions = positions.reshape(-1, positions.shape[-1])  # (N, D)
    registers = sum(
        found[key].shape[-2] for key, why in style.left_behind.items() if key in found and why == REGISTERS
    )
    count = positions.shape[0]
    if count == patches:
        return None
    # Whether the first position is the class token's is not written anywhere. Patches make a square grid.
    square = _is_square(count) and not any(_is_square(count - extra) for extra in {1, 1 + registers})
    if patches is None and square:
        return None
    return positions[0].reshape(1, 1, -1)  # (1, 1, D)


def _is_square(number: int) -> bool:
    return number >= 0 and math.isqrt(number) ** 2 == number


def listed(names: list[str]) -> str:
    """Names for a message, the first eight of them."""
    shown = ", ".join(names[:_MOST_LISTED])
    return shown + (f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else "")
