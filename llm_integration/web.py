"""A page in the browser to talk with a model about pictures, for this machine only.

``python -m llm_integration.chat --model LLAVA_DIR --web``

The page is served on 127.0.0.1, works without a network, and tells nobody anything: Gradio's analytics are
off, and a content security policy keeps the browser from fetching anything from elsewhere, whatever a page's
parts or a model's answer may name.
"""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Generator, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from .generate import Chat, Reply, build_message, open_picture
from .regions import NoRegionsError, draw_regions

HOST = "127.0.0.1"
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; "
    "worker-src 'self' blob:; connect-src 'self'; form-action 'self'; frame-ancestors 'none'"
)
NO_PICTURE = "There is no picture in this conversation: the answer comes from the words alone."
NO_QUESTION = "Write a question, then send it."
STOPPED = "Stopped: the model remembers what it has said so far."
STOPPED_EARLY = "Stopped before the first word: the model forgets the question."
_FONTS = ("system-ui", "sans-serif")
_MONO = ("ui-monospace", "monospace")
_HOUR = 3600
# Sharing would go to another machine; the buttons of the picture of regions would lie on its titles.
_STYLE = """
#talk button[aria-label="Share"], #talk button[title="Share"] { display: none }
#regions .icon-button-wrapper { top: auto; bottom: 4px }
"""


class MissingGradioError(ValueError):
    """The page's optional packages are not installed."""


class _StoppedError(Exception):
    """Nobody waits for the answer any more."""


def stream_reply(ask: Callable[[Callable[[str], None]], Reply]) -> Iterator[str | Reply]:
    """Turn a call that hands text to a function into an iterator: pieces of text, then the reply.

    When the iterator is closed early, the call is ended at its next piece of text.

    Args:
        ask: called in a thread, with the function that takes the pieces.

    Raises:
        Exception: whatever the call raised.
    """
    pieces: queue.Queue[str | Reply | BaseException] = queue.Queue()
    stopped = threading.Event()

    def take(text: str) -> None:
        if stopped.is_set():
            raise _StoppedError
        pieces.put(text)

    def work() -> None:
        try:
            pieces.put(ask(take))
        except BaseException as error:  # handed to the reader, who raises it
            pieces.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            piece = pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            yield piece
            if isinstance(piece, Reply):
                return
    finally:
        stopped.set()
        thread.join()


class Page:
    """What happens on the page, without a browser.

    Args:
        chat: the model.
        max_new_tokens: longest answer.
        temperature: 0 for the likeliest token every time.
    """

    def __init__(self, chat: Chat, max_new_tokens: int = 256, temperature: float = 0.0) -> None:
        self.chat = chat
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature

    def respond(
        self,
        given: dict[str, Any] | None,
        shown: list[Any],
        messages: list[dict[str, Any]],
        temperature: float | None = None,
    ) -> Generator[tuple[Any, list[Any], list[dict[str, Any]], Any, str], None, None]:
        """Answer one turn, piece by piece.

        Args:
            given: ``{"text", "files"}`` of the box one types in.
            shown: the conversation as the page shows it.
            messages: the conversation as the model reads it; what has been said of an answer is in it from
                the first word on, so that an answer that is stopped half-way is remembered as it is shown.
            temperature: of this answer; the page's own by default.

        Returns:
            Again and again: content of the box, the conversation shown, the one read, the picture of regions,
            and a line about it all; Gradio's "leave it" where nothing is new. What cannot be used stays in
            the box.
        """
        keep = import_module("gradio").skip()
        given = given or {"text": "", "files": []}
        question, files = (given.get("text") or "").strip(), [Path(file) for file in given.get("files") or ()]
        pictures = []
        for file in files:
            try:
                pictures.append(open_picture(file, upright=True))
            except ValueError as error:
                yield keep, shown, messages, keep, str(error).replace(str(file), file.name) + "."
                return
        if not question:
            yield keep, shown, messages, keep, NO_QUESTION
            return
        asked = [*messages, build_message(question, pictures)]
        begun = [*shown, *({"role": "user", "content": {"path": str(file)}} for file in files)]
        begun.append({"role": "user", "content": question})
        empty = {"text": "", "files": []}
        line, regions = "", keep
        if pictures:
            try:
                regions = draw_regions(self.chat, pictures[-1], columns=2, panel_width=320)
            except NoRegionsError as error:
                line, regions = str(error), None
        elif not any(part["type"] == "image" for message in asked for part in message["content"]):
            line = NO_PICTURE
        yield empty, begun, messages, regions, line or "…"
        said = ""
        heat = self.temperature if temperature is None else temperature
        try:
            for piece in stream_reply(lambda take: self._ask(asked, heat, take)):
                if isinstance(piece, str):
                    said += piece
                    answering = {"role": "assistant", "content": said}
                    yield keep, [*begun, answering], [*asked, _answer(said)], keep, line or "…"
                    continue
                whole = [*begun, {"role": "assistant", "content": piece.text or "(an empty answer)"}]
                told = " ".join(part for part in (piece.describe(), line) if part)
                yield keep, whole, [*asked, _answer(piece.text)], keep, told
        except (ValueError, RuntimeError, IndexError) as error:
            yield given, shown, messages, keep, f"The model cannot answer this: {error}."

    def _ask(self, messages: list[dict[str, Any]], temperature: float, take: Callable[[str], None]) -> Reply:
        return self.chat.reply(messages, self.max_new_tokens, temperature, take)


def _answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def leave_unanswered(shown: list[Any]) -> tuple[list[Any], str]:
    """What a page shows when an answer is stopped: without a question that no word of an answer came to.

    Args:
        shown: the conversation as the page shows it.

    Returns:
        The conversation, and a line about it.
    """
    kept = list(shown)
    while kept and kept[-1]["role"] == "user":
        kept.pop()
    return kept, STOPPED if len(kept) == len(shown) else STOPPED_EARLY


def build_app(chat: Chat, title: str, max_new_tokens: int = 256, temperature: float = 0.0) -> Any:
    """The page as an ASGI application.

    Args:
        chat: the model.
        title: at the head of the page.
        max_new_tokens: longest answer.
        temperature: 0 for the likeliest token every time.

    Raises:
        MissingGradioError: if Gradio is not installed.
    """
    try:
        gr, fastapi = import_module("gradio"), import_module("fastapi")
        trusted = import_module("starlette.middleware.trustedhost").TrustedHostMiddleware
    except ImportError as error:
        raise MissingGradioError(f"the page needs Gradio ({error}): pip install 'sparse-vlm[web]'") from None
    page = Page(chat, max_new_tokens, temperature)
    with gr.Blocks(analytics_enabled=False, title=title, delete_cache=(_HOUR, 24 * _HOUR)) as blocks:
        gr.Markdown(f"### {title}\nA picture is {chat.visual_tokens} tokens to the language model.")
        with gr.Row():
            with gr.Column(scale=3):
                talk = gr.Chatbot(
                    label="conversation", elem_id="talk", height=460, buttons=["copy"], feedback_options=None
                )
                box = gr.MultimodalTextbox(
                    show_label=False,
                    elem_id="box",
                    file_types=["image"],
                    file_count="multiple",
                    placeholder="Add a picture and ask about it",
                )
                line = gr.Markdown(elem_id="line")
                with gr.Row():
                    stop = gr.Button("Stop", elem_id="stop", size="sm")
                    fresh = gr.Button("New conversation", elem_id="fresh", size="sm")
                heat = gr.Slider(
                    0.0,
                    max(2.0, temperature),
                    temperature,
                    step=0.1,
                    label="temperature",
                    info="0: the likeliest word every time",
                    elem_id="temperature",
                )
            with gr.Column(scale=2):
                gr.Markdown("**Where the tokens look** in the newest picture, step by step")
                regions = gr.Image(
                    show_label=False,
                    elem_id="regions",
                    format="png",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                )
        messages = gr.State([])
        outputs = [box, talk, messages, regions, line]
        inputs = [box, talk, messages, heat]
        asking = box.submit(page.respond, inputs, outputs, show_progress="hidden", api_name=False)
        quietly: dict[str, Any] = {"show_progress": "hidden", "cancels": [asking], "api_name": False}
        stop.click(leave_unanswered, [talk], [talk, line], **quietly)
        fresh.click(lambda: ({"text": "", "files": []}, [], [], None, ""), None, outputs, **quietly)
        # The conversation's own button empties what is shown; the model forgets it, too.
        talk.clear(lambda: ([], None, ""), None, [messages, regions, line], **quietly)
    # Swagger's page would come from a content network.
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Policy)
    app.add_middleware(trusted, allowed_hosts=[HOST, "localhost"])
    theme = gr.themes.Default(font=list(_FONTS), font_mono=list(_MONO))
    return gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        server_name=HOST,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=theme,
        css=_STYLE,
    )


def build_server(app: Any, port: int = 7860) -> tuple[Any, socket.socket]:
    """A server and the socket on 127.0.0.1 that it is to run with.

    Args:
        app: an ASGI application.
        port: 0 for any free one.

    Raises:
        ValueError: if the port cannot be used.
    """
    uvicorn = import_module("uvicorn")
    place = socket.socket()
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((HOST, port))
        place.listen()  # who asks before the server has started waits, instead of being refused
    except (OSError, OverflowError) as error:
        place.close()
        raise ValueError(f"port {port} of {HOST} cannot be used ({error}); name another") from None
    return uvicorn.Server(uvicorn.Config(app, log_level="warning")), place


def serve(app: Any, port: int = 7860) -> None:
    """Serve an application on 127.0.0.1 until it is interrupted.

    Args:
        app: an ASGI application.
        port: 0 for any free one.

    Raises:
        ValueError: if the port cannot be used.
    """
    server, place = build_server(app, port)
    with place:
        print(f"http://{HOST}:{place.getsockname()[1]} (this machine only; Ctrl-C ends)", flush=True)
        server.run(sockets=[place])


class _Policy:
    """Puts the content security policy on every answer; streams pass through untouched."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


_HEADERS = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
