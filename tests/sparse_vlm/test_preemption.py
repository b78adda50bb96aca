"""A run that is asked to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

from sparse_vlm.preemption import StopRequest


def test_a_request_is_noted_within_the_block_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # some send it twice
        time.sleep(0.01)
        assert stop.asked
    assert signal.getsignal(signal.SIGTERM) is before
    with StopRequest() as again:
        assert not again.asked


def test_another_thread_leaves_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter() -> None:
        with StopRequest() as stop:
            seen.append(signal.getsignal(signal.SIGTERM))
            seen.append(stop.asked)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before, False]


def test_a_worker_outlives_it_and_is_ended_by_its_parent_alone() -> None:
    code = (
        "import os, signal; from sparse_vlm.preemption import ignore_in_worker; ignore_in_worker(0); "
        "os.kill(os.getpid(), signal.SIGTERM); print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "alive"
