"""Towers: exactly N tokens each, the ViT where nothing is reduced, and each method's own rule by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d as pool_patches

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")

from bootstrap.cost import count_work  # noqa: E402
from bootstrap.teacher import Teacher, spec_to_config  # noqa: E402
from bootstrap.teachers.open_clip_vit import build_open_clip_trunk  # noqa: E402
from bootstrap.teachers.timm_vit import TimmTrunk  # noqa: E402
from eval.towers import METHODS, OpenedVit, Seen, TowerError, build_tower, join_seen  # noqa: E402
from eval.towers.base import EVERYTHING  # noqa: E402
from eval.towers.pooling import choose_grid  # noqa: E402
from eval.towers.tome import merge_tokens, plan_merges  # noqa: E402
from eval.towers.visionzip import merge_rest  # noqa: E402
from sparse_vlm import SparseFormer  # noqa: E402

VISION = {"image_size": 32, "patch_size": 4, "layers": 4, "width": 32, "head_width": 16, "mlp_ratio": 2.0}
TEXT = {"context_length": 8, "vocab_size": 99, "width": 16, "heads": 2, "layers": 1}


def shake(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def clip_teacher() -> Teacher:
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=24, vision_cfg=VISION, text_cfg=TEXT, quick_gelu=True)
    return Teacher(build_open_clip_trunk(shake(model), "tiny clip"))


def timm_teacher(**options: Any) -> Teacher:
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    model = timm.models.vision_transformer.VisionTransformer(**shape, **options)
    model.default_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return Teacher(TimmTrunk(shake(model), "tiny timm"))


TEACHERS: dict[str, Callable[[], Teacher]] = {
    "open_clip": clip_teacher,
    "timm": timm_teacher,
    "timm without class token": lambda: timm_teacher(class_token=False, global_pool="avg"),
    "timm with registers": lambda: timm_teacher(reg_tokens=2),
}


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=list(TEACHERS))
def teacher(request: pytest.FixtureRequest) -> Teacher:
    return TEACHERS[request.param]()


@pytest.fixture(scope="module")
def vit(teacher: Teacher) -> OpenedVit:
    return OpenedVit(teacher)


@pytest.fixture(scope="module")
def clip_vit() -> OpenedVit:
    return OpenedVit(clip_teacher())


def encoder_for(vit: OpenedVit) -> SparseFormer:
    config = spec_to_config(vit.spec, drop=2, focusing_width=32, num_points=4, mixing_points=4, num_latents=8)
    return SparseFormer(config, vit.spec.transform)


def test_the_full_vit_is_the_teacher_before_its_last_block(
    teacher: Teacher, vit: OpenedVit, images: Tensor
) -> None:
    expected = teacher(images, at_block=3, stop=True).mid
    made = build_tower("vit", 64, vit)(images)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS[1:])
def test_exactly_n_tokens(vit: OpenedVit, images: Tensor, method: str) -> None:
    encoder = encoder_for(vit)
    for count in (9, 16, 36, 47, 49, 64):
        tower = build_tower(method, count, vit, encoder)
        tokens = tower(images)
        assert tokens.shape == (3, count, 32)
        assert tower.num_tokens == count
        assert tower.width == 32
        assert torch.isfinite(tokens).all()


@pytest.mark.parametrize("method", ["pool", "random", "visionzip", "prumerge", "tome"])
def test_all_patches_are_the_full_vit(vit: OpenedVit, images: Tensor, method: str) -> None:
    whole = build_tower("vit", 64, vit)(images)
    torch.testing.assert_close(build_tower(method, 64, vit)(images), whole, rtol=1e-5, atol=1e-5)


def test_the_two_halves_are_the_whole_in_any_batch(vit: OpenedVit, images: Tensor) -> None:
    shared = [build_tower(m, 64 if m == "vit" else 16, vit) for m in METHODS[:-1]]
    for tower in shared:
        parts = join_seen([tower.look(images[:1]), tower.look(images[1:])])
        torch.testing.assert_close(tower.reduce(parts[1:])[0], tower(images)[1], rtol=1e-4, atol=1e-4)


def test_what_is_trained(clip_vit: OpenedVit) -> None:
    for method in METHODS:
        tower = build_tower(method, 64 if method == "vit" else 16, clip_vit, encoder_for(clip_vit))
        trained = [name for name, p in tower.named_parameters() if p.requires_grad]
        assert bool(trained) == (method == "resampler")
        assert (tower.trained == "nothing") == (method != "resampler")
        assert not any(name.startswith("vit.") for name in trained)


def test_out_of_reach_is_refused(clip_vit: OpenedVit) -> None:
    for method in METHODS[1:-1]:
        with pytest.raises(TowerError, match="65"):
            build_tower(method, 65, clip_vit)
    assert build_tower("sparseformer", 100, clip_vit, encoder_for(clip_vit)).num_tokens == 100
    with pytest.raises(TowerError, match="64 to 7 tokens in 3 blocks"):
        build_tower("tome", 7, clip_vit)
    with pytest.raises(TowerError, match="makes 64 tokens, not 16"):
        build_tower("vit", 16, clip_vit)
    with pytest.raises(TowerError, match="no method 'pooling'"):
        build_tower("pooling", 16, clip_vit)
    with pytest.raises(TowerError, match="encoder directory"):
        build_tower("sparseformer", 16, clip_vit)


def test_pooling_averages_blocks(clip_vit: OpenedVit, images: Tensor) -> None:
    whole = build_tower("vit", 64, clip_vit)(images).unflatten(1, (8, 8))
    pooled = build_tower("pool", 16, clip_vit)(images)
    torch.testing.assert_close(pooled[:, 5], whole[:, 2:4, 2:4].mean(dim=(1, 2)))
    assert choose_grid(36, (12, 12)) == (6, 6)
    assert choose_grid(36, (6, 24)) == (3, 12)
    assert choose_grid(24, (12, 12)) in ((4, 6), (6, 4))
    assert choose_grid(47, (12, 12)) is None


def test_random_is_drawn_for_each_picture_and_stays(clip_vit: OpenedVit, images: Tensor) -> None:
    whole = build_tower("vit", 64, clip_vit)(images)
    tokens = build_tower("random", 16, clip_vit)(images)
    places = [[int((whole[b] - row).abs().sum(1).argmin()) for row in tokens[b]] for b in range(3)]
    assert all(row == sorted(set(row)) for row in places)
    assert places[0] != places[1]
    torch.testing.assert_close(build_tower("random", 16, clip_vit)(images[[1]])[0], tokens[1])
    assert not torch.equal(build_tower("random", 16, clip_vit, seed=1)(images), tokens)


def planted(attention: list[float], keys: list[list[float]] | None = None) -> Seen:
    """Six patches whose token says their number."""
    count = len(attention)
    tokens = torch.arange(1.0, count + 1)[None, :, None].expand(1, count, 32).clone()
    key = torch.eye(count, 32)[None] if keys is None else torch.tensor([keys])
    weights = torch.tensor([attention])
    class_token = torch.zeros(1, 1, 32)
    return Seen(tokens, class_token, weights, key, weights, key)


def test_visionzip_by_hand(clip_vit: OpenedVit) -> None:
    tower = build_tower("visionzip", 6, clip_vit)
    # One of six is contextual, one the class token: four dominant in raster order; the rest is one group.
    seen = planted([0.9, 0.1, 0.8, 0.2, 0.7, 0.6, 0.3, 0.5])
    assert tower.reduce(seen)[0, :, 0].tolist() == pytest.approx([0, 1, 3, 5, 6, 2 + (4 + 7 + 8) / 3])
    # Two groups around places 0 and 2; the key of place 1 is like that of place 2.
    keys = torch.tensor([[[1.0, 0.0], [0.1, 1.0], [0.0, 1.0], [1.0, 0.2]]])
    merged = merge_rest(torch.tensor([[[1.0], [2.0], [3.0], [4.0]]]), keys, 2)
    assert merged[0, :, 0].tolist() == [1 + 4, 3 + 2]
    # All like the first target: nothing joins the other.
    same = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.2]]])
    assert merge_rest(torch.tensor([[[1.0], [2.0], [3.0], [4.0]]]), same, 2)[0, :, 0].tolist() == [1 + 3, 3]


def test_visionzip_keeps_the_class_token_where_there_is_one(vit: OpenedVit, images: Tensor) -> None:
    seen = vit.look(images, ("penultimate",))
    first = build_tower("visionzip", 16, vit)(images)[:, 0]
    if vit.spec.has_cls:
        assert seen.class_token is not None
        torch.testing.assert_close(first, seen.class_token[:, 0])
    else:
        assert seen.class_token is None


def test_a_look_that_keeps_attention_computes_the_same_and_little_more(
    vit: OpenedVit, images: Tensor
) -> None:
    torch.testing.assert_close(
        vit.look(images, EVERYTHING).tokens, vit.look(images).tokens, rtol=1e-4, atol=1e-5
    )
    plain = count_work(lambda: vit.look(images[:1]))
    width, count = 32, 64 + vit.spec.num_prefix
    attention = (1 if vit.spec.has_cls else count) * count * width / 1e9
    assert count_work(lambda: vit.look(images[:1], ("penultimate",))) == pytest.approx(plain + attention)
    more = plain + attention + 2 * count * width**2 / 1e9
    assert count_work(lambda: vit.look(images[:1], ("last",))) == pytest.approx(more)


def test_prumerge_by_hand(clip_vit: OpenedVit) -> None:
    tower = build_tower("prumerge", 3, clip_vit)
    keys = [[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.3]]
    made = tower.reduce(planted([0.5, 0.1, 0.3, 0.05], keys))[0, :, 0]
    # Patches 1 and 3 stay, one neighbour each: 0.1 * 2 to the first, 0.05 * 4 to the third.
    assert made.tolist() == pytest.approx([1 + 0.2, 3 + 0.2, 0.1 * 2 + 0.05 * 4])


def test_tome_merges_the_pair_that_is_alike() -> None:
    # Places 0 (class token), 1 ... 4. Even places 2 and 4 may join odd places 1 and 3; 4 and 1 are alike.
    metric = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.5, 0.6], [0.0, 1.0], [2.0, 0.1]]])
    tokens = torch.tensor([[[7.0], [1.0], [2.0], [3.0], [4.0]]])
    sizes = torch.tensor([[1.0, 3.0, 1.0, 1.0, 1.0]])
    merged, counts = merge_tokens(tokens, sizes, metric, 1, protected=1)
    assert merged[0, :, 0].tolist() == [7.0, (3 * 1 + 4) / 4, 2.0, 3.0]
    assert counts[0].tolist() == [1.0, 4.0, 1.0, 1.0]
    both, counts = merge_tokens(tokens, sizes, metric, 2, protected=1)
    assert both[0, :, 0].tolist() == [7.0, (3 * 1 + 4) / 4, 2.5]
    assert counts[0].tolist() == [1.0, 4.0, 2.0]
    with pytest.raises(TowerError, match="cannot merge 3 of 5"):
        merge_tokens(tokens, sizes, metric, 3, protected=1)


def test_tome_keeps_the_sum_of_patches(vit: OpenedVit, images: Tensor) -> None:
    tower: Any = build_tower("tome", 16, vit)
    tokens, sizes = tower.merge(images)
    assert tokens.shape == (3, 16, 32)
    assert sizes.sum(dim=1).tolist() == [64.0] * 3
    assert sizes.min() >= 1


def test_tome_attention_counts_patches(clip_vit: OpenedVit) -> None:
    """A picture of equal halves: two equal tokens merged must act like the two."""
    from eval.towers.opened import attend, split_qkv

    block = clip_vit.used_blocks[0]
    tokens = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(2))
    twice = torch.cat((tokens, tokens[:, 2:]), dim=1)
    expected = attend(block, twice, *split_qkv(block, twice), None)[:, :3]
    sizes = torch.tensor([[1.0, 1.0, 2.0]])
    torch.testing.assert_close(attend(block, tokens, *split_qkv(block, tokens), sizes), expected)


def test_plans_of_merging() -> None:
    assert plan_merges(144, 16, 8) == [16] * 8
    assert plan_merges(64, 64, 3) == [0, 0, 0]
    assert plan_merges(64, 8, 3) == [32, 16, 8]
    for patches, count, blocks in ((144, 49, 8), (196, 16, 11), (100, 3, 6)):
        left = patches
        for merged in plan_merges(patches, count, blocks):
            assert 0 <= merged <= left // 2
            left -= merged
        assert left == count


def test_resampler_learns_from_a_seed_of_its_own(clip_vit: OpenedVit, images: Tensor) -> None:
    before = torch.get_rng_state()
    one, same, other = (build_tower("resampler", 16, clip_vit, seed=seed) for seed in (0, 0, 1))
    tokens = one(images)
    torch.testing.assert_close(tokens, same(images))
    assert not torch.allclose(tokens, other(images))
    tokens.sum().backward()
    assert all(p.grad is not None for p in one.parameters() if p.requires_grad)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_resampler_begins_with_the_patches_around(clip_vit: OpenedVit) -> None:
    tower: Any = build_tower("resampler", 16, clip_vit)
    nearest = (tower.query_places @ tower.key_places.T).argmax(dim=1)  # of 64 patches, for each of 16
    assert (nearest // 8 // 2).tolist() == [place // 4 for place in range(16)]
    assert (nearest % 8 // 2).tolist() == [place % 4 for place in range(16)]
    logits = tower.query(tower.query_places) @ tower.key(tower.key_places).T / tower.heads / 16**0.5
    around = pool_patches(logits.softmax(dim=1).unflatten(1, (8, 8)), 2) * 4  # (16, 4, 4)
    own = around.flatten(1).diagonal().mean()
    assert own > 3 / 16


def test_multiply_adds_are_those_of_the_formula(clip_vit: OpenedVit, images: Tensor) -> None:
    width, mlp, count = 32, 64, 65
    block = count * (4 * width**2 + 2 * width * mlp) + 2 * count**2 * width
    by_hand = (3 * block + 64 * 48 * width) / 1e9
    tower = build_tower("vit", 64, clip_vit)
    assert count_work(lambda: tower(images[:1])) == pytest.approx(by_hand, rel=1e-6)
    merged = build_tower("tome", 16, clip_vit)
    assert count_work(lambda: merged(images[:1])) < 0.8 * by_hand
