"""Plug encoder directories into an installed, unmodified LLaVA (``haotian-liu/LLaVA``).

With the plug in, LLaVA's own commands accept ``--vision_tower ENCODER_DIR``. Three ways to put it in:

* in front of a command: ``deepspeed --module llm_integration.llava llava/train/train_mem.py ...``,
  ``python -m llm_integration.llava -m llava.eval.model_vqa_loader ...``, and under ``torchrun -m`` alike
* inside Python: ``with plugged_in(): ...``, or ``plug_in()`` and ``unplug()``
* for every Python of an environment, until removed: ``python -m llm_integration.llava.pth install``

Importing this package changes nothing and is cheap: torch, transformers and llava stay unimported.
"""

from __future__ import annotations

from .plugin import is_plugged_in, plug_in, plugged_in, unplug

__all__ = ["is_plugged_in", "plug_in", "plugged_in", "unplug"]
