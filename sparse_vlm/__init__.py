"""SparseFormers: vision encoders that see with a handful of tokens.

>>> import sparse_vlm
>>> encoder = sparse_vlm.load_encoder("path/to/encoder")        # doctest: +SKIP
>>> output = encoder(encoder.transform(picture).unsqueeze(0))    # doctest: +SKIP
>>> output.tokens.shape                                          # doctest: +SKIP
torch.Size([1, 49, 768])
"""

from __future__ import annotations

from .checkpoint import EncoderDirectoryError, build_encoder, load_encoder
from .config import SparseFormerConfig
from .encoder import EncoderOutput, SparseFormer
from .presets import PRESETS
from .transform import ImageTransform, TransformConfig

__all__ = [
    "PRESETS",
    "EncoderDirectoryError",
    "EncoderOutput",
    "ImageTransform",
    "SparseFormer",
    "SparseFormerConfig",
    "TransformConfig",
    "build_encoder",
    "load_encoder",
]
