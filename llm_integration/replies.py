"""Many conversations at once: left-padded batches, greedy unless asked otherwise, until a stop.

Everything that asks much goes through this: ``llm_integration.batch``, ``eval.run`` and the lmms-eval plugin.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from .decoding import GREEDY, draw_each
from .generate import Chat, Picture, build_message, check_question, load_chat, open_picture
from .room import LastPosition, PromptTooLongError, check_room

_Shown = Picture | Sequence[Picture] | None
_READERS = 4  # threads that read pictures


@dataclass(frozen=True)
class BatchReply:
    """One answer of a batch.

    Attributes:
        text: the answer without special tokens, up to the first stop, stripped.
        visual_tokens: image tokens in its prompt, of all pictures together.
        prompt_tokens: tokens of its prompt, visual ones included and padding not.
        new_tokens: tokens of the answer, its end mark or stop included.
    """

    text: str
    visual_tokens: int
    prompt_tokens: int
    new_tokens: int


@torch.inference_mode()
def reply_to_all(
    chat: Chat,
    conversations: Sequence[Sequence[dict[str, Any]]],
    max_new_tokens: int,
    stop: Sequence[str] = (),
    refuse_long: bool = False,
    **sampling: Any,
) -> list[BatchReply]:
    """Answer several conversations; an answer does not depend on its neighbours.

    Args:
        chat: a loaded model.
        conversations: each as for :meth:`Chat.reply`.
        max_new_tokens: longest answer; it ends with the language model's last position in any case.
        stop: an answer ends before the first of these; empty ones are ignored.
        refuse_long: refuse prompts that leave no position for an answer. Otherwise a warning says that what
            is answered to them is of no use: a benchmark has to count it all the same.
        sampling: for ``generate``; by default greedy.

    Raises:
        PromptTooLongError: if there are such and they are refused.
    """
    model, processor = chat.model, chat.processor
    inputs: Any = processor.apply_chat_template(
        [list(messages) for messages in conversations],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    ).to(model.device)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    start = inputs["input_ids"].shape[1]
    visual = (inputs["input_ids"] == model.config.image_token_id).sum(dim=1).tolist()
    prompts = inputs["attention_mask"].sum(dim=1).tolist()
    try:
        check_room(prompts, visual, chat.positions)
    except PromptTooLongError as error:
        if refuse_long:
            raise
        warnings.warn(f"an answer is of no use: {error}", stacklevel=2)
    rooms = [_count_room(prompt, chat.positions, max_new_tokens) for prompt in prompts]
    stops = [text for text in stop if text]
    criteria: list[StoppingCriteria] = [_StopAt(stops, processor.tokenizer, start)] if stops else []
    if min(rooms) < max_new_tokens:
        criteria.append(LastPosition(rooms, start))
    output = model.generate(
        **inputs,
        **{**({"num_beams": 1} if sampling.get("do_sample") else GREEDY), **sampling},
        max_new_tokens=max_new_tokens,
        stopping_criteria=StoppingCriteriaList(criteria),
    )
    replies = []
    for written, room, seen, prompt in zip(output[:, start:].tolist(), rooms, visual, prompts, strict=True):
        row = written[:room]
        length = _count_new(row, model.generation_config)
        text = processor.tokenizer.decode(row[:length], skip_special_tokens=True)
        if length < len(row) and any(stop in text for stop in stops):
            length = _count_new(row, model.generation_config, stopped=True)
        replies.append(BatchReply(cut_at(text, stops).strip(), seen, prompt, length))
    return replies


def _count_room(prompt: int, positions: int | None, most: int) -> int:
    """Tokens that an answer may have; ``most`` where the prompt alone is beyond the last position."""
    return most if positions is None or prompt >= positions else min(most, positions - prompt)


@dataclass(frozen=True)
class Answered:
    """What became of one of many questions.

    Attributes:
        text: the answer; None if the question was skipped.
        skipped: why it was, in a sentence; None if it was not.
        new_tokens: tokens of the answer, its end mark included.
    """

    text: str | None
    skipped: str | None = None
    new_tokens: int = 0


def answer_many(
    asked: Iterable[tuple[_Shown, str]],
    model: Chat | str | PathLike[str],
    batch: int = 8,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    first: int = 0,
) -> Iterator[Answered]:
    """Answer many questions, in their order.

    A picture that cannot be read, and a question that is too long for the language model or holds the image
    mark, cost their own answer only.

    Args:
        asked: pictures (one, several, or None for none) and a question about them, again and again; read a
            batch ahead.
        model: a loaded :class:`Chat`, or a directory to load.
        batch: questions at once; the answers do not depend on it.
        max_new_tokens: longest answer.
        temperature: 0 for the likeliest token every time; otherwise an answer depends on the seed and on the
            question's place, and on nothing else.
        seed: of what is drawn.
        first: place of the first question, where these are the rest of a longer row.

    Raises:
        ValueError: if the model cannot be read, or the batch is less than one question.
    """
    if batch < 1:
        raise ValueError(f"batch must be 1 or more, got {batch}")
    chat = model if isinstance(model, Chat) else load_chat(model)
    for part, opened in _open_ahead(asked, batch):
        skipped: dict[int, str] = {}
        talks: dict[int, list[dict[str, Any]]] = {}
        for place, ((_, question), found) in enumerate(zip(part, opened, strict=True)):
            try:
                check_question(question, chat)
            except ValueError as error:
                skipped[place] = str(error)
                continue
            if isinstance(found, str):
                skipped[place] = found
            else:
                talks[place] = [build_message(question, found)]
        replies: dict[int, BatchReply] = {}
        while len(replies) < len(talks):
            keys = [f"{seed} {first + place}" for place in talks]
            settings = draw_each(chat.model.generation_config, temperature, keys)
            try:
                said = reply_to_all(chat, [*talks.values()], max_new_tokens, refuse_long=True, **settings)
            except PromptTooLongError as error:
                places = [*talks]
                for row, reason in error.reasons.items():
                    skipped[places[row]] = reason
                    del talks[places[row]]
            else:
                replies = dict(zip(talks, said, strict=True))
        for place in range(len(part)):
            if place in skipped:
                yield Answered(None, skipped[place])
            else:
                yield Answered(replies[place].text, None, replies[place].new_tokens)
        first += len(part)


def _open_ahead(
    asked: Iterable[tuple[_Shown, str]], batch: int
) -> Iterator[tuple[list[tuple[_Shown, str]], list[list[Image.Image] | str]]]:
    """Questions by the batch with their pictures, the next batch's being read while one is answered."""
    left = iter(asked)
    with ThreadPoolExecutor(min(batch, _READERS)) as readers:
        part = list(islice(left, batch))
        coming = [readers.submit(_open_all, pictures) for pictures, _ in part]
        while part:
            now, opened = part, [picture.result() for picture in coming]
            part = list(islice(left, batch))
            coming = [readers.submit(_open_all, pictures) for pictures, _ in part]
            yield now, opened


def _open_all(pictures: _Shown) -> list[Image.Image] | str:
    """The pictures of a question, upright; or a sentence about the first that cannot be read."""
    several = isinstance(pictures, (list, tuple))
    listed: Any = [] if pictures is None else pictures if several else [pictures]
    try:
        return [open_picture(each, upright=True) for each in listed]
    except ValueError as error:
        return str(error)


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stops in it."""
    return text[: min((place for place in map(text.find, stops) if place >= 0), default=len(text))]


def _count_new(row: Sequence[int], config: Any, stopped: bool = False) -> int:
    """Tokens up to the end mark; where there is none, up to the padding behind a stop.

    An answer that has ``stopped`` at a stop has no end mark: one behind it is padding that looks the same.
    """
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ended = next((place + int(not stopped) for place, token in enumerate(row) if token in ends), None)
    if ended is not None:
        return ended
    length = len(row)
    while length and row[length - 1] == config.pad_token_id:
        length -= 1
    return length


class _StopAt(StoppingCriteria):
    """Ends an answer as soon as a stop is in it.

    transformers' own stop strings also match across the border between prompt and answer: a template that
    ends in a line break and an answer that begins with one would be an empty line.
    """

    def __init__(self, stops: Sequence[str], tokenizer: Any, start: int) -> None:
        self.stops = list(stops)
        self.tokenizer = tokenizer
        self.start = start
        # A token is at least a byte of text; a few more, since decoding may take a space off the front.
        self.tail = max(len(text.encode()) for text in stops) + 4

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Which rows have come to an end, (B,)."""
        tails = input_ids[:, max(self.start, input_ids.shape[1] - self.tail) :].tolist()
        ended = [
            any(stop in self.tokenizer.decode(tail, skip_special_tokens=True) for stop in self.stops)
            for tail in tails
        ]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)
