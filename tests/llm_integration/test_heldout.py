"""The loss on conversations that are not trained on."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llm_integration import heldout
from llm_integration.config import TrainSettings
from llm_integration.heldout import measure_loss
from llm_integration.load import load_checked_processor, load_llava
from llm_integration.result import load_model
from llm_integration.train import build_collator, build_dataset, train
from llm_integration.trainer import ChatTrainer
from sparse_vlm.preemption import StoppedError
from sparse_vlm.settings import SettingsError, build_settings


def _write_chats(folder: Path, count: int) -> Path:
    """Records of different lengths; every third has no picture."""
    folder.mkdir()
    records = []
    for number in range(count):
        colour = ("red", "green", "blue")[number % 3]
        turns = [
            {"from": "human", "value": "<image>\nWhat colour?"},
            {"from": "gpt", "value": f"it is {colour}" + " indeed" * number},
        ]
        record: dict[str, Any] = {"id": str(number), "conversations": turns}
        if number % 3 == 2:
            turns[0]["value"] = "What do you say?"
        else:
            Image.new("RGB", (40, 30), colour).save(folder / f"{number}.jpg")
            record["image"] = f"{number}.jpg"
        records.append(record)
    (folder / "chat.json").write_text(json.dumps(records))
    return folder / "chat.json"


Build = Callable[..., TrainSettings]


@pytest.fixture
def build(llava_dir: Path, tmp_path: Path) -> Build:
    """Settings of a run of four updates, with seven conversations held out."""
    data, others = _write_chats(tmp_path / "data", 12), _write_chats(tmp_path / "others", 7)

    def settings(*overrides: str) -> TrainSettings:
        mapping = {
            "model": str(llava_dir),
            "out": str(tmp_path / "run"),
            "data": {"records": [str(data)], "workers": 0},
            "heldout": {"records": [str(others)], "every": 2},
            "optim": {"learning_rate": 3e-3, "warmup_fraction": 0.0, "schedule": "constant"},
            "batch": 2,
            "max_steps": 4,
            "precision": "fp32",
            "log_every": 1,
            "checkpoint_every": 2,
        }
        return build_settings(TrainSettings, mapping, overrides)

    return settings


def _log(out: Path, key: str) -> list[tuple[int, float]]:
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(entry["step"], entry[key]) for entry in entries if key in entry]


@torch.no_grad()
def _by_hand(directory: Path, settings: TrainSettings) -> float:
    """The mean over all learned tokens, one conversation at a time."""
    model: Any = load_model(directory) if (directory / "run.json").is_file() else load_llava(directory)
    processor = load_checked_processor(settings.model, model.config)
    dataset = build_dataset(settings, processor, str(processor.chat_template), None, settings.heldout)
    collate = build_collator(processor, model.config)
    losses, tokens = 0.0, 0
    for number in range(len(dataset)):
        batch = collate([dataset[number]])
        learned = int((batch["labels"][:, 1:] != -100).sum())
        losses += float(model(**batch).loss) * learned
        tokens += learned
    return losses / tokens


def test_it_is_the_mean_over_all_learned_tokens(build: Build, tmp_path: Path) -> None:
    settings = build()
    metrics = train(settings)
    found = dict(_log(tmp_path / "run", "heldout_loss"))
    assert list(found) == [0, 2, 4]
    assert found[0] == pytest.approx(_by_hand(settings.model, settings), rel=1e-5)
    assert found[4] == pytest.approx(_by_hand(tmp_path / "run" / "final", settings), rel=1e-5)
    assert found[4] < found[0]
    assert metrics["heldout_loss"] == found[4]
    facts = json.loads((tmp_path / "run" / "final" / "run.json").read_text())
    assert facts["metrics"]["heldout_loss"] == found[4]


@pytest.mark.parametrize(
    "extra", [(), ("lora.rank=4", "lora.dropout=0.5"), ("data.workers=1",), ("checkpoint_every=0",)]
)
def test_training_goes_on_as_if_nothing_had_been_asked(
    build: Build, tmp_path: Path, extra: tuple[str, ...]
) -> None:
    train(build(*extra))
    train(build(*extra, "heldout.records=[]", "heldout.every=500", f"out={tmp_path / 'without'}"))
    assert _log(tmp_path / "run", "loss") == _log(tmp_path / "without", "loss")
    assert not _log(tmp_path / "without", "heldout_loss")


def test_a_restart_logs_each_of_them_once(build: Build, tmp_path: Path) -> None:
    train(build("max_steps=2"))
    train(build("max_steps=4"))
    train(build(f"out={tmp_path / 'whole'}"))
    assert _log(tmp_path / "run", "heldout_loss") == _log(tmp_path / "whole", "heldout_loss")
    assert len(_log(tmp_path / "run", "heldout_loss")) == 3


def test_a_run_killed_before_its_first_checkpoint_logs_the_beginning_once(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: Any, **options: Any) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        measured = heldout.measure_loss
        patch.setattr(
            heldout, "measure_loss",
            lambda trainer, *rest: killed() if trainer.state.global_step else measured(trainer, *rest),
        )  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            train(build())
    assert [step for step, _ in _log(tmp_path / "run", "heldout_loss")] == [0]
    train(build())
    assert [step for step, _ in _log(tmp_path / "run", "heldout_loss")] == [0, 2, 4]


def test_a_run_may_begin_without_and_go_on_with_them(build: Build, tmp_path: Path) -> None:
    train(build("max_steps=2", "heldout.records=[]", "heldout.every=500"))
    train(build("max_steps=4"))
    assert [step for step, _ in _log(tmp_path / "run", "heldout_loss")] == [2, 4]


def test_a_run_that_is_asked_to_end_leaves_an_evaluation_to_the_next_start(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(build(f"out={tmp_path / 'whole'}"))
    step, done = ChatTrainer.training_step, []

    def ask(self: ChatTrainer, *arguments: Any) -> Any:
        done.append(1)
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ChatTrainer, "training_step", ask)
        with pytest.raises(StoppedError, match="after update 2"):
            train(build())
    assert [step for step, _ in _log(tmp_path / "run", "heldout_loss")] == [0]
    again = train(build())
    assert _log(tmp_path / "run", "heldout_loss") == _log(tmp_path / "whole", "heldout_loss")
    assert again["heldout_loss"] == whole["heldout_loss"]


def test_only_the_beginning_and_the_end(build: Build, tmp_path: Path) -> None:
    train(build("heldout.every=0", "heldout.limit=3"))
    assert [step for step, _ in _log(tmp_path / "run", "heldout_loss")] == [0, 4]


@pytest.mark.parametrize("processes", [2, 3, 9])
def test_processes_share_the_work_and_run_as_many_batches(
    build: Build, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    settings = build()
    model: Any = load_llava(settings.model)
    processor = load_checked_processor(settings.model, model.config)
    dataset = build_dataset(settings, processor, str(processor.chat_template), None, settings.heldout)
    sums: list[torch.Tensor] = []
    passes: list[int] = []
    model.train()
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: sums.append(total.clone()))
    for rank in range(processes):
        calls: list[int] = []
        hook = model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        arguments = SimpleNamespace(
            process_index=rank, world_size=processes, dataloader_num_workers=0, disable_tqdm=True,
            device=torch.device("cpu"),
        )  # fmt: skip
        trainer: Any = SimpleNamespace(
            args=arguments,
            model_wrapped=model,
            _prepare_inputs=dict,
            compute_loss_context_manager=torch.no_grad,
        )
        # What a process has alone may be nothing at all.
        if rank < len(dataset):
            measure_loss(trainer, dataset, build_collator(processor, model.config), 2)
        else:
            with pytest.raises(ValueError, match="no token is to be learned"):
                measure_loss(trainer, dataset, build_collator(processor, model.config), 2)
        hook.remove()
        passes.append(len(calls))
    assert len(set(passes)) == 1
    assert model.training
    model.eval()
    total = torch.stack(sums).sum(0)
    assert float(total[0] / total[1]) == pytest.approx(_by_hand(settings.model, settings), rel=1e-5)


def test_reports_hold_both_losses_and_change_nothing(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    train(build("max_steps=2"))
    train(build("max_steps=4", "report_to=[tensorboard]"))
    train(build(f"out={tmp_path / 'whole'}"))
    assert _log(tmp_path / "run", "loss") == _log(tmp_path / "whole", "loss")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for name in ("loss", "heldout_loss"):
        written = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        logged = {step: value for step, value in _log(tmp_path / "run", name) if step > 2}
        assert written == pytest.approx(logged)
    assert not (tmp_path / "whole" / "tensorboard").exists()
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    train(build(f"out={tmp_path / 'elsewhere'}", "report_to=[tensorboard]"))
    assert list((tmp_path / "board").iterdir())
    assert not (tmp_path / "elsewhere" / "tensorboard").exists()
    with pytest.raises(SettingsError, match=r"report_to: nowhere is nothing .* tensorboard"):
        train(build("report_to=[nowhere]", f"out={tmp_path / 'other'}"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("heldout.records=[]",), "name their records or shards"),
        (("heldout.every=-1",), "every must be at least 0"),
        (("heldout.limit=0",), "limit at least 1"),
    ],
)
def test_settings_that_make_no_sense(build: Build, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        build(*overrides)


def test_what_is_trained_on_is_not_held_out(build: Build, tmp_path: Path) -> None:
    chats = tmp_path / "data" / ".." / "data" / "chat.json"
    with pytest.raises(SettingsError, match="heldout names what data trains on"):
        build(f"heldout.records=[{chats}]")
