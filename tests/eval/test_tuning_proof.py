"""The proof on real material: its parts quickly, the whole of it through the launcher where asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.tuning_proof import ENGINES, command, format_report, largest_difference, main, read_losses


def test_all_engines_see_the_same_global_batches() -> None:
    plain, zero2, zero3 = (command(engine, "real_tune", ["model=m"], 16) for engine in ENGINES)
    assert plain[1:4] == ["-m", "llm_integration.train", "configs/llm/real_tune.yaml"]
    assert "batch=16" in plain
    for words, stage in ((zero2, 2), (zero3, 3)):
        assert words[words.index("--num_accelerators") + 1] == "2"
        assert words[-2:] == ["batch=8", f"deepspeed=configs/deepspeed/zero{stage}.json"]


def test_losses_of_a_run_that_was_killed(tmp_path: Path) -> None:
    assert read_losses(tmp_path) == {}
    entries = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "loss": 2.5},
        {"train_loss": 1},
    ]
    text = "".join(json.dumps(entry) + "\n" for entry in entries) + '{"step": 3, "lo'
    (tmp_path / "log.jsonl").write_text(text)
    losses = read_losses(tmp_path)
    assert losses == {1: 3.0, 2: 2.5}
    assert largest_difference(losses, {1: 3.0, 2: 2.25}) == 0.25
    with pytest.raises(ValueError, match="logged other steps"):
        largest_difference(losses, {1: 3.0})


def test_the_report_says_everything() -> None:
    figure = {"value": 12.5, "low": 10.0, "high": 15.0, "n": 40}
    report = {
        "losses": {"align": {"plain": {1: 3.0}, "zero2": {1: 3.125}}},
        "differences": {"align: zero2": 0.125},
        "daquar": {"picture": figure, "no_image": figure},
    }
    lines = format_report(report).splitlines()
    assert lines[0] == "| align: step | plain | zero2 |"
    assert lines[2] == "| 1 | 3.00000 | 3.12500 |"
    assert "align: zero2: 1.2e-01" in lines[4]
    assert lines[5] == "DAQUAR accuracy, picture: 12.50 % [10.00, 15.00], n = 40"


def test_what_is_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", str(tmp_path), "--encoder", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*words, "--batch", "3"]) == 2
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert "--batch must be a multiple of 2" in printed
    assert f"DAQUAR's questions could not be read from {tmp_path / 'daquar'}" in printed


@pytest.mark.launcher
@pytest.mark.real_data
@pytest.mark.slow
def test_both_stages_on_real_material(encoder_dir: Path, real_data: Path, tmp_path: Path) -> None:
    words = ["--data", str(real_data), "--encoder", str(encoder_dir), "--out", str(tmp_path / "out")]
    assert main([*words, "--align-steps", "3", "--tune-steps", "12", "--questions", "20"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["losses"]["tune"]) == {*ENGINES, "zero3, killed and resumed"}
    assert report["daquar"]["picture"]["n"] == 20
