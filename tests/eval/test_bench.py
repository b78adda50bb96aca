"""The benchmarks: that they run, compare what is comparable, and write down where a figure comes from."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from eval.answers import InputError
from eval.bench.__main__ import main
from eval.bench.rivals import build_official, build_vit
from eval.bench.turns import Laps, ratio, take_turns
from sparse_vlm.digits import what_is_missing


def test_turns_are_taken_in_rounds() -> None:
    order: list[str] = []
    laps = take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3)
    assert order == ["a", "b", "b", "a"] * 2  # a warm-up round, then three, each begun by the next one
    assert all(len(lap.wall) == len(lap.cpu) == 3 for lap in laps.values())


def test_ratios_are_taken_round_by_round() -> None:
    # Every round is noisy, but equally so for both: the ratio is not.
    slow, fast = Laps((2.0, 20.0, 8.0), (1.0, 1.0, 1.0)), Laps((1.0, 10.0, 4.0), (1.0, 2.0, 4.0))
    assert ratio(slow, fast, "wall").median == 2.0
    assert ratio(slow, fast, "wall").low == ratio(slow, fast, "wall").high == 2.0
    assert ratio(slow, fast, "cpu").median == 0.5


@pytest.mark.parametrize(("name", "refused"), [("2 digits", False), ("3 digits", True), ("packed", True)])
def test_a_variant_that_says_something_else_is_refused(name: str, refused: bool) -> None:
    from eval.bench.encoder import _check
    from eval.bench.rivals import build_ours

    ours = build_ours("sparseformer_btsp_openai_clip_base")
    other = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 1e-5)
    if refused:
        with pytest.raises(InputError, match=f"Ours, {name}, differs from ours by"):
            _check(ours, name, other)
    else:
        assert 1e-5 < _check(ours, name, other) < 1e-3


def test_encoder_bench_writes_a_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparse_vlm import SparseFormerConfig, build_encoder
    from sparse_vlm.presets import PRESETS

    small = SparseFormerConfig(width=64, depth=1, heads=4, mlp_width=64, focusing_width=32, focusing_heads=2)
    monkeypatch.setitem(PRESETS, "small", (small, PRESETS["sparseformer_btsp_augreg_base"][1]))
    assert build_encoder("small").config == small
    out = tmp_path / "bench.jsonl"
    words = ["encoder", "--preset", "small", "--batch", "1", "2", "--rounds", "2", "--threads", "1"]
    for _ in range(2):
        assert main([*words, "--json", str(out)]) == 0
    assert "times ours" in capsys.readouterr().out
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == 2
    record = records[0]
    assert record["provenance"]["command"].startswith("python -m eval.bench encoder --preset small")
    assert {"commit", "versions", "device", "date"} <= record["provenance"].keys()
    assert [part["batch"] for part in record["batches"]] == [1, 2]
    others = record["batches"][0]["candidates"].keys() - {"ours"}
    assert record["differences"].keys() == others
    assert all(0 <= difference < 0.1 for difference in record["differences"].values())
    digits = {"ours, 3 digits", "ours, 2 digits", "ours, 1 digit"}
    assert digits & others == (set() if what_is_missing() else digits)
    ours = record["batches"][1]["candidates"]["ours"]
    assert ours["gmacs"] > 0.1
    assert ours["wall"]["times_ours"]["median"] == 1
    assert 0 < ours["cpu"]["share_of_matrix_rate"] < 1.5


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["encoder", "--preset", "sparseformer"], "unknown preset"),
        (["encoder", "--official", "/nowhere"], "has no sparseformer/sparseformer/modeling.py"),
        (["encoder", "--rival", "open_clip:ViT-Z"], "open_clip:ViT-L-14-336"),
        (["encoder", "--batch", "0"], "--batch must be at least 1"),
        (["encoder", "--rounds", "0"], "--rounds and --threads"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    words: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--json", str(tmp_path / "none.jsonl")]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("words", ["estimate --device cpu", "data --dtype bf16", "memory --rounds 3"])
def test_a_flag_that_a_command_does_not_read_is_refused(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(words.split())
    assert "unrecognized arguments: --" in capsys.readouterr().err


def test_a_record_that_cannot_be_written_is_said_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["encoder", "--json", str(tmp_path)]) == 2
    assert f"error: --json {tmp_path} is a folder; name a file." in capsys.readouterr().err


def test_without_a_gpu_the_gpu_benchmark_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encoder", "--device", "cuda", "--json", str(tmp_path / "none.jsonl")]) == 2
    assert "PyTorch sees no GPU here" in capsys.readouterr().err


@pytest.mark.slow
def test_official_model_takes_our_weights(official_root: Path) -> None:
    from eval.bench.encoder import _compare
    from eval.bench.rivals import build_ours

    preset = "sparseformer_btsp_openai_clip_base"
    ours = build_ours(preset)
    assert _compare(ours, build_official(official_root, preset, ours)) < 1e-5
    with torch.no_grad():
        ours.focusing.lift.weight.add_(1.0)
    with pytest.raises(InputError, match="differs"):
        _compare(ours, build_official(official_root, preset, build_ours(preset)))


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
def test_rivals_have_the_published_size(library: str) -> None:
    with torch.device("meta"):
        vit, side = build_vit(f"{library}:ViT-B-16")
    assert side == 224
    assert sum(p.numel() for p in vit.parameters()) / 1e6 == pytest.approx(86, rel=0.011)
