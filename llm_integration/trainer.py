"""Hugging Face's Trainer with our parameter groups, our order of the data, and our log."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Sampler
from transformers import LlavaForConditionalGeneration, Trainer, TrainerCallback

from sparse_vlm.atomic import write_atomic
from sparse_vlm.preemption import StopRequest

from .config import TrainSettings
from .data import ChatDataset, GroupedSampler
from .freeze import build_groups
from .load import load_llava
from .processes import any_process
from .result import apply_weights


class ChatTrainer(Trainer):
    """Hugging Face's Trainer with our parameter groups and our order of the data.

    Args:
        settings: of the run.
        options: the Trainer's own arguments.
    """

    TRAINED = "trained.safetensors"

    def __init__(self, settings: TrainSettings, **options: Any) -> None:
        self.settings = settings
        self.order: GroupedSampler | None = None
        super().__init__(**options)
        model: Any = self.model
        model.register_load_state_dict_post_hook(_forgive_frozen)
        self.add_callback(EpochOrder(self))
        self.add_callback(OwnPace())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the groups of :func:`llm_integration.freeze.build_groups`."""
        if self.optimizer is None:
            target: Any = model or self.model
            groups = build_groups(target, self.settings)
            self.optimizer = torch.optim.AdamW(groups, lr=self.settings.optim.learning_rate)
        return self.optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        target = model or self.model
        if not isinstance(target, LlavaForConditionalGeneration):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        file = Path(resume_from_checkpoint) / self.TRAINED
        if file.is_file():
            weights = load_file(file)
            lost = sorted(_trained(target).keys() - weights.keys())
            if lost:
                raise ValueError(f"{file} lacks {len(lost)} of the trained weights, first {lost[0]}")
            apply_weights(target, weights, file)
            return
        # Checkpoints once held the whole model. The Trainer would look for names in the file that LLaVA only
        # has in memory, find none of them, and go on with the weights the run had begun with. Single
        # precision holds every stored value.
        stored = load_llava(resume_from_checkpoint, torch.float32)
        target.load_state_dict(stored.state_dict(), strict=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Called by the Trainer for a checkpoint, in every process; what is frozen lies in the run's model.

        DeepSpeed's own files hold the weights already, and are all that a restart with it reads: the Trainer
        would gather the whole model in memory, in every process, to write it a second time.
        """
        if self.is_deepspeed_enabled:
            return
        if not isinstance(self.model, LlavaForConditionalGeneration):  # peft writes its adapters alone
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            weights = _trained(self.model)
            file = Path(output_dir or self.settings.out) / self.TRAINED
            write_atomic(file, lambda path: save_file(weights, path))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            _leave_frozen_out(self.model_wrapped)
        super()._save_optimizer_and_scheduler(output_dir)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset: Any = train_dataset if train_dataset is not None else self.train_dataset
        if self.settings.data.group == "none":
            return super()._get_train_sampler(dataset)
        self.order = GroupedSampler(
            dataset.lengths,
            dataset.with_picture,
            self.settings.batch * self.args.world_size,
            self.settings.seed,
        )
        return self.order


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that receive gradients, by name."""
    return {name: weight.data for name, weight in model.named_parameters() if weight.requires_grad}


def _frozen_names(model: nn.Module) -> set[str]:
    """All names of the parameters that receive no gradients."""
    every = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in every if not parameter.requires_grad}


def _forgive_frozen(module: nn.Module, keys: Any) -> None:
    """After weights were read into a model: a checkpoint may lack what is frozen, and nothing else."""
    frozen = _frozen_names(module)
    keys.missing_keys[:] = [name for name in keys.missing_keys if name not in frozen]


def _leave_frozen_out(engine: Any) -> None:
    """Have DeepSpeed write checkpoints of what is trained, whoever asks it for one."""

    def only_trained(**options: Any) -> dict[str, Any]:
        # Its own option leaves a parameter out under one name: tied embeddings would be written by another.
        weights: dict[str, Any] = type(engine).module_state_dict(engine, **options)
        for name in _frozen_names(engine.module) & weights.keys():
            del weights[name]
        return weights

    engine.module_state_dict = only_trained
    engine.save_checkpoint = partial(type(engine).save_checkpoint, engine, exclude_frozen_parameters=True)


def gather_weights(trainer: Trainer, model: nn.Module) -> dict[str, torch.Tensor]:
    """A trained model's whole state dict in the first process, and an empty one in the others.

    Args:
        trainer: that trained it.
        model: the model, or peft's wrapping of it.
    """
    accelerator: Any = trainer.accelerator
    parted = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    weights: dict[str, torch.Tensor] = {}
    if parted:  # by ZeRO-3, to which all have to give
        weights = accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return {}
    if parted:
        return weights
    # Elsewhere each process has everything. accelerate would copy the whole model, in every process, because
    # ZeRO-1 and 2 keep weights as parts of one large tensor, which files would hold: those that are trained.
    weights = model.state_dict()
    if trainer.is_deepspeed_enabled:
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        weights |= {name: weights[name].to("cpu", copy=True) for name in trained}
    return weights


class EpochOrder(TrainerCallback):
    """Tells the sampler its epoch.

    The Trainer and accelerate tell what they find, and do not find a sampler below the wrappings that
    several processes and a restart within an epoch put around it.

    Args:
        trainer: whose sampler.
    """

    def __init__(self, trainer: ChatTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer before it asks for an epoch's first batch, or the next one of a restart."""
        if self.trainer.order is not None:
            self.trainer.order.begin_epoch(int(state.epoch + 1e-6))


class OwnPace(TrainerCallback):
    """Logs and saves as often as this start asks for; a checkpoint brings the pace that it was written at."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer after it has read a checkpoint."""
        state.logging_steps, state.save_steps = args.logging_steps, args.save_steps


class EndWhenAsked(TrainerCallback):
    """Ends training behind a checkpoint once a process of it is asked to end.

    Several processes have to agree where, which they do when they log: a launcher may ask one after the
    other.

    Args:
        stop: whether this process is asked.
    """

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop
        self.ended = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer after each update, in every process."""
        if control.should_training_stop:
            return
        if args.world_size > 1 and state.global_step % args.logging_steps:
            return
        if any_process(self.stop.asked, args.device):
            control.should_save = control.should_training_stop = self.ended = True


class LogFile(TrainerCallback):
    """One JSON line for each log entry in the run's directory, and in the output where there is no bar.

    Args:
        path: the log.
        dataset: whose bad and cut records are counted.
    """

    def __init__(self, path: Path, dataset: ChatDataset) -> None:
        self.path = path
        self.dataset = dataset

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer after each update."""
        # A checkpoint does not hold the losses since the last entry: an entry with it leaves none.
        if control.should_save or control.should_training_stop:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Called by the Trainer with each entry, in every process, before a checkpoint of the same step.

        Raises:
            FloatingPointError: if loss or gradients are no longer numbers.
        """
        # DeepSpeed leaves out by itself an update whose gradient is no number.
        for name in ("loss",) if args.deepspeed else ("loss", "grad_norm"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise FloatingPointError(
                    f"the {name} is {value} at step {state.global_step}: lower optim.learning_rate and begin "
                    "anew, or go on from a checkpoint, which are from before"
                )
        if not state.is_world_process_zero or not logs:
            return
        if "train_loss" in logs:
            logs = {**logs, "train_loss": mean_loss(self.path)}  # the Trainer's own is of this start alone
        counts = {"bad_records": self.dataset.bad_records, "cut_records": self.dataset.cut_records}
        line = json.dumps({"step": state.global_step, **logs, **counts})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        if args.disable_tqdm:
            print(line, flush=True)


def mean_loss(log: Path) -> float | None:
    """Mean loss of all updates in a log, whose entries each average those since the one before."""
    total, done = 0.0, 0
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        entry = json.loads(line)
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - done)
            done = entry["step"]
    return total / done if done else None


class WholeMark(TrainerCallback):
    """Marks a checkpoint once all processes have written their share of it.

    The Trainer's own last file is no such sign: it exists before it has content, and other processes may
    still be writing theirs. Older checkpoints go only then.

    Args:
        keep: how many checkpoints are kept.
        model: what they are known to belong to, see :func:`llm_integration.result.sample_weights`.
    """

    NAME = "whole.json"

    def __init__(self, keep: int, model: str) -> None:
        self.keep = keep
        self.model = model

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer, in every process, after its share is written."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            mark = {
                "step": state.global_step,
                "processes": args.world_size,
                "model_sample_sha256": self.model,
            }
            write_atomic(folder / self.NAME, json.dumps(mark) + "\n")
            steps = {int(path.name.split("-")[1]): path for path in folder.parent.glob("checkpoint-*")}
            # Later ones are of a longer run that this one takes the place of.
            done = sorted(step for step in steps if step <= state.global_step)
            for step in done[: -self.keep]:
                shutil.rmtree(steps[step])
