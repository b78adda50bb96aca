"""A common start: projector and language model trained on all towers in turn, before each goes its own way.

Learning to read visual tokens at all takes most of the training, and is the same work for every tower. Done
once for all, with every tower equally often, it leaves a tower's dialect to the short training of its point,
and no token count or method that the language model would know better than others.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from eval.answers import InputError
from eval.baselines.config import ParetoSettings
from eval.baselines.data import Plan
from eval.baselines.points import Looker, see_with
from eval.baselines.reader import Reader
from eval.baselines.teach import See, train
from eval.towers import Tower
from sparse_vlm.atomic import write_atomic

_READER = "reader"


@dataclass(frozen=True)
class Start:
    """Where all points of one seed begin.

    Attributes:
        tensors: Of projector and language model, and of what towers train, by label.
        towers: Labels of the towers that took part.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    towers: tuple[str, ...]

    def fill(self, reader: Reader, tower: Tower | None, label: str) -> None:
        """Puts the common weights into a fresh reader and tower."""
        reader.load_state_dict(self.tensors[_READER], strict=True)
        if tower is not None and label in self.tensors:
            trained = trained_tensors(tower)
            for name, tensor in self.tensors[label].items():
                trained[name].copy_(tensor)


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that are trained, by name, detached."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def train_together(
    reader: Reader,
    towers: Mapping[str, Tower],
    looker: Looker,
    plan: Plan,
    settings: ParetoSettings,
    seed: int,
    on_step: Callable[[float], object] = lambda loss: None,
) -> Start:
    """Trains one reader on all towers, a tower a step, each equally often and in random order.

    Args:
        reader: Fresh projector and language model.
        towers: By the labels of their points.
        looker: Of the training pictures.
        plan: As many batches as there are common steps.
        settings: The comparison's.
        seed: Of the order of towers.
        on_step: Called with every step's loss.
    """
    sees = {label: see_with(tower, looker.see(tower)) for label, tower in towers.items()}
    order = iter(take_turns(list(towers), len(plan.rows), seed))
    see: See = lambda rows: sees[next(order)](rows)  # noqa: E731
    train(reader, nn.ModuleList(towers.values()), see, plan, settings.training, on_step)
    tensors = {_READER: {name: tensor.detach() for name, tensor in reader.state_dict().items()}}
    tensors |= {label: trained_tensors(tower) for label, tower in towers.items()}
    return Start({label: named for label, named in tensors.items() if named}, tuple(towers))


def take_turns(labels: Sequence[str], steps: int, seed: int) -> list[str]:
    """Every label once before any comes again, shuffled."""
    rng = random.Random(seed)
    order: list[str] = []
    while len(order) < steps:
        order += rng.sample(labels, len(labels))
    return order[:steps]


def save_start(path: Path, start: Start, facts: Mapping[str, str | None]) -> None:
    """Writes a common start, with what it depends on."""
    flat = {
        f"{label}/{name}": tensor.contiguous().clone()
        for label, named in start.tensors.items()
        for name, tensor in named.items()
    }
    write_atomic(path, save(flat, {"facts": json.dumps({**facts, "towers": list(start.towers)})}))


def load_start(path: Path, labels: Sequence[str], facts: Mapping[str, str | None]) -> Start:
    """Reads a common start.

    Raises:
        InputError: If it is damaged, or other towers took part in it than are compared now.
    """
    try:
        with safe_open(path, "pt") as file:
            found = json.loads((file.metadata() or {}).get("facts", "{}"))
            tensors: dict[str, dict[str, Tensor]] = {}
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                label, _, name = key.partition("/")
                tensors.setdefault(label, {})[name] = file.get_tensor(key)
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); delete it, and it is made again.") from None
    wanted = {**facts, "towers": list(labels)}
    changed = [key for key, value in wanted.items() if found.get(key) != value]
    if changed:
        raise InputError(
            f"{path} was trained with other {' and '.join(changed)} than are compared now; fair is a start "
            "that all of them share: name another folder with out=…."
        )
    return Start(tensors, tuple(labels))
