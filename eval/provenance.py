"""Where a figure comes from: command, commit, settings, versions, device, date."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import torch

from bootstrap.provenance import describe_commit, describe_device, describe_versions


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
        "device": None if device is None else describe_device(torch.device(device)),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def hash_settings(settings: Any) -> str:
    """SHA-256 of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
