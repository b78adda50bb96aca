"""The device that a command names; what is wrong with it is this command's user's to hear."""

from __future__ import annotations

import torch

from eval.answers import InputError
from sparse_vlm import devices


def choose_device(name: str, option: str = "device=") -> torch.device:
    """The device of this process (:func:`sparse_vlm.devices.choose_device`).

    Raises:
        InputError: If there is no such device here.
    """
    try:
        return devices.choose_device(name, option)
    except ValueError as error:
        raise InputError(f"{error}.") from None
