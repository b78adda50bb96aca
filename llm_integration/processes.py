"""Training processes that work together: what one says to all, and how they part."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_SHARED_MEMORY = Path("/dev/shm")


def leave_process_group() -> None:
    """Close the connections to the other processes of a finished run, where there are any.

    Neither LLaVA's trainer nor Hugging Face's does. gloo's threads are then still running when the
    interpreter is taken down, and now and then the process of a run that went well ends with "terminate
    called without an active exception" and a failing exit status.
    """
    if "torch" not in sys.modules:
        return
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        _free_shared_memory()


def _free_shared_memory() -> None:
    """Remove what DeepSpeed shares between processes of a CPU, 69 MB of memory each; itself it never does."""
    place, rank = (os.environ.get(name) for name in ("MASTER_ADDR", "RANK"))
    port = os.environ.get("MASTER_PORT")
    if place and port and rank and hasattr(os, "getuid"):
        name = f"deepspeed_allreduce_buffer_{os.getuid()}_{place}_{port}_{rank}"
        (_SHARED_MEMORY / name).unlink(missing_ok=True)


def any_process(said: bool, device: torch.device) -> bool:
    """Whether any process of a run says so; all of them have to ask.

    Args:
        said: by this one.
        device: where the processes' group can add up.
    """
    import torch
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return said
    total = torch.tensor(int(said), device=device)
    distributed.all_reduce(total)
    return bool(total)
