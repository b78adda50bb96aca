"""What seeing costs: counts against hand formulas and another counter, caches against theirs, clocks."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bootstrap.cost import count_gmacs
from eval.answers import InputError
from eval.cost import append_record, main
from eval.cost_train import main as main_train
from eval.costs.clock import measure, summarise, take_turns, wait
from eval.costs.count import (
    cache_bytes,
    count_costs,
    prefill_gmacs,
    projector_gmacs,
    sparseformer_gmacs,
    vit_gmacs,
)
from eval.costs.memory import measure_growth
from eval.costs.shapes import build_subject, label_subjects, list_llms, list_towers
from eval.costs.train_step import time_steps
from eval.device import choose_device
from sparse_vlm import SparseFormerConfig, TransformConfig, build_encoder

PUBLISHED = {  # GMACs and millions of parameters, as computed from the published architectures
    "vit_b_16": (17.6, 86),
    "vit_l_14": (81.0, 303),
    "vit_l_14_336": (191.0, 304),
    "sf_b_49": (3.8, 64),
    "sf_l_49": (11.3, 212),
    "sf_l_64": (14.8, 212),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_those_of_the_published_towers(name: str) -> None:
    subject = build_subject(name, "7b", "meta", torch.float16)
    counts = count_costs(subject, words=64)
    gmacs, millions = PUBLISHED[name]
    assert counts.tower_gmacs == pytest.approx(gmacs, rel=0.01)
    assert counts.tower_parameters / 1e6 == pytest.approx(millions, rel=0.011)  # without the joint space
    assert counts.visual_tokens == list_towers()[name].tokens
    text = subject.model.config.text_config
    assert counts.prefill_gmacs == pytest.approx(prefill_gmacs(text, counts.prompt_tokens), rel=1e-6)
    assert counts.llm_parameters == pytest.approx(6.74e9, rel=0.01)
    vision = subject.model.config.vision_config
    width = vision.hidden_size
    assert counts.projector_gmacs == pytest.approx(projector_gmacs(width, 4096, counts.visual_tokens))
    if name.startswith("vit"):
        assert counts.tower_gmacs == pytest.approx(vit_gmacs(vision), rel=1e-6)
    else:
        by_hand = sparseformer_gmacs(vision.core, subject.image_size[0], counts.visual_tokens)
        assert counts.tower_gmacs == pytest.approx(by_hand, rel=1e-6)


def count_by_fvcore(module: torch.nn.Module, *inputs: torch.Tensor) -> float:
    """GMACs of matrix products and convolutions by fvcore, attention taken apart into its products."""
    fvcore = pytest.importorskip("fvcore.nn")

    def attend(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> Any:
        return (query @ key.transpose(-1, -2)).softmax(-1) @ value

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        analysis = fvcore.FlopCountAnalysis(module, inputs).unsupported_ops_warnings(False)
        by_operator = analysis.uncalled_modules_warnings(False).by_operator()
    return sum(by_operator[name] for name in ("linear", "matmul", "conv", "bmm", "einsum")) / 1e9


@pytest.mark.parametrize("name", ["vit_b_16", "sf_b_49"])
def test_another_counter_agrees(name: str) -> None:
    subject = build_subject(name, "tiny", "cpu", torch.float32)
    counts = count_costs(subject, 8)
    tower = count_by_fvcore(subject.tower, torch.zeros(1, 3, 224, 224))
    # LLaVA reads a ViT's last state but one; the tower computes its last block all the same.
    assert tower == pytest.approx(counts.tower_gmacs, rel=1e-3)
    projector = count_by_fvcore(
        subject.model.model.multi_modal_projector, torch.zeros(1, subject.tokens, 768)
    )
    assert projector == pytest.approx(counts.projector_gmacs, rel=1e-6)

    class Prefill(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.llm, self.head = subject.model.model.language_model, subject.model.lm_head

        def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
            states = self.llm(inputs_embeds=embeddings, use_cache=False).last_hidden_state
            return self.head(states[:, -1:])

    prefill = count_by_fvcore(Prefill(), torch.zeros(1, subject.tokens + 8, 256))
    assert prefill == pytest.approx(counts.prefill_gmacs, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "parameters"), [("0.5b", 0.5e9), ("1.5b", 1.5e9), ("7b", 6.74e9), ("13b", 13.0e9)]
)
def test_language_models_are_as_large_as_they_are_called(name: str, parameters: float) -> None:
    counts = count_costs(build_subject("sf_b_49", name, "meta", torch.float16), 64)
    assert counts.llm_parameters == pytest.approx(parameters, rel=0.02)


def test_a_cache_is_as_large_as_its_formula_says() -> None:
    subjects = [build_subject(name, "tiny", "cpu", torch.float32) for name in ("sf_b_49", "vit_b_16")]
    made = measure(subjects, batch=2, words=5, rounds=2, device="cpu")
    for subject in subjects:
        text = subject.model.config.text_config
        found = made[subject.name]
        assert found.cache_bytes == 2 * cache_bytes(text, subject.tokens + 5, 4)
        assert found.see.median > 0  # clocks of a busy machine: no order between them
        assert found.first_token.median > 0
        assert found.decode.rounds == 2
        weights = 4 * sum(parameter.numel() for parameter in subject.model.parameters())
        assert weights + found.cache_bytes < found.peak_bytes < weights + 1e9


def test_the_most_memory_is_what_lives_at_once() -> None:
    def work() -> None:
        first = torch.zeros(1000, 1000)  # 4 MB
        second = first + 1  # 8 MB
        del first
        third = second * 2  # 8 MB
        _ = third @ second  # 12 MB

    assert measure_growth(work, "cpu") == 12_000_000


def test_one_language_model_serves_all() -> None:
    first = build_subject("sf_b_49", "tiny", "cpu", torch.float32)
    second = build_subject("vit_b_16", "tiny", "cpu", torch.float32, [first])
    assert second.model.model.language_model is first.model.model.language_model
    assert second.model.lm_head is first.model.lm_head
    alone = count_costs(build_subject("vit_b_16", "tiny", "meta", torch.float32), 8)
    assert count_costs(second, 8) == alone


def test_compiled_means_both_halves_and_every_batch_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: done.append(module))
    monkeypatch.setattr(torch.compiler, "reset", lambda: done.append("anew"))
    subject = build_subject("sf_b_49", "tiny", "cpu", torch.float32)
    for batch in (1, 2):
        measure([subject], batch, words=2, rounds=1, device="cpu", compiled=True)
    inner = subject.model.model
    assert done == ["anew", inner.vision_tower, inner.language_model] * 2


def test_works_take_turns() -> None:
    calls: list[str] = []
    timings = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, "cpu")
    assert "".join(calls) == "abababab"
    assert timings["a"].rounds == 3
    assert summarise([4.0, 1.0, 2.0, 3.0, 5.0]).median == 3.0


def test_the_command_prints_ratios_and_appends_a_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "cost.jsonl"
    words = ["--model", "sf_l_49", "--llm", "7b", "--count-only", "--json", str(record)]
    assert main(words) == 0
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "5.96x" in printed
    first, second = (json.loads(line) for line in record.read_text().splitlines())
    assert first["counts"] == second["counts"]
    assert first["counts"]["sf_l_49"]["cache_bytes"] == 2 * 32 * 4096 * (49 + 64) * 4
    assert first["provenance"]["device"] is None


def test_a_file_that_ends_within_a_line_gets_a_line_of_its_own(tmp_path: Path) -> None:
    record = tmp_path / "cost.jsonl"
    record.write_text('{"a": 1}')
    append_record(record, {"b": 2})
    append_record(record, {"c": 3})
    assert [json.loads(line) for line in record.read_text().splitlines()] == [{"a": 1}, {"b": 2}, {"c": 3}]


def test_small_numbers_are_shown_and_a_llavas_own_language_model_is_named(
    llava_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(llava_dir), "--baseline", str(llava_dir), "--count-only"]) == 0
    said = capsys.readouterr().out
    assert "language model: the directories' own;" in said
    assert main(["--model", str(llava_dir), "--baseline", "sf_b_49", "--llm", "tiny", "--count-only"]) == 0
    said = capsys.readouterr().out
    assert "language model: tiny Llama, and the LLaVA directories' own;" in said
    (row,) = [line for line in said.splitlines() if line.startswith(llava_dir.name)]
    assert all(float(cell) > 0 for cell in row.split()[1:] if re.fullmatch(r"[\d.e-]+", cell))


def test_directories_of_one_name_are_told_apart(
    encoder_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [shutil.copytree(encoder_dir, tmp_path / name / "encoder") for name in ("a", "b")]
    words = [word for folder in folders for word in ("--model", str(folder))]
    record = tmp_path / "c.jsonl"
    small = ["--baseline", "sf_b_49", "--llm", "tiny", "--count-only", "--json", str(record)]
    assert main([*words, *small]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "encoder" in line]
    assert rows == ["a/encoder", "b/encoder"]
    assert list(json.loads(record.read_text())["labels"].values())[1:] == rows
    assert label_subjects(["vit_b_16", "x/encoder", "x/y"]) == {
        "vit_b_16": list_towers()["vit_b_16"].label, "x/encoder": "encoder", "x/y": "y",
    }  # fmt: skip


def test_pictures_that_are_no_squares_are_counted_at_their_size(
    tiny_encoder_config: SparseFormerConfig, tmp_path: Path
) -> None:
    encoder = build_encoder(tiny_encoder_config, TransformConfig(image_size=(32, 96)))
    encoder.save(tmp_path / "wide", {"teacher": "none"})
    subject = build_subject(str(tmp_path / "wide"), "tiny", "meta", torch.float32)
    assert subject.image_size == (32, 96)
    by_itself = count_gmacs(encoder, (32, 96))
    assert count_costs(subject, 8).tower_gmacs == pytest.approx(by_itself, rel=1e-3)  # less the head
    assert by_itself > 1.5 * count_gmacs(encoder, (32, 32))


@pytest.mark.parametrize("command", [main, main_train])
def test_what_cannot_be_is_said_before_the_work(command: Any, tmp_path: Path, capsys: Any) -> None:
    words = ["--model", "sf_b_49", "--llm", "tiny"]
    cases = [(["--json", str(tmp_path)], f"--json {tmp_path} is a folder; name a file.")]
    cases += [(["--device", "meta"], "--device meta computes nothing here")]
    if not torch.cuda.is_available():
        cases += [(["--device", "cuda:0"], "--device cuda:0, but PyTorch sees no GPU here; use --device cpu")]
    for more, said in cases:
        assert command([*words, *more]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {said}")
        assert error.count("\n") == 1


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(InputError, match=r"device=cuda:2, but PyTorch sees 2 GPU\(s\) here"):
        choose_device("cuda:2")


def test_a_second_gpu_is_waited_for_and_weighed_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    for name in ("synchronize", "memory_allocated", "reset_peak_memory_stats", "max_memory_allocated"):

        def note(device: object = None) -> int:
            asked.append(device)
            return 0

        monkeypatch.setattr(torch.cuda, name, note)
    wait("cuda:1")
    measure_growth(lambda: None, "cuda:1")
    time_steps(lambda: None, 1, "cuda:1")
    assert len(asked) >= 8
    assert set(asked) == {"cuda:1"}


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "sf_xl", "--count-only"]) == 2
    assert "There is no tower 'sf_xl': name one of vit_b_16" in capsys.readouterr().err
    assert main(["--model", "sf_l_49", "--llm", "70b", "--count-only"]) == 2
    assert "known are tiny, 0.5b" in capsys.readouterr().err
    assert set(list_llms()) == {"tiny", "0.5b", "1.5b", "7b", "13b"}


def test_a_directory_of_another_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    llama = Path(__file__).resolve().parents[2] / "assets" / "scenes_llama"
    assert main(["--model", str(llama), "--count-only"]) == 2
    assert "scenes_llama/config.json does not describe a sparse_vlm encoder" in capsys.readouterr().err


def test_an_encoder_directory_and_a_llava_directory(encoder_dir: Path, llava_dir: Path) -> None:
    of_encoder = count_costs(build_subject(str(encoder_dir), "tiny", "meta", torch.float32), 8)
    assert of_encoder.visual_tokens == 9
    of_llava = count_costs(build_subject(str(llava_dir), "tiny", "cpu", torch.float32), 8)
    assert of_llava.visual_tokens == 9
    assert of_llava.tower_gmacs == pytest.approx(of_encoder.tower_gmacs, rel=1e-6)


def test_a_llavas_own_language_model_is_in_no_ratio(llava_dir: Path, capsys: Any) -> None:
    words = ["--llm", "tiny", "--dtype", "fp32", "--words", "8"]
    assert main(["--model", str(llava_dir), "--baseline", "sf_b_49", "--count-only", *words]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "other LLM" in rows[next(name for name in rows if name in str(llava_dir) or "llava" in name)]
    assert "1.00x" in rows["SparseFormer"]


def test_a_teachers_fused_attention_is_counted() -> None:
    from bootstrap.teacher import load_teacher
    from llm_integration.clip_vision import load_clip_vision

    shipped = Path(__file__).resolve().parents[2] / "assets" / "scenes_clip"
    teacher = load_teacher(str(shipped))
    config = load_clip_vision(shipped)[0].config
    by_hand = vit_gmacs(config) + config.hidden_size * config.projection_dim / 1e9
    assert count_gmacs(teacher, teacher.spec.image_size) == pytest.approx(by_hand, rel=1e-3)
    assert torch.backends.mha.get_fastpath_enabled()
