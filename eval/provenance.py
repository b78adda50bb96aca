"""Where a figure comes from: command, commit, settings, versions, device, date."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("sparse-vlm", "torch", "transformers", "open_clip_torch", "timm", "numpy", "Pillow")


def describe_origin(
    module: str, arguments: Sequence[str], settings: Any, device: Any = None
) -> dict[str, Any]:
    """Everything one needs to get a figure again.

    Args:
        module: The command's module, such as "eval.run".
        arguments: Its words.
        settings: Its resolved settings, as JSON values.
        device: Where it ran; None for a command that only counts.
    """
    return {
        "command": shlex.join(["python", "-m", module, *arguments]),
        "commit": describe_commit(),
        "config_sha256": hash_settings(settings),
        "versions": describe_versions(),
        "device": None if device is None else describe_device(device),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def hash_settings(settings: Any) -> str:
    """SHA-256 of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def describe_commit() -> str:
    """The commit of the checkout that this code runs from, `-dirty` if it was changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    folder = Path(__file__).parent
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"


def describe_versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def describe_device(device: Any) -> str:
    """The processor in words."""
    chosen = torch.device(device)
    if chosen.type == "cuda":
        return torch.cuda.get_device_name(chosen)
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
