"""The page: its turns without a browser, and the whole of it in a real, headless one."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from llm_integration.chat import main
from llm_integration.generate import Chat, Reply, load_chat
from llm_integration.regions import NoRegionsError, draw_regions
from llm_integration.web import (
    NO_PICTURE,
    NO_QUESTION,
    STOPPED,
    STOPPED_EARLY,
    STOPPING,
    Brake,
    Page,
    build_app,
    build_server,
    start_anew,
    stop_answer,
    stream_reply,
)

needs_gradio = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("gradio") is None,
    reason="needs Gradio: pip install 'sparse-vlm[web]'",
)


@pytest.fixture(scope="module")
def chat(llava_dir: Path) -> Chat:
    return load_chat(llava_dir, device="cpu")


@pytest.fixture
def files(tmp_path: Path, picture: Image.Image) -> SimpleNamespace:
    """A good picture and a broken one."""
    picture.save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    return SimpleNamespace(good=str(tmp_path / "good.png"), broken=str(tmp_path / "broken.png"))


def _blind(chat: Chat) -> Chat:
    """The same model as far as a page can tell, but its tower is a ViT."""
    vit = CLIPVisionModel(CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                           num_attention_heads=1, image_size=8, patch_size=4))  # fmt: skip
    model = SimpleNamespace(model=SimpleNamespace(vision_tower=vit))
    blind = Chat.__new__(Chat)
    blind.model, blind.processor = model, chat.processor
    blind.reply = chat.reply  # type: ignore[method-assign]
    return blind


def test_regions_are_drawn_as_the_encoder_sees_them(chat: Chat, picture: Image.Image) -> None:
    drawing = draw_regions(chat, picture, columns=2, panel_width=100)
    assert drawing.mode == "RGB"
    assert drawing.width > 200
    with pytest.raises(NoRegionsError, match="is a CLIPVisionModel, not a SparseFormer"):
        draw_regions(_blind(chat), picture)


def test_a_reply_comes_piece_by_piece() -> None:
    reply = Reply("ab", 9, 12, 2, 0.1, 0.2)

    def ask(take: Callable[[str], None]) -> Reply:
        take("a")
        take("b")
        return reply

    assert list(stream_reply(ask)) == ["a", "b", reply]

    def fail(take: Callable[[str], None]) -> Reply:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        list(stream_reply(fail))


def test_an_answer_that_nobody_waits_for_is_ended() -> None:
    pieces: list[str] = []

    def ask(take: Callable[[str], None]) -> Reply:
        for number in range(1000):
            pieces.append(str(number))
            take(str(number))
            time.sleep(0.001)
        raise AssertionError("went on to the end")

    stream = stream_reply(ask)
    assert next(stream) == "0"
    stream.close()
    assert len(pieces) < 1000


@needs_gradio
def test_turns(chat: Chat, files: SimpleNamespace) -> None:
    page = Page(chat, max_new_tokens=5)
    turns = list(page.respond({"text": "What?", "files": [files.good]}, [], []))
    box, shown, messages, regions, line = turns[0]
    assert box == {"text": "", "files": []}
    assert regions.width > 300
    assert shown == [
        {"role": "user", "content": {"path": files.good}},
        {"role": "user", "content": "What?"},
    ]
    said = [turn[1][-1]["content"] for turn in turns[1:-1]]
    assert said == sorted(said, key=len)  # it grows
    _, shown, messages, _, line = turns[-1]
    assert "[9 visual of" in line
    assert "first token after" in line
    assert [message["role"] for message in messages] == ["user", "assistant"]
    # The picture of the first turn is still seen in the second.
    *_, last = page.respond({"text": "And?", "files": []}, shown, messages)
    assert "[9 visual of" in last[4]
    assert len(last[2]) == 4


@needs_gradio
def test_an_answer_that_is_stopped_is_remembered_as_it_is_shown(chat: Chat, files: SimpleNamespace) -> None:
    brake = Brake()
    speaker = _Speaker(chat.model, chat.processor)
    turns = Page(speaker, 5).respond({"text": "What?", "files": [files.good]}, [], [], brake=brake)
    assert list(stop_answer(brake)) == []  # nothing is being answered yet
    next(turns)
    _, shown, messages, _, _ = next(turns)
    assert shown[-1]["content"] == "it "
    assert list(stop_answer(brake)) == [STOPPING]
    *_, (box, shown, messages, _, line) = turns
    assert "value" not in box
    said = shown[-1]["content"]
    assert said in ("it ", "it is ")
    assert messages[-1] == {"role": "assistant", "content": [{"type": "text", "text": said}]}
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert line == STOPPED
    # The brake is off again for the next question.
    *_, last = Page(chat, 2).respond({"text": "And?", "files": []}, shown, messages, brake=brake)
    assert "[9 visual of" in last[4]
    assert not brake.moving


@needs_gradio
def test_a_question_that_is_stopped_before_the_first_word_was_never_asked(chat: Chat) -> None:
    brake = Brake()
    given = {"text": "What?", "files": []}
    turns = Page(chat, 5).respond(given, ["before"], [], brake=brake)
    next(turns)
    assert list(stop_answer(brake)) == [STOPPING]
    ((box, shown, messages, _, line),) = turns
    assert (box, shown, messages, line) == (given, ["before"], [], STOPPED_EARLY)


@needs_gradio
def test_a_new_conversation_waits_for_the_end_of_an_answer(chat: Chat) -> None:
    brake = Brake()
    ((box, *rest, line),) = start_anew(brake)
    assert (box, rest, line) == ({"text": "", "files": []}, [[], [], None], "")
    turns = Page(_Speaker(chat.model, chat.processor), 5).respond(
        {"text": "hi", "files": []}, [], [], brake=brake
    )
    next(turns)
    came: list[str] = []

    def drain() -> None:
        for turn in turns:
            came.append(turn[4])
            time.sleep(0.05)

    thread = threading.Thread(target=drain)
    fresh = start_anew(brake, empty_box=False)
    assert next(fresh)[4] == STOPPING
    thread.start()
    box, *_ = next(fresh)
    assert "value" not in box  # what is being typed stays
    assert came[-1] in (STOPPED, STOPPED_EARLY)  # nothing comes after the page was cleared
    thread.join()
    assert not brake.moving


def test_each_visitor_has_a_brake_of_their_own() -> None:
    brake = Brake()
    with brake.drive():
        brake.pull()
        other = copy.deepcopy(brake)
        assert not other.pulled
        assert not other.moving


@needs_gradio
def test_a_temperature_is_that_of_the_next_answer(chat: Chat) -> None:
    heard: list[float] = []
    page = Page(_blind(chat), temperature=0.3)

    def listen(messages: Any, new: int, heat: float, on_text: Any) -> Reply:
        heard.append(heat)
        return Reply("yes", 0, 1, 1, 0.1, 0.2)

    page.chat.reply = listen  # type: ignore[method-assign,assignment]
    for heat in (None, 0.0, 1.5):
        *_, last = page.respond({"text": "hi", "files": []}, [], [], heat)
        assert last[1][-1]["content"] == "yes"
    assert heard == [0.3, 0.0, 1.5]


@needs_gradio
def test_what_cannot_be_used_is_said_and_stays_in_the_box(chat: Chat, files: SimpleNamespace) -> None:
    page = Page(chat, max_new_tokens=2)
    given = {"text": "What?", "files": [files.broken]}
    ((box, shown, messages, _, line),) = page.respond(given, ["before"], [{"role": "user"}])
    assert "value" not in box  # Gradio's word for: leave it as it is
    assert (shown, messages) == (["before"], [{"role": "user"}])
    assert line.startswith("broken.png is no picture that can be read")
    ((box, _, _, _, line),) = page.respond({"text": " ", "files": [files.good]}, [], [])
    assert line == NO_QUESTION
    assert "value" not in box
    *_, last = page.respond({"text": "hi", "files": []}, [], [])
    assert last[4].endswith(NO_PICTURE)
    assert "[0 visual of" in last[4]
    *_, last = Page(_blind(chat), 2).respond({"text": "hi", "files": [files.good]}, [], [])
    assert "is a CLIPVisionModel, not a SparseFormer" in last[4]

    def explode(*_: Any) -> Reply:
        raise RuntimeError("out of memory")

    broken = _blind(chat)
    broken.reply = explode  # type: ignore[method-assign,assignment]
    *_, last = Page(broken, 2).respond({"text": "hi", "files": []}, [], [])
    assert last[0]["text"] == "hi"
    assert last[4] == "The model cannot answer this: out of memory."


def test_options_that_make_no_sense(llava_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--port", "80"], "say --web, too"),
        (["--web", "--image", "a.jpg"], "added in the browser"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["--model", str(llava_dir), *words])
        assert left.value.code == 2
        assert message in capsys.readouterr().err


@needs_gradio
def test_a_port_that_is_taken(llava_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SystemExit):
            main(["--model", str(llava_dir), "--web", "--port", str(port), "--device", "cpu"])
    assert f"error: port {port} of 127.0.0.1 cannot be used" in capsys.readouterr().err


def test_without_gradio_one_sentence(
    llava_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(SystemExit):
        main(["--model", str(llava_dir), "--web", "--device", "cpu"])
    assert "pip install 'sparse-vlm[web]'" in capsys.readouterr().err


class _Speaker(Chat):
    """Answers as the model does, but says it in words, slowly: a random model says nothing readable."""

    def reply(self, messages: Any, new: int = 256, heat: float = 0.0, on_text: Any = None) -> Reply:
        reply = super().reply(messages, new, heat)
        words = ["it", "is", "a", "red", "square", "and", "a", "blue", "one"]
        for word in words:
            on_text(f"{word} ")
            time.sleep(0.4)
        return dataclasses.replace(reply, text=" ".join(words))


@pytest.fixture(scope="module")
def address(llava_dir: Path) -> Iterator[str]:
    """Where the page is served."""
    fast = load_chat(llava_dir, device="cpu")
    server, place = build_server(build_app(_Speaker(fast.model, fast.processor), "a tiny LLaVA", 12), 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
    thread.start()
    host, port = place.getsockname()
    assert host == "127.0.0.1"
    yield f"http://{host}:{port}"
    server.should_exit = True
    thread.join(timeout=20)


@pytest.fixture
def browser() -> Iterator[Any]:
    """A headless Chromium that writes down every request of the page."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs Chromium and its driver (Debian: apt install chromium chromium-driver)")
    selenium = pytest.importorskip("selenium.webdriver", reason="needs Selenium: pip install selenium")
    options = selenium.ChromeOptions()
    options.binary_location = program
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "disable-gpu",
        "window-size=1280,900",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    window = selenium.Chrome(options=options, service=selenium.ChromeService(executable_path=driver))
    yield window
    window.quit()


class _Hand:
    """Types, adds files and reads, as a person would."""

    def __init__(self, window: Any, address: str) -> None:
        self.window = window
        window.get(address)
        self.until(lambda: self.find("#box textarea"))

    def find(self, selector: str) -> Any:
        found = self.window.find_elements("css selector", selector)
        return found[0] if found else None

    def text(self, selector: str) -> str:
        script = "const e = document.querySelector(arguments[0]); return e ? e.innerText : ''"
        return str(self.window.execute_script(script, selector))

    def until(self, condition: Callable[[], Any], seconds: float = 60) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = condition()
            if value:
                return value
            time.sleep(0.05)
        raise AssertionError(f"not within {seconds} s; the page says: {self.text('body')}")

    def ask(self, words: str, *pictures: str) -> None:
        for path in pictures:
            chooser = self.find("#box input[type=file]")
            # A person's choice takes the place of the last one; the driver's would be added to it.
            self.window.execute_script("arguments[0].value = ''", chooser)
            chooser.send_keys(path)
            self.until(lambda: self.find("#box .thumbnail-item"))
        self.find("#box textarea").send_keys(words)
        self.find("#box .submit-button").click()

    def start_anew(self) -> None:
        self.find("#fresh").click()
        self.until(lambda: not self.text("#line").strip() and not self.find("#box .thumbnail-item"))


@needs_gradio
@pytest.mark.slow
def test_in_a_real_browser(browser: Any, address: str, files: SimpleNamespace) -> None:
    hand = _Hand(browser, address)
    hand.ask("Anything?")
    hand.until(lambda: NO_PICTURE in hand.text("#line") and "0 visual" in hand.text("#line"))

    hand.start_anew()
    hand.ask("What is it?", files.broken)
    hand.until(lambda: "broken.png is no picture that can be read" in hand.text("#line"))
    assert hand.find("#box textarea").get_attribute("value") == "What is it?"

    hand.start_anew()
    hand.ask("What is it?", files.good)
    lengths: set[int] = set()

    def answered() -> bool:
        lengths.add(len(hand.text("#talk .bot")))
        return "9 visual of" in hand.text("#line")

    hand.until(answered)
    assert len(lengths - {0}) >= 3, "the answer did not come piece by piece"
    assert "first token after" in hand.text("#line")
    drawn = "const i = document.querySelector('#regions img'); return i && i.complete ? i.naturalWidth : 0"
    assert hand.until(lambda: browser.execute_script(drawn)) > 300
    assert "What is it?" in hand.text("#talk")
    assert "a red square and a blue one" in hand.text("#talk")

    # Half an answer stays, on the page and in the model's memory.
    hand.ask("And now?")
    hand.until(lambda: "And now?" in hand.text("#talk") and hand.text("#talk").count("it is") > 1)
    hand.find("#stop").click()
    hand.until(lambda: STOPPED in hand.text("#line"))
    time.sleep(4)  # as long as the rest of the answer would have taken
    assert hand.text("#talk").count("and a blue one") == 1
    assert STOPPED in hand.text("#line")

    # A new conversation in the middle of an answer is empty, and stays so.
    hand.ask("And then?")
    hand.until(lambda: hand.text("#talk").count("it is") > 2)
    hand.start_anew()
    time.sleep(4)
    assert "it is" not in hand.text("#talk")
    assert not hand.text("#line").strip()
    hand.ask("What is it?", files.good)
    hand.until(lambda: "9 visual of" in hand.text("#line"))

    # A question after the conversation was emptied is about no picture any more.
    hand.find("#talk button[aria-label=Clear]").click()
    hand.until(lambda: not hand.text("#line").strip())
    hand.ask("Still there?")
    hand.until(lambda: NO_PICTURE in hand.text("#line") and "0 visual" in hand.text("#line"))

    asked = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.append(message["params"]["request"]["url"])
    assert len(asked) > 5
    foreign = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert foreign == []


@needs_gradio
@pytest.mark.slow
def test_the_page_is_closed_to_other_names(address: str) -> None:
    with urllib.request.urlopen(f"{address}/") as page:
        assert "connect-src 'self'" in page.headers["content-security-policy"]
    strange = urllib.request.Request(f"{address}/", headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(strange)
    with pytest.raises(urllib.error.HTTPError, match="404"):  # its page would come from a content network
        urllib.request.urlopen(f"{address}/docs")
