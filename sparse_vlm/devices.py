"""The device that a setting names, seen before anything runs on it."""

from __future__ import annotations

import os

import torch


def choose_device(name: str, option: str = "device=") -> torch.device:
    """The device of this process.

    Args:
        name: "cpu", "cuda", "cuda:0" …, or "auto": a GPU where there is one, under a launcher that of this
            process.
        option: how the caller names it, for messages.

    Raises:
        ValueError: if there is no such device here, or it computes nothing.
    """
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"{option}{name} is no device; use {option}cpu, cuda, cuda:0 … or auto") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"{option}{name}, but PyTorch sees no GPU here; use {option}cpu or {option}auto")
        there = torch.cuda.device_count()
        if (device.index or 0) >= there:
            raise ValueError(f"{option}{name}, but PyTorch sees {there} GPU(s) here, the first being cuda:0")
        return device
    try:
        torch.ones(1, device=device).sum().item()
    except (RuntimeError, NotImplementedError):
        raise ValueError(f"{option}{name} computes nothing here; use {option}cpu, cuda or auto") from None
    return device
