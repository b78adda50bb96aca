"""The encoder's contract: counts, sizes, RoIs, gradients, and independence of a batch's rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image
from torch import Tensor

from sparse_vlm import SparseFormer, SparseFormerConfig, build_encoder
from sparse_vlm.rois import build_initial_rois

TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def test_shapes(family: str, build_tiny: Callable[..., SparseFormer], pictures: Tensor) -> None:
    encoder = build_tiny(family)
    config = encoder.config
    output = encoder(pictures, hidden_states=True)
    steps = config.focusing_repeats + 1
    assert output.tokens.shape == (3, encoder.num_tokens, config.width)
    assert output.pooled.shape == (3, config.embedding_width)
    assert [roi.shape for roi in output.rois] == [(3, config.num_latents, 4)] * steps
    assert output.hidden_states is not None
    assert len(output.hidden_states) == config.depth + 1
    torch.testing.assert_close(encoder.head.norm(output.hidden_states[-1]), output.tokens)
    focus = encoder.focus(pictures)
    assert [p.shape for p in focus.points] == [(3, config.num_latents, config.num_points, 2)] * steps
    assert encoder(pictures).hidden_states is None


@pytest.mark.parametrize("count", [1, 2, 3, 49, 100])
def test_any_number_of_tokens(count: int, build_tiny: Callable[..., SparseFormer], pictures: Tensor) -> None:
    without_cls = build_tiny("latents")(pictures, num_tokens=count)
    assert without_cls.tokens.shape[1] == without_cls.rois[0].shape[1] == count
    assert without_cls.tokens.isfinite().all()
    if count > 1:
        with_cls = build_tiny("bootstrapped")(pictures, num_tokens=count)
        assert with_cls.tokens.shape[1] == count
        assert with_cls.rois[0].shape[1] == count - 1
        assert with_cls.pooled.isfinite().all()


def test_num_tokens_is_what_comes_out(build_tiny: Callable[..., SparseFormer], pictures: Tensor) -> None:
    latents, released = build_tiny("latents"), build_tiny("bootstrapped")
    assert latents.num_tokens == latents(pictures).tokens.shape[1] == latents(pictures).rois[0].shape[1] == 49
    assert released.num_tokens == released(pictures).tokens.shape[1] == 49
    assert released(pictures).rois[0].shape[1] == 48


def test_counts_that_cannot_be(build_tiny: Callable[..., SparseFormer], pictures: Tensor) -> None:
    with pytest.raises(ValueError, match=r"at least 2 \(the class token and one that looks\), got 1"):
        build_tiny("bootstrapped")(pictures, num_tokens=1)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        build_tiny("latents")(pictures, num_tokens=0)
    with pytest.raises(ValueError, match="each of its 9 latent tokens and cannot run with 10"):
        build_tiny("v1")(pictures, num_tokens=10)


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (300, 7), (33, 65), (224, 112)])
def test_any_height_and_width(size: tuple[int, int], build_tiny: Callable[..., SparseFormer]) -> None:
    picture = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    for family in ("latents", "v1"):
        output = build_tiny(family)(picture)
        assert output.tokens.isfinite().all()
        assert output.pooled.isfinite().all()


def test_an_empty_batch_gives_empty_results(family: str, build_tiny: Callable[..., SparseFormer]) -> None:
    encoder = build_tiny(family)
    output, one = encoder(torch.randn(0, 3, 32, 32)), encoder(torch.randn(1, 3, 32, 32))
    assert output.tokens.shape == (0, *one.tokens.shape[1:])
    assert output.pooled.shape == (0, *one.pooled.shape[1:])
    assert output.rois[-1].shape == (0, *one.rois[-1].shape[1:])


def test_results_are_the_callers_own(
    family: str, build_tiny: Callable[..., SparseFormer], pictures: Tensor
) -> None:
    """Scaling RoIs to pixels or a pooled embedding to unit length, in place, changes nothing else."""
    encoder = build_tiny(family)
    with torch.no_grad():
        output, again = encoder(pictures[:1]), encoder(pictures[:1])
        for rois in output.rois:
            rois.mul_(224)
        output.pooled.div_(7)
        torch.testing.assert_close(output.tokens, again.tokens)
        after = encoder(pictures[:1])
    assert torch.equal(after.pooled, again.pooled)
    assert torch.equal(after.rois[0], again.rois[0])


@pytest.mark.parametrize(
    ("family", "change"),
    [("bootstrapped", {"position_temperature": 3.0}), ("v1", {"sampling_padding": "border"})],
)
def test_fields_of_the_architecture_have_a_say(
    family: str, change: dict[str, Any], build_tiny: Callable[..., SparseFormer], pictures: Tensor
) -> None:
    encoder = build_tiny(family)
    other = SparseFormer(encoder.config.replace(**change))
    other.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        assert not torch.allclose(encoder(pictures).pooled, other.eval()(pictures).pooled)


def test_point_gradients_are_clipped_where_the_architecture_says_so(
    build_tiny: Callable[..., SparseFormer], pictures: Tensor
) -> None:
    clipped = build_tiny("v1")
    free = SparseFormer(clipped.config.replace(clip_point_gradients=False))
    free.load_state_dict(clipped.state_dict())
    gradients = []
    for encoder in (clipped, free.eval()):
        (1e4 * encoder(pictures).pooled.square().sum()).backward()
        gradients.append(encoder.focusing.stage.offset_bias.grad.abs().sum())
    assert gradients[0] < 0.1 * gradients[1]


def test_one_latent_of_its_own_is_a_fixed_count(build_tiny: Callable[..., SparseFormer]) -> None:
    encoder = SparseFormer(build_tiny("v1").config.replace(num_latents=1))
    with pytest.raises(ValueError, match="cannot run with 5"):
        encoder(torch.randn(1, 3, 32, 32), num_tokens=5)


@pytest.mark.parametrize("family", ["bootstrapped", "v1"])
def test_functional_gradients(family: str, build_tiny: Callable[..., SparseFormer], pictures: Tensor) -> None:
    encoder = build_tiny(family)
    state = dict(encoder.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        pooled: Tensor = torch.func.functional_call(encoder, parameters, (pictures,)).pooled
        return pooled.square().sum()

    functional = torch.func.grad(loss)(state)
    encoder(pictures).pooled.square().sum().backward()
    for name, parameter in encoder.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                functional[name], parameter.grad, msg=lambda text, n=name: f"{n}: {text}"
            )


@pytest.mark.skipif(TORCH < (2, 2), reason="torch 2.1 has no batching rule for its attention on a CPU")
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_gradients_of_each_picture_alone(
    family: str, build_tiny: Callable[..., SparseFormer], pictures: Tensor
) -> None:
    encoder = build_tiny(family)
    state = {name: value.detach() for name, value in encoder.named_parameters()}

    def loss(parameters: dict[str, Tensor], picture: Tensor) -> Tensor:
        pooled: Tensor = torch.func.functional_call(encoder, parameters, (picture[None],)).pooled
        return pooled.square().sum()

    alone = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(state, pictures)
    for number, picture in enumerate(pictures):
        wanted = torch.func.grad(loss)(state, picture)
        for name, gradients in alone.items():
            torch.testing.assert_close(gradients[number], wanted[name], rtol=1e-3, atol=1e-4)


def test_wrong_pictures_are_named(build_tiny: Callable[..., SparseFormer]) -> None:
    encoder = build_tiny()
    with pytest.raises(ValueError, match=r"shape \(B, 3, H, W\), got \(3, 8, 8\)"):
        encoder(torch.rand(3, 8, 8))
    with pytest.raises(ValueError, match=r"shape \(B, 3, H, W\), got \(1, 4, 8, 8\)"):
        encoder(torch.rand(1, 4, 8, 8))
    picture: Any = Image.new("RGB", (8, 8))
    with pytest.raises(TypeError, match=r"must be a tensor \(see encoder\.transform\), got Image"):
        encoder(picture)
    with pytest.raises(ValueError, match=r"normalised floating-point pictures .*torch\.uint8"):
        encoder(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_learned_rois_are_used_at_the_learned_count(
    build_tiny: Callable[..., SparseFormer], pictures: Tensor
) -> None:
    encoder = build_tiny("bootstrapped")
    learned = encoder.focusing.initial_rois
    assert learned is not None
    assert torch.equal(encoder(pictures).rois[0][1], learned)
    assert not torch.allclose(learned, build_initial_rois(48, "half"))
    other = encoder(pictures, num_tokens=10).rois[0][1]
    assert torch.equal(other, build_initial_rois(9, "half"))
    # Without learned RoIs, every count starts from the layout.
    assert torch.equal(build_tiny("siglip")(pictures).rois[0][0], build_initial_rois(6, "half"))


def test_first_roi_is_before_and_last_after_the_adjustments(
    build_tiny: Callable[..., SparseFormer], pictures: Tensor
) -> None:
    rois = build_tiny("bootstrapped")(pictures).rois
    assert (rois[0][0] == rois[0][1]).all()
    for earlier, later in itertools.pairwise(rois):
        assert (earlier - later).abs().max() > 1e-3
    assert (rois[-1][0] != rois[-1][1]).any()  # where to look depends on the picture


def test_untrained_encoder_stands_still_and_looks_on_a_grid(pictures: Tensor) -> None:
    encoder = build_encoder(SparseFormerConfig(num_latents=9, num_points=16, **_TINY_WIDTHS)).eval()  # type: ignore[arg-type]
    focus = encoder.focus(pictures)
    for rois in focus.rois:
        torch.testing.assert_close(rois, build_initial_rois(9, "half").expand(3, -1, -1))
    points = focus.points[0][0, 0]
    assert len(points[:, 0].unique()) == len(points[:, 1].unique()) == 4
    odd = build_encoder(SparseFormerConfig(num_latents=9, num_points=5, **_TINY_WIDTHS)).eval()  # type: ignore[arg-type]
    assert odd(pictures).tokens.isfinite().all()


_TINY_WIDTHS = {
    "stem_channels": 8, "focusing_width": 16, "focusing_heads": 2, "focusing_mlp_width": 32,
    "mixing_points": 4, "generator_width": 8, "handover_generator_width": 8, "width": 32, "depth": 1,
    "heads": 2, "mlp_width": 32,
}  # fmt: skip


def test_batch_of_one_equals_a_row(
    family: str, build_tiny: Callable[..., SparseFormer], pictures: Tensor
) -> None:
    encoder = build_tiny(family)
    batch = encoder(pictures)
    for row in range(3):
        single = encoder(pictures[row : row + 1])
        torch.testing.assert_close(single.tokens[0], batch.tokens[row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(single.rois[-1][0], batch.rois[-1][row], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(single.pooled[0], batch.pooled[row], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(batch.pooled[0], batch.pooled[1], atol=1e-3)


def test_every_parameter_gets_a_gradient(
    family: str, build_tiny: Callable[..., SparseFormer], pictures: Tensor
) -> None:
    encoder = build_tiny(family).train()
    output = encoder(pictures)
    (output.tokens.square().sum() + output.pooled.square().sum()).backward()
    silent = [
        name
        for name, parameter in encoder.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all() or not parameter.grad.abs().max() > 0
    ]
    assert silent == []


def test_rois_get_their_gradient_from_looking(build_tiny: Callable[..., SparseFormer]) -> None:
    encoder = build_tiny("bootstrapped")
    flat = torch.zeros(1, 3, 32, 32)
    flat_grad = torch.autograd.grad(encoder(flat).pooled.square().sum(), encoder.focusing.initial_rois)[0]
    ramp = torch.linspace(-2, 2, 32).expand(1, 3, 32, 32)
    ramp_grad = torch.autograd.grad(encoder(ramp).pooled.square().sum(), encoder.focusing.initial_rois)[0]
    assert ramp_grad.abs().max() > 10 * flat_grad.abs().max()


@pytest.mark.parametrize("family", ["bootstrapped", "v1", "siglip"])
def test_attention_is_sdpa(family: str, build_tiny: Callable[..., SparseFormer], pictures: Tensor) -> None:
    encoder = build_tiny(family)
    real = torch.nn.functional.scaled_dot_product_attention
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", side_effect=real) as called:
        encoder(pictures)
    repeats = encoder.config.focusing_repeats + ("attention" in encoder.config.handover_order)
    assert called.call_count == repeats + encoder.config.depth + (encoder.config.pooling == "attention")


def test_checkpointing_gives_equal_gradients(
    family: str, build_tiny: Callable[..., SparseFormer], pictures: Tensor
) -> None:
    gradients = []
    for enable in (False, True):
        encoder = build_tiny(family).train()
        encoder.set_grad_checkpointing(enable)
        real = torch.utils.checkpoint.checkpoint
        with (
            mock.patch("sparse_vlm.cortex.checkpoint", side_effect=real) as blocks,
            mock.patch("sparse_vlm.focusing.checkpoint", side_effect=real) as looks,
        ):
            encoder(pictures).pooled.square().sum().backward()
        assert blocks.call_count == (encoder.config.depth if enable else 0)
        assert looks.call_count == (encoder.config.focusing_repeats + 1 if enable else 0)
        gradients.append({name: p.grad for name, p in encoder.named_parameters()})
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient, msg=lambda text, n=name: f"{n}: {text}")


def test_class_token_is_first_and_pooled(build_tiny: Callable[..., SparseFormer], pictures: Tensor) -> None:
    encoder = build_tiny("bootstrapped")
    output = encoder(pictures)
    torch.testing.assert_close(encoder.head.proj(output.tokens[:, 0]), output.pooled)
    states = encoder(pictures, hidden_states=True).hidden_states
    assert states is not None
    assert (states[0][:, 0] == encoder.cortex.cls_token).all()


def test_the_mean_leaves_the_class_token_out(pictures: Tensor) -> None:
    config = SparseFormerConfig(
        stem_channels=8, num_latents=4, focusing_width=16, focusing_heads=2, focusing_mlp_width=16,
        focusing_repeats=1, num_points=4, mixing_points=4, generator_width=4, handover_generator_width=4,
        width=16, depth=1, heads=2, mlp_width=16, output_width=0, head_bias=False, cls_token=True,
        pooling="mean",
    )  # fmt: skip
    head = build_encoder(config).head
    tokens = torch.randn(2, 5, 16)
    torch.testing.assert_close(head(tokens)[1], head.norm(tokens[:, 1:].mean(dim=1)))
    changed = torch.cat((torch.randn(2, 1, 16), tokens[:, 1:]), dim=1)
    torch.testing.assert_close(head(changed)[1], head(tokens)[1])


def test_activations_differ(build_tiny: Callable[..., SparseFormer], pictures: Tensor) -> None:
    outputs = [build_tiny(activation=word)(pictures).pooled for word in ("gelu", "quick_gelu", "gelu_tanh")]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4
    assert (outputs[0] - outputs[2]).abs().max() > 1e-7


def test_transform_gives_what_the_encoder_takes(build_tiny: Callable[..., SparseFormer]) -> None:
    encoder = build_tiny()
    picture = Image.new("RGB", (90, 40), (200, 30, 30))
    assert encoder(encoder.transform(picture).unsqueeze(0)).tokens.shape == (1, 49, 32)
