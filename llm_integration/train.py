"""Instruction tuning in two stages, on Hugging Face's Trainer.

``deepspeed --module llm_integration.train configs/llm/tune.yaml model=DIR out=DIR`` trains on all devices;
``python -m llm_integration.train ...`` with the same words trains on one.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import (
    LlavaConfig,
    LlavaProcessor,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sparse_vlm.atomic import write_atomic
from sparse_vlm.preemption import StoppedError, StopRequest
from sparse_vlm.settings import SettingsError, settings_to_dict

from .assemble import save_llava
from .config import DataSettings, HeldoutSettings, TrainSettings, load_settings
from .data import (
    ChatCollator,
    ChatDataset,
    ChatEncoder,
    FolderSource,
    JoinedSource,
    Source,
    TarSource,
)
from .data.dataset import TooManyBadRecordsError
from .freeze import PROJECTOR, TOWER, cast_frozen, prepare_parameters, trained_names
from .heldout import HeldoutLoss
from .load import load_llava_config, read_json
from .processes import leave_process_group
from .processor import count_image_tokens, measure_pictures
from .result import (
    RUN_FILE,
    base_of,
    load_model,
    load_model_processor,
    read_facts,
    sample_weights,
    save_result,
    trained_before,
)
from .room import count_positions
from .templates import CHATML_TOKENS, build_template, check_heard
from .trainer import ChatTrainer, EndWhenAsked, LogFile, WholeMark, gather_weights, mean_loss

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"
LOG_FILE = "log.jsonl"
CHECKPOINTS = "checkpoints"
FINAL = "final"
# What a run writes beside its settings, and what other runs and models are known by.
_TAKEN = (LOG_FILE, CHECKPOINTS, FINAL, "config.yaml", "config.json", RUN_FILE)
# What the result of a run does not depend on, and what a run may be continued with although begun otherwise.
_WITHOUT_EFFECT = (
    *("out", "resume", "log_every", "keep_checkpoints", "checkpoint_every", "heldout"),
    *("data.workers", "data.max_bad_records", "report_to"),
)
# DeepSpeed's own name of it, and the one of before, which it still takes.
_GATHER = ("stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save")
_FREE_TO_CHANGE = (*_WITHOUT_EFFECT, "max_steps", "epochs")


def build_dataset(
    settings: TrainSettings,
    processor: LlavaProcessor,
    template: str,
    positions: int | None = None,
    of: DataSettings | HeldoutSettings | None = None,
) -> ChatDataset:
    """The conversations that the settings name.

    Args:
        settings: of the run.
        processor: of the model.
        template: Jinja text.
        positions: of the language model; longer conversations are cut there, whatever ``data.max_length``.
        of: which of them; by default those that are trained on.

    Raises:
        ValueError: if files are missing or no record is good.
        TooManyBadRecordsError: if too many are bad.
    """
    data, of = settings.data, of or settings.data
    sources: list[Source] = [FolderSource(path, of.pictures) for path in of.records]
    if of.shards:
        sources.append(TarSource(of.shards))
    longest = data.max_length
    if positions is not None and positions < longest:
        logger.info("conversations are cut at the %d positions of the language model", positions)
        longest = positions
    encoder = ChatEncoder(processor.tokenizer, template, count_image_tokens(processor), longest)
    return ChatDataset(
        JoinedSource(sources), encoder, processor.image_processor, data.max_bad_records, of.limit
    )


def build_collator(processor: LlavaProcessor, config: LlavaConfig) -> ChatCollator:
    """The collator for a model and its processor."""
    tokenizer: Any = processor.tokenizer
    return ChatCollator(
        int(tokenizer.pad_token_id),
        int(config.image_token_id),
        count_image_tokens(processor),
        (3, *measure_pictures(processor)),
    )


def build_arguments(settings: TrainSettings, deepspeed: bool) -> TrainingArguments:
    """Our settings in the Trainer's words."""
    cpu = not torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(settings.out / CHECKPOINTS),
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulation,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.optim.learning_rate,
        weight_decay=settings.optim.weight_decay,
        warmup_steps=settings.optim.warmup_fraction,
        lr_scheduler_type=settings.optim.schedule
        if settings.optim.schedule != "constant"
        else "constant_with_warmup",
        max_grad_norm=settings.optim.clip,
        bf16=settings.precision == "bf16",
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        deepspeed=str(settings.deepspeed) if deepspeed else None,
        save_strategy="steps" if settings.checkpoint_every else "no",
        save_steps=settings.checkpoint_every or 1,
        # The Trainer removes old ones before a new one is marked as whole: that is done behind the mark.
        save_total_limit=settings.keep_checkpoints + 1,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        dataloader_num_workers=settings.data.workers,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        # Without a launcher a backend's name would make accelerate look for a process group.
        ddp_backend="gloo" if cpu and "LOCAL_RANK" in os.environ else None,
        use_cpu=cpu,
        seed=settings.seed,
        data_seed=settings.seed,
        disable_tqdm=not sys.stderr.isatty(),
        report_to=list(settings.report_to) or "none",
    )
    if "LOCAL_RANK" not in os.environ and arguments.n_gpu > 1:
        arguments._n_gpu = 1  # the Trainer would cut batches for all of them, pictures apart from their words
    return arguments


def check_start(settings: TrainSettings) -> None:
    """See that the result of this run can hold everything in which its model will differ from the base, and
    that its reports can be written.

    Raises:
        SettingsError: if adapters are asked for on top of a run that trained more than they carry with them:
            the projector, and a tower that is tuned; or if a report cannot be written.
    """
    here = get_available_reporting_integrations()
    lacking = [name for name in settings.report_to if name not in here]
    if lacking:
        raise SettingsError(
            [
                f"report_to: {', '.join(lacking)} is nothing that the Trainer of transformers knows, or not "
                f"installed; here it can report to {', '.join(here) or 'nothing'}"
            ]
        )
    carried = (PROJECTOR, TOWER) if settings.tower == "tuned" else (PROJECTOR,)
    before = trained_before(settings.model)
    if settings.lora.rank and not all(any(part in name for part in carried) for name in before):
        raise SettingsError(
            [
                f"model={settings.model} is the result of a run that trained more than adapters carry with "
                "them; make a plain model of it first: "
                f"python -m llm_integration.export --run {settings.model} --out DIR"
            ]
        )


def _changed(old: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str]) -> list[str]:
    """Keys of settings that are no longer what they were, ``data.records`` and so on, but for free ones."""

    def flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
        flat = dict(settings)
        flat.update({f"data.{key}": value for key, value in (flat.pop("data", None) or {}).items()})
        return flat

    before, after = flatten(old), flatten(now)
    return [key for key in after if key not in free and before.get(key) != after[key]]


def check_resume(settings: TrainSettings, processes: int) -> Path | None:
    """The newest whole checkpoint to go on from.

    Args:
        settings: of the run.
        processes: how many take part now.

    Raises:
        SettingsError: if the run was begun with other settings, or by another number of processes, or if
            something else lies there.
    """
    before, now = settings.out / SETTINGS_FILE, json.loads(json.dumps(settings_to_dict(settings)))
    # A log that a shell writes there is no harm; another run, a model or a result would be mixed with ours.
    place = settings.model.resolve()
    if settings.out.resolve() in (place, *place.parents):
        raise SettingsError([f"model={settings.model} lies in out={settings.out}: name another out"])
    strange = [name for name in _TAKEN if (settings.out / name).exists()]
    if strange and not before.is_file():
        raise SettingsError(
            [
                f"{settings.out} holds no run of llm_integration.train, but {' and '.join(strange)} of "
                "something else: name another out"
            ]
        )
    if not settings.resume or not before.is_file():
        return None
    old = json.loads(before.read_text(encoding="utf-8"))
    other = _changed(old, now, _FREE_TO_CHANGE)
    if other:
        raise SettingsError(
            [
                f"{settings.out} was begun with other settings ({', '.join(other)}): name another out, or "
                "set resume=false to begin anew"
            ]
        )
    found = [
        path
        for path in (settings.out / CHECKPOINTS).glob("checkpoint-*")
        if (path / WholeMark.NAME).is_file()
    ]
    # One at the very end has nothing left to do; within an epoch the Trainer would do a step more.
    unfinished = [path for path in found if not _is_at_end(path, settings, old)]
    newest = max(unfinished, key=checkpoint_step, default=None)
    if newest is not None:
        mark = json.loads((newest / WholeMark.NAME).read_text(encoding="utf-8"))
        wrote = mark.get("processes", processes)
        if wrote != processes:
            raise SettingsError(
                [
                    f"{newest} was written by {wrote} processes, and this run has {processes}, which would "
                    "skip records: start as many, or set resume=false to begin anew"
                ]
            )
        # What is frozen lies there alone; checkpoints of before it was written have no such hash.
        sampled = mark.get("model_sample_sha256")
        if sampled is not None and settings.model.is_dir() and sample_weights(settings.model) != sampled:
            raise SettingsError(
                [
                    f"the weights in model={settings.model} have changed since {newest} was written, which "
                    "holds only what is trained on top of them: put them back, or set resume=false to begin "
                    "anew"
                ]
            )
    return newest


def _is_at_end(checkpoint: Path, settings: TrainSettings, begun_with: Mapping[str, Any]) -> bool:
    """Whether a checkpoint of a run is the one after its last update."""
    if settings.max_steps is not None:
        return checkpoint_step(checkpoint) >= settings.max_steps
    if begun_with["max_steps"] is not None or begun_with["epochs"] != settings.epochs:
        return False
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return checkpoint_step(checkpoint) >= int(state["max_steps"])


def read_finished(settings: TrainSettings) -> dict[str, float] | None:
    """The closing figures of a run that has ended already; None if there is something left to do."""
    facts = read_facts(settings.out / FINAL) if settings.resume else None
    if facts is None or "settings" not in facts:
        return None
    asked = json.loads(json.dumps(settings_to_dict(settings)))
    return None if _changed(facts["settings"], asked, _WITHOUT_EFFECT) else dict(facts["metrics"])


def checkpoint_step(checkpoint: Path) -> int:
    """Updates that were done when a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def drop_after(log: Path, step: int) -> None:
    """Take the lines of later steps, which are done again, and a line that a kill cut off out of a log."""
    if not log.is_file():
        return
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:
            continue
    write_atomic(log, "".join(f"{line}\n" for line in kept))


def use_deepspeed(settings: TrainSettings) -> bool:
    """Whether DeepSpeed runs, made ready for it where the accelerator is the CPU."""
    launched = "LOCAL_RANK" in os.environ
    if settings.deepspeed is None or not launched:
        if settings.deepspeed is not None:
            logger.info("no launcher: training on one device without DeepSpeed (%s)", settings.deepspeed)
        return False
    if not settings.deepspeed.is_file():
        raise SettingsError([f"deepspeed: there is no file {settings.deepspeed}"])
    zero = read_json(settings.deepspeed).get("zero_optimization", {})
    if zero.get("stage") == 3 and not any(zero.get(name) for name in _GATHER):
        raise SettingsError(
            [
                f'deepspeed: stage 3 in {settings.deepspeed} needs "{_GATHER[0]}": true beside it, without '
                "which the result could not be put together in the end"
            ]
        )
    import deepspeed

    if deepspeed.get_accelerator().device_name() == "cpu":
        # Must come before any model or arguments: otherwise batch sizes are computed for another world.
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    return True


def train(settings: TrainSettings) -> dict[str, float]:
    """Run one stage and write its result to ``settings.out / "final"``.

    Returns:
        The Trainer's closing figures.

    Raises:
        ValueError: if model, data and settings do not fit each other.
        TooManyBadRecordsError: if too many records are bad.
        StoppedError: if it was asked to end, after a checkpoint.
    """
    deepspeed = use_deepspeed(settings)
    arguments = build_arguments(settings, deepspeed)  # ZeRO-3 partitions models that are loaded after this
    checkpoint = check_resume(settings, arguments.world_size)
    check_start(settings)
    finished = read_finished(settings)
    if finished is not None:
        logger.info("this run is finished: %s", settings.out / FINAL)
        return finished
    set_seed(settings.seed)

    processor = load_model_processor(settings.model)
    processor_template: Any = processor.chat_template
    template = build_template(settings.data.template, processor_template)
    tokenizer: Any = processor.tokenizer
    if settings.stage == "tune":
        check_heard(tokenizer, template)
    pieces = [token for token in CHATML_TOKENS if token not in tokenizer.get_vocab()]
    if settings.data.template == "chatml" and pieces:
        raise ValueError(
            f"data.template=chatml needs {' and '.join(pieces)} as single tokens, which the tokenizer in "
            f"{settings.model} does not have: assemble the model with --template chatml"
        )
    text_config: Any = load_llava_config(base_of(settings.model)).text_config
    positions = count_positions(text_config)
    dataset = build_dataset(settings, processor, template, positions)
    logger.info("%d records to train on, %d bad ones skipped", len(dataset), dataset.bad_records)
    others: ChatDataset | None = None
    if settings.heldout:
        others = build_dataset(settings, processor, template, positions, settings.heldout)
        logger.info("%d records held out, %d bad ones skipped", len(others), others.bad_records)

    half = deepspeed and settings.precision == "bf16"
    model: Any = load_model(settings.model, torch.bfloat16 if half else torch.float32, merge=False)
    model.config.use_cache = False
    wrapped = prepare_parameters(model, settings)
    if settings.precision == "bf16" and not deepspeed:
        cast_frozen(wrapped, torch.bfloat16)

    if arguments.process_index == 0:
        settings.out.mkdir(parents=True, exist_ok=True)
        for name in (CHECKPOINTS, FINAL):
            if not settings.resume and (settings.out / name).is_dir():
                # Left there, a later start would take them for this run's.
                shutil.rmtree(settings.out / name)
        drop_after(settings.out / LOG_FILE, checkpoint_step(checkpoint) if checkpoint else -1)
        write_atomic(settings.out / SETTINGS_FILE, json.dumps(settings_to_dict(settings), indent=2) + "\n")
        write_atomic(settings.out / "trained.txt", "\n".join(trained_names(wrapped)) + "\n")
    collator = build_collator(processor, model.config)
    end = EndWhenAsked(StopRequest())
    log = settings.out / LOG_FILE
    heldout = (
        HeldoutLoss(others, collator, settings.heldout.every, settings.batch, log, end) if others else None
    )
    board = os.environ.get("TENSORBOARD_LOGGING_DIR", str(settings.out / "tensorboard"))
    with patch.dict(os.environ, {"TENSORBOARD_LOGGING_DIR": board}):
        trainer = ChatTrainer(
            settings,
            model=wrapped,
            args=arguments,
            train_dataset=dataset,
            data_collator=collator,
            callbacks=[
                end,
                *([heldout] if heldout else []),
                LogFile(log, dataset),
                WholeMark(settings.keep_checkpoints, sample_weights(settings.model)),
            ],
        )
    if heldout is not None:
        heldout.trainer = trainer
    trainer.remove_callback(PrinterCallback)  # says again what the log says
    with end.stop:
        outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if end.ended:
        raise StoppedError(f"stopped after update {trainer.state.global_step}, as it was asked to")
    if deepspeed and type(trainer.model_wrapped).__name__ != "DeepSpeedEngine":
        raise RuntimeError("DeepSpeed was asked for, but the Trainer ran without its engine")
    if settings.stage == "tune":
        processor.chat_template = template
    metrics = dict(outcome.metrics)
    mean = mean_loss(settings.out / LOG_FILE) if trainer.is_world_process_zero() else None
    if mean is not None:
        metrics["train_loss"] = mean
    if heldout is not None and heldout.last is not None:
        metrics[heldout.NAME] = heldout.last
    _finish(trainer, wrapped, processor, settings, metrics)
    return metrics


def _finish(
    trainer: Trainer,
    model: Any,
    processor: LlavaProcessor,
    settings: TrainSettings,
    metrics: dict[str, float],
) -> None:
    accelerator: Any = trainer.accelerator
    tensors = gather_weights(trainer, model)
    if trainer.is_world_process_zero():
        for path in (settings.out / CHECKPOINTS).glob("checkpoint-*"):
            if checkpoint_step(path) > trainer.state.global_step:  # of a longer run, which this one replaces
                shutil.rmtree(path)
        facts = {
            "stage": settings.stage,
            "tower": settings.tower,
            "steps": trainer.state.global_step,
            "metrics": metrics,
            "settings": settings_to_dict(settings),
        }
        out = settings.out / FINAL
        if settings.self_contained:
            parts = settings.out / "parts"
            save_result(model, tensors, processor, parts, settings.model, facts)
            unset_hf_deepspeed_config()  # ZeRO-3 would wait for the others to load their share of it
            save_llava(load_model(parts), processor, out, facts, over="trained")
            shutil.rmtree(parts)
        else:
            save_result(model, tensors, processor, out, settings.model, facts)
    accelerator.wait_for_everyone()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: a settings file, then ``key.sub=value``."""
    words = [
        w for w in (sys.argv[1:] if arguments is None else arguments) if not w.startswith("--local_rank")
    ]
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: python -m llm_integration.train SETTINGS.yaml [key.sub=value ...]\n\n{__doc__}")
        raise SystemExit(0 if words else 2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    settings: TrainSettings | None = None
    try:
        settings = load_settings(Path(words[0]), words[1:])
        metrics = train(settings)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    except TooManyBadRecordsError as error:
        # One that a loader worker passed on has the worker's traceback before its sentence.
        sentence = str(error).strip().rpartition("\n")[2].rpartition("TooManyBadRecordsError: ")[2]
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    except StoppedError as error:
        print(f"{error}: the same command goes on from there", file=sys.stderr, flush=True)
        leave_process_group()
        raise SystemExit(143) from None
    except KeyboardInterrupt:
        if settings is None:
            raise SystemExit(130) from None
        print(
            f"stopped: the same command goes on from the newest checkpoint in {settings.out}, if any",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(130) from None
    print(json.dumps(metrics))
    if int(os.environ.get("RANK", "0")) == 0:
        final = settings.out / FINAL
        print(f"result: {final}; python -m llm_integration.chat --model {final}", file=sys.stderr)
    leave_process_group()


if __name__ == "__main__":
    main()
