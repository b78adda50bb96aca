"""The early convolution: a cheap feature map at a quarter of the picture's resolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EarlyConvolution(nn.Module):
    """7x7 stride-2 convolution, ReLU, 3x3 stride-2 max-pool, layer norm per map cell without gain or bias.

    Args:
        channels: channels C of the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, kernel_size=7, stride=2, padding=3)

    @torch.no_grad()
    def init_weights(self) -> None:
        """He initialisation by fan-out, bias zero."""
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """Map pictures (B, 3, H, W) to features (B, C, ceil(H/4), ceil(W/4))."""
        # Channels last in memory: the layer norm and every sample read the C numbers of a cell together, and
        # on a CPU convolution and pooling are several times faster. In these words vmap understands it too.
        x = self.conv(images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))  # (B, C, H/2, W/2)
        # Pooling first: a maximum commutes with ReLU and leaves it a quarter of the cells.
        x = F.relu(F.max_pool2d(x, kernel_size=3, stride=2, padding=1))
        x = x.permute(0, 2, 3, 1)  # (B, H/4, W/4, C)
        return F.layer_norm(x, (x.shape[-1],)).permute(0, 3, 1, 2)  # (B, C, H/4, W/4)
