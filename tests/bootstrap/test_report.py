"""What a run says at its end, and the page of a run that is finished, or is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bootstrap.config import read_config
from bootstrap.figures import describe_end, format_figure, tabulate
from bootstrap.log import RunLog, read_log
from bootstrap.report import build_report, describe_run, draw_curves
from bootstrap.train import bootstrap, main

Write = Callable[..., Path]
FIGURES = {"cosine": 0.98765, "retrieval": 0.5, "agreement": 0.25, "pictures": 12}


def test_figures_have_plain_names_and_shares_are_in_percent() -> None:
    assert format_figure("cosine", 0.98765) == "0.9877"
    assert format_figure("agreement", 0.25) == "25.0%"
    assert tabulate(FIGURES) == [
        ["held-out figure", "value"],
        ["cosine of the embeddings", "0.9877"],
        ["label agreement", "25.0%"],
        ["nearest to the teacher's own embedding", "50.0%"],
    ]
    by_tokens = {"9": {**FIGURES, "agreement": 0.5}, "3": {**FIGURES, "agreement": 0.125}, "5": FIGURES}
    rows = tabulate({**FIGURES, "by_tokens": by_tokens}, tokens=5)
    assert rows[0] == ["held-out figure", "3 tokens", "5 tokens", "9 tokens"]
    assert rows[2] == ["label agreement", "12.5%", "25.0%", "50.0%"]


def test_a_run_ends_with_its_figures_and_the_next_command(
    write_run: Write, heldout_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(steps=2, heldout={"source": str(heldout_folder), "tokens": [3]})
    main([str(path)])
    said = capsys.readouterr().err
    assert "comparing teacher and student on 12 held-out pictures" in said
    assert "held-out figure" in said
    assert (
        f"of 12 held-out pictures; the run as a page: python -m bootstrap.report {tmp_path / 'run'}" in said
    )
    figures = json.loads((tmp_path / "run" / "figures.json").read_text())
    assert (figures["pictures"], figures["by_tokens"]["3"]["pictures"]) == (12, 12)
    assert json.loads((tmp_path / "run" / "encoder" / "provenance.json").read_text())["figures"] == figures


def test_without_held_out_pictures_a_run_says_so() -> None:
    assert describe_end({}, 5, Path("runs/a b")) == (
        "no held-out figures: the run has no heldout.source; curves: python -m bootstrap.report 'runs/a b'"
    )


def test_a_page_says_what_the_run_was(
    write_run: Write, heldout_folder: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    heldout = {"source": str(heldout_folder), "tokens": [3], "every": 1}
    encoder = bootstrap(read_config(write_run(steps=2, log_every=2, heldout=heldout)))
    page = build_report(tmp_path / "run")
    assert f"Teacher {tiny_teacher}; 5 tokens; 8 pictures seen in 2 steps; judged on 12 held-out" in page
    assert "<th>3 tokens</th><th>5 tokens</th>" in page
    assert "nearest to the teacher&#x27;s own embedding</td>" in page
    assert "label agreement" not in page  # this teacher names no classes
    axes = draw_curves(read_log(tmp_path / "run" / "log.jsonl")).axes
    assert axes[2].get_ylabel() == "nearest to the teacher's own embedding"
    assert [line.get_label() for line in axes[2].lines] == ["3 tokens"]
    named = [
        {"kind": kind, "step": step, "retrieval": 0.5, "agreement": 0.25}
        for kind in ("heldout", "heldout_3_tokens")
        for step in (1, 2)
    ]
    assert draw_curves(named).axes[2].get_ylabel() == "label agreement"
    (encoder / "provenance.json").write_text("{")
    with pytest.raises(ValueError, match=r"provenance\.json is not valid JSON"):
        build_report(tmp_path / "run")
    shutil.rmtree(encoder)
    page = build_report(tmp_path / "run")
    assert "Not finished: 2 steps so far." in page
    assert "<th>value</th><th>3 tokens</th>" in page
    assert describe_run({}, []) == "Not finished: 0 steps so far."


def test_a_single_entry_is_a_point_and_none_is_no_error() -> None:
    once = [{"kind": "train", "step": 20, "loss": 2.0, "handover": 0.5}]
    assert [line.get_marker() for line in draw_curves(once).axes[0].lines] == ["o", "o"]
    twice = [*once, {"kind": "train", "step": 40, "loss": 1.0, "handover": 0.4, "tokens": 0.6}]
    assert [line.get_marker() for line in draw_curves(twice).axes[0].lines] == ["None", "None", "o"]
    assert not draw_curves([]).axes[0].lines


def test_an_objective_of_ones_own_is_drawn_and_shown_while_it_trains(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 8, 0, 0, is_main=True)
    log.write(2, {"handover": 0.5, "mine": 0.25, "loss": 0.75, "gradient_norm": 1.0, "lr": 0.1})
    log.close()
    assert log.bar.postfix == "hand=0.500, loss=0.750, mine=0.250"
    curves = draw_curves(read_log(tmp_path / "log.jsonl")).axes[0].lines
    assert [line.get_label() for line in curves] == ["loss (weighted sum)", "hand-over tokens", "mine"]


def test_curves_are_called_as_in_the_table_and_steps_are_whole() -> None:
    lines = [{"kind": "heldout", "step": step, **FIGURES} for step in (1, 2)]
    lines += [{"kind": "train", "step": step, "loss": 0.5} for step in (1, 2)]
    axes = draw_curves(lines).axes
    drawn = {line.get_label() for line in axes[1].lines}
    assert drawn == {row[0] for row in tabulate(FIGURES)[1:]}
    for panel in axes:
        assert all(tick == round(tick) for tick in panel.get_xticks())
