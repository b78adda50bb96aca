"""Image-text retrieval: recall at k both ways."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def recall(
    images: Tensor, texts: Tensor, owners: Sequence[int], tops: Sequence[int] = (1, 5, 10)
) -> dict[str, list[int]]:
    """Whether the right one is among the k nearest, for every query.

    A picture is right for each of its captions; a picture counts as found if any of its captions is among the
    k nearest texts, as in the published figures. An embedding that is no number finds nothing, and what is
    found through one does not count.

    Args:
        images: (n, E).
        texts: (m, E).
        owners: Picture of each text.
        tops: Values of k.

    Returns:
        "text_to_image@k" with m, and "image_to_text@k" with n entries of 0 or 1.
    """
    similarity = F.normalize(texts.float(), dim=-1) @ F.normalize(images.float(), dim=-1).T  # (m, n)
    owner = torch.tensor(list(owners))
    found: dict[str, list[int]] = {}
    pictures = similarity.topk(min(max(tops), images.shape[0]), dim=1)  # (m, k)
    captions = similarity.T.topk(min(max(tops), texts.shape[0]), dim=1)  # (n, k)
    right_pictures = (pictures.indices == owner[:, None]) & pictures.values.isfinite()
    right_captions = owner[captions.indices] == torch.arange(images.shape[0])[:, None]
    right_captions &= captions.values.isfinite()
    for k in tops:
        found[f"image_to_text@{k}"] = right_captions[:, :k].any(dim=1).int().tolist()
        found[f"text_to_image@{k}"] = right_pictures[:, :k].any(dim=1).int().tolist()
    return found
