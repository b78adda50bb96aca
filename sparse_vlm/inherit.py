"""Weights of a vision transformer for the cortex of a SparseFormer.

The first blocks of the ViT are dropped (the focusing transformer takes their place), the next are inherited
and tuned, the last and the head are inherited and stay frozen. What goes where is decided by the named tables
of :mod:`sparse_vlm.inherit_tables`; nothing is skipped without a reason in the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .inherit_convert import InheritanceError, VisionWeights, convert_vision_state_dict, listed

if TYPE_CHECKING:
    from .config import SparseFormerConfig
    from .encoder import SparseFormer

# Inherited names that live in the encoder under another roof.
_HOMES = {"norm": "head.norm", "proj": "head.proj", "pool": "head.pool"}


@dataclass(frozen=True)
class InheritPlan:
    """What happens to each block of the source ViT, first to last.

    Attributes:
        depth: blocks of the source ViT.
        drop: first blocks left out; the focusing transformer replaces them.
        tune: next blocks, inherited and trained.
        freeze: last blocks, inherited and frozen together with the head.
    """

    depth: int
    drop: int
    tune: int
    freeze: int

    def __post_init__(self) -> None:
        parts = {"drop": self.drop, "tune": self.tune, "freeze": self.freeze}
        for name, count in parts.items():
            if count < 0:
                raise ValueError(f"{name} must be 0 or more blocks, got {count}")
        if sum(parts.values()) != self.depth:
            told = " + ".join(f"{name} {count}" for name, count in parts.items())
            raise ValueError(
                f"{told} is {sum(parts.values())} blocks, but the source ViT has {self.depth}: "
                "they have to add up to its depth"
            )
        if self.drop >= self.depth:
            raise ValueError(f"drop {self.drop} of {self.depth} blocks leaves no block to inherit")

    @classmethod
    def thirds(
        cls, depth: int, drop: int | None = None, tune: int | None = None, freeze: int | None = None
    ) -> InheritPlan:
        """A plan in thirds (12 -> 4, 4, 4), with any of the three parts given.

        Where the depth is no multiple of three, ``drop`` and ``freeze`` are the third rounded down and
        ``tune`` has the rest (10 -> 3, 4, 3). A part that is given stays; the remainder goes to ``tune``
        unless ``tune`` is given, and then to ``freeze`` unless that is given too.

        Raises:
            ValueError: if the parts do not add up to ``depth`` or leave nothing to inherit.
        """
        if depth < 1:
            raise ValueError(f"a ViT has at least one block, got depth {depth}")
        if drop is None:
            given = tune is not None and freeze is not None
            drop = max(0, depth - (tune or 0) - (freeze or 0)) if given else depth // 3
        if tune is None:
            if freeze is None:
                freeze = min(depth // 3, max(0, depth - drop))
            tune = max(0, depth - drop - freeze)
        elif freeze is None:
            freeze = max(0, depth - drop - tune)
        return cls(depth, drop, tune, freeze)


@dataclass(frozen=True)
class InheritedTensor:
    """One line of the report: where a source tensor went, or why it stayed.

    Attributes:
        source: name in the source state dict.
        target: name in the encoder, or None.
        note: how it was changed on the way, or why it was left behind.
    """

    source: str
    target: str | None
    note: str


@dataclass(frozen=True)
class InheritReport:
    """What went where.

    Attributes:
        plan: the plan that was carried out.
        layout: the key style that was recognised.
        tensors: every tensor of the source state dict.
        trainable: encoder parameters that the plan trains (the focusing side included).
        frozen: encoder parameters that it freezes.
    """

    plan: InheritPlan
    layout: str
    tensors: tuple[InheritedTensor, ...]
    trainable: tuple[str, ...]
    frozen: tuple[str, ...]

    def table(self, every_tensor: bool = False) -> str:
        """The report as text, a line a block, or with ``every_tensor`` a line a tensor."""
        frozen = set(self.frozen)
        lines: dict[tuple[str, str], int] = {}
        for item in self.tensors:
            source, target = item.source, item.target
            if target is None:
                fate = f"left behind: {item.note}"
            else:
                state = "frozen" if target in frozen else "trained"
                note = f", {item.note}" if item.note else ""
                fate = f"{target if every_tensor else _shortened(target)} ({state}{note})"
            key = (source if every_tensor else _shortened(source), fate)
            lines[key] = lines.get(key, 0) + 1
        width = max((len(source) for source, _ in lines), default=0)
        plan = self.plan
        head = (
            f"Inherited from {self.layout}: {plan.depth} blocks = {plan.drop} dropped + {plan.tune} tuned "
            f"+ {plan.freeze} frozen"
        )
        body = [
            f"  {source:<{width}}  ->  {fate}" + (f"  x{count}" if count > 1 else "")
            for (source, fate), count in lines.items()
        ]
        return "\n".join([head, *body])

    def __str__(self) -> str:
        return self.table()


@torch.no_grad()
def inherit(
    encoder: SparseFormer,
    state_dict: Mapping[str, Tensor],
    layout: str,
    plan: InheritPlan,
    *,
    activation: str,
    heads: int,
    norm_eps: float,
    cls_state: Tensor | None = None,
    patches: int | None = None,
) -> InheritReport:
    """Give a SparseFormer's cortex and head the weights of a ViT, and freeze what the plan freezes.

    The three facts that no state dict tells, and that load without an error when they are wrong, have to be
    named: activation, number of heads, epsilon of the layer norms.

    The class token enters the cortex at the first inherited block, where the ViT's own class token has been
    through ``drop`` blocks: its state there depends on the picture. Without ``cls_state`` it starts from the
    ViT's class token plus its position embedding; a mean over some pictures is the better start.

    Args:
        encoder: built for this ViT: same width, heads, MLP, activation, and ``depth - drop`` cortex blocks.
        state_dict: the ViT's, or that of a whole image-text model.
        layout: a key of :data:`sparse_vlm.inherit_tables.LAYOUTS`.
        plan: which blocks are dropped, tuned and frozen.
        activation: of the ViT's MLPs: ``"gelu"``, ``"quick_gelu"`` or ``"gelu_tanh"``.
        heads: attention heads of the ViT.
        norm_eps: epsilon of its layer norms.
        cls_state: the class token's state where the first inherited block begins, (D,).
        patches: of one picture in the ViT; None for a square grid. As many position embeddings, and the class
            token has none.

    Returns:
        What went where.

    Raises:
        InheritanceError: with the reason, and nothing in the encoder changed.
    """
    _check_facts(encoder.config, activation, heads, norm_eps)
    weights = convert_vision_state_dict(state_dict, layout, patches)
    if weights.depth != plan.depth:
        raise InheritanceError(f"the plan is for a ViT of {plan.depth} blocks, this one has {weights.depth}")
    width = weights.tensors["norm.weight"].shape[0]
    if width != encoder.config.width:
        raise InheritanceError(
            f"the ViT is {width} wide, the encoder's cortex {encoder.config.width}: build it {width} wide"
        )
    trainable, frozen = _split(encoder, plan)
    parameters = dict(encoder.named_parameters())
    rows: list[InheritedTensor] = []
    ready: dict[str, Tensor] = {}
    homeless: list[str] = []
    for name, tensor in weights.tensors.items():
        if name in ("cls_token", "cls_position"):
            continue
        target, reason = _target(name, plan, encoder.config)
        if target is not None and target not in parameters:
            homeless += weights.sources[name]
        elif target is not None:
            ready[target] = tensor
        rows += [InheritedTensor(source, target, reason) for source in weights.sources[name]]
    rows += _start_cls_token(encoder, weights, cls_state, plan, ready)
    told = {row.source for row in rows}
    rows += [
        InheritedTensor(source, None, reason)
        for source, reason in weights.left_behind.items()
        if source not in told
    ]
    _check_complete(parameters, ready, homeless)
    for target, tensor in ready.items():
        parameters[target].copy_(tensor)
    _switch(encoder, trainable)
    return InheritReport(plan, weights.style, tuple(rows), trainable, frozen)


def freeze(encoder: SparseFormer, plan: InheritPlan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Switch gradients on and off as the plan says.

    Stem, focusing transformer, class token, entry norm and the first ``plan.tune`` cortex blocks are trained;
    the last ``plan.freeze`` blocks and the head are not.

    Returns:
        Names of the trained and of the frozen parameters.

    Raises:
        InheritanceError: if the cortex has another depth than the plan leaves.
    """
    trainable, frozen = _split(encoder, plan)
    _switch(encoder, trainable)
    return trainable, frozen


def _split(encoder: SparseFormer, plan: InheritPlan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the parameters that the plan trains, and of those it freezes."""
    depth = encoder.config.depth
    if depth != plan.tune + plan.freeze:
        raise InheritanceError(
            f"the plan keeps {plan.tune + plan.freeze} of {plan.depth} blocks, the cortex has {depth}: "
            f"build the encoder with depth={plan.tune + plan.freeze}"
        )
    still = (*(f"cortex.blocks.{index}." for index in range(plan.tune, depth)), "head.")
    names = [name for name, _ in encoder.named_parameters()]
    frozen = tuple(name for name in names if name.startswith(still))
    return tuple(name for name in names if not name.startswith(still)), frozen


def _switch(encoder: SparseFormer, trainable: tuple[str, ...]) -> None:
    chosen = set(trainable)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name in chosen)


def _target(name: str, plan: InheritPlan, config: SparseFormerConfig) -> tuple[str | None, str]:
    """Where a canonical tensor goes, or None and why it goes nowhere."""
    first, rest = name.split(".", 1)
    if first == "blocks":
        index, inner = rest.split(".", 1)
        if int(index) < plan.drop:
            return None, "dropped block"
        return f"cortex.blocks.{int(index) - plan.drop}.{inner}", ""
    if first == "entry_norm":
        if plan.drop:
            return None, "stands before the dropped blocks"
        return f"cortex.{name}", ""
    if first == "proj" and not config.output_width:
        return None, "this encoder has no projection (output_width=0)"
    return f"{_HOMES[first]}.{rest}", ""


def _start_cls_token(
    encoder: SparseFormer,
    weights: VisionWeights,
    cls_state: Tensor | None,
    plan: InheritPlan,
    ready: dict[str, Tensor],
) -> list[InheritedTensor]:
    """Put the class token's start into ``ready``; returns its lines of the report."""
    theirs, ours = "cls_token" in weights.tensors, encoder.cortex.cls_token is not None
    if theirs != ours:
        raise InheritanceError(
            f"the ViT has {'a' if theirs else 'no'} class token and the encoder has "
            f"{'one' if ours else 'none'}: build the encoder with cls_token={str(theirs).lower()}"
        )
    if not theirs:
        return []
    target = "cortex.cls_token"
    if cls_state is not None and plan.drop:
        ready[target] = cls_state.reshape(1, 1, -1)  # (1, 1, D)
        note = "replaced by its measured state where the cortex begins"
        return [InheritedTensor(source, None, note) for source in weights.sources["cls_token"]]
    start = weights.tensors["cls_token"]
    note = ""
    if "cls_position" in weights.tensors:
        start = start + weights.tensors["cls_position"]
        note = "plus its position embedding"
    ready[target] = start
    return [InheritedTensor(source, target, note) for source in weights.sources["cls_token"]]


def _check_facts(config: SparseFormerConfig, activation: str, heads: int, norm_eps: float) -> None:
    """What a state dict does not tell, and what loads silently when it is wrong."""
    for name, theirs in (("activation", activation), ("heads", heads), ("norm_eps", norm_eps)):
        ours = getattr(config, name)
        if ours != theirs:
            raise InheritanceError(
                f"the ViT's {name} is {theirs!r}, the encoder's is {ours!r}: its weights would load without "
                f"an error and compute the wrong thing; build the encoder with {name}={theirs!r}"
            )


def _check_complete(
    parameters: Mapping[str, Tensor], ready: Mapping[str, Tensor], homeless: list[str]
) -> None:
    """Every tensor of cortex and head is filled, every source tensor has a home, every shape fits."""
    inherited = [name for name in parameters if name.startswith(("cortex.", "head."))]
    unfilled = [name for name in inherited if name not in ready]
    misshapen = [
        f"{name} is {tuple(parameters[name].shape)}, the ViT's is {tuple(tensor.shape)}"
        for name, tensor in ready.items()
        if parameters[name].shape != tensor.shape
    ]
    problems = [f"no place in the encoder for {listed(homeless)}"] if homeless else []
    problems += [f"nothing in the ViT for {listed(unfilled)}"] if unfilled else []
    problems += [f"other shapes: {listed(misshapen)}"] if misshapen else []
    if problems:
        raise InheritanceError(f"the ViT does not fit the encoder: {'; '.join(problems)}")


def _shortened(name: str) -> str:
    """``cortex.blocks.3.attn.qkv.weight`` -> ``cortex.blocks.3.*``; other names lose their last part."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    if numbers:
        return ".".join([*parts[: numbers[0] + 1], "*"])
    return ".".join([*parts[:-1], "*"]) if parts[-1] in ("weight", "bias") else name
