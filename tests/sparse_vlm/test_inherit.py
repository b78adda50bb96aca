"""Plans, tables and strictness of inheritance, on hand-made state dicts (torch only)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_vlm.config import SparseFormerConfig
from sparse_vlm.encoder import SparseFormer
from sparse_vlm.inherit import InheritPlan, InheritReport, convert_vision_state_dict, freeze, inherit
from sparse_vlm.inherit_convert import InheritanceError
from sparse_vlm.inherit_tables import LAYOUTS, Thirds, source_keys

DEPTH, WIDTH, CLASSES, PATCHES = 3, 32, 5, 16


def timm_state_dict(depth: int = DEPTH, width: int = WIDTH) -> dict[str, Tensor]:
    """A timm ViT's tensors, every value different."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + PATCHES, width),
        "patch_embed.proj.weight": (width, 3, 4, 4),
        "patch_embed.proj.bias": (width,),
    }
    for index in range(depth):
        block = f"blocks.{index}."
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}{norm}.weight": (width,), f"{block}{norm}.bias": (width,)}
        linears = (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 2, 1), ("mlp.fc2", 1, 2))
        for name, out, into in linears:
            shapes[f"{block}{name}.weight"] = (out * width, into * width)
            shapes[f"{block}{name}.bias"] = (out * width,)
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"head.weight": (CLASSES, width), "head.bias": (CLASSES,)}
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def build_encoder(depth: int = 2, **changes: object) -> SparseFormer:
    fields = {
        "width": WIDTH, "heads": 2, "mlp_width": 2 * WIDTH, "depth": depth, "output_width": CLASSES,
        "num_latents": 4, "stem_channels": 8, "focusing_width": 16, "focusing_heads": 2,
        "focusing_mlp_width": 16, "focusing_repeats": 1, "num_points": 4, "mixing_points": 4,
        "generator_width": 8, "handover_generator_width": 8,
    }  # fmt: skip
    return SparseFormer(SparseFormerConfig(**{**fields, **changes}))  # type: ignore[arg-type]


def run_inherit(encoder: SparseFormer, state_dict: dict[str, Tensor], **changes: object) -> InheritReport:
    facts = {"activation": "gelu", "heads": 2, "norm_eps": 1e-5, **changes}
    plan = InheritPlan.thirds(DEPTH, drop=DEPTH - encoder.config.depth)
    return inherit(encoder, state_dict, "timm_vit", plan, **facts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("depth", "given", "parts"),
    [
        (12, {}, (4, 4, 4)),
        (24, {}, (8, 8, 8)),
        (10, {}, (3, 4, 3)),
        (5, {}, (1, 3, 1)),
        (2, {}, (0, 2, 0)),
        (1, {}, (0, 1, 0)),
        (12, {"drop": 2}, (2, 6, 4)),
        (12, {"drop": 10}, (10, 0, 2)),
        (12, {"tune": 2}, (4, 2, 6)),
        (12, {"freeze": 0}, (4, 8, 0)),
        (12, {"drop": 6, "freeze": 5}, (6, 1, 5)),
        (12, {"tune": 1, "freeze": 5}, (6, 1, 5)),
        (12, {"drop": 3, "tune": 4}, (3, 4, 5)),
    ],
)
def test_thirds(depth: int, given: dict[str, int], parts: tuple[int, int, int]) -> None:
    plan = InheritPlan.thirds(depth, **given)
    assert (plan.drop, plan.tune, plan.freeze) == parts


@pytest.mark.parametrize(
    ("depth", "given", "words"),
    [
        (12, {"drop": 12}, "leaves no block"),
        (12, {"drop": 4, "tune": 4, "freeze": 5}, "add up"),
        (12, {"drop": -1}, "0 or more"),
        (12, {"tune": 9}, "add up"),
        (0, {}, "at least one block"),
    ],
)
def test_impossible_plans_are_refused(depth: int, given: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        InheritPlan.thirds(depth, **given)


def test_every_tensor_arrives_or_is_accounted_for() -> None:
    encoder, source = build_encoder(), timm_state_dict()
    report = run_inherit(encoder, source)
    ours = encoder.state_dict()
    for key in source:
        if key.startswith("blocks.") and not key.startswith("blocks.0."):
            index, rest = key.split(".", 2)[1:]
            assert torch.equal(ours[f"cortex.blocks.{int(index) - 1}.{rest}"], source[key])
    assert torch.equal(ours["head.norm.weight"], source["norm.weight"])
    assert torch.equal(ours["head.proj.weight"], source["head.weight"])
    assert torch.equal(ours["head.proj.bias"], source["head.bias"])
    start = source["cls_token"] + source["pos_embed"][:, :1]
    assert torch.equal(ours["cortex.cls_token"], start)
    assert sorted(item.source for item in report.tensors) == sorted(source)
    left = {item.source for item in report.tensors if item.target is None}
    dropped = {key for key in source if key.startswith("blocks.0.")}
    assert left == dropped | {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_report_says_what_went_where() -> None:
    encoder = build_encoder()
    report = run_inherit(encoder, timm_state_dict())
    table = str(report)
    assert "3 blocks = 1 dropped + 1 tuned + 1 frozen" in table
    assert "left behind: dropped block" in table
    assert "cortex.blocks.0.* (trained)" in table
    assert "cortex.blocks.1.* (frozen)" in table
    assert "left behind: position embeddings" in table
    full = report.table(every_tensor=True)
    assert len(full.splitlines()) == 1 + len(timm_state_dict())
    assert "blocks.2.mlp.fc1.weight" in full


def test_freeze_follows_the_plan() -> None:
    encoder = build_encoder()
    trainable, frozen = freeze(encoder, InheritPlan(3, 1, 1, 1))
    grads = {name: parameter.requires_grad for name, parameter in encoder.named_parameters()}
    assert set(trainable) == {name for name, grad in grads.items() if grad}
    assert set(frozen) == {name for name, grad in grads.items() if not grad}
    assert all(name.startswith(("cortex.blocks.1.", "head.")) for name in frozen)
    assert {"cortex.cls_token", "cortex.blocks.0.norm1.weight", "stem.conv.weight"} <= set(trainable)
    freeze(encoder, InheritPlan(3, 1, 2, 0))
    assert encoder.cortex.blocks[1].norm1.weight.requires_grad
    assert not encoder.head.norm.weight.requires_grad
    with pytest.raises(InheritanceError, match="depth=3"):
        freeze(encoder, InheritPlan(3, 0, 2, 1))


def test_class_token_starts_from_a_measured_state() -> None:
    encoder = build_encoder()
    state = torch.arange(float(WIDTH))
    run_inherit(encoder, timm_state_dict(), cls_state=state)
    assert torch.equal(encoder.cortex.cls_token[0, 0], state)  # type: ignore[index]


def test_position_of_the_class_token_is_told_from_the_number_of_patches() -> None:
    source = timm_state_dict()
    for rows, patches, has_one in ((8, 8, False), (9, 8, True), (16, 15, True)):  # no square; one, of 3 x 5
        source["pos_embed"] = torch.randn(1, rows, WIDTH)
        weights = convert_vision_state_dict(source, "timm_vit", patches)
        assert ("cls_position" in weights.tensors) == has_one, rows


def test_position_of_the_class_token_is_told_from_the_grid() -> None:
    source = timm_state_dict()
    source["pos_embed"] = source["pos_embed"][:, 1:]  # positions of the 4 x 4 patches only
    assert "cls_position" not in convert_vision_state_dict(source, "timm_vit").tensors
    source["reg_token"] = torch.zeros(1, 4, WIDTH)
    assert "cls_position" not in convert_vision_state_dict(source, "timm_vit").tensors
    source["pos_embed"] = torch.randn(1, 1 + 4 + PATCHES, WIDTH)
    weights = convert_vision_state_dict(source, "timm_vit")
    assert torch.equal(weights.tensors["cls_position"][0, 0], source["pos_embed"][0, 0])


@pytest.mark.parametrize(("fact", "value"), [("activation", "quick_gelu"), ("heads", 4), ("norm_eps", 1e-6)])
def test_facts_that_load_silently_are_checked(fact: str, value: object) -> None:
    encoder = build_encoder()
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    with pytest.raises(InheritanceError, match=f"{fact} is {value!r}"):
        run_inherit(encoder, timm_state_dict(), **{fact: value})
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.state_dict().items())


def test_missing_and_unknown_tensors_are_listed_together() -> None:
    source = timm_state_dict()
    del source["blocks.1.mlp.fc1.weight"], source["norm.bias"]
    source["blocks.2.attn.q_norm.weight"] = torch.ones(4)
    source["rope.freqs"] = torch.ones(4)
    with pytest.raises(InheritanceError) as caught:
        run_inherit(build_encoder(), source)
    for name in ("blocks.1.mlp.fc1.weight", "norm.bias", "blocks.2.attn.q_norm.weight", "rope.freqs"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 64}, "the ViT is 32 wide, the encoder's cortex 64"),
        ({"mlp_width": 32}, "other shapes: cortex.blocks.0.mlp.fc1.weight"),
        ({"layer_scale": True}, "nothing in the ViT for cortex.blocks.0.ls1.gamma"),
        ({"qkv_bias": False}, "no place in the encoder for blocks.1.attn.qkv.bias"),
        ({"head_bias": False}, "no place in the encoder for head.bias"),
        ({"cls_token": False, "pooling": "mean"}, "cls_token=true"),
        ({"depth": 3, "entry_norm": True}, "nothing in the ViT for cortex.entry_norm.weight"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(changes: dict[str, object], words: str) -> None:
    encoder = build_encoder(**changes)  # type: ignore[arg-type]
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    with pytest.raises(InheritanceError, match=words):
        run_inherit(encoder, timm_state_dict())
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.state_dict().items())
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_another_depth_than_the_plans_is_refused() -> None:
    with pytest.raises(InheritanceError, match="3 blocks, this one has 4"):
        run_inherit(build_encoder(), timm_state_dict(depth=4))


def test_foreign_and_unknown_layouts_are_refused() -> None:
    with pytest.raises(InheritanceError, match=r"expects names like 'transformer\.resblocks\.0"):
        convert_vision_state_dict(timm_state_dict(), "open_clip_vit")
    with pytest.raises(InheritanceError, match="known are hf_clip"):
        convert_vision_state_dict(timm_state_dict(), "timm")


def test_encoder_without_projection_leaves_it_behind() -> None:
    report = run_inherit(build_encoder(output_width=0, head_bias=False), timm_state_dict())
    left = {item.source: item.note for item in report.tensors if item.target is None}
    assert "no projection" in left["head.weight"]


def test_whole_clip_state_dict_keeps_its_text_side_apart() -> None:
    clip: dict[str, Tensor] = {"visual.class_embedding": torch.randn(WIDTH)}
    style = LAYOUTS["open_clip_vit"][0]
    for source in style.block.values():
        for key in source_keys(source):
            clip[f"visual.transformer.resblocks.0.{key}"] = torch.randn(4, 4)
            clip[f"transformer.resblocks.0.{key}"] = torch.randn(4, 4)  # the text side's own
    for key in ("ln_post.weight", "ln_post.bias"):
        clip[f"visual.{key}"] = torch.randn(WIDTH)
    clip["visual.proj"] = torch.randn(WIDTH, CLASSES)
    clip["visual.positional_embedding"] = torch.randn(5, WIDTH)
    clip["visual.conv1.weight"] = torch.randn(WIDTH, 3, 4, 4)
    clip |= {"logit_scale": torch.ones(()), "positional_embedding": torch.randn(7, WIDTH)}
    weights = convert_vision_state_dict(clip, "open_clip_vit")
    assert torch.equal(weights.tensors["proj.weight"], clip["visual.proj"].t())
    assert torch.equal(weights.tensors["cls_position"][0, 0], clip["visual.positional_embedding"][0])
    assert weights.left_behind["positional_embedding"] == "text side"
    clip["visual_extra"] = torch.ones(1)
    with pytest.raises(InheritanceError, match="1 unknown: visual_extra"):
        convert_vision_state_dict(clip, "open_clip_vit")


def test_tables_name_every_source_once() -> None:
    for styles in LAYOUTS.values():
        for style in styles:
            whole = [key for source in style.block.values() for key in source_keys(source)]
            assert len(whole) == len(set(whole)), style.name
            tower = [source for source in style.tower.values() if not isinstance(source, Thirds)]
            names = [key for source in tower for key in source_keys(source)]
            assert len(names) == len(set(names)), style.name
            assert not set(names) & set(style.left_behind), style.name
