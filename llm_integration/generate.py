"""Ask a model about a picture, from Python.

>>> from llm_integration.generate import answer, load_chat
>>> chat = load_chat("path/to/llava")                       # doctest: +SKIP
>>> answer("dog.jpg", "What is the dog doing?", chat)       # doctest: +SKIP
'It runs over the grass.'
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from transformers import LlavaForConditionalGeneration, LlavaProcessor, TextStreamer

from sparse_vlm.devices import choose_device
from sparse_vlm.transform import UNREADABLE, to_rgb

from .decoding import choose_decoding
from .hf import SparseFormerVisionModel
from .load import check_processor
from .processor import count_image_tokens
from .result import load_model, load_model_processor
from .room import check_room, count_positions
from .templates import add_end, check_heard, find_stop

Picture = str | PathLike[str] | Image.Image


@dataclass(frozen=True)
class Reply:
    """One answer and what it took.

    Attributes:
        text: the answer.
        visual_tokens: image tokens in the prompt, of all pictures together.
        prompt_tokens: tokens of the prompt, visual ones included.
        new_tokens: tokens of the answer.
        seconds_to_first_token: from the finished prompt to the first token, the picture's encoding
            included.
        seconds: to the last token.
    """

    text: str
    visual_tokens: int
    prompt_tokens: int
    new_tokens: int
    seconds_to_first_token: float
    seconds: float

    def describe(self) -> str:
        """What the answer took, in one line."""
        rest = self.seconds - self.seconds_to_first_token
        later = self.new_tokens - 1
        rate = f", then {later / rest:.1f} tokens/s" if later > 0 and rest > 0 else ""
        return (
            f"[{self.visual_tokens} visual of {self.prompt_tokens} prompt tokens; first token after "
            f"{self.seconds_to_first_token:.2f} s{rate}]"
        )


class Chat:
    """A model that answers conversations with pictures.

    Args:
        model: a LLaVA.
        processor: its processor.
    """

    def __init__(self, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
        check_processor(processor, model.config, "the processor")
        self.model: Any = model.eval()
        self.processor: Any = processor
        # It may have been tuned with another template than it was put together with.
        template: Any = self.processor.chat_template
        check_heard(self.processor.tokenizer, template)
        settings = self.model.generation_config
        add_end(settings, find_stop(self.processor.tokenizer, template))
        settings.max_length = None  # the longest answer is said each time; told both, transformers warns
        self.positions = count_positions(model.config.text_config)

    @property
    def visual_tokens(self) -> int:
        """Tokens that stand for one picture."""
        return count_image_tokens(self.processor)

    @torch.no_grad()
    def reply(
        self,
        messages: Sequence[dict[str, Any]],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """Answer a conversation.

        Args:
            messages: ``{"role", "content"}``; content is a list of ``{"type": "text", "text": ...}`` and
                ``{"type": "image", "image": picture}``.
            max_new_tokens: longest answer; it ends with the language model's last position in any case.
            temperature: 0 for the likeliest token every time.
            on_text: receives the answer piece by piece.

        Raises:
            PromptTooLongError: if the language model has no position left for an answer.
        """
        inputs = self.processor.apply_chat_template(
            list(messages),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        prompt = int(inputs["input_ids"].shape[1])
        visual = int((inputs["input_ids"] == self.model.config.image_token_id).sum())
        check_room([prompt], [visual], self.positions)
        if self.positions is not None:
            max_new_tokens = min(max_new_tokens, self.positions - prompt)
        settings = choose_decoding(temperature)
        clock = _Clock(self.processor.tokenizer, on_text, self.model.device)
        output = self.model.generate(**inputs, **settings, max_new_tokens=max_new_tokens, streamer=clock)
        self._wait()
        seconds = time.perf_counter() - clock.start
        text = self.processor.tokenizer.decode(output[0, prompt:], skip_special_tokens=True)
        return Reply(
            text.strip(),
            visual,
            prompt,
            int(output.shape[1]) - prompt,
            clock.first or seconds,
            seconds,
        )

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)


class _Clock(TextStreamer):
    """Hands text on as it comes, and notes when the first token came."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None, device: torch.device) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.cuda = device if device.type == "cuda" else None
        self.first: float | None = None
        self.prompt_seen = False
        self.start = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt first, then with every token."""
        if self.prompt_seen and self.first is None:
            if self.cuda is not None:
                torch.cuda.synchronize(self.cuda)
            self.first = time.perf_counter() - self.start
        self.prompt_seen = True
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with text that will not change any more."""
        if self.on_text is not None and text:
            self.on_text(text)


def load_chat(
    directory: str | PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    graphs: bool = False,
) -> Chat:
    """Load a plain LLaVA directory, or the result of a run.

    Args:
        directory: either.
        device: by default a GPU where there is one.
        dtype: precision; by default the checkpoint's.
        graphs: run the SparseFormer through CUDA graphs, see
            :meth:`llm_integration.hf.SparseFormerVisionModel.use_graphs`.

    Raises:
        ValueError: if something does not fit.
    """
    chosen = choose_device("auto" if device is None else str(device), "device ")
    if graphs and chosen.type != "cuda":
        raise ValueError(f"CUDA graphs need a CUDA device, not {chosen}")
    model: Any = load_model(directory, dtype)
    if graphs:
        tower = model.model.vision_tower
        if not isinstance(tower, SparseFormerVisionModel):
            raise ValueError(
                f"the tower of {directory} is a {type(tower).__name__}; only SparseFormers run through graphs"
            )
        tower.use_graphs()
    return Chat(model.to(chosen), load_model_processor(directory))


def answer(
    image: Picture | Sequence[Picture] | None,
    question: str,
    model: Chat | str | PathLike[str],
    max_new_tokens: int = 256,
) -> str:
    """Answer one question about one picture, several, or none.

    Args:
        image: a Pillow picture or a file; a list for several; None for a question without picture.
        question: in words.
        model: a loaded :class:`Chat`, or a directory to load.
        max_new_tokens: longest answer.

    Raises:
        ValueError: if a picture or the model cannot be read, the question holds the image mark, or the
            language model has no room for them.
    """
    chat = model if isinstance(model, Chat) else load_chat(model)
    check_question(question, chat)
    pictures: list[Any] = [] if image is None else [*image] if isinstance(image, (list, tuple)) else [image]
    shown = [open_picture(each, upright=True) for each in pictures]
    return chat.reply([build_message(question, shown)], max_new_tokens).text


def check_question(question: str, chat: Chat) -> None:
    """See that a question does not hold the mark that stands for a picture.

    Raises:
        ValueError: if it does.
    """
    mark = chat.processor.image_token
    if mark in question:
        raise ValueError(f"leave {mark} out of the question {question[:60]!r}: its pictures come before it")


def build_message(text: str, pictures: Sequence[Image.Image] = ()) -> dict[str, Any]:
    """A user's turn: pictures first, then words."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def open_picture(picture: Picture, upright: bool = False) -> Image.Image:
    """A Pillow picture from a file, or the picture itself, in RGB.

    Args:
        picture: either.
        upright: turn a file as its EXIF data say, as browsers and transformers do. Benchmarks are not turned:
            their own code does not.

    Raises:
        ValueError: if the file is missing or no picture.
    """
    if isinstance(picture, Image.Image):
        return to_rgb(picture)
    path = Path(picture)
    if not path.is_file():
        raise ValueError(f"there is no picture {path}")
    try:
        with Image.open(path) as opened:
            turned = ImageOps.exif_transpose(opened) if upright else opened
            return to_rgb(turned).copy()  # its own pixels: the file is closed
    except UNREADABLE as error:
        raise ValueError(f"{path} is no picture that can be read ({error})") from error
