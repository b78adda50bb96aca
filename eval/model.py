"""A model as the engine sees it: prompts and pictures in, answers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from eval.answers import InputError
from llm_integration.generate import Chat, build_message, load_chat

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Answer:
    """A model's answer.

    Attributes:
        text: As decoded, without special tokens, stripped.
        visual_tokens: Image tokens of its prompt.
        new_tokens: Tokens of the answer, its end mark included.
    """

    text: str
    visual_tokens: int
    new_tokens: int


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

    @torch.inference_mode()
    def answer(self, prompts: Sequence[str], pictures: Sequence[Image.Image | None]) -> list[Answer]:
        """Answers one prompt each, with or without a picture before it."""
        model, processor = self.chat.model, self.chat.processor
        conversations = [
            [build_message(prompt, () if picture is None else (picture,))]
            for prompt, picture in zip(prompts, pictures, strict=True)
        ]
        inputs: Any = processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(self.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        output = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=self.max_new_tokens)
        start = inputs["input_ids"].shape[1]
        seen = (inputs["input_ids"] == model.config.image_token_id).sum(dim=1).tolist()
        ends = model.generation_config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends}
        answers = []
        for row, visual in zip(output[:, start:].tolist(), seen, strict=True):
            length = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
            text = processor.tokenizer.decode(row[:length], skip_special_tokens=True)
            answers.append(Answer(text.strip(), visual, length))
        return answers


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
