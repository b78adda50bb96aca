"""A finished run closes its process group, and a process without one is left alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torch import distributed

from llm_integration import processes
from llm_integration.processes import leave_process_group


def test_a_process_group_is_closed_and_its_absence_is_no_error(tmp_path: Path) -> None:
    leave_process_group()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    leave_process_group()
    assert not distributed.is_initialized()
    leave_process_group()


def test_shared_memory_of_deepspeed_is_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_SHARED_MEMORY", tmp_path)
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500"), ("RANK", "1")):
        monkeypatch.setenv(name, value)
    names = [
        f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{end}"
        for end in ("29500_1", "29500_0", "29501_1")
    ]
    for name in names:
        (tmp_path / name).touch()
    for _ in range(2):  # the second time there is none
        distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1
        )
        leave_process_group()
    assert sorted(path.name for path in tmp_path.glob("deepspeed_*")) == sorted(names[1:])
