"""Where a run's weights come from, in plain JSON values."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

_PACKAGES = ("sparse-vlm", "torch", "timm", "open_clip_torch", "transformers", "deepspeed", "numpy", "Pillow")


def describe_commit() -> str:
    """The commit of the checkout that this code runs from, ``-dirty`` if it was changed since."""
    try:
        # A copy inside another repository, an environment in an ignored folder say, has no commit there.
        _ask_git("ls-files", "--error-unmatch", Path(__file__).name)
        return _ask_git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"


def _ask_git(*words: str) -> str:
    folder = Path(__file__).parent
    return subprocess.run(
        ["git", *words], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def describe_versions() -> dict[str, str]:
    """Versions of the packages that take part."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def describe_device(device: torch.device) -> str:
    """The processor in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
