"""A teacher's QuickGELU: the library's own, or ours where there is a kernel."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bootstrap.teachers.activation import FusedQuickGelu, fuse_quick_gelu


class QuickGELU(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values * torch.sigmoid(1.702 * values)


def test_every_quick_gelu_is_replaced_once_and_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = nn.Sequential(nn.Linear(4, 4), nn.Sequential(QuickGELU(), nn.GELU()), QuickGELU())
    values = torch.randn(3, 4)
    wanted, names = trunk(values), list(trunk.state_dict())
    assert fuse_quick_gelu(trunk) == 2
    assert fuse_quick_gelu(trunk) == 0
    assert isinstance(trunk[2], FusedQuickGelu)
    assert isinstance(trunk[1][1], nn.GELU)
    assert list(trunk.state_dict()) == names
    assert torch.equal(trunk(values), wanted)  # without a kernel bit for bit the library's
    monkeypatch.setattr("bootstrap.teachers.activation.has_kernels", lambda values: True)
    asked = []
    ours = torch.nn.functional.silu
    monkeypatch.setattr(
        "bootstrap.teachers.activation.quick_gelu", lambda x: asked.append(x) or ours(1.702 * x) / 1.702
    )
    torch.testing.assert_close(trunk(values), wanted)
    assert len(asked) == 2


@pytest.mark.parametrize("library", ["timm", "open_clip", "transformers"])
def test_the_libraries_still_call_it_so(library: str) -> None:
    built = {
        "timm": lambda: __import__("timm.layers").layers.create_act_layer("quick_gelu"),
        "open_clip": lambda: __import__("open_clip.transformer").transformer.QuickGELU(),
        "transformers": lambda: __import__("transformers.activations").activations.ACT2FN["quick_gelu"],
    }[library]()
    assert fuse_quick_gelu(nn.Sequential(built)) == 1
