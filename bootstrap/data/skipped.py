"""Counts and names the pictures that could not be used."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_log = logging.getLogger(__name__)

# A share is not judged on fewer pictures than this, unless a whole epoch has fewer.
_JUDGE_AFTER = 200


class SkippedPictures:
    """Tally of skipped pictures; each name counts once per epoch in which it was met.

    Args:
        source: name of the source, for messages.
        max_bad_share: largest share of bad pictures that is put up with.
        names_kept: how many names are kept and logged; the rest are only counted.
    """

    def __init__(self, source: str, max_bad_share: float = 1.0, names_kept: int = 20) -> None:
        self.source = source
        self.max_bad_share = max_bad_share
        self.names_kept = names_kept
        self.seen = 0
        self.reasons: Counter[str] = Counter()
        self.names: dict[str, str] = {}

    @property
    def total(self) -> int:
        """Pictures skipped so far."""
        return sum(self.reasons.values())

    def add_seen(self, count: int) -> None:
        """Counts pictures that were tried, good and bad, each as often as it was tried."""
        self.seen += count

    def add(self, name: str, reason: str, detail: str = "") -> None:
        """Counts one bad picture, and logs its name if few were logged before."""
        self.reasons[reason] += 1
        if name in self.names or len(self.names) >= self.names_kept:
            return
        self.names[name] = reason
        _log.warning("skipped %s: %s%s", name, reason, f" ({detail})" if detail else "")
        if len(self.names) == self.names_kept:
            _log.warning("%d pictures skipped; further ones are counted, not named", self.names_kept)

    def check(self, whole_epoch: bool = False) -> None:
        """Stops a run on a bad source.

        Args:
            whole_epoch: every picture was tried, so the share is exact however few they are.

        Raises:
            ValueError: more than the allowed share is bad, or nothing at all is good.
        """
        if self.seen < _JUDGE_AFTER and not whole_epoch:
            return
        self.check_any()
        if self.total > self.max_bad_share * self.seen:
            raise ValueError(f"{self.summary()}{self._beyond()}")

    def check_any(self) -> None:
        """Stops a run on a source in which nothing at all is good.

        Raises:
            ValueError: every picture that was tried is bad.
        """
        if self.seen and self.total >= self.seen:
            raise ValueError(f"{self.summary()}: no picture in it can be used")

    def check_all(self, tallies: Sequence[tuple[int, int]]) -> None:
        """Stops a run of several processes, each of which has tried a part of the source.

        Args:
            tallies: pictures tried and pictures skipped, of every process.

        Raises:
            ValueError: more than the allowed share of them all is bad.
        """
        seen, total = (sum(numbers) for numbers in zip(*tallies, strict=True))
        if seen >= _JUDGE_AFTER and total > self.max_bad_share * seen:
            found = f"{self.source}: {total} of {seen} pictures skipped by {len(tallies)} processes"
            raise ValueError(f"{found}{self._beyond()}")

    def _beyond(self) -> str:
        return (
            f"; that is more than data.max_bad_share = {self.max_bad_share} allows: repair the source or "
            "raise the limit"
        )

    def summary(self) -> str:
        """One sentence: how many of how many, why, and the first names."""
        if not self.total:
            return f"{self.source}: nothing skipped, {self.seen} times a picture was read"
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        first = ", ".join(list(self.names)[:3])
        return f"{self.source}: {self.total} of {self.seen} pictures skipped ({reasons}), such as {first}"

    def state_dict(self) -> dict[str, Any]:
        """Plain values that `load_state_dict` takes."""
        return {"seen": self.seen, "reasons": dict(self.reasons), "names": dict(self.names)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up the tally where `state_dict` left it."""
        self.seen = int(state["seen"])
        self.reasons = Counter(state["reasons"])
        self.names = dict(state["names"])
