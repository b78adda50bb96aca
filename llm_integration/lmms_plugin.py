"""Where lmms-eval finds this package's models: the entry point ``sparse_vlm`` of ``lmms_eval.models``.

    python -m lmms_eval --model sparse_vlm --model_args pretrained=LLAVA_DIR --tasks pope

Importing this module needs no lmms-eval; the model's class, named here only, does.
"""

from __future__ import annotations

from typing import Any

MODEL = "sparse_vlm"
MODEL_CLASS = "llm_integration.lmms_model.SparseVlm"


def build_manifest() -> Any:
    """What lmms-eval wants to know: the model's name and the path of its class, a ``ModelManifest``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL, chat_class_path=MODEL_CLASS)
