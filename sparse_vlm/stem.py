"""The early convolution: a cheap feature map at a quarter of the picture's resolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compiling import is_exporting
from .norms import pool_norm


class EarlyConvolution(nn.Module):
    """7x7 stride-2 convolution, ReLU, 3x3 stride-2 max-pool, layer norm per map cell without gain or bias.

    Args:
        channels: channels C of the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _PooledConvolution(channels)

    @torch.no_grad()
    def init_weights(self) -> None:
        """He initialisation by fan-out, bias zero."""
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.conv.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map pictures (B, 3, H, W) to features (B, C, ceil(H/4), ceil(W/4))."""
        features: Tensor = self.conv(images)
        return features


class _PooledConvolution(nn.Module):
    """The convolution and all that follows it.

    One module, since the bias is added behind the pooling: who brings a module's weights for its call only
    (DeepSpeed's ZeRO-3, accelerate) then has both there. No ``nn.Conv2d``: who exchanges those by their type
    (quantisation, adapters) would leave out what follows.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        drawn = nn.Conv2d(3, channels, kernel_size=7)  # a seed gives the weights that it always gave
        assert drawn.bias is not None
        self.weight, self.bias = drawn.weight, drawn.bias

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, C, ceil(H/4), ceil(W/4))."""
        convolve = convolve_cells if _has_tensor_cores(images) else convolve_plain
        return pool_norm(convolve(images, self.weight), self.bias)  # (B, C, H/4, W/4)


def convolve_plain(images: Tensor, weight: Tensor) -> Tensor:
    """7x7 stride-2 convolution without bias, (B, 3, H, W) to (B, C, ceil(H/2), ceil(W/2)), channels last."""
    # Channels last in memory: the layer norm and every sample read the C numbers of a cell together, and
    # on a CPU convolution and pooling are several times faster. In these words vmap understands it too.
    return F.conv2d(_channels_last(images), weight, stride=2, padding=3)


def convolve_cells(images: Tensor, weight: Tensor) -> Tensor:
    """:func:`convolve_plain` as a 4x4 convolution of stride one over cells of 2 x 2 pixels.

    The same sums. A GPU's tensor cores take channels by eights and had little use for three of them; a cell
    has twelve, and four zeros. On an H200 with PyTorch 2.11, 256 pictures in bf16: 1.6 ms, now 0.6 ms
    (docs/performance.md).
    """
    height, width = images.shape[-2:]
    # The 7 x 7 weights become 8 x 8 by a row and a column of zeros before them.
    cells = _gather(F.pad(images, (4, 2 + width % 2, 4, 2 + height % 2, 0, 1)))
    return F.conv2d(cells, _gather(F.pad(weight, (1, 0, 1, 0, 0, 1))))


def _gather(pixels: Tensor) -> Tensor:
    """Cells of 2 x 2 pixels: (B, C, 2H, 2W) to (B, 4C, H, W), channels last, in one copy."""
    batch, channels, height, width = pixels.shape
    split = pixels.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return split.reshape(batch, height // 2, width // 2, 4 * channels).permute(0, 3, 1, 2)


def _channels_last(images: Tensor) -> Tensor:
    return images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _has_tensor_cores(images: Tensor) -> bool:
    """Whether the convolution is one of half-precision numbers on a GPU."""
    half = images.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled()
    # Exported programs take any size, which the cells would pin down.
    return images.is_cuda and half and not is_exporting()
