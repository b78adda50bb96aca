"""Keep freed memory in the process, so that a CPU training step does not go into page faults."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Tell glibc to reuse freed memory instead of handing it back to the system.

    A training step allocates and frees the same large tensors over and over. By default each one is mapped
    anew and every page of it is faulted in and zeroed; that can cost as much as the
    arithmetic. For applications only: it changes the whole process.

    Returns:
        Whether it could be done: it needs glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
