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
from contextlib import contextmanager
from functools import partial
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
STOPPING = "Stopping…"
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


class Brake:
    """Ends the answer of one conversation, from another thread than the one that gives it.

    The page stops an answer itself, because Gradio's own way, ``cancels``, now and then shows an error in its
    place (6.31: the stream of messages is closed while the answer's last one is on its way).
    """

    def __init__(self) -> None:
        self._pulled, self._still = threading.Event(), threading.Event()
        self._still.set()

    def __deepcopy__(self, _: dict[int, Any]) -> Brake:
        return Brake()  # Gradio copies a state for every visitor: each has a brake of their own

    @property
    def moving(self) -> bool:
        """An answer is being given."""
        return not self._still.is_set()

    @property
    def pulled(self) -> bool:
        """The answer that is being given is to end."""
        return self._pulled.is_set()

    @contextmanager
    def drive(self) -> Iterator[None]:
        """An answer is given inside."""
        self._pulled.clear()
        self._still.clear()
        try:
            yield
        finally:
            self._still.set()

    def pull(self) -> None:
        """Ask the answer to end."""
        self._pulled.set()

    def wait(self) -> None:
        """Come back when no answer is being given any more."""
        self._still.wait()


def stream_reply(
    ask: Callable[[Callable[[str], None]], Reply], brake: Brake | None = None
) -> Iterator[str | Reply]:
    """Turn a call that hands text to a function into an iterator: pieces of text, then the reply.

    When the iterator is closed early or the brake is pulled, the call is ended at its next piece of text:
    what was said before still comes, a reply does not.

    Args:
        ask: called in a thread, with the function that takes the pieces.
        brake: ends the iterator.

    Raises:
        Exception: whatever the call raised.
    """
    pieces: queue.Queue[str | Reply | BaseException] = queue.Queue()
    stopped = threading.Event()

    def take(text: str) -> None:
        if stopped.is_set() or (brake is not None and brake.pulled):
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
            if isinstance(piece, _StoppedError):
                return
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
        brake: Brake | None = None,
    ) -> Generator[tuple[Any, list[Any], list[dict[str, Any]], Any, str], None, None]:
        """Answer one turn, piece by piece.

        Args:
            given: ``{"text", "files"}`` of the box one types in.
            shown: the conversation as the page shows it.
            messages: the conversation as the model reads it; what has been said of an answer is in it from
                the first word on, so that an answer that is stopped half-way is remembered as it is shown.
            temperature: of this answer; the page's own by default.
            brake: stops it; a question that no word of an answer came to is then as if it had not been asked.

        Returns:
            Again and again: content of the box, the conversation shown, the one read, the picture of regions,
            and a line about it all; Gradio's "leave it" where nothing is new. What cannot be used stays in
            the box, or is put back into it.
        """
        brake = brake or Brake()
        with brake.drive():
            yield from self._respond(given, shown, messages, temperature, brake)

    def _respond(
        self,
        given: dict[str, Any] | None,
        shown: list[Any],
        messages: list[dict[str, Any]],
        temperature: float | None,
        brake: Brake,
    ) -> Generator[tuple[Any, list[Any], list[dict[str, Any]], Any, str], None, None]:
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
            for piece in stream_reply(lambda take: self._ask(asked, heat, take), brake):
                if isinstance(piece, str):
                    said += piece
                    answering = {"role": "assistant", "content": said}
                    yield keep, [*begun, answering], [*asked, _answer(said)], keep, line or "…"
                    continue
                whole = [*begun, {"role": "assistant", "content": piece.text or "(an empty answer)"}]
                told = " ".join(part for part in (piece.describe(), line) if part)
                yield keep, whole, [*asked, _answer(piece.text)], keep, told
                return
            if said:
                yield keep, [*begun, answering], [*asked, _answer(said)], keep, STOPPED
            else:
                yield given, shown, messages, keep, STOPPED_EARLY
        except (ValueError, RuntimeError, IndexError) as error:
            yield given, shown, messages, keep, f"The model cannot answer this: {error}."

    def _ask(self, messages: list[dict[str, Any]], temperature: float, take: Callable[[str], None]) -> Reply:
        return self.chat.reply(messages, self.max_new_tokens, temperature, take)


def _answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def stop_answer(brake: Brake) -> Iterator[str]:
    """End the answer that is being given, if one is.

    Args:
        brake: of the conversation. It is pulled after the line has been shown, so that the line with which
            the answer ends is the later one.

    Returns:
        The line to show meanwhile.
    """
    if brake.moving:
        yield STOPPING
        brake.pull()


def start_anew(brake: Brake, empty_box: bool = True) -> Iterator[tuple[Any, Any, Any, Any, str]]:
    """Forget the conversation, once an answer that is being given has ended.

    Args:
        brake: of the conversation.
        empty_box: forget what is being typed, too.

    Returns:
        As :meth:`Page.respond`.
    """
    keep = import_module("gradio").skip()
    for line in stop_answer(brake):
        yield keep, keep, keep, keep, line
    brake.wait()
    yield {"text": "", "files": []} if empty_box else keep, [], [], None, ""


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
        messages, brake = gr.State([]), gr.State(Brake())
        outputs = [box, talk, messages, regions, line]
        quietly: dict[str, Any] = {"show_progress": "hidden", "api_name": False}
        box.submit(page.respond, [box, talk, messages, heat, brake], outputs, **quietly)
        stop.click(stop_answer, [brake], [line], **quietly)
        fresh.click(start_anew, [brake], outputs, **quietly)
        # The conversation's own button empties what is shown; the model forgets it, too.
        talk.clear(partial(start_anew, empty_box=False), [brake], outputs, **quietly)
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
