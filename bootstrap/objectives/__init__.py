"""What the student is asked to match, one pure function a file."""

from __future__ import annotations

from .handover import match_handover
from .pooled import align_pooled, match_pooled
from .relations import match_relations
from .roi_pool import pool_rois
from .tokens import match_tokens

__all__ = ["align_pooled", "match_handover", "match_pooled", "match_relations", "match_tokens", "pool_rois"]
