"""What a vision tower is here: pictures in, exactly N visual tokens out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

Want = Literal["penultimate", "last", "draws"]
EVERYTHING: frozenset[Want] = frozenset(("penultimate", "last", "draws"))


class TowerError(ValueError):
    """A tower that cannot be built, with the reason; a token count out of its reach, for instance."""


@dataclass(frozen=True)
class Seen:
    """What a frozen look at pictures left behind, and all that a tower's second half may use.

    Attributes:
        tokens: (B, P, D): patch tokens as they leave the last block but one, or a tower's own tokens.
        class_token: (B, 1, D) beside them, of a ViT that has one.
        attention: (B, P) attention that each patch gets in the last block but one, mean over heads.
        keys: (B, P, D/K) keys there, mean over heads.
        last_attention: (B, P) attention in the last block, over all heads at once.
        last_keys: (B, P, D) keys there.
        draws: (B,) a number made of each picture's pixels.
    """

    tokens: Tensor
    class_token: Tensor | None = None
    attention: Tensor | None = None
    keys: Tensor | None = None
    last_attention: Tensor | None = None
    last_keys: Tensor | None = None
    draws: Tensor | None = None

    def __getitem__(self, rows: Tensor | slice) -> Seen:
        """The same for some of the pictures."""
        return _map_seen(lambda name: None if self.__dict__[name] is None else self.__dict__[name][rows])


def join_seen(parts: list[Seen]) -> Seen:
    """Batches one after another."""

    def join(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return _map_seen(join)


def _map_seen(make: Callable[[str], Tensor | None]) -> Seen:
    values: dict[str, Any] = {field.name: make(field.name) for field in fields(Seen)}
    return Seen(**values)


class Tower(nn.Module):
    """Pictures (B, 3, H, W) to visual tokens (B, N, D), in two halves.

    :meth:`look` is frozen and the same every time, so that what it returns can be kept. :meth:`reduce` comes
    after it, and is where parameters that are trained live, if there are any.

    Attributes:
        name: the method.
        num_tokens: N.
        width: D.
        shared_look: towers with the same non-empty word look alike, and one look serves them all.
        wants: what :meth:`reduce` needs of a shared look.
        trained: which part is trained, in words; "nothing" for most.
    """

    name: str
    num_tokens: int
    width: int
    shared_look: str = ""
    wants: frozenset[Want] = frozenset()
    trained: str = "nothing"

    @abstractmethod
    def look(self, images: Tensor) -> Seen:
        """The frozen half: pictures as the teacher's transform prepares them."""

    def look_for_all(self, images: Tensor) -> Seen:
        """A look that serves every tower with the same :attr:`shared_look`."""
        return self.look(images)

    def reduce(self, seen: Seen) -> Tensor:
        """The half after it: exactly N tokens, (B, N, D)."""
        return seen.tokens

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, N, D)."""
        with torch.no_grad():
            seen = self.look(images)
        return self.reduce(seen)


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Picks tokens (B, P, D) by number (B, N): (B, N, D)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))  # (B, N, D)
