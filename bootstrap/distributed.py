"""One process, many under torchrun, or DeepSpeed: the same few calls in the training loop."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparse_vlm import devices

from .config import BootstrapConfig
from .optim import rest_groups
from .student import Student, Targets


class TorchEngine:
    """Plain PyTorch: one process, or DistributedDataParallel where a launcher started several.

    Args:
        config: the run's settings.
    """

    def __init__(self, config: BootstrapConfig) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        launched = "RANK" in os.environ
        if config.engine == "single" and self.world_size > 1:
            raise ValueError(
                f"engine=single, but a launcher started {self.world_size} processes: use engine=ddp"
            )
        if config.engine == "ddp" and not launched:
            raise ValueError("engine=ddp needs a launcher: torchrun --nproc-per-node=N -m bootstrap.train …")
        self.device = choose_device(config.device)
        self.autocast = config.precision == "bf16"
        self.accumulate = config.accumulate
        self.clip_norm = config.optimiser.clip_norm
        self._owns_group = launched and not dist.is_initialized()
        if self._owns_group:
            self._init_group()
        self.model: nn.Module | None = None
        self.optimiser: torch.optim.Optimizer | None = None
        self.parameters: list[nn.Parameter] = []

    def _init_group(self) -> None:
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def wrap(self, student: Student, optimiser: torch.optim.Optimizer) -> None:
        """Take over the student and its optimiser."""
        self.parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self.optimiser = optimiser
        self.model = student
        if dist.is_initialized():
            ids = [self.device.index] if self.device.type == "cuda" else None
            # The warm-up leaves the tuned cortex blocks without gradients.
            self.model = DistributedDataParallel(student, device_ids=ids, find_unused_parameters=True)

    def forward(self, images: Tensor, targets: Targets, num_tokens: int | None = None) -> dict[str, Tensor]:
        """The student's distances from the teacher."""
        if self.model is None:
            raise RuntimeError("wrap the student first")
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            return self.model(images, targets, num_tokens)

    def backward(self, loss: Tensor) -> None:
        """Add gradients of one of the step's forward passes."""
        (loss / self.accumulate).backward()

    def accumulating(self, last: bool) -> Any:
        """A context for one forward and backward pass; gradients are exchanged in the step's last one."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()

    def step(self) -> Tensor:
        """Clip gradients, update the weights, forget the gradients; returns the gradient norm."""
        if self.optimiser is None:
            raise RuntimeError("wrap the student first")
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return norm

    def rest(self, warming_up: bool, first_after: bool) -> None:
        """Leave alone what has no part in the warm-up; called before every step, after the learning rates.

        Here such parameters have no gradients, and the optimiser passes them over.

        Args:
            warming_up: whether this step belongs to the warm-up.
            first_after: whether it is the first that does not.
        """

    def gather(self, value: Any) -> list[Any]:
        """One value of every process, in the order of ranks, on all of them."""
        if not dist.is_initialized():
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def save_shards(self, folder: Path) -> None:
        """Write what only this engine can (nothing here); called on every process."""

    def load_shards(self, folder: Path) -> None:
        """Read it back (nothing here)."""

    @property
    def keeps_optimiser(self) -> bool:
        """Whether the optimiser's state is in :attr:`optimiser`, rather than in the engine's own shards."""
        return True

    def close(self) -> None:
        """Leave the process group, if this engine made it."""
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group()


class DeepSpeedEngine(TorchEngine):
    """DeepSpeed ZeRO, stages 0 to 2.

    Args:
        config: the run's settings; ``config.deepspeed`` names the JSON file.
    """

    def __init__(self, config: BootstrapConfig) -> None:
        self.settings = read_deepspeed(config)
        super().__init__(config)
        self.engine: Any = None
        self.inner: torch.optim.Optimizer | None = None

    def _init_group(self) -> None:
        import deepspeed

        deepspeed.init_distributed(auto_mpi_discovery=False)

    def wrap(self, student: Student, optimiser: torch.optim.Optimizer) -> None:
        """Hand the student and its optimiser to DeepSpeed."""
        if not dist.is_initialized():
            raise ValueError("engine=deepspeed needs its launcher: deepspeed --module bootstrap.train …")
        import deepspeed

        self.inner = optimiser
        self.parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self.engine, self.optimiser, _, _ = deepspeed.initialize(
            model=student, model_parameters=self.parameters, optimizer=optimiser, config=self.settings
        )
        self.model = self.engine

    def backward(self, loss: Tensor) -> None:
        """Add gradients; DeepSpeed divides by the accumulation itself."""
        self.engine.backward(loss)

    def accumulating(self, last: bool) -> Any:
        """DeepSpeed keeps its own count of passes; only its boundary is told."""
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def step(self) -> Tensor:
        """Clip, update, forget; returns the gradient norm."""
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(float(norm) if norm is not None else float("nan"))

    def rest(self, warming_up: bool, first_after: bool) -> None:
        """DeepSpeed gives parameters without a gradient one of zero: they must not decay, nor count steps."""
        if self.inner is None:
            raise RuntimeError("wrap the student first")
        rest_groups(self.inner, warming_up, first_after)

    def save_shards(self, folder: Path) -> None:
        """Every process writes its part of optimiser and weights."""
        self.engine.save_checkpoint(str(folder), tag="state")

    def load_shards(self, folder: Path) -> None:
        """Every process reads its part."""
        path, _ = self.engine.load_checkpoint(str(folder), tag="state")
        if path is None:
            raise ValueError(f"DeepSpeed found no checkpoint in {folder}")

    @property
    def keeps_optimiser(self) -> bool:
        """DeepSpeed's optimiser state is in its shards."""
        return False


def build_engine(config: BootstrapConfig) -> TorchEngine:
    """The engine that the settings ask for."""
    return DeepSpeedEngine(config) if config.engine == "deepspeed" else TorchEngine(config)


def is_left_behind(error: RuntimeError) -> bool:
    """Whether a process failed only because another one of its run has ended, which says why itself."""
    words = ("Connection closed by peer", "Connection reset by peer")  # gloo's
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and any(word in str(error) for word in words)


def choose_device(name: str) -> torch.device:
    """The device of this process, which becomes CUDA's current one where it is a GPU.

    Raises:
        ValueError: if the settings ask for a GPU that is not there, for one GPU for several processes, or for
            something that is no device.
    """
    if name.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise ValueError(f"device={name} would put every process on one GPU; use device=cuda")
    if name == "cuda" and torch.cuda.is_available():
        name = "auto"
    device = devices.choose_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def read_deepspeed(config: BootstrapConfig) -> dict[str, Any]:
    """Read the DeepSpeed JSON and fill in what the run's settings decide.

    Raises:
        ValueError: for a missing or broken file, an optimiser in it, a stage above 2, or a value that
            contradicts the run's settings.
    """
    path = Path(config.deepspeed or "")
    if not path.is_file():
        raise ValueError(f"there is no DeepSpeed configuration {path}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(settings).__name__}")
    for key in ("zero_optimization", "fp16", "bf16"):
        if not isinstance(settings.get(key, {}), dict):
            raise ValueError(f"{path}: {key} must be an object, found {type(settings[key]).__name__}")
    for key in ("optimizer", "scheduler"):
        if key in settings:
            raise ValueError(f"{path}: leave {key!r} out; it comes from the run's own settings")
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, "auto"):
        raise ValueError(
            f"{path}: ZeRO stage {stage} would take the student apart; a SparseFormer fits on every "
            "card, use stage 2 or less"
        )
    if settings.get("fp16", {}).get("enabled"):
        raise ValueError(f"{path} enables fp16, which is no precision of this training: use bf16 or fp32")
    if settings.get("bf16", {}).get("enabled"):
        raise ValueError(
            f"{path} enables bf16, under which DeepSpeed casts the weights, RoIs among them: leave it out; "
            "precision=bf16 runs under autocast and keeps weights and RoIs in fp32"
        )
    ours: Mapping[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.accumulate,
        "gradient_clipping": config.optimiser.clip_norm,
    }
    for key, value in ours.items():
        if settings.get(key, "auto") not in ("auto", value):
            raise ValueError(f'{path}: {key}={settings[key]} contradicts the run\'s {value}; write "auto"')
    filled = {**settings, **ours}
    if open_keys := _find_auto(filled):
        raise ValueError(f'{path}: nothing fills in "auto" for {", ".join(open_keys)}; write a value')
    return filled


def _find_auto(settings: Mapping[str, Any], above: str = "") -> list[str]:
    """Dotted names of the keys that are still "auto"."""
    found = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found += _find_auto(value, f"{above}{key}.")
        elif value == "auto":
            found.append(above + key)
    return found
