"""Batches of views without end, that can be left and taken up again at any batch, bit for bit."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from bootstrap.data.config import DataConfig
from bootstrap.data.decode import BadPictureError
from bootstrap.data.places import open_source
from bootstrap.data.skipped import SkippedPictures
from bootstrap.data.source import AnySource, PictureSource
from bootstrap.data.tasks import Planner, Position, Task, Wanted
from bootstrap.data.views import EvalView, TrainView
from sparse_vlm.preemption import ignore_in_worker
from sparse_vlm.transform import TransformConfig

# Encoded picture, index, view -> (3, H, W).
View = Callable[[bytes, int, int], torch.Tensor]


class PictureBatch(NamedTuple):
    """A batch of views.

    Attributes:
        images: (B, 3, H, W) normalised fp32.
        indices: (B,) int64, each picture's index in its source.
        views: (B,) int64, the number of the view of each picture.
        names: B names, to find the pictures again.
    """

    images: torch.Tensor
    indices: torch.Tensor
    views: torch.Tensor
    names: tuple[str, ...]


class PictureStream:
    """Training batches without end.

    The batches are a function of the source, the seed, the rank and the world size; the number of workers
    changes nothing but speed. The place of a picture that cannot be decoded is taken by the next good one of
    its batch; a batch without a good picture is left out.

    Args:
        source: the pictures.
        view: makes a tensor of a picture, such as `TrainView`.
        planner: the order.
        skipped: keeps the tally of bad pictures.
        workers: decoding processes; 0 decodes in this process.
        pin_memory: put batches into page-locked memory, for faster copies to a GPU.
    """

    def __init__(
        self,
        source: AnySource,
        view: View,
        planner: Planner,
        skipped: SkippedPictures,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.source = source
        self.view = view
        self.planner = planner
        self.skipped = skipped
        self.workers = workers
        self.pin_memory = pin_memory
        self.position = Position()

    def __iter__(self) -> Iterator[PictureBatch]:
        """Goes on from the current position, without end.

        Raises:
            ValueError: too many pictures are bad.
        """
        for done in _run(
            self.source, self.view, self.planner.tasks(self.position), self.workers, self.pin_memory
        ):
            self._tally(done)
            self.position = done.after
            if done.batch is not None:
                yield done.batch

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values: the position after the last batch handed out, and what it is a position in."""
        return {
            "position": list(self.position),
            "skipped": self.skipped.state_dict(),
            "order": self._order(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken; affects the next `iter`.

        Raises:
            ValueError: the source, the seed, the number of processes or the views are not the same.
        """
        ours = self._order()
        for key, theirs in state["order"].items():
            if key == "source" and ours[key] != theirs:  # hashes say nothing to people
                raise ValueError(
                    f"cannot resume the picture stream exactly: {self.source.title} no longer holds the "
                    "pictures (by name and size) that it held when the checkpoint was written; restore them "
                    "or start a new run"
                )
            if ours.get(key) != theirs:
                raise ValueError(
                    f"cannot resume the picture stream exactly: {key} was {theirs!r} when the checkpoint was "
                    f"written and is {ours.get(key)!r} now; restore it or start a new run"
                )
        self.position = Position(*state["position"])
        self.skipped.load_state_dict(state["skipped"])

    def _order(self) -> dict[str, Any]:
        planner = self.planner
        return {
            "source": self.source.fingerprint(),
            "seed": planner.seed,
            "views": planner.views,
            "rank": planner.rank,
            "world_size": planner.world_size,
            "stream_block": planner.stream_block,
        }

    def _tally(self, done: _Done) -> None:
        self.skipped.add_seen(done.tried)
        for name, reason, detail in done.bad:
            self.skipped.add(name, reason, detail)
        whole_epoch = done.after.epoch > self.position.epoch
        if self.planner.world_size == 1:
            self.skipped.check(whole_epoch)
        elif whole_epoch:
            self.skipped.check_any()  # the share is judged over all processes, which the training loop asks


def build_stream(
    config: DataConfig,
    transform: TransformConfig,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    source: AnySource | None = None,
    pin_memory: bool = False,
) -> PictureStream:
    """Opens the source that the settings name and plans its batches.

    Args:
        config: data settings.
        transform: size, interpolation and pixel statistics of the teacher.
        batch_size: pictures in a batch of this process.
        rank: of this process.
        world_size: number of processes.
        source: an already open source, instead of `config.source`.
        pin_memory: put batches into page-locked memory.

    Raises:
        FileNotFoundError: the source does not exist.
        ValueError: it has no pictures, or too few for the processes.
    """
    source = open_source(config) if source is None else source
    planner = Planner(
        source, batch_size, config.seed, config.views, rank, world_size, stream_block=config.stream_block
    )
    skipped = SkippedPictures(source.title, config.max_bad_share)
    view = TrainView.from_config(config, transform)
    return PictureStream(source, view, planner, skipped, config.workers, pin_memory)


def read_in_order(
    source: PictureSource,
    transform: TransformConfig,
    batch_size: int,
    workers: int = 0,
    indices: Sequence[int] | None = None,
    skipped: SkippedPictures | None = None,
    max_pixels: int = 80_000_000,
) -> Iterator[PictureBatch]:
    """Every picture once, in the source's order, through the inference transform: for held-out pictures.

    Bad pictures are left out, so batches may be smaller than `batch_size`; the last one usually is.

    Args:
        source: the pictures.
        transform: the inference transform's settings.
        batch_size: pictures in a batch.
        workers: decoding processes.
        indices: only these pictures.
        skipped: keeps the tally of bad pictures.
        max_pixels: most pixels to decode at once.
    """
    chosen = list(range(len(source))) if indices is None else [int(index) for index in indices]

    def tasks() -> Iterator[Task]:
        for start in range(0, len(chosen), batch_size):
            yield Task(tuple(Wanted(index, 0) for index in chosen[start : start + batch_size]), Position())

    view = EvalView(transform, max_pixels)
    for done in _run(source, view, tasks(), workers, pin_memory=False, fill=False):
        if skipped is not None:
            skipped.add_seen(done.tried)
            for bad in done.bad:
                skipped.add(*bad)
        if done.batch is not None:
            yield done.batch


class _Done(NamedTuple):
    batch: PictureBatch | None
    tried: int
    bad: tuple[tuple[str, str, str], ...]  # name, reason, detail
    after: Position


class _Decoder(Dataset[_Done]):
    """Decodes tasks; what workers are given."""

    def __init__(self, source: AnySource, view: View, fill: bool) -> None:
        self.source = source
        self.view = view
        self.fill = fill

    def __getitem__(self, task: Task) -> _Done:
        images: list[torch.Tensor | None] = []
        names: list[str] = []
        bad: list[tuple[str, str, str]] = []
        for wanted in task.wanted:
            name = wanted.name if wanted.name is not None else self._source.name(wanted.number)
            names.append(name)
            try:
                data = wanted.data if wanted.data is not None else self._source.read(wanted.number)
                images.append(self.view(data, wanted.number, wanted.view))
            except BadPictureError as error:
                images.append(None)
                bad.append((name, error.reason, error.detail))
        places = _good_places([image is not None for image in images], self.fill)
        batch = None
        if places:
            batch = PictureBatch(
                images=torch.stack([image for place in places if (image := images[place]) is not None]),
                indices=torch.tensor([task.wanted[place].number for place in places]),
                views=torch.tensor([task.wanted[place].view for place in places]),
                names=tuple(names[place] for place in places),
            )
        return _Done(batch, len(task.wanted), tuple(bad), task.after)

    @property
    def _source(self) -> PictureSource:
        if not isinstance(self.source, PictureSource):
            raise TypeError(f"{self.source.title} has no random access")
        return self.source


def _good_places(good: list[bool], fill: bool) -> list[int]:
    """For every place of a batch the place of a good picture: itself, or the next good one, cyclically."""
    if not any(good):
        return []
    if not fill:
        return [place for place, is_good in enumerate(good) if is_good]
    count = len(good)
    return [
        next((place + step) % count for step in range(count) if good[(place + step) % count])
        for place in range(count)
    ]


def _run(
    source: AnySource, view: View, tasks: Iterator[Task], workers: int, pin_memory: bool, fill: bool = True
) -> Iterator[_Done]:
    """Decodes tasks in order."""
    decoder = _Decoder(source, view, fill)
    if workers == 0:
        yield from (decoder[task] for task in tasks)
        return
    # Streamed shards are read ahead by a thread, so that the network does not hold up the training loop.
    ahead = tasks if isinstance(source, PictureSource) else _read_ahead(tasks, depth=2)
    loader = DataLoader(
        decoder,
        batch_size=None,
        sampler=_Tasks(ahead),
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=pin_memory,
        prefetch_factor=3,
        worker_init_fn=ignore_in_worker,
        generator=torch.Generator(),  # the seed that workers get is not drawn from what the run draws from
    )
    yield from loader


class _Tasks:
    """A sampler that hands out tasks; it has no length."""

    def __init__(self, tasks: Iterator[Task]) -> None:
        self.tasks = tasks

    def __iter__(self) -> Iterator[Task]:
        return self.tasks


def _as_is(done: Any) -> Any:
    return done


def _read_ahead(tasks: Iterator[Task], depth: int) -> Iterator[Task]:
    """Runs an iterator in a thread that stays at most `depth` items ahead; its error is raised here."""
    items: queue.Queue[Task | BaseException] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: Task | BaseException) -> None:
        while not stop.is_set():
            try:
                return items.put(item, timeout=0.2)
            except queue.Full:
                continue
        return None

    def work() -> None:
        try:
            for task in tasks:
                put(task)
                if stop.is_set():
                    return
            put(StopIteration())
        except BaseException as error:
            put(error)

    threading.Thread(target=work, name="shard reader", daemon=True).start()
    try:
        while True:
            item = items.get()
            if isinstance(item, StopIteration):
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
