"""What a run says while it works: a progress bar, a JSONL file, TensorBoard."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from sparse_vlm.atomic import explain_full_disk, write_atomic

_SHORT = {
    "handover": "hand", "tokens": "tok", "pooled": "pool", "pooled_cosine": "cos", "relations": "rel",
}  # fmt: skip
# What a line of training holds beside the distances.
_NO_DISTANCES = ("kind", "step", "seconds", "loss", "gradient_norm", "lr", "waited_for_data_s")


class RunLog:
    """Progress for people (a bar), for programs (``log.jsonl``) and for charts (TensorBoard).

    Lines of steps that a resumed run does again are dropped from ``log.jsonl`` first.

    Args:
        folder: the run directory.
        pictures: pictures of the whole run.
        done: pictures already seen.
        step: steps already done.
        is_main: other processes say nothing.
    """

    def __init__(self, folder: Path, pictures: int, done: int, step: int, is_main: bool) -> None:
        self.is_main = is_main
        self.started = time.time()
        self.bar: Any = None
        self.board: Any = None
        if not is_main:
            return
        self.path = folder / "log.jsonl"
        self._drop_after(step)
        # A file takes a line each time the bar is drawn.
        seconds = 1 if sys.stderr.isatty() else 30
        self.bar = tqdm(total=pictures, initial=done, unit="pic", dynamic_ncols=True, mininterval=seconds)
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        except ImportError:
            self.say("TensorBoard is not installed: curves go to log.jsonl only")

    def has(self, kind: str, step: int) -> bool:
        """Whether there are figures of a kind and a step already."""
        lines = read_log(self.path) if self.is_main and self.path.is_file() else []
        return any((line.get("kind"), line.get("step")) == (kind, step) for line in lines)

    def advance(self, pictures: int) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(pictures)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)

    def write(self, step: int, figures: Mapping[str, float], kind: str = "train") -> None:
        """Add one line of figures to the log and the charts, and the losses to the bar."""
        if not self.is_main:
            return
        line = {"kind": kind, "step": step, "seconds": round(time.time() - self.started, 2), **figures}
        with explain_full_disk(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if kind == "train":
            terms = {_SHORT.get(name, name): f"{figures[name]:.3f}" for name in list_distances(figures)}
            self.bar.set_postfix(loss=f"{figures['loss']:.3f}", **terms, refresh=False)
        if self.board is not None:
            for name, value in figures.items():
                self.board.add_scalar(f"{kind}/{name}", value, step)

    def picture(self, step: int, picture: Image.Image) -> None:
        """Add a picture to the charts."""
        if self.board is not None:
            import numpy as np

            self.board.add_image("rois", np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close everything."""
        if self.bar is not None:
            self.bar.close()  # closing twice does nothing
        if self.board is not None:
            self.board.close()

    def _drop_after(self, step: int) -> None:
        if not self.path.is_file():
            return
        kept = [line for line in read_log(self.path) if line.get("step", 0) <= step]
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept))


def list_distances(line: Mapping[str, Any]) -> list[str]:
    """Names of the distances in a line of training, those of objectives unknown here among them."""
    return [name for name in line if name not in _NO_DISTANCES]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``log.jsonl``; what is no whole line, as a kill may leave it, is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines
