"""The report: what it says, in all its forms, and what it refuses."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from eval.compare import main as compare
from eval.config import BenchmarkSettings, RunSettings
from eval.report import main
from eval.reports.content import build_content
from eval.reports.examples import draw_lots
from eval.reports.eyes import crop_of, load_eyes
from eval.reports.inputs import read_sources
from eval.reports.parts import signed
from eval.reports.svg import pick_log_ticks, pick_ticks, short
from eval.reports.words import name_figure, name_prompts, name_task, say_times
from eval.run import run
from eval.task import SHORT_ANSWER, Example
from eval.tasks import list_tasks
from llm_integration.hf import SparseFormerVisionModel
from llm_integration.result import load_tower
from sparse_vlm import TransformConfig, load_encoder
from tests.eval.report_runs import Scripted, make_everything, make_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, llava_dir: Path) -> Path:
    """A run of every kind."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_everything(llava_dir)
    return folder


@pytest.fixture
def runs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them to spoil, in the current folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


EVERYTHING = ("vit", "ours", "blind", "pareto", "cost.jsonl", "zeroshot.json")


def report(runs: Path, *words: str, names: tuple[str, ...] = EVERYTHING) -> int:
    return main([*(str(runs / name) for name in names), *words])


def test_everything_in_three_forms(runs: Path, tmp_path: Path) -> None:
    page, markdown, values = tmp_path / "r.html", tmp_path / "r.md", tmp_path / "r.json"
    assert report(runs, "-o", str(page), "--markdown", str(markdown), "--json", str(values)) == 0
    html, text, content = page.read_text(), markdown.read_text(), json.loads(values.read_text())
    for section in ("Benchmarks", "Paired comparisons", "Accuracy against cost", "Cost", "Examples"):
        assert f"{section}</a></h2>" in html
    # Nothing is fetched: addresses are data or places in the page.
    addresses = re.findall(r'(?:href|src|url)\s*[=(]\s*"?([^">)]+)', html)
    assert addresses
    assert {address[:5] for address in addresses if not address.startswith("#")} == {"data:"}
    assert "<script" not in html
    assert "&lt;script&gt;alert(&#x27;x&#x27;)" in html
    assert "\\<script\\>" in text
    # The figures are those of the runs.
    scores = json.loads((runs / "vit" / "scores.json").read_text())["figures"]["accuracy"]
    assert content["benchmarks"][0]["runs"][0]["figures"]["accuracy"] == scores
    # Ours − the ViT: first what ours alone has right.
    assert re.search(r"ours.* − .*vit(?s:.*?)<td[^>]*>2 / 3, pictures drawn: no McNemar test", html)
    interval = f"{scores['low']:.2f} – {scores['high']:.2f}"
    assert f'50.00</span><span class="interval">{interval}' in html
    assert f"50.00 ({scores['low']:.2f} to {scores['high']:.2f})" in text
    assert [point["method"] for point in content["pareto"][0]["points"]][:2] == ["vit", "pool"]
    assert "units" not in json.dumps(content["pareto"])


def test_every_figure_says_where_it_comes_from(runs: Path, tmp_path: Path) -> None:
    page, markdown, values = tmp_path / "r.html", tmp_path / "r.md", tmp_path / "r.json"
    report(runs, "-o", str(page), "--markdown", str(markdown), "--json", str(values), "--no-rois")
    html = page.read_text()
    sources = json.loads(values.read_text())["sources"]
    assert [source["number"] for source in sources] == list(range(1, 8))
    for source in sources:
        assert f'id="source-{source["number"]}"' in html
        assert html.count(f'href="#source-{source["number"]}"') >= 1
        for key in ("command", "commit", "config_sha256"):
            assert source[key]
            assert source[key] in html
            assert source[key] in markdown.read_text()
    assert sources[0]["command"].startswith("python -m eval.run configs/eval/easy_vqa.yaml")


def test_readers_get_words_and_the_json_form_keeps_the_identifiers(runs: Path, tmp_path: Path) -> None:
    page, markdown, values = tmp_path / "r.html", tmp_path / "r.md", tmp_path / "r.json"
    report(runs, "-o", str(page), "--markdown", str(markdown), "--json", str(values), "--no-rois")
    html, text = page.read_text(), markdown.read_text()
    for word in ("easy-VQA score", "<h3>easy-VQA</h3>", "LLaVA-1.5&#x27;s prompts", "over pictures"):
        assert word in html
    for word in ("## easy-VQA", "yes or no, %", "top 1", "LLaVA-1.5's prompts", "average pooling at 100"):
        assert word in text
    shown = re.sub(r"<code>.*?</code>|<[^>]*>", "", html.split("Where the figures come from</a></h2>")[0])
    shown = shown.split("</style>")[-1]
    for identifier in ("easy_vqa", "yes_no", "top1", "llava-1.5", "pool at"):
        assert identifier not in shown.partition("sparse-vlm · evaluation")[2], identifier
        assert identifier not in re.sub(r"`[^`]*`", "", text), identifier
    assert '<span title="yes_no">yes or no</span>' in html
    assert "average pooling at 100 (of 64)" in html
    kept = json.loads(values.read_text())
    assert kept["benchmarks"][0]["task"] == "easy_vqa"
    assert "yes_no" in kept["benchmarks"][0]["runs"][0]["figures"]


def test_what_is_not_known_is_left_out_and_what_is_alike_is_said_once(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    report(runs, "-o", str(page), "--no-rois")
    html = page.read_text()
    # Two records of the same towers; one has clocks, and neither knows its device.
    assert html.count("multiply-adds, tiny Llama") == 1
    assert "200 ms, batch 4." in html
    assert "Multiply-adds, counted.<" in html
    path = runs / "pareto" / "pareto.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prompt_tokens": 12}))
    report(runs, "-o", str(page), names=("pareto",))
    assert "Multiply-adds, counted; a question of 12 tokens." in page.read_text()


def test_a_comparison_says_how_often_each_point_was_trained(runs: Path, tmp_path: Path) -> None:
    page, path = tmp_path / "r.html", runs / "pareto" / "pareto.json"
    report(runs, "-o", str(page), names=("pareto",))
    assert "VQA v2 official; 8 steps of 4 pictures; 2 trainings a point<" in page.read_text()
    content = json.loads(path.read_text())
    content["points"][1]["seeds"] = [0, 1, 2]
    path.write_text(json.dumps(content))
    report(runs, "-o", str(page), names=("pareto",))
    assert "; 2 or 3 trainings a point<" in page.read_text()
    for point in content["points"]:
        point["seeds"] = [0]
    path.write_text(json.dumps(content))
    report(runs, "-o", str(page), names=("pareto",))
    assert "trainings a point<" not in page.read_text()


def test_a_drawing_stands_above_a_table_that_is_much_longer(runs: Path, tmp_path: Path) -> None:
    page, path = tmp_path / "r.html", runs / "vit" / "scores.json"
    words = ["-o", str(page), "--examples", "0"]
    report(runs, *words, names=("vit",))
    assert '<div class="pair"><figure' in page.read_text()
    scores = json.loads(path.read_text())
    scores["figures"] |= {f"{n}": scores["figures"]["accuracy"] for n in range(6)}
    path.write_text(json.dumps(scores))
    report(runs, *words, names=("vit",))
    assert '<div class="stack"><figure' in page.read_text()
    # No empty box where there is neither.
    path.write_text(json.dumps({**scores, "figures": {}}))
    report(runs, *words, names=("vit",))
    assert '<div class="pair"></div>' not in page.read_text()
    assert '<div class="stack"></div>' not in page.read_text()


@pytest.mark.parametrize(
    ("figure", "words"),
    [
        ("accuracy", "accuracy"),
        ("llava/mean/f1", "LLaVA's rule: mean F1"),
        ("strict/random/yes_ratio", "exact word: random share of yes"),
        ("answer_type/yes/no", "answer type: yes/no"),
        ("l2_category/finegrained_perception", "l2 category: finegrained perception"),
        ("code_reasoning/accuracy_plus", "code reasoning accuracy+"),
        ("OCR", "OCR"),
        ("image_to_text@5", "image to text @ 5"),
    ],
)
def test_figures_have_names(figure: str, words: str) -> None:
    assert name_figure(figure) == words


def test_benchmarks_have_names() -> None:
    """A new one is added to the words, unless it is a word itself."""
    assert [task for task in list_tasks() if name_task(task) == task] == ["scenes"]
    assert name_prompts("lmms-eval") == "lmms-eval prompts"


def test_pairs_are_compared_as_eval_compare_does(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report(runs, "-o", str(tmp_path / "r.json"))
    towers, eyes = json.loads((tmp_path / "r.json").read_text())["benchmarks"][0]["comparisons"]
    compare([str(runs / "vit"), str(runs / "ours"), "--json", str(tmp_path / "c.json")])
    assert towers == {"what": "towers", "runs": [1, 2], **json.loads((tmp_path / "c.json").read_text())}
    assert (towers["only_first"], towers["only_second"]) == (3, 2)
    assert (eyes["what"], eyes["runs"], eyes["difference"]) == ("eyes", [3, 2], 40.0)


def test_examples_are_right_and_wrong_alike(runs: Path, tmp_path: Path) -> None:
    report(runs, "-o", str(tmp_path / "r.json"), "--examples", "2")
    groups = json.loads((tmp_path / "r.json").read_text())["benchmarks"][0]["examples"]
    assert {group["group"]: group["of"] for group in groups} == {
        "both right": 2,
        "only vit right": 3,
        "only ours right": 2,
        "both wrong": 3,
    }
    assert all(len(group["shown"]) == 2 for group in groups)
    for group in groups:
        for shown in group["shown"]:
            assert shown["gold"] == ["yes"]
            right = [answer["score"] == 1 for answer in shown["answers"]]
            assert (
                right
                == {
                    "both right": [True, True],
                    "only vit right": [True, False],
                    "only ours right": [False, True],
                    "both wrong": [False, False],
                }[group["group"]]
            )
            assert [answer["source"] for answer in shown["answers"]] == [1, 2]


def test_one_run_alone_and_soft_edges(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    assert report(runs, "-o", str(page), names=("ours",)) == 0
    html = page.read_text()
    assert ">right <span" in html
    assert "Paired comparisons" not in html
    assert "answers in another script than Latin" in html
    assert html.count('class="rois layer-2"') == html.count("<image ")
    assert report(runs, "-o", str(page), "--no-rois", names=("ours",)) == 0
    assert 'class="rois' not in page.read_text()
    assert report(runs, "-o", str(page), "--examples", "0", names=("ours",)) == 0
    assert "<image " not in page.read_text()


def test_names_are_the_callers(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    words = [f"Whole & large={runs / 'vit'}", f"small={runs / 'ours'}", "-o", str(page), "--title", "A <b> C"]
    assert main(words) == 0
    html = page.read_text()
    assert "only Whole &amp; large right" in html
    assert "<h1>A &lt;b&gt; C</h1>" in html


def test_runs_that_cannot_be_compared_say_so(runs: Path) -> None:
    short_run = make_run(runs / "short", Path("vit"), ["yes"] * 4, limit=4)
    sources = read_sources([str(runs / "vit"), str(short_run)])
    origin = {"date": "", "commit": "", "command": ""}
    (benchmark,) = build_content(sources, "", origin, 0).benchmarks
    assert benchmark.comparisons[0]["dropped"] == 6
    assert "6 questions that only one of them answered" in benchmark.notes[0]
    path = runs / "short" / "scores.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "protocol": "lmms-eval"}))
    sources = read_sources([str(runs / "vit"), str(short_run)])
    (benchmark,) = build_content(sources, "", origin, 0).benchmarks
    assert benchmark.comparisons == ()
    assert "their prompts follow llava-1.5 and lmms-eval" in benchmark.notes[0]


def test_runs_that_a_server_scores_are_shown_and_not_compared(runs: Path, tmp_path: Path) -> None:
    asked = [
        {"question_id": n, "image": f"{n}.png", "text": f"q {n}?{SHORT_ANSWER}", "category": "default"}
        for n in range(4)
    ]
    questions = tmp_path / "testdev.jsonl"
    questions.write_text("".join(f"{json.dumps(row)}\n" for row in asked))
    files = BenchmarkSettings("vqav2", questions=questions, images=Path("quiz/images"))
    for name in ("one", "two"):
        run(RunSettings(model=Path(name), task=files, out=runs / name), [], Scripted(["yes"] * 4, 9))
    words = ["-o", str(tmp_path / "r.html"), "--json", str(tmp_path / "r.json"), "--no-rois"]
    assert report(runs, *words, names=("one", "two", "vit", "ours")) == 0
    served, scored = json.loads((tmp_path / "r.json").read_text())["benchmarks"]
    assert served["comparisons"] == []
    assert served["notes"] == ["one and two are not compared: no question of one and two has a score here."]
    assert len(scored["comparisons"]) == 1
    assert "No figures: this benchmark is scored by a server or a judge." in (tmp_path / "r.html").read_text()


def test_other_figures_than_the_primary_one_are_no_servers(runs: Path, tmp_path: Path) -> None:
    path = runs / "vit" / "scores.json"
    scores = json.loads(path.read_text())
    scores["figures"] = {"vanilla": scores["figures"]["accuracy"]}
    path.write_text(json.dumps(scores))
    assert report(runs, "-o", str(tmp_path / "r.html"), "--examples", "0", names=("vit",)) == 0
    html = (tmp_path / "r.html").read_text()
    assert "No run has the figure “accuracy”" in html
    assert "scored by a server" not in html


def test_runs_of_other_questions_are_not_compared(runs: Path, tmp_path: Path) -> None:
    rows = json.loads(Path("quiz/questions.json").read_text())
    other = tmp_path / "other.json"
    other.write_text(json.dumps([[f"another {row[0]}", *row[1:]] for row in rows]))
    files = BenchmarkSettings("easy_vqa", questions=other, images=Path("quiz/images"))
    settings = RunSettings(model=Path("vit"), task=files, out=runs / "other")
    run(settings, [], Scripted(["yes"] * 10, 9))
    assert report(runs, "-o", str(tmp_path / "r.json"), names=("vit", "other", "ours")) == 0
    (benchmark,) = json.loads((tmp_path / "r.json").read_text())["benchmarks"]
    assert [made["runs"] for made in benchmark["comparisons"]] == [[1, 3]]
    (note,) = benchmark["notes"]
    assert note.startswith("vit and other are not compared: 10 questions of the same keys are others")
    shown = [answer for group in benchmark["examples"] for one in group["shown"] for answer in one["answers"]]
    assert {answer["source"] for answer in shown} == {1, 3}


def test_examples_are_of_the_questions_that_were_asked(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("quiz/questions.json")
    path.write_text(path.read_text().replace("is it number 3?", "is it number three?"))
    words = ["-o", str(tmp_path / "r.html"), "--no-rois"]
    assert report(runs, *words, names=("vit",)) == 2
    error = capsys.readouterr().err
    assert "Line 4 of " in error
    assert "answers 'is it number 3?" in error
    assert "is now 'is it number three?" in error
    assert report(runs, *words, "--examples", "0", names=("vit",)) == 0


def test_examples_show_the_pictures_that_were_asked_about(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("quiz/questions.json")
    rows = json.loads(path.read_text())
    words = ["-o", str(tmp_path / "r.html"), "--no-rois"]
    path.write_text(json.dumps([*rows[:3], [*rows[3][:2], 0], *rows[4:]]))
    assert report(runs, *words, names=("vit",)) == 2
    error = capsys.readouterr().err
    assert "Line 4 of " in error
    assert "was asked about 3.png, and the question of that key is now about 0.png" in error
    assert report(runs, *words, "--examples", "0", names=("vit",)) == 0
    # A copy under another name is the same picture.
    shutil.copy("quiz/images/3.png", "quiz/images/x.png")
    path.write_text(json.dumps([*rows[:3], [*rows[3][:2], "x"], *rows[4:]]))
    assert report(runs, *words, names=("vit",)) == 0
    answers = runs / "vit" / "answers.jsonl"
    path.write_text(json.dumps(rows))
    answers.write_text(answers.read_text().replace('"image": "3.png"', '"image": null'))
    assert report(runs, *words, names=("vit",)) == 2
    assert "was asked without a picture, and the question of that key is now about 3.png" in (
        capsys.readouterr().err
    )


def test_runs_whose_folders_hold_other_pictures_of_one_name_are_not_shown_together(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("quiz/images", "moved")
    path = runs / "ours" / "config.json"
    path.write_text(path.read_text().replace("quiz/images", "moved"))
    words = ["-o", str(tmp_path / "r.html"), "--no-rois", "--examples", "10"]
    assert report(runs, *words, names=("vit", "ours")) == 0
    Image.new("RGB", (40, 30)).save("moved/2.png")
    assert report(runs, *words, names=("vit", "ours")) == 2
    said = "ours was asked about 2.png of moved, which is another picture than that of quiz/images"
    assert said in capsys.readouterr().err
    shutil.rmtree("moved")  # nothing to hold it against
    assert report(runs, *words, names=("vit", "ours")) == 0


def spoil(runs: Path, how: str) -> list[str]:
    """Breaks something; returns what to name."""
    quiz = runs.parent / "quiz"
    if how == "no run":
        return [str(quiz)]
    if how == "nothing there":
        return [str(runs / "nobody")]
    if how == "half-finished":
        (runs / "vit" / "answers.jsonl").rename(runs / "vit" / "answers.part-0000.jsonl")
        (runs / "vit" / "scores.json").unlink()
    elif how == "no scores":
        (runs / "vit" / "scores.json").unlink()
    elif how == "answers cut":
        path = runs / "vit" / "answers.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:6]))
    elif how == "line cut":
        path = runs / "vit" / "answers.jsonl"
        path.write_text(path.read_text()[:-5])
    elif how == "picture gone":
        (quiz / "images" / "2.png").unlink()
    elif how == "questions gone":
        (quiz / "questions.json").unlink()
    elif how == "model gone":
        shutil.rmtree(runs.parent / "vit")
    elif how == "twice":
        return [str(runs / "vit"), str(runs / "." / "vit")]
    elif how == "pareto half":
        (runs / "pareto" / "points").mkdir()
        (runs / "pareto" / "points" / "pool-16.json").write_text("{}")
        (runs / "pareto" / "pareto.json").unlink()
        return [str(runs / "pareto")]
    elif how == "pareto without cost":
        path = runs / "pareto" / "pareto.json"
        content = json.loads(path.read_text())
        del content["points"][1]["gmacs"]
        path.write_text(json.dumps(content))
        return [str(runs / "pareto")]
    elif how == "cost line cut":
        path = runs / "cost.jsonl"
        path.write_text(path.read_text()[:-20])
        return [str(path)]
    elif how == "something else":
        path = runs / "other.json"
        path.write_text('{"weights": [1, 2]}')
        return [str(path)]
    elif how == "scores named":
        return [str(runs / "vit" / "scores.json")]
    return [str(runs / "vit")]


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("no run", r"quiz is no run: expected a folder that eval\.run wrote"),
        ("nothing there", r"There is no run at .*nobody\."),
        ("half-finished", r"vit is a run that is not finished \(10 questions answered so far\)"),
        ("no scores", r"vit is not a whole run: it has no scores\.json\."),
        ("answers cut", r"scores\.json was made of 10 answers and .*answers\.jsonl holds 6;"),
        ("line cut", r"The last line of .*answers\.jsonl is not whole\."),
        ("picture gone", r"A picture of .*vit cannot be shown: there is no picture .*2\.png\. Make the"),
        ("questions gone", r"The examples of .*vit cannot be shown: .*questions\.json does not exist\."),
        ("model gone", r"The RoIs of .*vit cannot be drawn: there is no model directory.*--no-rois"),
        ("twice", r"vit is named twice\."),
        ("pareto half", r"pareto is a comparison that is not finished \(pool-16 there, no pareto\.json\)"),
        (
            "pareto without cost",
            r"pareto\.json is damaged, or .* of python -m eval\.pareto: points\[1\] lacks gmacs\.",
        ),
        ("cost line cut", r"Line 2 of .*cost\.jsonl is not whole JSON\."),
        ("something else", r"other\.json is not something a report is made of; expected the output of"),
        ("scores named", r"scores\.json belongs to a run; name its folder, .*vit\."),
    ],
)
def test_bad_input_is_named_in_one_sentence(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str, sentence: str
) -> None:
    named = spoil(runs, how)
    capsys.readouterr()
    assert main([*named, "-o", str(tmp_path / "r.html"), "--examples", "10"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(sentence, line), line
    assert not (tmp_path / "r.html").exists()


GONE = object()


def places(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place within JSON values; of what is alike, the first two."""
    if before:
        yield before
    if isinstance(value, dict):
        alike: Counter[str] = Counter()
        for key, inner in value.items():
            kind = str(sorted(inner) if isinstance(inner, dict) else key)
            alike[kind] += 1
            if alike[kind] <= 2:
                yield from places(inner, (*before, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value[:2]):
            yield from places(inner, (*before, number))


def change(value: Any, place: tuple[Any, ...], new: Any) -> str:
    """The values with one place changed, as JSON."""
    made = copy.deepcopy(value)
    inner = made
    for key in place[:-1]:
        inner = inner[key]
    if new is GONE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = new
    return json.dumps(made)


def make_quickstart(runs: Path) -> None:
    """A folder as eval.quickstart leaves it."""
    (runs / "quick" / "language").mkdir(parents=True)
    (runs / "quick" / "language" / "quickstart.json").write_text(
        json.dumps({"rows": {"vit": {}, "ours": {}}})
    )
    for name in ("vit", "ours"):
        shutil.copytree(runs / name, runs / "quick" / "language" / "runs" / name)


def test_a_folder_of_quickstart_is_its_runs(runs: Path, tmp_path: Path) -> None:
    make_quickstart(runs)
    for words, labels in (
        ([str(runs / "quick")], ["vit", "ours"]),
        ([f"Q={runs}/quick/language"], ["Q, vit", "Q, ours"]),
    ):
        assert main([*words, "-o", str(tmp_path / "r.json")]) == 0
        assert [
            source["label"] for source in json.loads((tmp_path / "r.json").read_text())["sources"]
        ] == labels


@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("vit", "vit/scores.json", 200),
        ("vit", "vit/config.json", 30),
        ("vit", "vit/answers.jsonl", 6),
        ("pareto", "pareto/pareto.json", 150),
        ("cost.jsonl", "cost.jsonl", 200),
        ("zeroshot.json", "zeroshot.json", 100),
        ("quick", "quick/language/quickstart.json", 3),
    ],
)
def test_whatever_is_damaged_ends_in_one_sentence_that_names_the_file(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, file: str, count: int
) -> None:
    """Each key of each kind of record gone, or of another kind."""
    make_quickstart(runs)
    path = runs / file
    *before, last = (
        path.read_text().splitlines(keepends=True) if path.suffix == ".jsonl" else [path.read_text()]
    )
    value = json.loads(last)
    words = [str(runs / name), "-o", str(tmp_path / "r.html"), "--markdown", str(tmp_path / "r.md")]
    refused = 0
    for place in places(value):
        for new in (GONE, None, [1], math.nan):
            path.write_text("".join(before) + change(value, place, new) + "\n")
            status = main([*words, "--json", str(tmp_path / "r.json"), "--no-rois", "--examples", "1"])
            lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            assert (status, len(lines)) in ((0, 0), (2, 1)), (place, new)
            assert all(path.name in line or f"{path.parent} " in line for line in lines), lines
            refused += len(lines)
    assert refused > count


@pytest.mark.parametrize(
    ("file", "place", "new", "sentence"),
    [
        (
            "vit/scores.json",
            ("figures", "accuracy", "value"),
            "50",
            r'scores\.json .* figures\.accuracy\.value must be a number, and is "50"\.$',
        ),
        (
            "vit/scores.json",
            ("figures", "accuracy", "low"),
            math.nan,
            r"figures\.accuracy\.low must be a finite number, and is NaN\.$",
        ),
        ("vit/scores.json", ("units", "3"), 40, r"units\.3 must be at most 1, and is 40\.$"),
        ("vit/scores.json", ("coverage", "answered"), GONE, r"coverage lacks answered\.$"),
        ("vit/config.json", ("task",), GONE, r"config\.json holds no settings of eval\.run: .*'task'"),
        (
            "vit/answers.jsonl",
            ("text",),
            None,
            r"Line 10 of .*answers\.jsonl is no answer of eval\.run: text must be text, and is null\.$",
        ),
        (
            "pareto/pareto.json",
            ("points", 2, "figures", "accuracy"),
            GONE,
            r"points\[2\]\.figures lacks accuracy\.$",
        ),
        (
            "pareto/pareto.json",
            ("points", 1, "ms", "total"),
            0,
            r"points\[1\]\.ms\.total must be more than 0, and is 0\.$",
        ),
        (
            "cost.jsonl",
            ("measured", 0, "sf_b_49", "see", "low"),
            0,
            r"Record 2 of .*cost\.jsonl .* measured\[0\]\.sf_b_49\.see\.low must be more than 0",
        ),
        ("cost.jsonl", ("labels", "sf_b_49"), GONE, r"labels lacks sf_b_49\.$"),
        (
            "zeroshot.json",
            ("differences", "top1", "p"),
            2,
            r"differences\.top1\.p must be at most 1, and is 2\.$",
        ),
        (
            "zeroshot.json",
            ("provenance", "versions"),
            [],
            r"provenance\.versions must be an object, and is \[\]\.$",
        ),
    ],
)
def test_a_damaged_key_is_named_with_what_would_be_right(
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    place: Any,
    new: Any,
    sentence: str,
) -> None:
    path = runs / file
    *before, last = (
        path.read_text().splitlines(keepends=True) if path.suffix == ".jsonl" else [path.read_text()]
    )
    path.write_text("".join(before) + change(json.loads(last), place, new) + "\n")
    named = path.parent if path.parent != runs else path
    assert main([str(named), "-o", str(tmp_path / "r.md")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(sentence, line), line


def test_outputs_that_cannot_be(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, sentence in (
        (["-o", "r.pdf"], "-o r.pdf: the name must end in .html, .md, .json."),
        (["-o", "r.md", "--markdown", "r.md"], "r.md is named twice."),
        (["-o", "r.html", "--json", str(tmp_path)], "is a folder; name a file."),
        (["-o", str(runs / "cost.jsonl" / "r.html")], "r.html cannot be written: "),
        (["-o", "r.html", "--examples", "-1"], "--examples must be at least 0."),
        (["-o", str(runs / "vit" / "scores.json")], "scores.json is named for something else, too"),
        (["-o", "r.md", "--json", str(runs / "zeroshot.json")], "zeroshot.json is named for something else"),
    ):
        kept = {path: path.read_bytes() for path in runs.rglob("*.json")}
        assert report(runs, *words) == 2
        assert sentence in capsys.readouterr().err
        assert {path: path.read_bytes() for path in kept} == kept


def test_eyes_are_the_encoders(
    llava_dir: Path, encoder_dir: Path, random_picture: Callable[..., Image.Image]
) -> None:
    picture = random_picture(64, 48)
    eyes = load_eyes(llava_dir)
    assert eyes is not None
    look = eyes.look(picture)
    encoder = load_encoder(encoder_dir)
    with torch.no_grad():
        rois = encoder.focus(encoder.transform(picture).unsqueeze(0)).rois
    for step, wanted in zip(look.steps, (rois[0][0], rois[-1][0]), strict=True):
        assert len(step.boxes) + step.whole == 8
        x, y, w, h = look.crop
        found = torch.tensor(step.boxes)
        spans = (wanted[:, 2:].clamp(0, 1) - wanted[:, :2].clamp(0, 1)) * torch.tensor([w, h])
        areas = spans.prod(-1)[spans.div(torch.tensor([w, h])).amin(-1) < 0.97]
        assert torch.allclose(found[:, 2:].prod(-1), areas.sort(descending=True).values, atol=1e-5)
        assert (found[:, 0] >= x - 1e-6).all()
        assert (found[:, 1] + found[:, 3] <= y + h + 1e-6).all()


def test_eyes_of_a_result_are_its_tuned_ones(
    llava_dir: Path, tmp_path: Path, random_picture: Callable[..., Image.Image]
) -> None:
    picture = random_picture(64, 48)
    result = tmp_path / "result"
    result.mkdir()
    (result / "run.json").write_text(json.dumps({"base": str(llava_dir)}))
    name = "focusing.stage.adjust.weight"
    moved = load_tower(llava_dir)[name].roll(1, 0).contiguous()
    save_file({f"model.vision_tower.{name}": moved}, result / "trained.safetensors")
    plain, tuned = load_eyes(llava_dir), load_eyes(result)
    assert plain is not None
    assert tuned is not None
    assert isinstance(tuned.model, SparseFormerVisionModel)
    assert torch.equal(tuned.model.get_parameter(name), moved)
    assert plain.look(picture).steps[-1] != tuned.look(picture).steps[-1]


@pytest.mark.parametrize("size", [(640, 480), (300, 900), (224, 224)])
def test_a_crop_is_the_transforms(size: tuple[int, int]) -> None:
    config = TransformConfig(image_size=224, resize_size=256)
    x, y, w, h = crop_of(config, *size)
    assert w * size[0] == pytest.approx(h * size[1], rel=0.01)  # a square of the photograph
    assert max(w, h) == pytest.approx(224 / 256)
    assert (x + w / 2, y + h / 2) == (0.5, 0.5)
    assert crop_of(TransformConfig(image_size=32, resize="squash"), *size) == (0, 0, 1, 1)


def test_lots_take_other_pictures_first() -> None:
    examples = [Example(str(n), n, "?", f"{n % 3}.png") for n in range(30)]
    drawn = draw_lots(examples, 4)
    assert len({example.image for example in drawn[:3]}) == 3
    assert draw_lots(examples, 4) == drawn
    assert draw_lots(examples, 4, seed=1) != drawn


def test_numbers_are_written_for_reading() -> None:
    assert [short(v) for v in (0, 4455.3, 748.2, 59.2, 0.02561, 1.0)] == [
        "0",
        "4,455",
        "748",
        "59.2",
        "0.0256",
        "1",
    ]
    assert (signed(-4.04), signed(0.0), signed(-0.001), signed(3, 0)) == ("−4.0", "±0.0", "±0.0", "+3")
    assert pick_ticks(0, 4455) == [0, 1000, 2000, 3000, 4000]
    assert pick_ticks(-0.3, 0.3, 4) == pytest.approx([-0.2, 0, 0.2])
    assert pick_log_ticks(0.09, 0.6) == pytest.approx([0.1, 0.2, 0.5])
    assert pick_log_ticks(6, 16) == pytest.approx([10, 15][-2:])


def test_a_report_of_old_records_says_what_they_lack(runs: Path, tmp_path: Path) -> None:
    scores: dict[str, Any] = json.loads((runs / "vit" / "scores.json").read_text())
    for key in ("provenance", "protocol", "model", "floor", "visual_tokens"):
        del scores[key]
    (runs / "rescored.json").write_text(json.dumps(scores))
    assert report(runs, "-o", str(tmp_path / "r.html"), names=("rescored.json",)) == 0
    assert "no provenance was recorded" in (tmp_path / "r.html").read_text()
    assert "prompts unknown (rescored)" in (tmp_path / "r.html").read_text()


def test_what_takes_more_than_the_baseline_is_not_so_many_times_less() -> None:
    assert say_times(10.0, 4.0, 2) == "2.50× less"
    assert say_times(4.0, 10.0, 1) == "2.5× more"
    assert say_times(1.0, 1.5, 1, "sooner", "later") == "1.5× later"
    assert say_times(2.0, 2.0, 1) == "1.0× less"
