"""The loss on held-out conversations, while a model is tuned."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import Trainer, TrainerCallback

from .data import ChatCollator, ChatDataset
from .data.encode import IGNORED
from .processes import any_process
from .trainer import EndWhenAsked


class HeldoutLoss(TrainerCallback):
    """Logs ``heldout_loss`` before the first update, every so many updates, and after the last one.

    It is the mean over all tokens that are to be learned, whichever process and batch they are in, so that it
    does not depend on how many processes share the work. Training goes on as if nothing had been asked.

    Args:
        dataset: the held-out conversations.
        collator: makes batches of them.
        every: updates between two evaluations; 0 for only before the first and after the last.
        batch: conversations at once in each process.
        log: the run's log, which tells what an earlier start has left out.
        end: comes before it: a run that is asked to end may have seconds for its checkpoint.
    """

    NAME = "heldout_loss"

    def __init__(
        self,
        dataset: ChatDataset,
        collator: ChatCollator,
        every: int,
        batch: int,
        log: Path,
        end: EndWhenAsked,
    ) -> None:
        self.dataset = dataset
        self.collator = collator
        self.every = every
        self.batch = batch
        self.log = log
        self.end = end
        self.trainer: Any = None
        self.last: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer after it has read a checkpoint."""
        step = state.global_step
        # All have to go the same way, whatever each of them sees of a file that one has written.
        if step == 0 or (self._is_due(step) and not any_process(self._has(step), args.device)):
            self._log(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer after each update, in every process, before a checkpoint is written."""
        due = self._is_due(state.global_step) or control.should_training_stop
        if due and not self.end.ended:  # otherwise the next start does it
            self._log(control)

    def _is_due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def _has(self, step: int) -> bool:
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.is_file() else []
        return any(entry["step"] == step and self.NAME in entry for entry in map(json.loads, lines))

    def _log(self, control: Any) -> None:
        self.last = measure_loss(self.trainer, self.dataset, self.collator, self.batch)
        due = control.should_log
        self.trainer.log({self.NAME: self.last})
        control.should_log = due  # the Trainer takes any entry for the one of this update's losses


@torch.no_grad()
def measure_loss(trainer: Trainer, dataset: ChatDataset, collator: ChatCollator, batch: int) -> float:
    """Mean loss over the tokens that are to be learned in a data set; all processes have to call it.

    Args:
        trainer: whose model, as it is at the moment.
        dataset: conversations.
        collator: makes batches of them.
        batch: conversations at once in each process.

    Raises:
        ValueError: if there is nothing to be learned in it.
    """
    rank, processes = trainer.args.process_index, trainer.args.world_size
    share = list(range(rank, len(dataset), processes))
    # Under ZeRO-3 all of them put the weights together in every batch: one with less to do goes along.
    batches = math.ceil(math.ceil(len(dataset) / processes) / batch)
    model: Any = trainer.model_wrapped
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)
    loader = iter(
        DataLoader(
            Subset(dataset, share or [0]),
            batch,
            collate_fn=collator,
            num_workers=trainer.args.dataloader_num_workers,
            generator=torch.Generator().manual_seed(0),  # the random numbers of training stay its own
        )
    )
    hidden = trainer.args.disable_tqdm or rank > 0
    last: Any = None
    for number in tqdm(range(batches), desc="held out", unit="batch", leave=False, disable=hidden):
        counts = number * batch < len(share)
        last = next(loader, last)
        inputs = trainer._prepare_inputs(last)
        with trainer.compute_loss_context_manager():
            loss = model(**inputs).loss
        learned = int((last["labels"][:, 1:] != IGNORED).sum())
        if counts and learned:
            total += torch.tensor([float(loss) * learned, learned], dtype=torch.float64)
    model.train(was_training)
    if processes > 1:
        total = total.to(trainer.args.device)
        torch.distributed.all_reduce(total)
    loss_sum, tokens = total.tolist()
    if not tokens:
        raise ValueError("no token is to be learned in the held-out conversations")
    return float(loss_sum / tokens)
