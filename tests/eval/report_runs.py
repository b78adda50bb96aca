"""Finished runs for the report's tests: small ones of every kind, made by the commands' own code."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from eval.config import BenchmarkSettings, RunSettings
from eval.cost import main as cost
from eval.encoder.command import Sheet
from eval.intervals import accuracy_figure
from eval.model import Answer
from eval.provenance import describe_origin
from eval.run import run

NASTY = "<script>alert('x')</script> & \"quotes\" | `code`"


class Scripted:
    """Gives prepared answers, one after the other."""

    def __init__(self, texts: Sequence[str], tokens: int) -> None:
        self.texts = list(texts)
        self.tokens = tokens

    def answer(self, prompts: Sequence[str], pictures: Sequence[Image.Image | None]) -> list[Answer]:
        """The next ones."""
        now, self.texts = self.texts[: len(prompts)], self.texts[len(prompts) :]
        return [
            Answer(text, 0 if picture is None else self.tokens, 2)
            for text, picture in zip(now, pictures, strict=True)
        ]


def make_everything(llava: Path) -> None:
    """Makes `quiz`, `vit` and `runs` in the current folder; paths in them are relative.

    The whole ViT is right five times, the SparseFormer four, and the same without pictures never.
    """
    runs = Path("runs")
    runs.mkdir()
    make_quiz(Path("quiz"))
    make_vit(Path("vit"))
    make_run(runs / "vit", Path("vit"), ["yes"] * 5 + ["no"] * 5)
    make_run(runs / "ours", llava, ["yes"] * 2 + ["no"] * 4 + ["yes"] * 2 + [NASTY, "こんにちは"])
    make_run(runs / "blind", llava, ["no"] * 10, floor="no-image")
    make_pareto(runs / "pareto")
    make_cost(runs / "cost.jsonl")
    make_sheet(runs / "zeroshot.json")


def make_quiz(folder: Path) -> None:
    """Ten easy-VQA questions about four pictures, one of them wider than an encoder sees."""
    (folder / "images").mkdir(parents=True)
    for number in range(4):
        picture = Image.new("RGB", (40 + 50 * number, 30), (60 * number, 200 - 50 * number, 90))
        picture.save(folder / "images" / f"{number}.png")
    rows = [[f"is it{' really' * (n % 3)} number {n}?", "yes", n % 4] for n in range(10)]
    (folder / "questions.json").write_text(json.dumps(rows))


def make_run(out: Path, model: Path, texts: Sequence[str], **changes: Any) -> Path:
    """A run over the quiz, all of whose gold answers are "yes"."""
    quiz = Path("quiz")
    files = BenchmarkSettings("easy_vqa", questions=quiz / "questions.json", images=quiz / "images")
    settings = RunSettings(model=model, task=files, out=out, **changes)
    run(settings, ["configs/eval/easy_vqa.yaml", f"out={out}"], Scripted(texts, 9))
    return out


def make_vit(folder: Path) -> Path:
    """A LLaVA's configuration whose tower is a ViT."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(vision_config=CLIPVisionConfig(**sizes), text_config=LlamaConfig(**sizes))
    config.save_pretrained(folder)
    return folder


def make_pareto(folder: Path) -> Path:
    """A comparison of towers, as eval.pareto writes it."""
    points = []
    for method, tokens, share, gmacs in (
        ("vit", 64, 0.6, 1.0),
        ("pool", 16, 0.5, 0.6),
        ("sparseformer", 16, 0.5, 0.2),
        ("sparseformer", 36, 0.55, 0.3),
        ("no-image", 0, 0.2, 0.1),
    ):
        point: dict[str, Any] = {
            "method": method,
            "tokens": tokens,
            "training": {"steps": 8, "batch": 4},
            "seeds": [0, 1],
            "figures": {"accuracy": figure(share, 100)},
            "gmacs": {"tower": gmacs / 2, "total": gmacs},
            "ms": {"total": 10 * gmacs, "quartiles": [9 * gmacs, 12 * gmacs]},
            "units": {"a": 1.0},
        }
        if method == "vit":
            point["random-picture"] = {"figures": {"accuracy": figure(0.3, 100)}, "units": {"a": 0.0}}
        points.append(point)
    content = {
        "task": "scenes",
        "scorer": "VQA v2 official",
        "primary": "accuracy",
        "points": points,
        "skipped": ["pool at 100 (of 64)"],
        "provenance": describe_origin("eval.pareto", ["configs/eval/pareto_scenes.yaml"], {"a": 1}, "cpu"),
    }
    folder.mkdir()
    (folder / "pareto.json").write_text(json.dumps(content))
    return folder


def figure(share: float, n: int) -> dict[str, Any]:
    """An accuracy as JSON values."""
    return dataclasses.asdict(accuracy_figure([1] * round(share * n) + [0] * (n - round(share * n))))


def make_cost(file: Path) -> Path:
    """Two records: one counted, one with made-up clocks."""
    assert cost(["--model", "sf_b_49", "--llm", "tiny", "--count-only", "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    part = {
        name: {
            "batch": 4,
            "see": timing(seconds),
            "first_token": timing(2 * seconds),
            "decode": timing(0.1 * seconds),
            "peak_bytes": 2_000_000,
            "cache_bytes": 1000,
        }
        for name, seconds in (("vit_l_14_336", 0.4), ("sf_b_49", 0.1))
    }
    record["measured"] = [part]
    file.write_text(file.read_text() + json.dumps(record) + "\n")
    return file


def timing(seconds: float) -> dict[str, float]:
    """A median with quartiles."""
    return {"median": seconds, "low": 0.9 * seconds, "high": 1.2 * seconds, "rounds": 7}


def make_sheet(file: Path) -> Path:
    """What eval.zeroshot --json writes."""
    sheet = Sheet("zero-shot, 2 classes, 1 templates, PICTURES")
    sheet.add({"teacher": {"top1": [1, 1, 1, 0]}, "encoder": {"top1": [1, 1, 0, 0]}})
    content = {"command": "zeroshot", **dataclasses.asdict(sheet)}
    content["provenance"] = describe_origin("eval.zeroshot", ["--teacher", "T"], {}, "cpu")
    file.write_text(json.dumps(content))
    return file
