"""LLaVAs of this package as lmms-eval's model ``sparse_vlm``. Needs lmms-eval (tested with 0.7.3)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

from .generate import Chat, load_chat, open_picture
from .lmms_plugin import MODEL
from .replies import reply_to_all

_PRECISIONS = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# For tasks that name none; what lmms-eval's own LLaVA takes.
_MAX_NEW_TOKENS = 1024
_SAMPLING = ("top_p", "top_k")
_ALWAYS = ("num_beams", "repetition_penalty")
# How LLaVA's own code should cut a picture up; here the encoder's transform says it.
_OF_NO_USE = ("image_aspect_ratio",)
_KNOWN = ("until", "max_new_tokens", "do_sample", "temperature", *_SAMPLING, *_ALWAYS, *_OF_NO_USE)


class SparseVlm(lmms):
    """A LLaVA directory, or a result of instruction tuning, behind lmms-eval's chat protocol.

    Args:
        pretrained: the directory.
        batch_size: questions at once, in each process.
        device: by default this process's GPU where there is one.
        dtype: "auto" keeps the stored precision; else "float32", "bfloat16" or "float16".
        unknown: anything else is refused.

    Raises:
        ValueError: if an argument is wrong or the model cannot be loaded.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(
                f"{MODEL} has no argument {', '.join(unknown)}; it has pretrained, batch_size, device, dtype"
            )
        if not pretrained:
            raise ValueError(f"{MODEL} needs a model directory: --model_args pretrained=LLAVA_DIR")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a whole number from 1 on, not {batch_size!r}")
        if dtype not in _PRECISIONS:
            raise ValueError(f"dtype must be one of {', '.join(_PRECISIONS)}, not {dtype!r}")
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self.batch_size = int(batch_size)
        self._device = self.accelerator.device if self._world_size > 1 or not device else torch.device(device)
        self.chat: Chat | None = load_chat(str(pretrained), self._device, _PRECISIONS[dtype])

    @property
    def device(self) -> torch.device:
        """Where the model is, and what lmms-eval gathers over several processes."""
        return self._device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer requests, in their order.

        Raises:
            ValueError: if a task asks for something else than pictures and words, or for an unknown setting.
        """
        assert self.chat is not None, "the model has been cleaned away"
        results: list[GenerationResult | None] = [None] * len(requests)
        tokens, began = 0, time.perf_counter()
        with tqdm(total=len(requests), unit="question", disable=True if self.rank else None) as bar:
            for indices in group(requests, self.batch_size):
                batch = [requests[index].args for index in indices]
                stop, settings = read_generation(batch[0][2])
                talks = [
                    read_messages(to_messages(self.task_dict[task][split][doc]), task)
                    for _, to_messages, _, doc, task, split in batch
                ]
                for index, reply in zip(
                    indices, reply_to_all(self.chat, talks, stop=stop, **settings), strict=True
                ):
                    counts = TokenCounts(input_tokens=reply.prompt_tokens, output_tokens=reply.new_tokens)
                    results[index] = GenerationResult(reply.text, counts)
                    tokens += reply.new_tokens
                bar.update(len(indices))
        seconds = time.perf_counter() - began
        log_metrics(
            total_elapsed_time=seconds, total_gen_tokens=tokens, avg_speed=tokens / max(seconds, 1e-9)
        )
        return [result for result in results if result is not None]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered."""
        raise NotImplementedError(f"{MODEL} does not answer tasks of several rounds")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered."""
        raise NotImplementedError(
            f"{MODEL} answers in words; it does not weigh given answers (loglikelihood)"
        )

    def clean(self) -> None:
        """Let go of the model; lmms-eval calls this when all answers are there."""
        self.chat = None
        super().clean()


def group(requests: Sequence[Instance], size: int) -> Iterator[list[int]]:
    """Batches of requests that are generated alike, long ones first, as indices.

    Args:
        requests: with arguments (context, messages of a document, generation settings, document, task,
            split).
        size: requests in a batch.
    """
    kinds: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        kinds.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), []).append(index)
    for indices in kinds.values():
        ordered = sorted(indices, key=lambda index: -len(str(requests[index].args[0])))
        yield from (ordered[start : start + size] for start in range(0, len(ordered), size))


def read_generation(settings: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """A task's generation settings: its stops, and arguments for :func:`reply_to_all`.

    A temperature above 0 samples, whatever ``do_sample`` says, as with lmms-eval's own models: that is how
    ``--gen_kwargs temperature=0.7`` reaches a task whose definition says ``do_sample: false``.

    Raises:
        ValueError: if there is a setting that cannot be honoured.
    """
    unknown = [name for name in settings if name not in _KNOWN]
    if unknown:
        raise ValueError(
            f"{MODEL} cannot honour the generation setting {', '.join(unknown)}; it knows {', '.join(_KNOWN)}"
        )
    until = settings.get("until") or []
    stop = [until] if isinstance(until, str) else [text for text in until if text]
    temperature = float(settings.get("temperature", 1.0 if settings.get("do_sample") else 0.0) or 0.0)
    given = {name: settings[name] for name in _ALWAYS if settings.get(name) is not None}
    if temperature > 0:
        given |= {name: settings[name] for name in _SAMPLING if settings.get(name) is not None}
        given |= {"do_sample": True, "temperature": temperature}
    return stop, {"max_new_tokens": int(settings.get("max_new_tokens") or _MAX_NEW_TOKENS), **given}


def read_messages(messages: Sequence[Mapping[str, Any]], task: str) -> list[dict[str, Any]]:
    """lmms-eval's messages in the form of :class:`Chat`, pictures opened, in RGB.

    Args:
        messages: ``{"role", "content"}``; content is words, or a list of ``{"type": "text", "text"}`` and
            ``{"type": "image", "url": picture or file}``.
        task: for the error.

    Raises:
        ValueError: if there is a video or a sound, or a picture cannot be read.
    """
    read = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        read.append({"role": message["role"], "content": [_read_part(part, task) for part in parts]})
    return read


def _read_part(part: Mapping[str, Any], task: str) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] == "image":
        return {"type": "image", "image": open_picture(part["url"])}
    raise ValueError(f"the task {task} shows its model a {part['type']}; {MODEL} sees pictures only")
