"""Talk with a model about pictures, in the terminal or, with ``--web``, on a page in the browser.

``python -m llm_integration.chat --model LLAVA_DIR --image FILE``

Within the chat: ``/image FILE`` shows another picture with the next question, ``/new`` starts over, ``/quit``
ends.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TextIO

from PIL import Image
from transformers.utils import logging as transformers_logging

from sparse_vlm.digits import DigitsError, pack_digits
from sparse_vlm.settings import expand_home

from .assemble import DTYPES
from .generate import Chat, build_message, load_chat, open_picture
from .room import PromptTooLongError

_COMMANDS = ("/image", "/new", "/quit")


def run_chat(
    chat: Chat,
    picture: Image.Image | None,
    lines: TextIO,
    out: TextIO,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
) -> None:
    """Answer line by line until the lines end.

    Args:
        chat: the model.
        picture: shown with the first question.
        lines: what the user types.
        out: where answers go, as they come.
        max_new_tokens: longest answer.
        temperature: 0 for the likeliest token every time.
    """
    messages: list[dict[str, Any]] = []
    waiting = [picture] if picture is not None else []

    def write(text: str) -> None:
        out.write(text)
        out.flush()

    write("you: ")
    for line in lines:
        words = line.strip().encode("utf-8", "replace").decode("utf-8")  # what was no text comes as "?"
        command, _, rest = words.partition(" ")
        if command == "/quit":
            break
        if command == "/new":
            messages, waiting = [], []
            write("(a new conversation)\n")
        elif command == "/image":
            try:
                file = Path(expand_home(rest.strip().strip("\"'")))
                waiting.append(open_picture(file, upright=True))
                write(f"({file} goes with your next question)\n")
            except ValueError as error:
                write(f"({error})\n")
        elif command.startswith("/") and get_close_matches(command.lower(), _COMMANDS):
            write(f"(there is no {command}; there are /image FILE, /new and /quit)\n")
        elif words:
            if chat.processor.image_token in words:
                write(
                    f"({chat.processor.image_token} stands for a picture: show one with /image FILE)\nyou: "
                )
                continue
            asked = [*messages, build_message(words, waiting)]
            write("model: ")
            try:
                reply = chat.reply(asked, max_new_tokens, temperature, on_text=write)
            except PromptTooLongError as error:  # as if it had not been asked
                write(f"({error}, or start over with /new)\nyou: ")
                continue
            messages, waiting = asked, []
            messages.append({"role": "assistant", "content": [{"type": "text", "text": reply.text}]})
            write(f"\n{reply.describe()}\n")
        write("you: ")
    write("\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llm_integration.chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="LLaVA directory, or the result of a run")
    parser.add_argument("--image", type=Path, help="picture to begin with")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 for the likeliest token every time")
    parser.add_argument("--web", action="store_true", help="a page on 127.0.0.1 (needs the extra 'web')")
    parser.add_argument("--port", type=int, help="of the page; 0 for any free one (default 7860)")
    parser.add_argument("--device", help="by default the first GPU where there is one")
    parser.add_argument("--dtype", choices=list(DTYPES), help="precision (default: the checkpoint's)")
    parser.add_argument(
        "--digits",
        type=int,
        choices=(1, 2, 3),
        help="on a CPU with AMX, in fp32: multiply so many 8-bit digits; 3 are as precise as fp32, 2 nearly",
    )
    parser.add_argument(
        "--graphs", action="store_true", help="on a GPU: look at pictures through CUDA graphs"
    )
    options = parser.parse_args(arguments)
    if options.port is not None and not options.web:
        parser.error("--port is of the page: say --web, too")
    if not 0 <= options.temperature < math.inf:
        parser.error(f"--temperature must be 0 or more, got {options.temperature}")
    if options.max_new_tokens < 1:
        parser.error(f"--max-new-tokens must be 1 or more, got {options.max_new_tokens}")
    if options.image is not None and options.web:
        parser.error("--image is for the terminal; on the page pictures are added in the browser")
    transformers_logging.disable_progress_bar()
    if options.web:
        print(f"loading {options.model} …", flush=True)
    try:
        picture = open_picture(options.image, upright=True) if options.image else None
        dtype = DTYPES[options.dtype] if options.dtype else None
        chat = load_chat(options.model, options.device, dtype, options.graphs)
        if options.digits is not None:
            pack_digits(chat.model, options.digits, strict=True)
        if options.web:
            from .web import build_app, serve

            place = options.model.resolve()
            title = place.parent.name if place.name == "final" else place.name
            app = build_app(chat, title, options.max_new_tokens, options.temperature)
            serve(app, 7860 if options.port is None else options.port)
            return
    except DigitsError as error:
        parser.exit(2, f"error: --digits {options.digits}: {error}\n")
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{options.model}: a picture is {chat.visual_tokens} tokens; /image FILE, /new, /quit")
    try:
        run_chat(chat, picture, sys.stdin, sys.stdout, options.max_new_tokens, options.temperature)
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
