"""The optimisers: who updates what, at which learning rate, and what is remembered."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bootstrap.config import BootstrapConfig, OptimiserSettings, TeacherSettings
from bootstrap.data.config import DataConfig
from bootstrap.muon import MuonAndAdamW, has_muon
from bootstrap.optim import WeightAverage, build_optimiser, rest_groups, set_learning_rate
from bootstrap.state import _optimiser_state, _restore_optimiser
from sparse_vlm import SparseFormer, SparseFormerConfig, build_encoder

needs_muon = pytest.mark.skipif(not has_muon(), reason="this PyTorch has no Muon (2.9 and later have)")
SMALL = SparseFormerConfig(
    stem_channels=8, num_latents=4, focusing_width=16, focusing_heads=2, focusing_mlp_width=16,
    focusing_repeats=1, num_points=4, mixing_points=4, generator_width=4, handover_generator_width=4,
    width=16, depth=1, heads=2, mlp_width=16, output_width=0, head_bias=False,
)  # fmt: skip


def build() -> SparseFormer:
    torch.manual_seed(0)
    return build_encoder(SMALL)


def step(encoder: SparseFormer, optimiser: torch.optim.Optimizer, seed: int) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    encoder(images).pooled.square().mean().backward()
    optimiser.step()
    optimiser.zero_grad()


@pytest.mark.parametrize("muon_lr", [0.0, pytest.param(6e-3, marks=needs_muon)])
def test_every_parameter_has_its_learning_rate_and_decay(muon_lr: float) -> None:
    encoder = build()
    frozen = "stem.conv.bias"
    encoder.get_parameter(frozen).requires_grad_(False)
    settings = OptimiserSettings(lr=4e-3, cortex_lr=1e-3, muon_lr=muon_lr, weight_decay=0.5)
    optimiser = build_optimiser(encoder, settings)
    names = {parameter: name for name, parameter in encoder.named_parameters()}
    found = {
        names[parameter]: (group["peak_lr"], group["weight_decay"], "momentum" in group)
        for group in optimiser.param_groups
        for parameter in group["params"]
    }
    assert found.keys() == set(names.values()) - {frozen}
    focusing = next(name for name in found if "focusing" in name and name.endswith("mlp.fc1.weight"))
    embedding = next(name for name in found if name.endswith("token_embedding"))
    if muon_lr:
        assert found[focusing] == (6e-3, 0.5, True)
        assert found["cortex.blocks.0.mlp.fc1.weight"] == (pytest.approx(1.5e-3), 0.5, True)
        assert found["stem.conv.weight"] == (4e-3, 0.0, False)
    else:
        assert found[focusing] == (4e-3, 0.5, False)
        assert found["cortex.blocks.0.mlp.fc1.weight"] == (1e-3, 0.5, False)
        assert found["stem.conv.weight"] == (4e-3, 0.5, False)
    assert found["cortex.blocks.0.mlp.fc1.bias"] == (1e-3, 0.0, False)
    assert found[embedding] == (4e-3, 0.0, False)


def test_what_rests_in_the_warm_up_is_left_alone_by_gradients_of_zero() -> None:
    """As DeepSpeed's engine steps, beside plain PyTorch, which has no gradient there."""
    settings = OptimiserSettings(lr=1e-3, cortex_lr=1e-3, weight_decay=0.5)
    plain, zeros = build(), build()
    optimisers = {encoder: build_optimiser(encoder, settings) for encoder in (plain, zeros)}
    for number, warming_up in enumerate((True, True, True, False, False)):
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(number))
        for encoder, optimiser in optimisers.items():
            set_learning_rate(optimiser, 1.0)
            out = encoder.focus(images).tokens if warming_up else encoder(images).pooled
            out.square().mean().backward()
            if encoder is zeros:
                rest_groups(optimiser, warming_up, first_after=number == 3)
                for parameter in encoder.parameters():
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
            optimiser.step()
            optimiser.zero_grad()
    resting = [name for name, _ in plain.named_parameters() if not name.startswith(("stem.", "focusing."))]
    assert len(resting) > 10
    start = build()
    assert not torch.equal(plain.get_parameter(resting[0]), start.get_parameter(resting[0]))
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(zeros.get_parameter(name), parameter, msg=name)


def test_the_average_forgets_early_weights() -> None:
    weight = nn.Parameter(torch.zeros(1))
    average = WeightAverage([("weight", weight)], 0.999)
    for value in range(1, 21):
        with torch.no_grad():
            weight.fill_(float(value))
        average.update([("weight", weight)])
    expected = 0.0
    for count in range(1, 21):
        decay = min(0.999, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * count
    assert average.shadow["weight"].item() == pytest.approx(expected, rel=1e-5)
    assert expected > 10  # at 0.999 from the start it would be 0.2


@needs_muon
def test_the_schedule_reaches_both_optimisers() -> None:
    encoder = build()
    optimiser = build_optimiser(encoder, OptimiserSettings(muon_lr=6e-3))
    assert isinstance(optimiser, MuonAndAdamW)
    set_learning_rate(optimiser, 0.0)
    before = {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}
    step(encoder, optimiser, 0)
    assert all(torch.equal(parameter, before[name]) for name, parameter in encoder.named_parameters())
    set_learning_rate(optimiser, 1.0)
    step(encoder, optimiser, 1)
    for name in ("cortex.blocks.0.mlp.fc1.weight", "stem.conv.weight"):
        assert not torch.equal(encoder.get_parameter(name), before[name])


@needs_muon
def test_muon_moves_a_matrix_in_all_directions_alike() -> None:
    weight = nn.Parameter(torch.zeros(8, 8))
    bias = nn.Parameter(torch.zeros(8))
    optimiser = MuonAndAdamW(
        [{"params": [weight], "lr": 1.0}], [{"params": [bias], "lr": 1.0}], 0.0, (0.9, 0.98), False
    )
    weight.grad = torch.diag(torch.tensor([1.0, 0.5, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1]))
    bias.grad = torch.ones(8)
    optimiser.step()
    moved = torch.linalg.svdvals(weight.detach()) / (0.2 * 8**0.5)
    # AdamW's size, and no direction left behind.
    assert moved.min() > 0.5
    assert moved.max() < 1.4
    torch.testing.assert_close(bias.detach(), -torch.ones(8))


@pytest.mark.parametrize("muon_lr", [0.0, pytest.param(6e-3, marks=needs_muon)])
def test_what_is_remembered_comes_back(muon_lr: float) -> None:
    settings = OptimiserSettings(muon_lr=muon_lr)
    encoder, other = build(), build()
    optimiser = build_optimiser(encoder, settings)
    step(encoder, optimiser, 0)
    other.load_state_dict(encoder.state_dict())
    resumed = build_optimiser(other, settings)
    remembered = {name: value.clone() for name, value in _optimiser_state(encoder, optimiser).items()}
    _restore_optimiser(other, resumed, remembered)
    for one, its in ((encoder, optimiser), (other, resumed)):
        step(one, its, 1)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_muon_where_it_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="muon_lr must be a number of 0 or more"):
        OptimiserSettings(muon_lr=-1.0)
    with pytest.raises(ValueError, match="needs lr above 0"):
        OptimiserSettings(muon_lr=1e-3, lr=0.0)
    monkeypatch.setattr("bootstrap.config.has_muon", lambda: False)
    with pytest.raises(ValueError, match=r"PyTorch 2\.9 or later"):
        OptimiserSettings(muon_lr=1e-3)
    monkeypatch.setattr("bootstrap.config.has_muon", lambda: True)
    with pytest.raises(ValueError, match="cuts them into pieces"):
        BootstrapConfig(
            out="run",
            teacher=TeacherSettings("teacher"),
            data=DataConfig(source="pictures"),
            steps=1,
            engine="deepspeed",
            deepspeed="zero.json",
            optimiser=OptimiserSettings(muon_lr=1e-3),
        )
