"""From a conversation to token ids and labels: the loss covers the answers, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..templates import IMAGE_MARK, TEMPLATES, end_of_answer, find_end, list_specials
from .records import BadRecordError

IGNORED = -100
_HERE = "\ue000answer\ue001"  # in no text: of Unicode's private use


@dataclass(frozen=True)
class Encoded:
    """One conversation as a model reads it.

    Attributes:
        input_ids: token ids; a picture is N image tokens.
        labels: the ids to be predicted, or -100 where nothing is to be learned.
        cut: how many tokens were cut off its end.
    """

    input_ids: list[int]
    labels: list[int]
    cut: int = 0


class ChatEncoder:
    """Renders conversations with a chat template and finds the answers in the tokens by their place.

    The text is tokenized whole, so ids are those the model meets when it answers; a token belongs to an
    answer if it begins inside it. An answer goes from the end of the prompt to the sign that ends its turn.
    Where a template has no such sign, the tokenizer's end of a sequence follows the last answer.

    Args:
        tokenizer: a fast tokenizer, with the image token in its vocabulary.
        template: Jinja text.
        num_tokens: image tokens N for each picture.
        max_length: longer conversations are cut at their end.

    Raises:
        ValueError: if the tokenizer cannot say which characters its tokens come from.
    """

    def __init__(self, tokenizer: Any, template: str, num_tokens: int, max_length: int) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} cannot say which characters a token comes from; use the fast "
                "version"
            )
        self.tokenizer = tokenizer
        self.template = template
        self.num_tokens = num_tokens
        self.max_length = max_length
        self.image_id = int(tokenizer.convert_tokens_to_ids(IMAGE_MARK))
        self.specials = list_specials(tokenizer)
        # A template may end answers with nothing, as those of transformers' own LLaVAs do. A model tuned with
        # that alone would never stop.
        unended = template != TEMPLATES["plain"] and find_end(tokenizer, template) is None
        self.closing: int | None = tokenizer.eos_token_id if unended else None

    def encode(self, messages: Sequence[dict[str, str]], where: str = "this conversation") -> Encoded:
        """Encode one conversation.

        Args:
            messages: ``{"role", "content"}`` with an ``<image>`` mark for each picture.
            where: how messages name the conversation.

        Raises:
            BadRecordError: if the template cannot render it, if a picture is cut, or if no answer is left.
        """
        text, spans = self.render(messages, where)
        marks = sum(message["content"].count(IMAGE_MARK) for message in messages)
        written = text.count(IMAGE_MARK)
        if written != marks:
            raise BadRecordError(
                f"{where}: the chat template writes {written} of {marks} pictures as {IMAGE_MARK}; choose "
                "another template"
            )
        text, spans = self._expand(text, spans)
        closes = self.closing is not None and bool(messages) and messages[-1]["role"] == "assistant"
        if closes:
            text = text.rstrip()
        bos = self.tokenizer.bos_token
        encoded = self.tokenizer(
            text,
            add_special_tokens=not (bos and text.startswith(bos)),
            return_offsets_mapping=True,
            verbose=False,
        )
        ids: list[int] = encoded["input_ids"]
        labels = [IGNORED] * len(ids)
        span = 0
        for position, (start, end) in enumerate(encoded["offset_mapping"]):
            while span < len(spans) and start >= spans[span][1]:
                span += 1
            if span == len(spans):
                break
            if end > start >= spans[span][0] and ids[position] != self.image_id:
                labels[position] = ids[position]
        if closes and self.closing is not None:
            ids, labels = [*ids, self.closing], [*labels, self.closing]
        wanted, cut = ids.count(self.image_id), max(0, len(ids) - self.max_length)
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        if ids.count(self.image_id) != wanted:
            raise BadRecordError(f"{where} is cut inside a picture at max_length={self.max_length} tokens")
        if all(label == IGNORED for label in labels[1:]):
            raise BadRecordError(
                f"{where} has no answer left after it was cut at max_length={self.max_length} tokens "
                "(data.max_length)"
            )
        return Encoded(ids, labels, cut)

    def render(self, messages: Sequence[dict[str, str]], where: str) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the (start, end) characters of its answers."""
        whole = self._apply(messages, False, where)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._apply(messages[:index], True, where)
            upto = self._apply(messages[: index + 1], False, where)
            if not (upto.startswith(prompt) and whole.startswith(upto)):
                return whole, self._find_answers(messages, whole, where)
            if message["content"].strip() not in upto[len(prompt) :]:
                raise BadRecordError(
                    f"{where}: the chat template leaves the answer out; choose another template"
                )
            end, _ = end_of_answer(upto, len(prompt), self.specials)
            if self.closing is not None:
                # A sign that looks like an end is of the answer's own words (HTML's </s>). White space behind
                # an answer belongs to the next turn, whose first token may begin in it.
                end = max(len(prompt), len(upto.rstrip()))
            spans.append((len(prompt), end))
        return whole, spans

    def _find_answers(
        self, messages: Sequence[dict[str, str]], whole: str, where: str
    ) -> list[tuple[int, int]]:
        """Answers in a text whose earlier turns are written anew when later ones follow (Qwen3, Phi-3).

        They stand where marks in their place would: behind a line's end or a special token, up to the special
        token that follows.
        """
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        marked = [{**m, "content": _HERE} if m["role"] == "assistant" else m for m in messages]
        pieces = self._apply(marked, False, where).split(_HERE)
        spans, place = [], len(pieces[0])
        found = whole.startswith(pieces[0]) and len(pieces) == len(answers) + 1
        for answer, behind in zip(answers, pieces[1:], strict=False):
            written = next((a for a in (answer, answer.strip()) if whole.startswith(a + behind, place)), None)
            alone = whole[:place].endswith(("\n", *self.specials))
            if not found or written is None or not alone:
                raise BadRecordError(
                    f"{where}: the chat template writes earlier turns anew when later ones follow, so "
                    "answers cannot be told from prompts; choose another template"
                )
            sign = next((s for s in self.specials if behind.lstrip().startswith(s)), "")
            gap = len(behind) - len(behind.lstrip()) if sign else 0
            spans.append((place, place + len(written) + gap + len(sign)))
            place += len(written) + len(behind)
        return spans

    def _expand(self, text: str, spans: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
        """N image marks in place of each, as the processor writes them, and where the answers are then."""
        longer = (self.num_tokens - 1) * len(IMAGE_MARK)
        moved = [(place + longer * text.count(IMAGE_MARK, 0, place)) for span in spans for place in span]
        pairs = list(zip(moved[::2], moved[1::2], strict=True))
        return text.replace(IMAGE_MARK, IMAGE_MARK * self.num_tokens), pairs

    def _apply(self, messages: Sequence[dict[str, str]], prompt: bool, where: str) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.template, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # templates raise whatever they like
            raise BadRecordError(f"{where}: the chat template refuses it ({error})") from error
        return str(text)
