"""Configuration of the SparseFormer as a transformers model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from sparse_vlm.config import SparseFormerConfig


class SparseFormerVisionConfig(PreTrainedConfig):
    """What transformers needs to know to build a SparseFormer.

    The ``config.json`` of an encoder directory is one of these.

    Args:
        architecture: fields of :class:`sparse_vlm.SparseFormerConfig`; fields left out take their defaults.
        num_tokens: tokens N per picture, class token included; by default the architecture's own count.
        pooling_head: whether the model has the layers behind the pooled embedding. LLaVA discards that
            embedding; without its layers every parameter of the tower receives a gradient.
        transform: fields of :class:`sparse_vlm.TransformConfig`, kept so that an encoder directory can be
            written again.
        kwargs: fields of every transformers configuration.

    Raises:
        ValueError: for an architecture or a token count that cannot be.
    """

    model_type = "sparseformer_vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        architecture: dict[str, Any] | None = None,
        num_tokens: int | None = None,
        pooling_head: bool = True,
        transform: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        core = SparseFormerConfig.from_dict(architecture or {}, "vision_config.architecture")
        num_tokens = core.num_tokens if num_tokens is None else num_tokens
        if num_tokens < 1 + int(core.cls_token):
            raise ValueError(
                f"vision_config.num_tokens must be at least {1 + int(core.cls_token)}, got {num_tokens}"
            )
        if core.token_embedding == "per_token" and num_tokens != core.num_tokens:
            raise ValueError(
                f"vision_config.num_tokens is {num_tokens}, but this encoder learned one embedding for each "
                f"token and runs with exactly {core.num_tokens}"
            )
        self.architecture = core.to_dict()
        self.num_tokens = num_tokens
        self.pooling_head = pooling_head
        self.transform = transform
        # The names under which transformers and LLaVA look for sizes; derived, so a stored value is dropped.
        derived = {
            "hidden_size": core.width,
            "intermediate_size": core.mlp_width,
            "num_hidden_layers": core.depth,
            "num_attention_heads": core.heads,
            "num_channels": 3,
        }
        for key, value in derived.items():
            kwargs.pop(key, None)
            setattr(self, key, value)
        super().__init__(**kwargs)

    @property
    def core(self) -> SparseFormerConfig:
        """The architecture as the encoder library's own configuration."""
        return SparseFormerConfig.from_dict(self.architecture, "vision_config.architecture")
