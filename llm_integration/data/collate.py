"""From examples to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .encode import IGNORED


class ChatCollator:
    """Pads to the right, and puts the pictures of all conversations behind each other.

    A batch without any picture gets one more row: a blank picture's tokens, without labels. So projector and
    tower run on every process in every step, which ZeRO-3 and DDP rely on, and no loss comes from it.

    Args:
        pad_id: fills up ``input_ids``.
        image_id: the image token.
        num_tokens: image tokens for each picture.
        picture_shape: (3, H, W) of a prepared picture.
    """

    def __init__(
        self, pad_id: int, image_id: int, num_tokens: int, picture_shape: tuple[int, int, int]
    ) -> None:
        self.pad_id = pad_id
        self.image_id = image_id
        self.num_tokens = num_tokens
        self.picture_shape = picture_shape

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        rows = list(examples)
        if not any("pixel_values" in row for row in rows):
            ids = torch.full((self.num_tokens,), self.image_id)
            blank = torch.zeros((1, *self.picture_shape))
            rows.append({"input_ids": ids, "labels": torch.full_like(ids, IGNORED), "pixel_values": blank})
        longest = max(len(row["input_ids"]) for row in rows)
        input_ids = torch.full((len(rows), longest), self.pad_id)
        labels = torch.full((len(rows), longest), IGNORED)
        attention_mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for number, row in enumerate(rows):
            length = len(row["input_ids"])
            input_ids[number, :length] = row["input_ids"]
            labels[number, :length] = row["labels"]
            attention_mask[number, :length] = 1
        pictures = [row["pixel_values"] for row in rows if "pixel_values" in row]
        return {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": attention_mask,
            "pixel_values": torch.cat(pictures),
        }
