"""The one face behind which a library's vision transformer runs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from .spec import TeacherError, TeacherSpec


class Trunk(nn.Module):
    """A library's own ViT, opened between its blocks.

    Attributes:
        spec: the facts.
        layout: name of the weight table its state dict follows (``sparse_vlm.inherit_tables``).
    """

    spec: TeacherSpec
    layout: str

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) to the tokens that enter the first block, (B, prefix + P, D)."""

    @abstractmethod
    def run_block(self, index: int, tokens: Tensor) -> Tensor:
        """One block, (B, N, D) to (B, N, D)."""

    @abstractmethod
    def finish(self, tokens: Tensor, num_prefix: int) -> tuple[Tensor, Tensor]:
        """The end of the model.

        Args:
            tokens: (B, N, D) from the last block.
            num_prefix: how many of them come before the patches.

        Returns:
            Normalised tokens (B, N, D) and the pooled embedding (B, E), the library's own output.
        """

    @abstractmethod
    def vision_state_dict(self) -> dict[str, Tensor]:
        """The weights of the image side under the library's names."""

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (n, E) of texts in the space of the pooled embedding, not normalised.

        Raises:
            TeacherError: if this teacher has no text side.
        """
        raise TeacherError(f"{self.spec.name} has no text side: zero-shot needs a CLIP or SigLIP")

    @property
    def has_text(self) -> bool:
        """Whether :meth:`encode_text` works."""
        return False

    @property
    def logit_scale(self) -> float | None:
        """Factor on cosine similarities before the softmax (CLIP) or sigmoid (SigLIP), if there is one."""
        return None
