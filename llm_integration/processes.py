"""The end of a training process that others worked with."""

from __future__ import annotations

import sys


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
