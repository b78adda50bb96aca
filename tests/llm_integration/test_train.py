"""Instruction tuning: stages, freezing, adapters, results, resume."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from llm_integration import train as train_module
from llm_integration import trainer as trainer_module
from llm_integration.assemble import assemble
from llm_integration.config import TrainSettings, load_settings
from llm_integration.data import ChatEncoder
from llm_integration.data.sampling import GroupedSampler
from llm_integration.export import main as export
from llm_integration.freeze import adapter_pattern, build_groups, prepare_parameters, trained_names
from llm_integration.generate import answer, build_message, load_chat
from llm_integration.load import check_processor, load_llava, load_llava_config
from llm_integration.processor import load_processor
from llm_integration.replies import reply_to_all
from llm_integration.result import load_model
from llm_integration.templates import TEMPLATES, check_heard
from llm_integration.train import build_arguments, build_collator, check_resume, main, train
from llm_integration.trainer import ChatTrainer, EpochOrder, LogFile, WholeMark, gather_weights, mean_loss
from sparse_vlm.preemption import StoppedError
from sparse_vlm.settings import SettingsError, build_settings

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve records: with one picture, with two, and without."""
    folder = tmp_path_factory.mktemp("chat")
    records: list[dict[str, Any]] = []
    for number in range(12):
        colour = ("red", "green", "blue")[number % 3]
        Image.new("RGB", (40, 30), colour).save(folder / f"{number}.jpg")
        question, image = f"<image>\nWhat colour is picture {number}?", f"{number}.jpg"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"it is {colour}"}]
        records.append({"id": str(number), "image": image, "conversations": turns})
    records[3]["conversations"][0]["value"] = "Is <image> like <image>?"
    records[3]["image"] = ["3.jpg", "4.jpg"]
    for number in (5, 8, 11):
        del records[number]["image"]
        records[number]["conversations"][0]["value"] = "What do you say?"
    (folder / "chat.json").write_text(json.dumps(records))
    return folder / "chat.json"


@pytest.fixture
def build(llava_dir: Path, chat_file: Path, tmp_path: Path) -> Callable[..., TrainSettings]:
    """Settings of a run of a few steps."""

    def settings(*overrides: str) -> TrainSettings:
        mapping = {
            "model": str(llava_dir),
            "out": str(tmp_path / "run"),
            "data": {"records": [str(chat_file)], "workers": 0, "max_length": 300},
            "optim": {"learning_rate": 1e-3, "warmup_fraction": 0.0, "schedule": "constant"},
            "batch": 2,
            "max_steps": 3,
            "precision": "fp32",
            "log_every": 1,
            "checkpoint_every": 0,
        }
        return build_settings(TrainSettings, mapping, overrides)

    return settings


def _losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def _parts(names: list[str]) -> set[str]:
    parts = ("multi_modal_projector", "vision_tower", "language_model", "lm_head")
    return {next(part for part in parts if part in name) for name in names}


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("stage=align",), {"multi_modal_projector"}),
        (("stage=align", "tower=tuned"), {"multi_modal_projector", "vision_tower"}),
        (("stage=tune",), {"multi_modal_projector", "language_model", "lm_head"}),
        (("tower=tuned",), {"multi_modal_projector", "language_model", "lm_head", "vision_tower"}),
    ],
)
def test_freezing_by_stage(build: Any, llava_dir: Path, overrides: tuple[str, ...], parts: set[str]) -> None:
    model = load_llava(llava_dir)
    names = trained_names(prepare_parameters(model, build(*overrides)))
    assert _parts(names) == parts
    for name, _ in model.named_parameters():
        assert (name in names) == bool(_parts([name]) & parts), name


def test_align_trains_these_names(build: Any, llava_dir: Path) -> None:
    names = trained_names(prepare_parameters(load_llava(llava_dir), build("stage=align")))
    layers = [f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    assert names == layers


@pytest.mark.parametrize("tower", ["frozen", "tuned", "lora"])
def test_adapters_land_where_they_are_asked_for(build: Any, llava_dir: Path, tower: str) -> None:
    model = prepare_parameters(load_llava(llava_dir), build("lora.rank=2", f"tower={tower}"))
    names = trained_names(model)
    adapters = [name for name in names if "lora_" in name]
    language = [name for name in adapters if "language_model.layers." in name]
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in language} == set(LINEARS)
    others = [name for name in adapters if name not in language]
    if tower == "lora":
        assert others
        assert all("vision_tower.cortex.blocks." in name for name in others)
    else:
        assert others == []
    rest = [name for name in names if "lora_" not in name]
    expected = {"multi_modal_projector", "vision_tower"} if tower == "tuned" else {"multi_modal_projector"}
    assert _parts(rest) == expected
    assert "vision" not in adapter_pattern(load_llava(llava_dir), tower=False)


def test_each_part_has_its_own_rate(build: Any, llava_dir: Path) -> None:
    settings = build(
        "tower=tuned", "optim.projector_learning_rate=0.5", "optim.tower_learning_rate=0.25",
        "optim.weight_decay=0.1",
    )  # fmt: skip
    model = load_llava(llava_dir)
    prepare_parameters(model, settings)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen: dict[str, set[float]] = {}
    for group in build_groups(model, settings):
        for parameter in group["params"]:
            seen.setdefault(next(iter(_parts([names[id(parameter)]]))), set()).add(group["lr"])
            assert bool(group["weight_decay"]) == (parameter.dim() > 1)
    assert seen == {
        "multi_modal_projector": {0.5}, "vision_tower": {0.25}, "language_model": {1e-3}, "lm_head": {1e-3},
    }  # fmt: skip


def test_align_then_tune_then_export(build: Any, llava_dir: Path, tmp_path: Path, picture: Any) -> None:
    out = tmp_path / "align"
    train(build("stage=align", "data.template=plain", f"out={out}", "max_steps=6"))
    before, after = load_llava(llava_dir), load_model(out / "final")
    for name, parameter in before.named_parameters():
        changed = not torch.equal(parameter, after.get_parameter(name))
        assert changed == ("multi_modal_projector" in name), name
    assert not any((out / "final").glob("model*.safetensors"))

    train(build(f"model={out / 'final'}", f"out={tmp_path / 'tune'}", "tower=tuned", "self_contained=true"))
    tuned = load_llava(tmp_path / "tune" / "final")
    assert not torch.equal(
        tuned.model.vision_tower.stem.conv.weight, before.model.vision_tower.stem.conv.weight
    )
    assert isinstance(answer(picture, "What?", tmp_path / "tune" / "final", max_new_tokens=3), str)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("stage=tune",), ("stage=align", "data.template=plain")),
        (("stage=align", "tower=tuned", "data.template=plain"), ("stage=tune",)),
        (("stage=tune", "tower=tuned"), ("stage=tune", "precision=bf16")),
    ],
)
def test_a_run_keeps_what_the_run_before_it_trained(
    build: Any, llava_dir: Path, tmp_path: Path, first: tuple[str, ...], second: tuple[str, ...]
) -> None:
    one, two = tmp_path / "one" / "final", tmp_path / "two" / "final"
    train(build(*first, f"out={one.parent}"))
    train(build(*second, f"model={one}", f"out={two.parent}"))
    base, before, after = load_llava(llava_dir), load_model(one), load_model(two)
    again = trained_names(prepare_parameters(load_llava(llava_dir), build(*second)))
    kept = 0
    for name, parameter in before.named_parameters():
        if name not in again:
            assert torch.equal(after.get_parameter(name), parameter), name
            kept += not torch.equal(base.get_parameter(name), parameter)
    assert kept > 5


def test_adapters_on_top_of_a_tuned_result_are_refused(build: Any, tmp_path: Path) -> None:
    final = tmp_path / "tuned" / "final"
    train(build("max_steps=1", f"out={final.parent}"))
    with pytest.raises(SettingsError, match="make a plain model of it first"):
        train(build("lora.rank=2", f"model={final}", f"out={tmp_path / 'lora'}"))
    lora = tmp_path / "lora" / "final"
    train(build("lora.rank=2", "max_steps=1", f"out={lora.parent}"))
    with pytest.raises(ValueError, match=r"llm_integration\.export --run"):
        train(build(f"model={lora}", f"out={tmp_path / 'more'}"))


def test_a_result_without_its_weights_is_no_model(build: Any, tmp_path: Path) -> None:
    final = tmp_path / "run" / "final"
    train(build("stage=align", "max_steps=1"))
    weights = load_file(str(final / "trained.safetensors"))
    name = sorted(weights)[0]
    some = {key: value for key, value in weights.items() if key != name}
    save_file(some, str(final / "trained.safetensors"))
    with pytest.raises(ValueError, match=f"1 are missing, the first {name}"):
        load_model(final)
    (final / "trained.safetensors").unlink()
    with pytest.raises(ValueError, match="does not hold the weights that its run trained"):
        load_model(final)


def test_a_llava_that_names_no_token_to_pad_with_is_tuned(
    build: Any, llava_dir: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(llava_dir, tmp_path / "bare")
    file = bare / "tokenizer_config.json"
    values = {key: value for key, value in json.loads(file.read_text()).items() if key != "pad_token"}
    file.write_text(json.dumps(values))
    train(build(f"model={bare}", "max_steps=1"))
    chat = load_chat(tmp_path / "run" / "final")
    assert len(reply_to_all(chat, [[build_message("hi")], [build_message("and so on")]], 2)) == 2


def test_a_result_says_where_it_looks_for_a_model_that_was_moved(
    build: Any, llava_dir: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(llava_dir, tmp_path / "base")
    train(build(f"model={base}", "max_steps=1", "stage=align"))
    final = tmp_path / "run" / "final"
    moved = base.rename(tmp_path / "moved")
    sentence = r'base, which is not there any more: .* write where it is now as "base" into .*run\.json'
    for use in (load_model, load_chat, lambda run: train(build(f"model={run}", f"out={tmp_path / 'next'}"))):
        with pytest.raises(ValueError, match=sentence):
            use(final)
    facts = json.loads((final / "run.json").read_text())
    (final / "run.json").write_text(json.dumps({**facts, "base": str(moved)}))
    load_chat(final)


def test_zero_3_that_could_not_write_its_result_does_not_begin(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    for zero in ({"stage": 3}, {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}):
        (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
        with pytest.raises(SettingsError, match='needs "stage3_gather_16bit_weights_on_model_save": true'):
            train(build(f"deepspeed={tmp_path / 'zero.json'}"))
    (tmp_path / "zero.json").write_text("{")
    with pytest.raises(ValueError, match=r"zero\.json is not valid JSON"):
        train(build(f"deepspeed={tmp_path / 'zero.json'}"))


def test_a_checkpoint_is_no_model(build: Any, tmp_path: Path) -> None:
    train(build("max_steps=1", "checkpoint_every=1"))
    with pytest.raises(ValueError, match="it is a checkpoint, from which only its run goes on"):
        load_chat(tmp_path / "run" / "checkpoints" / "checkpoint-1")


def test_chatml_in_pieces_is_refused(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_integration.train.CHATML_TOKENS", ("<|begin|>", "<|end|>"))
    with pytest.raises(ValueError, match=r"needs <\|begin\|> and <\|end\|> as single tokens"):
        train(build("data.template=chatml"))


def test_a_template_that_leaves_the_question_out_is_for_alignment_only(
    build: Any, llava_dir: Path, tmp_path: Path
) -> None:
    deaf = shutil.copytree(llava_dir, tmp_path / "deaf")
    processor = load_processor(deaf)
    processor.chat_template = TEMPLATES["plain"]
    processor.save_pretrained(deaf)
    with pytest.raises(ValueError, match="chat template leaves out what is asked"):
        load_chat(deaf)
    with pytest.raises(ValueError, match="chat template leaves out what is asked"):
        train(build(f"model={deaf}"))
    with pytest.raises(ValueError, match="chat template leaves out what is asked"):
        train(build("data.template=plain"))
    train(build(f"model={deaf}", "stage=align", "data.template=plain", "max_steps=1"))


def test_another_number_of_processes_is_refused(build: Any, tmp_path: Path) -> None:
    train(build("checkpoint_every=1", "max_steps=2"))
    assert check_resume(build("checkpoint_every=1", "max_steps=2"), 1) is not None
    with pytest.raises(SettingsError, match="was written by 1 processes, and this run has 2"):
        check_resume(build("checkpoint_every=1", "max_steps=2"), 2)


def test_adapters_merge_into_the_model_that_was_trained(build: Any, tmp_path: Path, picture: Any) -> None:
    train(build("lora.rank=4", "lora.alpha=8", "lora.dropout=0.0", f"out={tmp_path / 'lora'}"))
    final = tmp_path / "lora" / "final"
    export(["--run", str(final), "--out", str(tmp_path / "plain")])
    merged, plain = load_model(final), load_llava(tmp_path / "plain")
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    torch.testing.assert_close(plain(**inputs).logits, merged(**inputs).logits)
    with pytest.raises(ValueError, match=r"llm_integration\.export --run"):
        load_model(final, merge=False)
    assert load_chat(final).reply([build_message("hi")], max_new_tokens=2).visual_tokens == 0


def test_a_result_refuses_another_tower(build: Any, llava_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(llava_dir, tmp_path / "base")
    train(build("stage=align", f"model={tmp_path / 'base'}", "max_steps=1"))
    path = tmp_path / "base" / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("stem.conv.weight"))
    save_file({**weights, name: weights[name] + 1}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is not the one that"):
        load_model(tmp_path / "run" / "final")


def test_a_result_refuses_another_language_model(build: Any, llava_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(llava_dir, tmp_path / "base")
    train(build("stage=align", f"model={tmp_path / 'base'}", "max_steps=1"))
    load_model(tmp_path / "run" / "final")
    path = tmp_path / "base" / "model.safetensors"
    weights = load_file(path)
    changed = {name: value * 1.01 if "language_model" in name else value for name, value in weights.items()}
    save_file(changed, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"base is not the model that .* was trained on top of"):
        load_model(tmp_path / "run" / "final")


def test_what_was_trained_is_not_overwritten(
    build: Any, llava_dir: Path, encoder_dir: Path, build_llm_dir: Any, tmp_path: Path
) -> None:
    shutil.copytree(llava_dir, tmp_path / "base")
    words = ("stage=align", f"model={tmp_path / 'base'}", "max_steps=1")
    for name in ("run", "other"):
        train(build(*words, f"out={tmp_path / name}"))
    result, exported = tmp_path / "run" / "final", tmp_path / "exported"
    for _ in range(2):  # an export may be made again
        export(["--run", str(result), "--out", str(exported)])
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    llm = str(build_llm_dir("llama"))
    for place in (result, exported):
        with pytest.raises(FileExistsError, match="has trained, which would be lost"):
            assemble(encoder_dir, llm, place)
    with pytest.raises(SystemExit):
        export(["--run", str(result), "--out", str(tmp_path / "other" / "final")])
    with pytest.raises(SystemExit):
        export(["--run", str(result), "--out", str(tmp_path / "base")])
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before
    train(build(*words, f"out={tmp_path / 'run'}", "seed=5", "resume=false"))  # its own result a run replaces
    assert (tmp_path / "run" / "final" / "trained.safetensors").read_bytes() != before[
        tmp_path / "run" / "final" / "trained.safetensors"
    ]
    assemble(encoder_dir, llm, tmp_path / "base")  # what was only assembled can be assembled again


def test_a_kill_before_a_checkpoint_is_whole_leaves_the_one_before(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("checkpoint_every=2", "keep_checkpoints=1", "max_steps=6")
    mark = WholeMark.on_save

    def killed(self: WholeMark, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            raise KeyboardInterrupt
        mark(self, args, state, control, **kwargs)

    monkeypatch.setattr(WholeMark, "on_save", killed)
    with pytest.raises(KeyboardInterrupt):
        train(build(*words))
    newest = check_resume(build(*words), 1)
    assert newest is not None
    assert newest.name == "checkpoint-2"
    monkeypatch.setattr(WholeMark, "on_save", mark)
    train(build(*words))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-6"]
    train(build(*words, f"out={tmp_path / 'whole'}"))
    assert _losses(tmp_path / "run") == _losses(tmp_path / "whole")


def test_a_loss_that_is_no_number_stops_before_a_checkpoint(
    build: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = build("checkpoint_every=1", "max_steps=8", "log_every=8", "optim.learning_rate=1e30")
    monkeypatch.setattr("llm_integration.train.load_settings", lambda *given: settings)
    with pytest.raises(SystemExit) as ended:
        main(["settings.yaml"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert re.search(r"error: the (loss|grad_norm) is (nan|inf) at step \d: lower optim", said)
    assert not (tmp_path / "run" / "final").exists()
    for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*/model.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values()), path


def test_beginning_anew_leaves_no_result_of_before(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(build("max_steps=2"))

    def killed(self: WholeMark, *given: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WholeMark, "on_save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(build("max_steps=2", "checkpoint_every=1", "resume=false"))
    assert not (tmp_path / "run" / "final").exists()
    assert train(build("max_steps=2"))["train_runtime"] > 0
    with pytest.raises(SettingsError, match=r"model=.*final lies in out="):
        train(build(f"model={tmp_path / 'run' / 'final'}", "resume=false"))
    assert (tmp_path / "run" / "final").is_dir()


def test_a_limit_of_bad_records_may_be_raised_on_the_way(build: Any, tmp_path: Path) -> None:
    train(build("checkpoint_every=1", "max_steps=2"))
    for word in ("data.max_bad_records=5", "data.workers=3"):
        assert check_resume(build("checkpoint_every=1", "max_steps=3", word), 1) is not None
    with pytest.raises(SettingsError, match=r"begun with other settings \(seed, data.max_length\)"):
        check_resume(build("data.max_length=77", "seed=3"), 1)


def test_a_run_that_was_moved_goes_on(build: Any, tmp_path: Path) -> None:
    train(build("checkpoint_every=1", "max_steps=2"))
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    train(build("checkpoint_every=1", "max_steps=3", f"out={moved}"))
    steps = [json.loads(line)["step"] for line in (moved / "log.jsonl").read_text().splitlines()]
    assert steps.count(1) == 1, "the run began anew"


def test_the_order_of_a_later_epoch_survives_a_restart_on_two_processes(build: Any) -> None:
    """What accelerate and the Trainer wrap around a sampler: a share for each process, and the skipping."""
    settings = build("batch=2")

    def batches(skipped: int) -> list[list[int]]:
        trainer = SimpleNamespace(order=GroupedSampler(range(1, 17), [True] * 16, 4, 0))
        loader: Any = torch.utils.data.DataLoader(range(16), batch_size=2, sampler=trainer.order)  # type: ignore[arg-type]
        loader = prepare_data_loader(loader, num_processes=2, process_index=0, put_on_device=False)
        state = SimpleNamespace(epoch=1 + skipped / 4)
        EpochOrder(trainer).on_epoch_begin(settings, state, None)  # type: ignore[arg-type]
        if skipped:
            loader = skip_first_batches(loader, skipped)
        loader.set_epoch(1)
        return [batch.tolist() for batch in loader]

    whole = batches(0)
    assert len(whole) == 4
    assert whole[1:] == batches(1)
    order = GroupedSampler(range(1, 17), [True] * 16, 4, 0)
    share = [list(order)[at : at + 2] for at in range(0, 16, 4)]
    assert share != whole, "the second epoch has an order of its own"


@pytest.mark.parametrize("extra", [(), ("lora.rank=2", "lora.dropout=0.3")])
def test_resume_is_exact(build: Any, tmp_path: Path, extra: tuple[str, ...]) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    common = ("accumulation=2", "checkpoint_every=2", *extra)
    train(build(*common, "max_steps=6", f"out={whole}"))
    train(build(*common, "max_steps=2", f"out={broken}"))
    train(build(*common, "max_steps=6", f"out={broken}"))
    assert _losses(broken) == _losses(whole)
    with pytest.raises(SettingsError, match="begun with other settings"):
        train(build(*common, f"out={broken}", "seed=4"))


@pytest.mark.parametrize(
    "extra", [(), ("log_every=4",), ("lora.rank=4", "lora.dropout=0.3"), ("precision=bf16",)]
)
def test_asked_to_end_it_writes_a_checkpoint_and_goes_on(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: tuple[str, ...]
) -> None:
    common = ("max_steps=6", "checkpoint_every=0", *extra)
    whole = train(build(*common, f"out={tmp_path / 'whole'}"))
    step = ChatTrainer.training_step
    steps = []

    def ask(self: ChatTrainer, *arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ChatTrainer, "training_step", ask)
        with pytest.raises(StoppedError, match="stopped after update 3, as it was asked to"):
            train(build(*common))
    assert not (tmp_path / "run" / "final").exists()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-3"]
    again = train(build(*common))
    assert again["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-9)
    for file in (tmp_path / "whole" / "final").rglob("*.safetensors"):
        other = load_file(tmp_path / "run" / "final" / file.relative_to(tmp_path / "whole" / "final"))
        assert all(torch.equal(value, other[name]) for name, value in load_file(file).items())


def test_a_run_that_was_asked_to_end_says_so(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(settings: TrainSettings) -> dict[str, float]:
        raise StoppedError("stopped after update 5, as it was asked to")

    left_group: list[bool] = []
    monkeypatch.setattr(train_module, "leave_process_group", lambda: left_group.append(True))
    monkeypatch.setattr(train_module, "train", stop)
    monkeypatch.setattr(train_module, "load_settings", lambda path, words: build())
    with pytest.raises(SystemExit) as left:
        main(["any.yaml"])
    assert left.value.code == 143
    assert left_group, "gloo's threads may end the process another way"
    assert capsys.readouterr().err.splitlines()[-1].endswith("asked to: the same command goes on from there")


def _write_whole_model(self: ChatTrainer, folder: str | None = None, _internal_call: bool = False) -> None:
    Trainer.save_model(self, folder, _internal_call)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_holds_what_is_trained_and_no_more(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    common = ("stage=align", "data.template=plain", "checkpoint_every=2", f"precision={precision}")
    train(build(*common, "max_steps=6", f"out={tmp_path / 'whole'}"))
    folder = tmp_path / "whole" / "checkpoints" / "checkpoint-6"
    names = (tmp_path / "whole" / "trained.txt").read_text().split()
    weights = load_file(folder / "trained.safetensors")
    assert sorted(weights) == sorted(names)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    size = sum(weight.nbytes for weight in weights.values())
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3 * size + 40_000
    train(build(*common, "max_steps=2", f"out={tmp_path / 'new'}"))
    with monkeypatch.context() as patch:  # as checkpoints were before
        patch.setattr(ChatTrainer, "save_model", _write_whole_model)
        train(build(*common, "max_steps=2", f"out={tmp_path / 'old'}"))
    assert (tmp_path / "old" / "checkpoints" / "checkpoint-2" / "model.safetensors").is_file()
    final = load_file(tmp_path / "whole" / "final" / "trained.safetensors")
    for name in ("new", "old"):
        train(build(*common, "max_steps=6", f"out={tmp_path / name}"))
        assert _losses(tmp_path / name) == _losses(tmp_path / "whole")
        again = load_file(tmp_path / name / "final" / "trained.safetensors")
        assert all(torch.equal(again[key], value) for key, value in final.items())
        load_model(tmp_path / name / "final")


def test_a_checkpoint_without_its_weights_is_refused(build: Any, tmp_path: Path) -> None:
    train(build("stage=align", "checkpoint_every=2", "max_steps=2"))
    file = tmp_path / "run" / "checkpoints" / "checkpoint-2" / "trained.safetensors"
    weights = load_file(file)
    name = sorted(weights)[0]
    save_file({key: value for key, value in weights.items() if key != name}, file)
    with pytest.raises(ValueError, match=f"lacks 1 of the trained weights, first {name}"):
        train(build("stage=align", "checkpoint_every=2", "max_steps=4"))


@pytest.mark.parametrize("extra", [("stage=align",), ("lora.rank=2",)])
def test_a_checkpoint_belongs_to_the_model_it_was_begun_with(
    build: Any, llava_dir: Path, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    base = shutil.copytree(llava_dir, tmp_path / "base")
    common = (*extra, f"model={base}", "checkpoint_every=2")
    train(build(*common, "max_steps=2"))
    weights = load_file(base / "model.safetensors")
    save_file({k: v * 1.01 for k, v in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(SettingsError, match=r"weights in model=.*base have changed since .*checkpoint-2"):
        train(build(*common, "max_steps=4"))
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    train(build(*common, "max_steps=4"))
    shutil.rmtree(base)
    with pytest.raises(ValueError, match="there is no model directory at"):
        train(build(*common, "max_steps=6"))


def test_deepspeed_leaves_out_what_is_frozen_under_all_its_names() -> None:
    class Engine:
        def __init__(self, module: torch.nn.Module) -> None:
            self.module = module

        def module_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any]:
            return self.module.state_dict()

        def save_checkpoint(
            self, folder: str, exclude_frozen_parameters: bool = False
        ) -> tuple[str, bool, list[str]]:
            return folder, exclude_frozen_parameters, list(self.module_state_dict())

    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    model.requires_grad_(False)
    model[0].bias.requires_grad_(True)
    engine: Any = Engine(model)
    trainer_module._leave_frozen_out(engine)
    buffers = [f"2.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")]
    assert engine.save_checkpoint("there") == ("there", True, ["0.bias", *buffers])
    model.register_load_state_dict_post_hook(trainer_module._forgive_frozen)
    stored = engine.module_state_dict()
    model.load_state_dict(stored, strict=True)
    del stored["0.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.bias"'):
        model.load_state_dict(stored, strict=True)


def test_losses_between_log_entries_survive_a_restart(build: Any, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    common = ("checkpoint_every=3", "log_every=4")
    asked = train(build(*common, "max_steps=8", f"out={whole}"))
    train(build(*common, "max_steps=3", f"out={broken}"))
    resumed = train(build(*common, "max_steps=8", f"out={broken}"))
    logs = [
        [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (whole, broken)
    ]
    entries = [[(line["step"], line["loss"]) for line in log if "loss" in line] for log in logs]
    assert [step for step, _ in entries[0]] == [3, 4, 6, 8]
    assert entries[0] == entries[1]
    single = train(build("log_every=1", "max_steps=8", f"out={tmp_path / 'single'}"))
    assert resumed["train_loss"] == asked["train_loss"] == pytest.approx(single["train_loss"], abs=1e-3)
    for run, log in zip((whole, broken), logs, strict=True):
        assert log[-1]["train_loss"] == asked["train_loss"]
        assert (
            json.loads((run / "final" / "run.json").read_text())["metrics"]["train_loss"]
            == asked["train_loss"]
        )


def test_a_run_that_is_stopped_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(settings: TrainSettings) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llm_integration.train.train", stopped)
    monkeypatch.setattr("llm_integration.train.load_settings", lambda *given: TrainSettings)
    monkeypatch.setattr(TrainSettings, "out", Path("runs/mine"), raising=False)
    with pytest.raises(SystemExit) as ended:
        main(["settings.yaml"])
    assert ended.value.code == 130
    assert "the same command goes on from the newest checkpoint in runs/mine" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["log.jsonl", "config.yaml", "config.json", "final", "checkpoints"])
@pytest.mark.parametrize("resume", ["true", "false"])
def test_another_runs_folder_is_left_as_it_is(build: Any, tmp_path: Path, name: str, resume: str) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / name).write_text('{"step": 1}\n')
    (taken / "train.txt").write_text("what a shell wrote")
    with pytest.raises(
        SettingsError, match=f"holds no run of llm_integration.train, but {name} of something"
    ):
        train(build("max_steps=1", f"out={taken}", f"resume={resume}"))
    assert sorted(path.name for path in taken.iterdir()) == sorted([name, "train.txt"])
    assert (taken / name).read_text() == '{"step": 1}\n'
    (taken / name).unlink()
    check_resume(build(f"out={taken}"), 1)  # a shell's log alone is no run


@pytest.mark.parametrize(
    ("extra", "last"), [(("max_steps=4",), 4), (("max_steps=null", "epochs=1.33"), 8), (("max_steps=6",), 6)]
)
def test_a_run_killed_before_its_result_is_written_gives_the_same(
    build: Any, tmp_path: Path, extra: tuple[str, ...], last: int
) -> None:
    """Its last checkpoint leaves no update to do, be it within an epoch (of six) or at the end of one."""
    run = tmp_path / "run"
    train(build("checkpoint_every=2", *extra))
    losses, weights = _losses(run), load_file(run / "final" / "trained.safetensors")
    assert (run / "checkpoints" / f"checkpoint-{last}").is_dir()
    shutil.rmtree(run / "final")
    train(build("checkpoint_every=2", *extra))
    assert _losses(run) == losses
    again = load_file(run / "final" / "trained.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_a_finished_run_is_left_alone(build: Any, tmp_path: Path) -> None:
    figures = train(build("checkpoint_every=2", "max_steps=2"))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert train(build("checkpoint_every=2", "max_steps=2", "log_every=5")) == figures
    assert files == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()
    }
    train(build("checkpoint_every=2", "max_steps=3"))
    assert len(_losses(tmp_path / "run")) == 3


def test_a_longer_run_goes_on_from_the_end_of_the_shorter(build: Any, tmp_path: Path) -> None:
    settings = build("checkpoint_every=6", "max_steps=null", "epochs=1")
    train(settings)
    longer = build("checkpoint_every=6", "max_steps=null", "epochs=2")
    assert check_resume(longer, 1) == tmp_path / "run" / "checkpoints" / "checkpoint-6"
    assert check_resume(settings, 1) is None


def test_export_keeps_the_run_it_is_made_of(
    build: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(build("max_steps=1"))
    final = str(tmp_path / "run" / "final")
    with pytest.raises(SystemExit):
        export(["--run", final, "--out", final])
    assert "is what the model is made of" in capsys.readouterr().err
    load_model(tmp_path / "run" / "final")


def test_beginning_anew_leaves_nothing_of_the_run_before(build: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(build("checkpoint_every=1", "max_steps=3"))
    before = _losses(run)
    (run / "log.jsonl").open("a").write('{"step": 4, "lo')  # as a kill leaves it
    train(build("checkpoint_every=1", "max_steps=1", "resume=false"))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["checkpoint-1"]
    assert _losses(run) == before[:1]


def test_bf16_with_checkpointing(build: Any, tmp_path: Path) -> None:
    train(build("precision=bf16", "gradient_checkpointing=true", "stage=align"))
    assert all(0 < loss < 20 for loss in _losses(tmp_path / "run"))


def test_training_lowers_the_loss(build: Any, tmp_path: Path) -> None:
    train(build("max_steps=30", "batch=4", "epochs=20"))
    losses = _losses(tmp_path / "run")
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("stage=align", "lora.rank=8"), "lora.rank must be 0"),
        (("tower=lora",), "needs lora.rank"),
        (("optim.tower_learning_rate=1.0",), "while the tower is frozen"),
        (("optim.projector_learning_rate=0",), "projector_learning_rate must be greater than 0"),
        (("data.max_lenght=3",), "did you mean 'data.max_length'"),
        (("batch=0",), "at least 1"),
        (("data.limit=0",), "limit must be at least 1"),
        (("optim.learning_rate=NaN",), "learning_rate must be greater than 0"),
        (("optim.weight_decay=NaN",), "weight_decay at least 0"),
        (("optim.tower_learning_rate=Infinity", "tower=tuned"), "tower_learning_rate must be greater than 0"),
        (("optim.clip=0",), "clip must be greater than 0"),
        (("optim.clip=-1.0",), "clip must be greater than 0"),
        (("lora.alpha=NaN",), "alpha greater than 0"),
        (("epochs=NaN",), "epochs must be greater than 0"),
        (("checkpoint_every=-1",), "checkpoint_every must be 0 or more"),
    ],
)
def test_settings_that_make_no_sense(build: Any, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        build(*overrides)


def test_shipped_settings_are_read() -> None:
    for path in sorted((Path(__file__).parents[2] / "configs" / "llm").glob("*.yaml")):
        settings = load_settings(path, ["batch=3"])
        assert settings.batch == 3
        # The quickstart's models are tuned in one process each.
        assert (settings.deepspeed is None) == (path.stem == "quickstart")
        if settings.deepspeed is not None:
            assert (Path(__file__).parents[2] / settings.deepspeed).is_file()


def test_wrong_tokenizer_is_named(llava_dir: Path) -> None:
    processor, config = load_processor(llava_dir), load_llava(llava_dir).config
    config.image_token_id = 7
    with pytest.raises(ValueError, match="wrong tokenizer: it gives '<image>' the id"):
        check_processor(processor, config, "dir")


def test_errors_on_the_command_line_are_one_sentence(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.yaml").write_text("model: nowhere\nout: run\ndata: {records: [x.json]}\n")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "a.yaml"), f"out={tmp_path / 'run'}"])
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith("error: there is no model directory at nowhere")
    )


def test_too_many_bad_records_end_the_run(build: Any, tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_text(json.dumps([{"id": "e", "conversations": []}] * 3))
    with pytest.raises(RuntimeError, match="3 bad records, 2 are allowed"):
        train(build(f"data.records=[{tmp_path / 'chat.json'}]", "data.max_bad_records=2"))


def test_bad_records_found_by_a_loader_worker_end_the_run_in_one_sentence(
    llava_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]
    chat = tmp_path / "chat.json"
    chat.write_text(json.dumps([{"id": "b", "image": "b.jpg", "conversations": turns}]))
    (tmp_path / "b.jpg").write_text("no picture")
    config = tmp_path / "a.yaml"
    config.write_text(f"model: {llava_dir}\nout: {tmp_path / 'run'}\ndata: {{records: [{chat}]}}\n")
    with pytest.raises(SystemExit) as left:
        main([str(config), "data.max_bad_records=0", "data.workers=1", "precision=fp32", "max_steps=1"])
    assert left.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: 1 bad records, 0 are allowed (data.max_bad_records); the last: record 0")
    assert "b.jpg is broken" in said


@pytest.mark.real_data
def test_llavas_own_records_and_a_real_language_model(
    build: Any, encoder_dir: Path, real_data: Path, tmp_path: Path
) -> None:
    from llm_integration.assemble import assemble

    sample = real_data / "lcs_558k_sample"
    assemble(encoder_dir, str(real_data / "babyllama"), tmp_path / "llava")
    common = (f"data.records=[{sample / 'chat.json'}]", f"data.pictures={sample / 'images'}", "data.limit=60")
    train(
        build(
            *common, f"model={tmp_path / 'llava'}", f"out={tmp_path / 'align'}", "stage=align",
            "data.template=plain", "batch=4", "max_steps=4",
        )
    )  # fmt: skip
    train(
        build(
            *common, f"model={tmp_path / 'align' / 'final'}", f"out={tmp_path / 'tune'}",
            "data.template=vicuna_v1", "data.max_length=400", "batch=2", "optim.learning_rate=3e-4",
        )
    )  # fmt: skip
    assert all(1 < loss < 8 for loss in _losses(tmp_path / "align") + _losses(tmp_path / "tune"))
    assert load_chat(tmp_path / "tune" / "final").visual_tokens == 9


def test_without_a_launcher_one_gpu_trains(
    monkeypatch: pytest.MonkeyPatch, build: Callable[..., TrainSettings]
) -> None:
    class Several(TrainingArguments):
        """As on a machine with two GPUs."""

        @cached_property
        def _setup_devices(self) -> torch.device:
            self._n_gpu = 2
            self.distributed_state = None
            return torch.device("cpu")

    monkeypatch.setattr(train_module, "TrainingArguments", Several)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    arguments = build_arguments(build("batch=3"), False)
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 3)


def test_a_processor_without_a_crop_is_collated(llava_dir: Path) -> None:
    processor: Any = load_processor(llava_dir)
    images = processor.image_processor
    images.do_center_crop, images.crop_size, images.size = False, None, {"height": 32, "width": 32}
    config = load_llava_config(llava_dir)
    assert build_collator(processor, config).picture_shape == (3, 32, 32)


def test_the_last_updates_are_in_the_log(build: Any, tmp_path: Path) -> None:
    figures = train(build("log_every=4", "max_steps=6"))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    entries = [line for line in log if "loss" in line]
    assert [line["step"] for line in entries] == [4, 6]
    assert figures["train_loss"] == pytest.approx((4 * entries[0]["loss"] + 2 * entries[1]["loss"]) / 6)


def test_a_whole_model_that_was_trained_is_not_overwritten(
    build: Any, encoder_dir: Path, build_llm_dir: Any, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    words = ("self_contained=true", "checkpoint_every=1", f"out={whole}")
    train(build(*words, "max_steps=1"))
    train(build("max_steps=1"))
    before = {path: path.read_bytes() for path in sorted((whole / "final").iterdir())}
    with pytest.raises(FileExistsError, match="has trained, which would be lost"):
        assemble(encoder_dir, str(build_llm_dir("llama")), whole / "final")
    with pytest.raises(SystemExit):
        export(["--run", str(tmp_path / "run" / "final"), "--out", str(whole / "final")])
    assert {path: path.read_bytes() for path in sorted((whole / "final").iterdir())} == before
    train(build(*words, "max_steps=2"))  # its own result a run replaces
    assert json.loads((whole / "final" / "assembly.json").read_text())["steps"] == 2


def test_a_whole_directory_is_not_exported_again(llava_dir: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        export(["--run", str(llava_dir), "--out", str(tmp_path / "out")])
    assert "is a whole LLaVA directory already: there is nothing to export" in capsys.readouterr().err


def test_a_result_without_a_sample_of_its_base_is_read(build: Any, tmp_path: Path) -> None:
    train(build("stage=align", "max_steps=1"))
    path = tmp_path / "run" / "final" / "run.json"
    facts = json.loads(path.read_text())
    del facts["base_sample_sha256"]
    path.write_text(json.dumps(facts))
    load_model(path.parent)


def test_a_finished_run_that_was_moved_is_left_alone(build: Any, tmp_path: Path) -> None:
    figures = train(build("max_steps=2"))
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    before = {path: path.read_bytes() for path in sorted(moved.rglob("*")) if path.is_file()}
    assert train(build("max_steps=2", f"out={moved}", "data.max_bad_records=5", "data.workers=3")) == figures
    assert {path: path.read_bytes() for path in sorted(moved.rglob("*")) if path.is_file()} == before


def test_the_newest_checkpoints_are_kept(build: Any, tmp_path: Path) -> None:
    train(build("checkpoint_every=3", "keep_checkpoints=2", "max_steps=12"))
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["checkpoint-12", "checkpoint-9"]


def test_older_checkpoints_go_behind_the_mark(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("checkpoint_every=2", "keep_checkpoints=1", "max_steps=6")
    write = trainer_module.write_atomic

    def killed(path: Path, content: str) -> None:
        if path.parent.name == "checkpoint-4":
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(trainer_module, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        train(build(*words))
    newest = check_resume(build(*words), 1)
    assert newest is not None
    assert newest.name == "checkpoint-2"


def test_a_second_epoch_has_an_order_of_its_own(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[list[int]] = []
    plain = GroupedSampler.__iter__

    def watched(self: GroupedSampler) -> Any:
        orders.append(list(plain(self)))
        return iter(orders[-1])

    monkeypatch.setattr(GroupedSampler, "__iter__", watched)
    train(build("max_steps=null", "epochs=2"))
    assert len(orders) == 2
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_an_epoch_is_told_whatever_rounding_made_of_it() -> None:
    told: list[int] = []
    trainer: Any = SimpleNamespace(order=SimpleNamespace(begin_epoch=told.append))
    for epoch in (0, 1 - 1e-12, 1, 1.75, 2 - 1e-12):
        EpochOrder(trainer).on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)
    assert told == [0, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("deepspeed", "logs", "stops"),
    [
        (None, {"loss": float("nan"), "grad_norm": 1.0}, True),
        (None, {"loss": 1.0, "grad_norm": float("inf")}, True),
        (None, {"loss": 1.0, "grad_norm": 1.0}, False),
        (None, {"loss": 1.0}, False),
        ("zero2.json", {"loss": float("inf"), "grad_norm": 1.0}, True),
        ("zero2.json", {"loss": 1.0, "grad_norm": float("inf")}, False),  # it leaves such an update out
    ],
)
@pytest.mark.parametrize("zero", [True, False])
def test_losses_that_are_no_numbers_stop_every_process(
    tmp_path: Path, deepspeed: str | None, logs: dict[str, float], stops: bool, zero: bool
) -> None:
    log = LogFile(tmp_path / "log.jsonl", SimpleNamespace(bad_records=0, cut_records=0))  # type: ignore[arg-type]
    args = SimpleNamespace(deepspeed=deepspeed, disable_tqdm=False)
    state = SimpleNamespace(global_step=3, is_world_process_zero=zero)
    if stops:
        with pytest.raises(FloatingPointError, match=r"is (nan|inf) at step 3"):
            log.on_log(args, state, None, logs)
    else:
        log.on_log(args, state, None, logs)
    assert (tmp_path / "log.jsonl").exists() == (zero and not stops)


def test_templates_that_take_text_or_parts_are_heard(llava_dir: Path) -> None:
    tokenizer = load_processor(llava_dir).tokenizer
    whole = "{% for m in messages %}{{ m['content'].upper() }}{% endfor %}"
    parts = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] + '' }}{% endfor %}{% endfor %}"
    for template in (whole, parts):
        check_heard(tokenizer, template)
    with pytest.raises(ValueError, match="leaves out what is asked"):
        check_heard(tokenizer, "Answer whatever you see. {% for m in messages %}{{ m['role'] }}{% endfor %}")


def test_a_log_without_losses_has_no_mean(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert mean_loss(log) is None
    log.write_text('{"step": 0, "bad_records": 0}\n')
    assert mean_loss(log) is None
    log.write_text('{"step": 3, "loss": 2.0}\n{"step": 4, "loss": 6.0}\n{"step": 4, "train_loss": 9.0}\n')
    assert mean_loss(log) == 3.0


def test_a_model_within_the_run_is_found_by_any_path(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=r"model=run/final lies in out="):
        check_resume(build("model=run/final"), 1)


def test_a_restart_logs_and_saves_as_often_as_it_asks_for(build: Any, tmp_path: Path) -> None:
    train(build("checkpoint_every=1", "log_every=1", "max_steps=2", "keep_checkpoints=9"))
    train(build("checkpoint_every=3", "log_every=3", "max_steps=6", "keep_checkpoints=9"))
    saved = {int(path.name.split("-")[1]) for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert saved == {1, 2, 3, 6}


def test_a_shorter_run_keeps_its_own_checkpoints(build: Any, tmp_path: Path) -> None:
    train(build("checkpoint_every=2", "max_steps=4", "keep_checkpoints=1"))
    train(build("checkpoint_every=1", "max_steps=2", "keep_checkpoints=1"))
    saved = {int(path.name.split("-")[1]) for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert saved == {2}


def test_a_run_does_not_write_among_the_files_of_its_model(build: Any, tmp_path: Path) -> None:
    train(build("stage=align", "max_steps=1"))
    final = tmp_path / "run" / "final"
    with pytest.raises(SettingsError, match="lies in out"):
        check_resume(build(f"model={final}", f"out={final}"), 1)
    with pytest.raises(SettingsError, match=r"but run\.json of something else"):
        check_resume(build(f"out={final}"), 1)


def test_a_run_that_is_stopped_before_it_has_settings_ends_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "load_settings", interrupt)
    with pytest.raises(SystemExit) as stopped:
        main(["x.yaml"])
    assert stopped.value.code == 130


def test_a_setting_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("max_steps: 1\nbatch: 2\nmax_steps: 3\n")
    with pytest.raises(SettingsError, match=r"x\.yaml is not valid YAML: the key 'max_steps' is there twice"):
        load_settings(tmp_path / "x.yaml")


def test_weights_are_copied_once_and_only_where_they_are_written() -> None:
    def refuse(engine: Any) -> None:
        raise AssertionError("accelerate copies the whole model in every process")

    model = torch.nn.Linear(3, 2)
    flat = torch.arange(8.0)  # as ZeRO-2 keeps what is trained
    model.weight.data, model.bias.data = flat[:6].view(2, 3), flat[6:]
    model.bias.requires_grad_(False)
    for first in (True, False):
        trainer: Any = SimpleNamespace(
            accelerator=SimpleNamespace(get_state_dict=refuse),
            model_wrapped=None,
            is_world_process_zero=lambda first=first: first,
            is_deepspeed_enabled=True,
        )
        weights = gather_weights(trainer, model)
        assert list(weights) == (["weight", "bias"] if first else [])
        if first:
            assert torch.equal(weights["weight"], model.weight)
            assert weights["weight"].untyped_storage().nbytes() == 6 * 4
            assert weights["bias"].data_ptr() == model.bias.data_ptr()


def test_a_checkpoint_of_deepspeed_holds_the_weights_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer: Any = ChatTrainer.__new__(ChatTrainer)
    trainer.model = torch.nn.Identity()
    written: list[str | None] = []
    monkeypatch.setattr(Trainer, "save_model", lambda self, folder, internal: written.append(folder))
    for trainer.is_deepspeed_enabled in (True, False):
        trainer.save_model(str(tmp_path / str(trainer.is_deepspeed_enabled)), _internal_call=True)
    assert written == [str(tmp_path / "False")]


def test_conversations_that_were_cut_are_counted_in_the_log(build: Any, tmp_path: Path) -> None:
    def counts(*words: str) -> list[int]:
        plain = ("stage=align", "data.template=plain", "max_steps=6")
        train(build(*plain, *words, f"out={tmp_path / words[0]}"))
        lines = (tmp_path / words[0] / "log.jsonl").read_text().splitlines()
        return [json.loads(line)["cut_records"] for line in lines]

    assert set(counts("data.max_length=300")) == {0}
    short = counts("data.max_length=20", "data.workers=1")  # of twelve records one has two pictures
    assert short == sorted(short)
    assert short[-1] == 1


def test_no_conversation_is_longer_than_the_language_model_has_positions(
    build: Any, llava_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    monkeypatch.setattr(
        train_module, "ChatEncoder", lambda *words: lengths.append(words[3]) or ChatEncoder(*words)
    )
    for words in (("data.max_length=300",), ("data.max_length=2048", "resume=false")):
        train(build(*words))
    assert lengths == [300, load_llava_config(llava_dir).text_config.max_position_embeddings] == [300, 512]
    # Stretched ones reach further, as in chat.
    stretched = Path(shutil.copytree(llava_dir, tmp_path / "stretched"))
    config = json.loads((stretched / "config.json").read_text())
    config["text_config"]["rope_parameters"] |= {"rope_type": "linear", "factor": 2.0}
    (stretched / "config.json").write_text(json.dumps(config))
    train(build("data.max_length=2048", f"model={stretched}", f"out={tmp_path / 'longer'}"))
    assert lengths[2:] == [1024]
