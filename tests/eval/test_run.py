"""The engine: batches, kills, several processes, floors, bad pictures, and the command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from eval import run as run_module
from eval.answers import InputError
from eval.compare import main as compare
from eval.config import BenchmarkSettings, RunSettings, load_settings
from eval.engine import AnswerStore, exchange_pictures
from eval.model import Answer, Answerer
from eval.report import main as report
from eval.rescore import main as rescore
from eval.run import main, run
from llm_integration.generate import answer as answer_one
from llm_integration.generate import build_message, load_chat
from llm_integration.replies import reply_to_all

ROOT = Path(__file__).resolve().parents[2]


class Parrot:
    """Answers every question with what it was shown, and remembers its batches."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.batches: list[list[str]] = []
        self.fail_after = fail_after

    def answer(self, prompts: Sequence[str], pictures: Sequence[Image.Image | None]) -> list[Answer]:
        if self.fail_after is not None and len(self.batches) == self.fail_after:
            raise KeyboardInterrupt
        self.batches.append(list(prompts))
        return [Answer("no" if p is None else f"yes {p.width}", 9 * (p is not None), 2) for p in pictures]


@pytest.fixture
def settings(quiz: Path, tmp_path: Path) -> Callable[..., RunSettings]:
    def build(**changes: Any) -> RunSettings:
        files = BenchmarkSettings("easy_vqa", questions=quiz / "questions.json", images=quiz / "images")
        return RunSettings(
            **{"model": Path("m"), "task": files, "out": tmp_path / "run", "batch": 4} | changes
        )

    return build


def lines(folder: Path, name: str = "answers.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_every_question_is_asked_once_and_scored(settings: Callable[..., RunSettings]) -> None:
    parrot = Parrot()
    outcome = run(settings(), ["words"], parrot)
    assert [len(batch) for batch in parrot.batches] == [4, 4, 2]
    assert parrot.batches[0][0] == "is it number 0?\nAnswer the question using a single word or phrase."
    rows = lines(settings().out)
    assert [row["question_id"] for row in rows] == list(range(10))
    assert rows[1] == {
        "question_id": 1,
        "key": "1",
        "image": "1.png",
        "prompt": parrot.batches[0][1],
        "text": "yes 49",
        "model_id": "m",
        "visual_tokens": 9,
        "new_tokens": 2,
    }
    scores = json.loads((settings().out / "scores.json").read_text())
    assert scores["figures"]["accuracy"]["n"] == 10
    assert (scores["floor"], scores["visual_tokens"], scores["protocol"]) == (None, 9.0, "llava-1.5")
    assert scores["provenance"]["command"] == "python -m eval.run words"
    assert len(scores["provenance"]["config_sha256"]) == 64
    assert outcome is not None
    assert outcome.figures["accuracy"].value == scores["figures"]["accuracy"]["value"] == 0.0
    again = Parrot()
    run(settings(), [], again)
    assert again.batches == []  # a finished run is not asked again
    rescored = json.loads((settings().out / "scores.json").read_text())
    assert rescored["provenance"] == scores["provenance"]  # of the answers, not the scoring


def test_an_interrupted_run_goes_on_without_hole_or_duplicate(settings: Callable[..., RunSettings]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(settings(), [], Parrot(fail_after=1))
    part = settings().out / "answers.part-0000.jsonl"
    with part.open("a") as file:
        file.write('{"key": "4", "te')  # a line that was being written
    parrot = Parrot()
    run(settings(batch=3), [], parrot)
    assert [len(batch) for batch in parrot.batches] == [3, 3]
    assert [row["key"] for row in lines(settings().out)] == [str(n) for n in range(10)]
    assert list(settings().out.glob("*.part-*")) == []
    provenance = json.loads((settings().out / "scores.json").read_text())["provenance"]
    assert len(provenance["earlier_starts"]) == 1


def test_a_kill_before_the_parts_are_removed_leaves_a_whole_run(
    settings: Callable[..., RunSettings], tmp_path: Path
) -> None:
    run(settings(), [], Parrot())
    shutil.copy(settings().out / "answers.jsonl", settings().out / "answers.part-0000.jsonl")
    run(settings(), [], Parrot(fail_after=0))
    assert list(settings().out.glob("*.part-*")) == []
    assert report([str(settings().out), "-o", str(tmp_path / "r.md"), "--no-rois"]) == 0


def test_a_run_that_is_stopped_says_how_to_go_on(
    quiz: Path,
    llava_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("eval.run.run", stopped)
    assert main([str(command(quiz, llava_dir, tmp_path / "run")[0])]) == 130
    assert f"goes on behind the last answer in {tmp_path / 'run'}" in capsys.readouterr().err


def test_answers_that_do_not_fit_the_questions_are_refused(settings: Callable[..., RunSettings]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(settings(), [], Parrot(fail_after=1))
    AnswerStore(settings().out, 3).write([{"key": "1", "text": "twice"}])
    with pytest.raises(InputError, match="1 duplicates and 0 holes"):
        run(settings(), [], Parrot())


def test_a_line_that_another_process_is_writing_is_not_read_yet(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path, 0)
    store.write([{"key": "1", "text": "gr\u00fcn"}])
    torn = json.dumps({"key": "2", "text": "gr\u00fcn"}, ensure_ascii=False).encode()[:-3]
    AnswerStore(tmp_path, 1).path.write_bytes(torn)  # cut within the letter
    assert store.read() == [{"key": "1", "text": "gr\u00fcn"}]
    AnswerStore(tmp_path, 1).path.write_bytes(b"{]\n")
    with pytest.raises(InputError, match=r"Line 1 of .*0001.* is not JSON"):
        store.read()


def test_other_settings_in_the_same_folder_are_refused(settings: Callable[..., RunSettings]) -> None:
    run(settings(), [], Parrot())
    with pytest.raises(InputError, match="max_new_tokens: 16 there, 9 here"):
        run(settings(max_new_tokens=9), [], Parrot())
    (settings().out / "config.json").unlink()
    with pytest.raises(InputError, match="is not empty and holds no run"):
        run(settings(), [], Parrot())


def test_a_second_run_in_a_folder_is_refused_while_one_is_at_work(
    settings: Callable[..., RunSettings], quiz: Path, llava_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = settings().out
    other = [*command(quiz, llava_dir, out)[1][1:], "limit=3"]
    told: list[subprocess.CompletedProcess[str]] = []

    class Meanwhile(Parrot):
        def answer(self, *given: Any) -> list[Answer]:
            if not told:
                told.append(
                    subprocess.run([sys.executable, *other], cwd=ROOT, capture_output=True, text=True)
                )
            return super().answer(*given)

    assert run(settings(), [], Meanwhile()) is not None
    assert told[0].returncode == 2
    assert f"error: {out} is in use by process {os.getpid()} on " in told[0].stderr
    assert len(lines(out)) == 10
    assert json.loads((out / "config.json").read_text())["limit"] is None


def test_a_folder_that_was_moved_is_the_same_run(settings: Callable[..., RunSettings]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(settings(), [], Parrot(fail_after=1))
    moved = settings().out.rename(settings().out.with_name("moved"))
    parrot = Parrot()
    assert run(settings(out=moved), [], parrot) is not None
    assert [len(batch) for batch in parrot.batches] == [4, 2]


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_run_whose_own_files_were_spoilt_is_refused_in_one_sentence(
    content: str, settings: Callable[..., RunSettings]
) -> None:
    run(settings(), [], Parrot())
    for name in ("config.json", "origins.json"):
        path = settings().out / name
        whole = path.read_text()
        path.write_text("{}" if (name, content) == ("origins.json", "[]") else content)
        with pytest.raises(InputError, match=rf"{name} is not (JSON|what a run writes there)"):
            run(settings(), [], Parrot())
        path.write_text(whole)


def test_a_folder_that_cannot_be_one_is_refused_in_one_sentence(
    settings: Callable[..., RunSettings], quiz: Path
) -> None:
    for out in (quiz / "questions.json", quiz / "questions.json" / "run"):
        with pytest.raises(InputError, match=r"The run's folder .* cannot be used: "):
            run(settings(out=out), [], Parrot())


def test_a_start_without_an_answer_leaves_the_folder_free(settings: Callable[..., RunSettings]) -> None:
    class Broken(Parrot):
        def answer(self, *_: Any) -> Any:
            raise InputError("no answer at all")

    with pytest.raises(InputError, match="no answer at all"):
        run(settings(seed=7), [], Broken())
    assert run(settings(seed=8), [], Parrot()) is not None
    assert len(json.loads((settings().out / "origins.json").read_text())) == 1


def test_floors(settings: Callable[..., RunSettings], tmp_path: Path) -> None:
    run(settings(floor="no-image"), [], Parrot())
    assert {row["text"] for row in lines(settings().out)} == {"no"}
    assert json.loads((settings().out / "scores.json").read_text())["floor"] == "no-image"
    out = tmp_path / "other"
    run(settings(floor="random-picture", out=out), [], Parrot())
    own = {row["key"]: f"{int(row['key']) % 4}.png" for row in lines(out)}
    assert all(row["image"] != own[row["key"]] for row in lines(out))
    assert {row["image"] for row in lines(out)} == {f"{n}.png" for n in range(4)}


def test_exchanged_pictures_depend_on_the_seed_only() -> None:
    images = [f"{n}.png" for n in range(9)] * 2 + [None]
    first = exchange_pictures(images, 0)
    assert first == exchange_pictures(images, 0) != exchange_pictures(images, 1)
    assert first[-1] is None
    assert all(a != b for a, b in zip(images[:-1], first[:-1], strict=True))
    with pytest.raises(InputError, match="at least two pictures"):
        exchange_pictures(["a.png", "a.png"], 0)


def test_bad_pictures_are_named_and_left_out_of_the_figures(
    settings: Callable[..., RunSettings], quiz: Path
) -> None:
    (quiz / "images" / "2.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"1 pictures cannot be used \(.*2\.png is no picture"):
        run(settings(), [], Parrot())
    (quiz / "images" / "1.png").unlink()
    with pytest.raises(InputError, match=r"1 pictures of easy_vqa are not in .* \(1\.png\)"):
        run(settings(), [], Parrot())
    outcome = run(settings(max_bad_pictures=2), [], Parrot())  # five questions about two pictures
    assert outcome is not None
    assert outcome.figures["accuracy"].n == 5
    assert outcome.matched.missing == ("1", "2", "5", "6", "9")
    assert [row["key"] for row in lines(settings().out, "skipped.jsonl")] == ["1", "2", "5", "6", "9"]
    with pytest.raises(InputError, match="max_bad_pictures=1 are allowed"):
        run(settings(max_bad_pictures=1, out=settings().out.parent / "b"), [], Parrot())


def test_limit_needs_the_pictures_of_its_questions_only(
    settings: Callable[..., RunSettings], quiz: Path
) -> None:
    (quiz / "images" / "3.png").unlink()
    outcome = run(settings(limit=3), [], Parrot())
    assert outcome is not None
    assert outcome.figures["accuracy"].n == 3


def test_a_batch_answers_as_one_question_does(llava_dir: Path, quiz: Path) -> None:
    chat = load_chat(llava_dir, "cpu")
    prompts = ["is it red?", "what colour is the big square on the left of the table?", "why"]
    pictures = [Image.open(quiz / "images" / "0.png"), None, Image.open(quiz / "images" / "3.png")]
    answers = Answerer(chat, 8).answer(prompts, pictures)
    for prompt, picture, given in zip(prompts, pictures, answers, strict=True):
        assert given.text == answer_one(picture, prompt, chat, 8)
        assert given.visual_tokens == (0 if picture is None else 9)
        assert 1 <= given.new_tokens <= 8


def command(quiz: Path, llava_dir: Path, out: Path) -> tuple[Path, list[str]]:
    config = quiz / "run.yaml"
    config.write_text(
        f"model: {llava_dir}\nout: {out}\nbatch: 2\nmax_new_tokens: 4\ntask:\n  name: easy_vqa\n"
        f"  questions: {quiz / 'questions.json'}\n  images: {quiz / 'images'}\n"
    )
    return config, [sys.executable, "-m", "eval.run", str(config)]


def test_the_command_survives_sigkill(quiz: Path, llava_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    config, words = command(quiz, llava_dir, out)
    part = out / "answers.part-0000.jsonl"
    process = subprocess.Popen([*words, "batch=1"], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (part.is_file() and part.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main([str(config)]) == 0
    assert main([str(config), f"out={tmp_path / 'whole'}"]) == 0
    assert lines(out) == lines(tmp_path / "whole")
    assert compare([str(out), str(tmp_path / "whole")]) == 0
    assert report([str(out), "--out", str(tmp_path / "report.html")]) == 0
    stored = ["--questions", str(quiz / "questions.json"), "--answers", str(out / "answers.jsonl")]
    assert rescore(["--task", "easy_vqa", *stored]) == 0


def test_answers_of_other_weights_are_not_taken_for_the_models(
    quiz: Path, llava_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(llava_dir, tmp_path / "model")
    config, _ = command(quiz, model, tmp_path / "run")
    assert main([str(config)]) == 0
    assert main([str(config)]) == 0
    file = str(model / "model.safetensors")
    save_file(
        {name: value * 1.01 for name, value in load_file(file).items()}, file, metadata={"format": "pt"}
    )
    assert main([str(config)]) != 0
    assert f"holds answers of other weights than {model} has now" in capsys.readouterr().err
    shutil.rmtree(model)
    assert main([str(config)]) == 0  # what is finished can be scored without the model


def test_answers_of_another_configuration_are_not_taken_for_the_models(
    quiz: Path, llava_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(llava_dir, tmp_path / "model")
    config, _ = command(quiz, model, tmp_path / "run")
    assert main([str(config)]) == 0
    (model / "notes.txt").write_text("mine")  # nothing is read from it
    (model / "results.json").mkdir()
    assert main([str(config)]) == 0
    changed = [model / "config.json", next(model.glob("*.jinja"))]
    for path in changed:
        path.write_text(path.read_text() + " ")
    assert main([str(config)]) == 2
    error = capsys.readouterr().err
    assert f"as it was before {', '.join(sorted(path.name for path in changed))} changed" in error
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    del written["model_files"]  # a run of before they were noted
    (tmp_path / "run" / "config.json").write_text(json.dumps(written))
    assert main([str(config)]) == 0


@pytest.mark.parametrize("finished", [True, False])
def test_answers_to_questions_that_were_edited_meanwhile_are_refused(
    finished: bool, settings: Callable[..., RunSettings], quiz: Path
) -> None:
    if finished:
        run(settings(), [], Parrot())
    else:
        with pytest.raises(KeyboardInterrupt):
            run(settings(), [], Parrot(fail_after=1))
    path = quiz / "questions.json"
    path.write_text(path.read_text().replace("is it really number 1?", "is it number one?"))
    parrot = Parrot()
    with pytest.raises(
        InputError, match=r"holds an answer to 'is it really number 1\?.* where question 1 is"
    ):
        run(settings(), [], parrot)
    assert parrot.batches == []


@pytest.mark.parametrize("finished", [True, False])
def test_answers_about_pictures_that_were_exchanged_meanwhile_are_refused(
    finished: bool, settings: Callable[..., RunSettings], quiz: Path
) -> None:
    if finished:
        run(settings(), [], Parrot())
    else:
        with pytest.raises(KeyboardInterrupt):
            run(settings(), [], Parrot(fail_after=1))
    path = quiz / "questions.json"
    rows = json.loads(path.read_text())
    was, now = rows[1][2], (rows[1][2] + 1) % 3
    path.write_text(json.dumps([rows[0], [*rows[1][:2], now], *rows[2:]]))
    parrot = Parrot()
    with pytest.raises(
        InputError, match=rf"holds an answer to '{was}\.png', where question 1 is now '{now}\.png'"
    ):
        run(settings(), [], parrot)
    assert parrot.batches == []


def test_runs_of_other_prompts_are_not_compared(
    settings: Callable[..., RunSettings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, floor in (("plain", "none"), ("bare", "none"), ("floor", "no-image")):
        run(settings(out=tmp_path / name, floor=floor), [], Parrot())
    scores = tmp_path / "bare" / "scores.json"
    scores.write_text(json.dumps({**json.loads(scores.read_text()), "protocol": "bare"}))
    assert compare([str(tmp_path / "plain"), str(tmp_path / "bare")]) == 2
    assert "follow different protocols, llava-1.5 and bare" in capsys.readouterr().err
    assert compare([str(tmp_path / "plain"), str(tmp_path / "floor")]) == 0
    assert f"{tmp_path / 'floor'} (floor: no-image)" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_give_the_same_file(quiz: Path, llava_dir: Path, tmp_path: Path) -> None:
    config, _ = command(quiz, llava_dir, tmp_path / "one")
    assert main([str(config)]) == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [sys.executable, *launcher, "-m", "eval.run", str(config), f"out={tmp_path / 'two'}"],
        cwd=ROOT,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert lines(tmp_path / "one") == lines(tmp_path / "two")


def test_errors_are_one_sentence(
    quiz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], llava_dir: Path
) -> None:
    config, _ = command(quiz, llava_dir, tmp_path / "run")
    for words, said in (
        (["nothing.yaml"], "The settings file nothing.yaml does not exist."),
        ([str(tmp_path)], f"The settings file {tmp_path} cannot be read: "),
        ([str(quiz / "images" / "0.png")], "0.png is not UTF-8 text (byte 0)."),
        ([str(config), f"task.questions={config}/q.json"], "q.json cannot be read: "),
        ([str(config), "task.name=popo"], "did you mean 'pope'?"),
        ([str(config), "floor=blind"], "floor"),
        ([str(config), "btch=3"], "batch"),
        ([str(config), f"model={tmp_path}"], "there is no model directory"),
        ([str(config), "protocol=lmms-eval"], "has no prompt protocol 'lmms-eval'"),
        ([str(config), "task.images=null"], "name their folder as task.images"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert said in error
        assert "Traceback" not in error


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "eval").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_settings_name_their_benchmark(path: Path) -> None:
    if path.stem.startswith("pareto"):
        pytest.skip("settings of eval.pareto")
    made = load_settings(path, ["model=somewhere"])
    assert made.task.name == path.stem
    assert str(made.out) == f"runs/eval/{path.stem}"
    ours = dict.fromkeys(("daquar", "easy_vqa", "scenes"), 16)
    long = dict.fromkeys(("mmbench", "mmvet", "scienceqa"), 1024)
    assert made.max_new_tokens == {**ours, **long}.get(path.stem, 128)  # as LLaVA's scripts have it


def test_answers_that_do_not_tell_their_prompts_are_compared(
    settings: Callable[..., RunSettings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("plain", "rescored"):
        run(settings(out=tmp_path / name), [], Parrot())
    scores = tmp_path / "rescored" / "scores.json"
    told = json.loads(scores.read_text())
    scores.write_text(json.dumps({key: told[key] for key in told if key not in ("protocol", "floor")}))
    assert compare([str(tmp_path / "plain"), str(tmp_path / "rescored")]) == 0
    assert "floor" not in capsys.readouterr().out


def test_a_run_that_is_stopped_before_it_has_settings_ends_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "load_settings", interrupt)
    assert main(["x.yaml"]) == 130


def test_a_setting_that_is_there_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.yaml").write_text("limit: 1\nbatch: 2\nlimit: 3\n")
    assert main([str(tmp_path / "x.yaml")]) == 2
    assert "x.yaml is not valid YAML: the key 'limit' is there twice" in capsys.readouterr().err


def test_prompts_that_leave_no_room_for_an_answer_are_counted(
    settings: Callable[..., RunSettings], llava_dir: Path, quiz: Path
) -> None:
    chat = load_chat(llava_dir)
    asked = [question for question, *_ in json.loads((quiz / "questions.json").read_text())]
    suffix = "\nAnswer the question using a single word or phrase."
    prompts = [
        reply.prompt_tokens for reply in reply_to_all(chat, [[build_message(q + suffix)] for q in asked], 1)
    ]
    chat.positions = sorted(prompts)[5] + 9  # with a picture's tokens: between the shortest and the longest
    with pytest.warns(UserWarning, match="of no use"):
        run(settings(), [], Answerer(chat, 2))
    rows = lines(settings().out)
    long = [row["key"] for row in rows if row.get("too_long")]
    assert 0 < len(long) < len(rows)
    by_length = sorted(rows, key=lambda row: len(row["prompt"]))
    assert {row["key"] for row in by_length[-len(long) :]} == set(long)
    assert json.loads((settings().out / "scores.json").read_text())["prompts_too_long"] == len(long)
