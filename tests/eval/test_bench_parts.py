"""The benchmarks of parts, memory, data, training, answers, growth, and the estimate on paper."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bootstrap.muon import has_muon
from eval.bench import growth, training
from eval.bench.__main__ import main
from eval.bench.data import make_photograph, plain_view
from eval.bench.encoder import _graph
from eval.bench.estimate import count_parts, work_of
from eval.bench.rivals import build_ours, count_gmacs
from sparse_vlm import SparseFormerConfig
from sparse_vlm.digits import DigitLinear, what_is_missing
from sparse_vlm.packed import PackedLinear
from sparse_vlm.presets import PRESETS

SMALL = SparseFormerConfig(width=64, depth=2, heads=4, mlp_width=64, focusing_width=32, focusing_heads=2)

_NEEDS_DIGITS = pytest.mark.skipif(what_is_missing() is not None, reason=f"no digits: {what_is_missing()}")


@pytest.fixture(autouse=True)
def small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "small", (SMALL, PRESETS["sparseformer_btsp_openai_clip_base"][1]))


@pytest.fixture
def tiny_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CLIPVisionConfig

    from eval.costs.shapes import TowerShape

    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, patch_size=32
    )
    config.image_size = 224
    tower = TowerShape("vit_b_16", "tiny", 224, 49, config, -2, True)
    monkeypatch.setattr(training, "list_towers", lambda: {"vit_b_16": tower})


def _run(tmp_path: Path, *words: str) -> dict[str, Any]:
    out = tmp_path / "bench.jsonl"
    rounds = () if words[0] in ("memory", "estimate") else ("--rounds", "1")
    assert main([*words, *rounds, "--json", str(out)]) == 0
    record: dict[str, Any] = json.loads(out.read_text().splitlines()[-1])
    assert record["bench"] == words[0]
    return record


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--packed",),
        pytest.param(("--digits", "2"), marks=_NEEDS_DIGITS),
    ],
)
def test_parts_are_all_there(tmp_path: Path, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []
    pack = PackedLinear._pack
    monkeypatch.setattr(PackedLinear, "_pack", lambda layer: packed.append(layer) or pack(layer))
    record = _run(tmp_path, "parts", "--preset", "small", "--batch", "2", *flags)
    assert {type(layer).__name__ for layer in packed} == {
        (): set(),
        ("--packed",): {"PackedLinear"},
        ("--digits", "2"): {"DigitLinear"},
    }[flags]
    (batch,) = record["batches"]
    inside = sum(part["gmacs"] for part in batch["parts"].values())
    whole = 2 * count_gmacs(build_ours("small"), 224)
    assert 0.98 < inside / whole < 1.0  # the lift and the RoI adjustment are left
    assert all(part["bytes"] > 0 and part["cpu"]["ms"] > 0 for part in batch["parts"].values())
    assert {"stem", "sampling", "generation of mixing weights", "mixing", "cortex MLP"} <= batch[
        "parts"
    ].keys()


def test_digits_are_for_fp32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["parts", "--preset", "small", "--digits", "3", "--dtype", "bf16"]
    assert main([*words, "--json", str(tmp_path / "none.jsonl")]) == 2
    said = capsys.readouterr().err
    assert "--digits: " in said
    assert "these are torch.bfloat16 on cpu" in said or "lacks" in said


def test_checkpointing_takes_less_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = torch.nn.Conv2d(3, 4, 16)
    monkeypatch.setattr("eval.bench.memory.build_vit", lambda spec: (tiny, 32))
    peaks = _run(tmp_path, "memory", "--preset", "small")["peak_bytes_a_picture"]
    assert 0 < peaks["student, activation checkpointing"] < peaks["student"]


def test_both_ways_to_decode_show_the_same_picture(tmp_path: Path) -> None:
    from bootstrap.data import TrainView

    view = TrainView(PRESETS["small"][1])
    data = make_photograph(640, 480)
    assert (view(data, 3, 0) - plain_view(view)(data, 3, 0)).abs().mean() < 0.1
    record = _run(tmp_path, "data", "--size", "64x48", "--pictures", "2")
    assert record["sizes"]["64x48"]["ours"]["cpu"] > 0
    assert record["ceiling"]["cpu"] > record["sizes"]["64x48"]["ours"]["cpu"]


@pytest.mark.usefixtures("tiny_teacher")
def test_training_steps_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "has_bf16", lambda device: True)
    record = _run(tmp_path, "training", "--batch", "2", "--jpeg", "64x48")
    steps = record["steps"]
    ours = [training.WARMUP, training.LIVE, training.STORED]
    assert list(steps) == [training.PLAIN, *ours, *(name + training.HALF for name in ours)]
    assert steps[training.PLAIN]["cpu"]["times_faster"]["median"] == 1
    assert record["whole_run"]["wall"] > 0
    assert record["whole_run_bf16"]["wall"] > 0
    assert record["decoding"]
    assert set(record["updates"]) == {training.ADAMW} | ({training.MUON} if has_muon() else set())
    assert all(one["cpu"]["median"] > 0 for one in record["updates"].values())


@pytest.mark.usefixtures("tiny_teacher")
def test_steps_in_a_row_are_counted_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(
        training, "plain_step", lambda *given: lambda: time.sleep(0.02) or calls.append(given)
    )
    words = ("--batch", "2", "--jpeg", "64x48", "--steps", "3")
    record = _run(tmp_path, "training", *words)
    row = record["steps"][training.PLAIN]["wall"]
    assert len(calls) == 3 * (row["rounds"] + 1)
    assert 0.02 <= row["low"] <= row["median"] < 0.06
    assert row["pictures_a_second"] == pytest.approx(2 / row["median"])
    assert "3 steps in a row" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny_teacher")
def test_pictures_decoded_beforehand_are_decoded_once_a_loop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, compiled = [], []
    build = training.TrainView

    def counting(*arguments: Any) -> Any:
        view = build(*arguments)
        return lambda data, index, number: decoded.append(index) or view(data, index, number)

    monkeypatch.setattr(training, "TrainView", counting)
    monkeypatch.setattr(training, "plain_view", lambda view: view)
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    words = ("--batch", "2", "--jpeg", "64x48", "--decoded", "--compile")
    record = _run(tmp_path, "training", *words)
    assert decoded == [0, 1] * 2
    assert not record["decoding"]
    assert "decoded beforehand" in capsys.readouterr().out
    assert len(compiled) == 1
    assert {training.WARMUP + training.COMPILED, training.STORED + training.COMPILED} <= set(record["steps"])
    assert record["whole_run_compiled"]["wall"] > 0


KERNELS = """
import sys
from eval.bench import kernels
from eval.bench.__main__ import main
from sparse_vlm import SparseFormerConfig, agreement
from sparse_vlm.presets import PRESETS
agreement.DEVICES = ("cpu",)
kernels._IN_A_ROW, kernels._SIDE = 2, 16
small = SparseFormerConfig(
    width=32, depth=1, heads=4, mlp_width=32, focusing_width=32, focusing_heads=2, num_latents=2,
    stem_channels=16, num_points=16, mixing_points=16, generator_width=8,
)
PRESETS["small"] = (small, PRESETS["sparseformer_btsp_openai_clip_base"][1])
words = ["kernels", "--preset", "small", "--batch", "1", "--rounds", "1", "--json", sys.argv[1]]
sys.exit(main(words))
"""


def test_kernels_are_refused_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "--json", str(tmp_path / "bench.jsonl")]) == 2
    assert "they run on a GPU; give --device cuda" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels_are_timed_beside_what_they_stand_for(tmp_path: Path) -> None:
    out = tmp_path / "bench.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", KERNELS, str(out)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(out.read_text())
    assert record["kernels"].keys() >= {
        "look",
        "reading points",
        "stem, convolution",
        "sum and norm",
        "placing points",
        "moving RoIs",
        "position codes",
        "QuickGELU",
    }
    for name, row in record["kernels"].items():
        assert row["ms"] > 0, name
        assert row["times_faster"]["median"] == pytest.approx(row["plain_ms"] / row["ms"])
        assert f"\n{name} " in done.stdout


def test_estimate_is_what_its_assumptions_give(tmp_path: Path) -> None:
    words = ("--pictures", "1e6", "--gpus", "10", "--epochs", "2", "--peak", "100", "--used", "0.5")
    record = _run(tmp_path, "estimate", *words, "--scaling", "1", "--warmup", "0")
    parts = count_parts()
    _, full = work_of(parts)
    assert parts["teacher"] == pytest.approx(191, rel=0.01)
    assert parts["student focusing"] + 2 * parts["student cortex, tuned half"] == pytest.approx(
        14.8, rel=0.01
    )
    (row,) = record["rows"]
    # 2e6 pictures, two operations a multiply-add, ten GPUs of 50 TFLOP/s.
    assert row["hours_live"] == pytest.approx(2e6 * 2e9 * (full + parts["teacher"]) / 5e14 / 3600)
    assert row["read_terabytes"] == pytest.approx(0.22)
    # Half of the pictures are shown for the second time, 2.36 MB of targets each, at 20 GB/s.
    assert row["targets_read_terabytes"] == pytest.approx(2.36, rel=1e-3)
    arithmetic = 2e9 * (2e6 * full + 1e6 * parts["teacher"]) / 5e14 / 3600
    assert row["hours_stored"] == pytest.approx(arithmetic)
    slow = _run(tmp_path, "estimate", *words, "--scaling", "1", "--warmup", "0", "--storage", "0.01")
    assert slow["rows"][0]["hours_stored"] == pytest.approx(2.36e12 / 1e8 / 3600, rel=1e-3)
    assert slow["rows"][0]["hours_stored"] > arithmetic
    # Of half an epoch no picture comes twice, and half of them are never looked at.
    (half,) = _run(tmp_path, "estimate", "--pictures", "1e6", "--gpus", "10", "--epochs", "0.5")["rows"]
    assert half["targets_read_terabytes"] == 0
    assert half["stored_terabytes"] == pytest.approx(2.36 / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--warmup", "1.5"), "--warmup is a share of the steps, 0 to 1, and is 1.5"),
        (("--epochs", "0", "1"), "must be above 0"),
        (("--peak", "nan"), "must be above 0"),
    ],
)
def test_assumptions_that_make_no_sense_are_refused(
    words: tuple[str, ...], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", *words, "--json", str(tmp_path / "none.jsonl")]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [(), pytest.param(("--digits", "2"), marks=_NEEDS_DIGITS)], ids=["plain", "digits"]
)
def test_answer_bench(tmp_path: Path, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    multiply = DigitLinear._multiply
    monkeypatch.setattr(DigitLinear, "_multiply", lambda *words: products.append(1) or multiply(*words))
    words = ("--tower", "sf_b_49", "--llm", "tiny", "--words", "4", "--answer", "3")
    record = _run(tmp_path, "answer", *words, *flags)
    assert bool(products) == bool(flags)
    row = record["batches"][0]["towers"]["sf_b_49"]
    assert row["times_shorter"] == 1
    spent = row["first_token"]["median"] + 2 * row["next_token"]["median"]
    assert row["questions_a_second"] == pytest.approx(1 / spent)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("answer --tower sf_b_49 --llm tiny --graphs", "--graphs needs --device cuda"),
        ("encoder --preset small --autotune", "--autotune and --rival-graphs need --device cuda"),
        ("encoder --preset small --rival-graphs", "--autotune and --rival-graphs need --device cuda"),
    ],
)
def test_graphs_are_for_a_gpu(
    tmp_path: Path, words: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words.split(), "--json", str(tmp_path / "none.jsonl")]) == 2
    assert reason in capsys.readouterr().err


def test_rivals_run_as_graphs_or_are_left_out(
    stand_in_graphs: list[tuple[int, ...]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vit, pictures = torch.nn.Conv2d(3, 4, 16), torch.randn(1, 3, 32, 32)
    graphed = _graph(vit, torch.zeros_like(pictures))
    assert graphed is not None
    assert torch.equal(graphed(pictures), vit(pictures))
    assert len(stand_in_graphs) == 1

    def refuse(*words: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("sparse_vlm.graphed_calls._capture", refuse)
    assert _graph(vit, pictures) is None
    assert "Conv2d does not run as a CUDA graph: operation not permitted" in capsys.readouterr().err


def test_growth_draws_its_charts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "_spread", lambda options, count: 2.0 * count)
    record = _run(
        tmp_path, "growth", "--preset", "small", "--picture-size", "32", "64", "--tokens", "5", "9",
        "--batch", "1", "2", "--pictures", "100", "1000", "--charts", str(tmp_path / "charts"),
    )  # fmt: skip
    assert (tmp_path / "charts" / "growth.png").stat().st_size > 10_000
    assert {name: len(curve["y"]) for name, curve in record["curves"].items()} == {
        "picture size": 2, "tokens": 2, "batch": 2, "pictures": 2,
    }  # fmt: skip
    assert record["processes"]["y"] == [2.0, 4.0]


def test_processes_need_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "build_ours", lambda preset: pytest.fail("nothing is to be measured"))
    assert main(["growth", "--seconds", "0", "--json", str(tmp_path / "none.jsonl")]) == 2
    assert "--seconds must be above 0, and is 0.0." in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_processes_count_their_forward_passes(dtype: torch.dtype) -> None:
    options = argparse.Namespace(preset="sparseformer_v1_tiny", seconds=0.5, device="cpu", torch_dtype=dtype)
    assert growth._spread(options, 1) > 0
