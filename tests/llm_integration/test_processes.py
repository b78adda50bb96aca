"""A finished run closes its process group, and a process without one is left alone."""

from __future__ import annotations

from pathlib import Path

from torch import distributed

from llm_integration.processes import leave_process_group


def test_a_process_group_is_closed_and_its_absence_is_no_error(tmp_path: Path) -> None:
    leave_process_group()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    leave_process_group()
    assert not distributed.is_initialized()
    leave_process_group()
