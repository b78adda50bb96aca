"""The parts of a ViT block, with timm's parameter names so that inherited weights keep theirs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activations import ACTIVATIONS
from .norms import add_norm


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention, (B, K, N, D) each.

    Gradients in bf16 on a CPU go through fp32: PyTorch's own bf16 backward pass takes longer there. Measured
    with PyTorch 2.14 on a processor with AMX, forward and backward, 16 pictures of 49 tokens and 3 heads:
    8.7 ms in bf16, 3.1 ms this way.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad:
        with torch.autocast("cpu", enabled=False):  # which would cast it back
            mixed = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
        return mixed.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value)


class Attention(nn.Module):
    """Multi-head self-attention over tokens.

    Args:
        width: token width D.
        heads: heads K, dividing D.
        qkv_bias: bias on the packed query, key and value projection.
    """

    def __init__(self, width: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        batch, count, width = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, count, 3, self.heads, width // self.heads)  # (B, N, 3, K, D/K)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, K, N, D/K)
        mixed = attend(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, count, width))  # (B, N, D)


class Mlp(nn.Module):
    """Two linear layers with an activation between.

    Args:
        width: token width D.
        hidden: hidden width.
        activation: a key of :data:`sparse_vlm.activations.ACTIVATIONS`.
    """

    def __init__(self, width: int, hidden: int, activation: str = "gelu") -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        return self.fc2(self.activation(self.fc1(tokens)))


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        return tokens * self.gamma


class TransformerBlock(nn.Module):
    """A pre-norm ViT block: attention, then MLP, each on a residual branch.

    Args:
        width: token width D.
        heads: attention heads.
        mlp_width: hidden width of the MLP.
        activation: a key of :data:`sparse_vlm.activations.ACTIVATIONS`.
        norm_eps: epsilon of the layer norms.
        qkv_bias: bias on query, key and value.
        layer_scale: learned residual scales.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        activation: str = "gelu",
        norm_eps: float = 1e-5,
        qkv_bias: bool = True,
        layer_scale: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, heads, qkv_bias)
        self.ls1 = LayerScale(width) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, mlp_width, activation)
        self.ls2 = LayerScale(width) if layer_scale else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        tokens, normed = add_norm(tokens, None, self.norm1)
        tokens, normed = add_norm(tokens, self.ls1(self.attn(normed)), self.norm2)
        return tokens + self.ls2(self.mlp(normed))


@torch.no_grad()
def init_linear(linear: nn.Linear) -> None:
    """Truncated normal of standard deviation 0.02, bias zero: what ViTs and SparseFormers start from."""
    nn.init.trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def init_modules(module: nn.Module) -> None:
    """Initialise every linear layer, layer norm and layer scale below ``module``."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            init_linear(child)
        elif isinstance(child, nn.LayerNorm):
            nn.init.ones_(child.weight)
            nn.init.zeros_(child.bias)
        elif isinstance(child, LayerScale):
            nn.init.ones_(child.gamma)
