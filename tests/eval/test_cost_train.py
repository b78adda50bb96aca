"""Training steps on the clock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eval.cost_train import format_steps, main
from eval.costs.shapes import build_subject
from eval.costs.train_step import StepCost, measure_steps


def test_a_step_trains_what_its_stage_says(encoder_dir: Path) -> None:
    for stage, part in (("align", "multi_modal_projector"), ("lora", "lora_")):
        subject = build_subject(str(encoder_dir), "tiny", "cpu", torch.float32)
        before = {name: value.clone() for name, value in subject.model.named_parameters()}
        (cost,) = measure_steps(subject, stage, [1], 4, 3, 1, "cpu")  # type: ignore[arg-type]
        assert cost.tokens == 9 + 4 + 3
        assert cost.step is not None
        assert cost.step.median > 0
        changed = [
            name
            for name, value in subject.model.named_parameters()
            if name not in before or not torch.equal(before[name], value)
        ]
        assert any(part in name for name in changed), stage
        assert not any("vision_tower" in name for name in changed), stage


def test_the_command_prints_ratios_and_appends_a_record(
    encoder_dir: Path, llava_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(llava_dir), "--baseline", str(encoder_dir), "--llm", "tiny", "--stage", "align"]
    words += ["--batch", "1", "--rounds", "2", "--words", "8", "--answer", "4", "--dtype", "bf16"]
    words += ["--checkpointing", "--device", "cpu", "--json", str(tmp_path / "a.jsonl")]
    assert main(words) == 0
    assert "1.00x" in capsys.readouterr().out
    record = json.loads((tmp_path / "a.jsonl").read_text())
    assert record["steps"][str(llava_dir)][0]["tokens"] == 9 + 8 + 4
    assert record["provenance"]["command"].startswith("python -m eval.cost_train --model")


def test_what_does_not_fit_is_said() -> None:
    cost = StepCost("tune", 32, 640, 7_000_000_000, None, None).__dict__
    fits = {**cost, "step": {"median": 2.0, "low": 1.0, "high": 3.0}, "peak_bytes": 5_000_000_000}
    report = {
        "llm": "7b", "dtype": "bf16", "baseline": "a", "labels": {"a": "A", "b": "B"},
        "steps": {"a": [cost], "b": [fits]}, "provenance": {"device": "x"},
    }  # fmt: skip
    first, second = format_steps(report).splitlines()[-2:]
    assert "does not fit" in first
    assert "2 [1, 3]" in second
    assert "5.0" in second


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "sf_xl"]) == 2
    assert main(["--model", "sf_l_49", "--batch", "0"]) == 2
    printed = capsys.readouterr().err
    assert "There is no tower" in printed
    assert "at least 1" in printed
