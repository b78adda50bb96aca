"""A model as the engine sees it: prompts and pictures in, answers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from eval.answers import InputError
from llm_integration.generate import Chat, build_message, load_chat
from llm_integration.replies import reply_to_all

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Answer:
    """A model's answer.

    Attributes:
        text: As decoded, without special tokens, stripped.
        visual_tokens: Image tokens of its prompt.
        new_tokens: Tokens of the answer, its end mark included.
        too_long: Whether its prompt alone filled all positions of the language model, so that the answer is
            of no use.
    """

    text: str
    visual_tokens: int
    new_tokens: int
    too_long: bool = False


class Answerer:
    """Greedy answers in batches; a question's answer does not depend on its neighbours.

    Args:
        chat: A loaded model.
        max_new_tokens: Longest answer.
    """

    def __init__(self, chat: Chat, max_new_tokens: int) -> None:
        self.chat = chat
        self.max_new_tokens = max_new_tokens

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.chat.model.device
        return device

    def answer(self, prompts: Sequence[str], pictures: Sequence[Image.Image | None]) -> list[Answer]:
        """Answers one prompt each, with or without a picture before it."""
        conversations = [
            [build_message(prompt, () if picture is None else (picture,))]
            for prompt, picture in zip(prompts, pictures, strict=True)
        ]
        replies = reply_to_all(self.chat, conversations, self.max_new_tokens)
        most = self.chat.positions
        return [
            Answer(
                reply.text,
                reply.visual_tokens,
                reply.new_tokens,
                too_long=most is not None and reply.prompt_tokens >= most,
            )
            for reply in replies
        ]


def load_answerer(directory: Path, max_new_tokens: int, precision: str, device: torch.device) -> Answerer:
    """Loads a LLaVA directory or a run's result.

    Raises:
        InputError: If it cannot be loaded; the reason is in the message.
    """
    try:
        chat = load_chat(directory, device, _PRECISIONS.get(precision))
    except (ValueError, OSError) as error:
        raise InputError(f"The model in {directory} cannot be loaded: {error}") from None
    return Answerer(chat, max_new_tokens)
