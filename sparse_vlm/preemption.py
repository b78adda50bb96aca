"""A run that is asked to end: schedulers send SIGTERM a little before they take a machine away."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StoppedError(Exception):
    """A run that was asked to end has written where it goes on from."""


class StopRequest:
    """Notes a SIGTERM instead of dying of it, within a ``with`` block.

    It may come more than once: a scheduler sends it to all processes, and a launcher among them passes it on.
    Signals are the main thread's; in another one nothing is noted, and SIGTERM ends the process as ever.

    Attributes:
        asked: whether one has come.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def ignore_in_worker(worker: int = 0) -> None:
    """Let a data loader's worker outlive a SIGTERM to all processes: its loader ends it when it is done.

    Args:
        worker: its number, as PyTorch passes it to ``worker_init_fn``.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
