"""Many pictures from the command line: every question answered once, whatever happens in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llm_integration import batch as batch_module
from llm_integration.batch import main
from llm_integration.generate import answer, load_chat


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures at two depths, one broken, and what is none."""
    root = tmp_path / "pictures"
    (root / "more").mkdir(parents=True)
    for number in range(5):
        Image.new("RGB", (40, 30), (50 * number, 90, 20)).save(root / f"{number}.jpg")
    Image.new("RGB", (30, 40), "green").save(root / "more" / "a.PNG")
    (root / "2.jpg").write_bytes(b"\xff\xd8 cut")
    (root / "notes.txt").write_text("no picture")
    (root / ".3.jpg").write_text("what a system leaves")
    return root


def _run(llava: Path, *words: Any) -> None:
    main(["--model", str(llava), "--max-new-tokens", "6", *map(str, words)])


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_folder_is_described(llava_dir: Path, folder: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "new" / "answers.jsonl"
    words = ("--prompt", "Describe it.", "--images", folder, folder / "0.jpg", "--out", out)
    _run(llava_dir, *words, "--batch", 4)
    rows = _rows(out)
    names = ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "more/a.PNG", "0.jpg"]
    assert [row["image"] for row in rows] == [str(folder / name) for name in names]
    assert {row["question"] for row in rows} == {"Describe it."}
    chat = load_chat(llava_dir)
    for row in rows:
        if row["image"].endswith("2.jpg"):
            assert "2.jpg is no picture that can be read" in row["skipped"]
        else:
            assert row["answer"] == answer(row["image"], "Describe it.", chat, 6)
    said = capsys.readouterr()
    assert f"wrote {out}: 6 answers, skipped questions: 1" in said.out
    assert "tokens/s" in said.out
    assert "2.jpg is no picture" in said.err
    _run(llava_dir, *words)
    assert "is finished already: 7 questions" in capsys.readouterr().out
    one = tmp_path / "one.jsonl"
    _run(llava_dir, *words[:-1], one, "--batch", 1)
    assert one.read_bytes() == out.read_bytes()
    assert sorted(path.name for path in out.parent.iterdir()) == ["answers.jsonl", "answers.jsonl.run.json"]


def test_questions_keep_what_else_they_hold(llava_dir: Path, folder: Path, tmp_path: Path) -> None:
    asked = [
        {"id": 7, "image": "0.jpg", "question": "Größe?"},
        {"question": "Hi?"},
        {"image": ["0.jpg", "more/a.PNG"], "question": "Same?", "gold": "no"},
        {"image": ["0.jpg", "gone.jpg"], "question": "Same?"},
    ]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in asked)
    for file, more in ((folder / "q.jsonl", ()), (tmp_path / "q.jsonl", ("--images", folder))):
        file.write_text(text, encoding="utf-8")
        out = tmp_path / f"{len(more)}.jsonl"
        _run(llava_dir, "--questions", file, *more, "--out", out)
        rows = _rows(out)
        assert [{k: v for k, v in row.items() if k not in ("answer", "skipped")} for row in rows] == [
            {"image": None, **row} for row in asked
        ]
        assert ["skipped" in row for row in rows] == [False, False, False, True]
        assert "gone.jpg" in rows[3]["skipped"]


@pytest.mark.parametrize("temperature", [0, 3])
def test_a_run_that_is_stopped_goes_on(
    llava_dir: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: int
) -> None:
    words = ("--prompt", "What?", "--images", folder, "--batch", 2, "--temperature", temperature)
    _run(llava_dir, *words, "--out", tmp_path / "whole.jsonl")
    out, add = tmp_path / "cut.jsonl", batch_module.AnswerFile.add

    def stop(self: Any, rows: Any) -> None:
        add(self, rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(batch_module.AnswerFile, "add", stop)
    with pytest.raises(SystemExit) as caught:
        _run(llava_dir, *words, "--out", out)
    assert caught.value.code == 130
    assert not out.exists()
    part = tmp_path / "cut.jsonl.part"
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    assert part.read_bytes() == b"".join(lines[:2])
    part.write_bytes(b"".join(lines[:3]) + lines[3][:9])  # a kill within the second batch's lines
    monkeypatch.undo()
    sizes: list[int] = []
    many = batch_module.answer_many
    monkeypatch.setattr(
        batch_module, "answer_many", lambda asked, *rest: sizes.append(len(asked)) or many(asked, *rest)
    )
    _run(llava_dir, *words, "--out", out)
    assert sizes == [4]  # of six: the first batch alone was whole
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not part.exists()
    # Killed when everything was answered and the file had not its name yet: no model is needed any more.
    out.rename(part)
    monkeypatch.setattr(batch_module, "load_chat", None)
    _run(llava_dir, *words, "--out", out)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_kill_leaves_a_file_that_the_next_start_ends(llava_dir: Path, folder: Path, tmp_path: Path) -> None:
    words = ["--model", str(llava_dir), "--prompt", "What?", "--images", str(folder), "--batch", "1"]
    command = [sys.executable, "-m", "llm_integration.batch", *words, "--max-new-tokens", "40", "--out"]
    out, part = tmp_path / "cut.jsonl", tmp_path / "cut.jsonl.part"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([*command, str(out)], env=environment, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while not part.is_file() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for place in (out, tmp_path / "whole.jsonl"):
        done = subprocess.run([*command, str(place)], env=environment, check=True, capture_output=True)
        assert b"5 answers, skipped questions: 1" in done.stdout
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_answers_of_another_run_are_not_mixed_in(
    llava_dir: Path, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "a.jsonl"
    words = ("--images", folder / "0.jpg", "--out", out)
    _run(llava_dir, *words, "--prompt", "What?")
    for more, name in (
        (("--prompt", "Who?"), "questions"),
        (("--prompt", "What?", "--temperature", "1"), "temperature"),
        (("--prompt", "What?", "--seed", "1"), "seed"),
        (("--prompt", "What?", "--dtype", "bfloat16"), "dtype"),
    ):
        with pytest.raises(SystemExit) as caught:
            _run(llava_dir, *words, *more)
        assert caught.value.code == 2
        assert f"holds answers of another run ({name} changed since)" in capsys.readouterr().err
    (tmp_path / "a.jsonl.run.json").unlink()
    with pytest.raises(SystemExit):
        _run(llava_dir, *words, "--prompt", "What?")
    assert "is there already, and not of this command" in capsys.readouterr().err


def test_answers_about_other_pictures_of_the_same_names_are_not_mixed_in(
    llava_dir: Path, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (400, 300), "green").save(other / "0.jpg")
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"image": "0.jpg", "question": "What?"}\n')
    words = ("--questions", questions, "--out", tmp_path / "a.jsonl")
    _run(llava_dir, *words, "--images", folder)
    _run(llava_dir, *words, "--images", shutil.copytree(folder, tmp_path / "moved"))
    assert "is finished already" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        _run(llava_dir, *words, "--images", other)
    assert caught.value.code == 2
    assert "holds answers of another run (pictures changed since)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "{}"], "say --prompt TEXT with --images, or --questions FILE.jsonl"),
        (["--prompt", "a", "--questions", "q.jsonl"], "say --prompt TEXT"),
        (["--prompt", "a"], "--prompt is asked about pictures"),
        (["--prompt", "a", "--images", "{}", "--batch", "0"], "--batch must be 1 or more, got 0"),
        (["--prompt", "a", "--images", "{}", "--max-new-tokens", "0"], "--max-new-tokens must be 1"),
        (["--prompt", "a", "--images", "{}", "--temperature", "nan"], "--temperature must be 0 or more"),
        (["--prompt", " ", "--images", "{}"], "--prompt: the question is empty"),
        (["--prompt", "<image> a", "--images", "{}"], "--prompt: leave <image> out of the question"),
        (["--prompt", "a", "--images", "{}/gone"], "there is no picture and no folder of that name"),
        (["--prompt", "a", "--images", "{}/empty"], "the folder holds no picture (.jpg, .jpeg"),
        (["--questions", "{}/gone.jsonl"], "gone.jsonl: there is no such file"),
        (["--questions", "{}/q.jsonl", "--images", "{}", "{}"], "is the one folder"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_named(
    words: list[str], message: str, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    (folder / "empty").mkdir()
    (folder / "q.jsonl").write_text('{"question": "a"}')
    with pytest.raises(SystemExit) as caught:
        _run(tmp_path, *(word.format(folder) for word in words), "--out", tmp_path / "a.jsonl")
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("a.jsonl*"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a.jpg"}', 'line 2 of {} is not {{"image": path, "question": text}}'),
        ("[1]", "line 2 of {} is not"),
        ('{"question": ', "line 2 of {} is not valid JSON"),
        ('{"question": "\xe9"}', "line 2 of {} is not valid JSON"),
        ('{"question": "a", "image": 7}', "line 2 of {} names its picture as 7"),
        ('{"question": "a <image>"}', "line 2 of {}: leave <image> out"),
        ('{"question": "a", "answer": "b"}', "line 2 of {} has 'answer'"),
        ('{"question": ""}', "line 2 of {}: the question is empty"),
        (None, "it holds no question"),
    ],
)
def test_a_bad_line_of_questions_is_named(
    line: str | None, message: str, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(b"" if line is None else b'{"question": "a"}\n' + line.encode("latin-1"))
    with pytest.raises(SystemExit):
        _run(tmp_path, "--questions", path, "--out", tmp_path / "a.jsonl")
    assert message.format(path) in capsys.readouterr().err


def test_a_folder_without_any_readable_picture_fails(llava_dir: Path, tmp_path: Path, capsys: Any) -> None:
    for number in range(7):
        (tmp_path / f"{number}.jpg").write_text("no picture")
    with pytest.raises(SystemExit) as caught:
        _run(llava_dir, "--prompt", "a", "--images", tmp_path, "--out", tmp_path / "a.jsonl")
    assert caught.value.code == 1
    assert "skipped: 2 more" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        _run(tmp_path, "--prompt", "a", "--images", tmp_path, "--out", tmp_path / "b.jsonl")
    assert caught.value.code == 2
    assert "there is no model directory" in capsys.readouterr().err
