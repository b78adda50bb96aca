"""Order, coverage and exact resume of the picture stream, with and without workers."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bootstrap.data import DataConfig, PictureBatch, PictureStream, build_stream, open_source, read_in_order
from bootstrap.data.order import epoch_order
from bootstrap.data.shards import StreamedPicture
from bootstrap.data.source import PictureSource
from bootstrap.data.tasks import MEMBER_BITS, Planner, Position
from sparse_vlm.transform import ImageTransform, TransformConfig
from tests.bootstrap import picture_files as files

TRANSFORM = TransformConfig(16)


class Numbers:
    """A source with random access whose pictures are only counted."""

    title = "numbers"

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> bytes:
        return files.jpeg(index)

    def name(self, index: int) -> str:
        return str(index)

    def fingerprint(self) -> str:
        return str(self.count)


class NumberShards:
    """Streamed shards of given lengths; remembers from where each was read."""

    title = "number shards"

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.shards = [str(number) for number in range(len(lengths))]
        self.reads: list[tuple[int, int]] = []

    def stream(self, shard: int, start: int = 0) -> Iterator[StreamedPicture]:
        self.reads.append((shard, start))
        for member in range(start, self.lengths[shard]):
            yield StreamedPicture(member, f"{shard}/{member}", b"")

    def fingerprint(self) -> str:
        return str(self.lengths)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    root.mkdir()
    for number in range(11):
        (root / f"{number:02d}.jpg").write_bytes(files.jpeg(number))
    return root


def take(stream: PictureStream, count: int) -> list[PictureBatch]:
    return list(itertools.islice(stream, count))


def same(ours: list[PictureBatch], theirs: list[PictureBatch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a.images, b.images)
        and torch.equal(a.indices, b.indices)
        and torch.equal(a.views, b.views)
        and a.names == b.names
        for a, b in zip(ours, theirs, strict=True)
    )


# --- order ---


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 200),
    world_size=st.integers(1, 9),
    seed=st.integers(0, 1 << 40),
    epoch=st.integers(0, 50),
)
def test_ranks_cover_every_epoch_disjointly(count: int, world_size: int, seed: int, epoch: int) -> None:
    shares = [epoch_order(count, seed, epoch, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    views=st.none() | st.integers(1, 3),
    world=st.integers(1, 4).flatmap(lambda size: st.tuples(st.integers(0, size - 1), st.just(size))),
    stop=st.integers(0, 12),
    seed=st.integers(0, 99),
)
def test_plans_resume_anywhere(
    count: int, batch_size: int, views: int | None, world: tuple[int, int], stop: int, seed: int
) -> None:
    rank, world_size = world
    planner = Planner(Numbers(max(count, world_size)), batch_size, seed, views, rank, world_size)
    straight = list(itertools.islice(planner.tasks(Position()), 16))
    start = straight[stop - 1].after if stop else Position()
    assert list(itertools.islice(planner.tasks(start), 16 - stop)) == straight[stop:]
    # Every epoch shows this rank's whole share once, whatever the batch size.
    shown = [item for task in straight for item in task.wanted]
    share = len(planner.share(0))
    for epoch in range(len(shown) // share):
        part = shown[epoch * share : (epoch + 1) * share]
        assert sorted(item.number for item in part) == sorted(planner.share(epoch).tolist())
        assert {item.view for item in part} == {epoch if views is None else epoch % views}


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    batch_size=st.integers(1, 7),
    block=st.integers(1, 6),
    stop=st.integers(0, 12),
)
def test_streamed_plans_resume_anywhere(lengths: list[int], batch_size: int, block: int, stop: int) -> None:
    planner = Planner(NumberShards(lengths), batch_size, seed=3, stream_block=block)
    straight = list(itertools.islice(planner.tasks(Position()), 16))
    start = straight[stop - 1].after if stop else Position()
    assert list(itertools.islice(planner.tasks(start), 16 - stop)) == straight[stop:]
    shown = [item.number for task in straight for item in task.wanted]
    everything = sorted((s << MEMBER_BITS) + m for s, length in enumerate(lengths) for m in range(length))
    for epoch in range(len(shown) // len(everything)):
        part = shown[epoch * len(everything) : (epoch + 1) * len(everything)]
        assert sorted(part) == everything


def test_streamed_resume_reads_from_the_block_not_from_the_first_shard() -> None:
    source = NumberShards([100, 100, 100])
    planner = Planner(source, 5, seed=0, stream_block=10)
    position = next(itertools.islice(planner.tasks(Position()), 26, None)).after
    assert (position.shard, position.offset) == (1, 35)
    source.reads.clear()
    next(planner.tasks(position))
    assert source.reads == [(int(planner.share(0)[1]), 30)]


def test_streamed_ranks_have_their_own_shards() -> None:
    source = NumberShards([3, 4, 5, 2, 6])
    seen: list[int] = []
    for rank in range(2):
        planner = Planner(source, 1, seed=0, rank=rank, world_size=2)
        length = sum(source.lengths[shard] for shard in planner.share(0))
        seen += [t.wanted[0].number for t in itertools.islice(planner.tasks(Position()), length)]
    assert len(seen) == len(set(seen)) == 20


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        (Numbers(3), {"batch_size": 0}, "batch size must be one or more, got 0"),
        (Numbers(3), {"batch_size": 1, "rank": 2, "world_size": 2}, "rank must be between 0 and"),
        (
            Numbers(3),
            {"batch_size": 1, "world_size": 4},
            "numbers has 3 pictures, fewer than the 4 processes",
        ),
        (NumberShards([9]), {"batch_size": 1, "world_size": 2}, "has 1 shards, fewer than the 2 processes"),
    ],
)
def test_impossible_plans_are_refused(source: Any, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Planner(source, seed=0, **arguments)


def test_empty_shards_stop_with_one_sentence() -> None:
    planner = Planner(NumberShards([0, 0]), 2, seed=0)
    with pytest.raises(ValueError, match=r"no pictures in any of 2 shard\(s\) of number shards"):
        next(planner.tasks(Position()))


# --- batches ---


def test_batches_have_the_promised_form(folder: Path) -> None:
    stream = build_stream(DataConfig(str(folder), workers=0, views=2), TRANSFORM, batch_size=4)
    first, second, third = take(stream, 3)
    assert first.images.shape == (4, 3, 16, 16)
    assert first.images.dtype == torch.float32
    assert first.indices.dtype == first.views.dtype == torch.int64
    assert first.names == tuple(f"{index:02d}.jpg" for index in first.indices.tolist())
    assert third.views.tolist() == [0, 0, 0, 1]  # 11 pictures an epoch: the batch straddles
    assert sorted(torch.cat([first.indices, second.indices, third.indices[:3]]).tolist()) == list(range(11))
    assert stream.position.epoch == 1


def test_returning_views_are_the_same_pixels(folder: Path) -> None:
    stream = build_stream(DataConfig(str(folder), workers=0, views=2), TRANSFORM, batch_size=11)
    epochs = [{int(i): image for i, image in zip(b.indices, b.images, strict=True)} for b in take(stream, 3)]
    assert all(torch.equal(epochs[0][index], epochs[2][index]) for index in range(11))
    assert not any(torch.equal(epochs[0][index], epochs[1][index]) for index in range(11))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_bit_identical_with_any_number_of_workers(workers: int, folder: Path) -> None:
    (folder / "03.jpg").write_bytes(b"")  # a bad picture must not upset the order either
    config = DataConfig(str(folder), workers=0, max_bad_share=0.5)
    straight = take(build_stream(config, TRANSFORM, batch_size=3), 9)

    stream = build_stream(
        DataConfig(str(folder), workers=workers, max_bad_share=0.5), TRANSFORM, batch_size=3
    )
    first = take(stream, 4)
    state = json.loads(json.dumps(stream.state_dict()))
    again = build_stream(DataConfig(str(folder), workers=workers, max_bad_share=0.5), TRANSFORM, batch_size=3)
    again.load_state_dict(state)
    assert again.skipped.state_dict() == stream.skipped.state_dict()
    assert same(first + take(again, 5), straight)
    assert same(first + take(stream, 5), straight)  # the same object can be taken up again too


@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_tars_resume_bit_identically(workers: int, tmp_path: Path) -> None:
    for shard in range(2):
        members = {f"{shard}{n}.jpg": files.jpeg(10 * shard + n) for n in range(7)}
        members[f"{shard}3.jpg"] = b"broken"
        files.write_tar(tmp_path / f"{shard}.tar", members)
    config = DataConfig(
        f"pipe:cat {tmp_path}/{{0,1}}.tar", workers=workers, stream_block=4, max_bad_share=0.5
    )
    stream = build_stream(config, TRANSFORM, batch_size=3)
    straight = take(stream, 8)
    for stop in (1, 4, 6):
        head = build_stream(config, TRANSFORM, batch_size=3)
        taken = take(head, stop)
        tail = build_stream(config, TRANSFORM, batch_size=3)
        tail.load_state_dict(head.state_dict())
        assert same(taken + take(tail, 8 - stop), straight)
    assert stream.skipped.reasons["not a picture"] >= 2


def test_resume_does_not_decode_what_came_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(str(folder), workers=0)
    stream = build_stream(config, TRANSFORM, batch_size=2)
    take(stream, 20)
    again = build_stream(config, TRANSFORM, batch_size=2)
    again.load_state_dict(stream.state_dict())
    reads: list[int] = []
    source: Any = again.source
    real = source.read
    monkeypatch.setattr(source, "read", lambda index: (reads.append(index), real(index))[1])
    take(again, 1)
    assert len(reads) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed was 0 when the checkpoint was written and is 1 now"),
        ({"views": 3}, "views was None"),
        ({"world_size": 2}, "world_size was 1"),
        ({"new_file": True}, r".* no longer holds the pictures \(by name and size\) .*; restore them"),
    ],
)
def test_resume_refuses_another_order(folder: Path, changes: dict[str, Any], message: str) -> None:
    state = build_stream(DataConfig(str(folder)), TRANSFORM, batch_size=2).state_dict()
    world_size = changes.pop("world_size", 1)
    if changes.pop("new_file", False):
        (folder / "new.jpg").write_bytes(files.jpeg())
    other = build_stream(DataConfig(str(folder), **changes), TRANSFORM, 2, world_size=world_size)
    with pytest.raises(ValueError, match=f"cannot resume the picture stream exactly: {message}"):
        other.load_state_dict(state)


def test_bad_pictures_are_replaced_counted_and_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, (data, _) in files.bad_files().items():
        (folder / name).write_bytes(data)
    count = 11 + len(files.bad_files())
    stream = build_stream(DataConfig(str(folder), workers=0, max_bad_share=0.6), TRANSFORM, batch_size=count)
    (batch,) = take(stream, 1)
    assert batch.images.shape[0] == count
    assert set(batch.names) == {f"{number:02d}.jpg" for number in range(11)}
    assert set(stream.skipped.names) == set(files.bad_files())
    assert stream.skipped.seen == count
    assert stream.skipped.reasons["empty file"] == 1
    assert "skipped empty.jpg: empty file" in caplog.text
    for place, index in enumerate(batch.indices.tolist()):  # image, index and name belong together
        name = open_source(DataConfig(str(folder))).name(index)  # type: ignore[union-attr]
        assert batch.names[place] == name


def test_batch_without_a_good_picture_is_left_out(folder: Path) -> None:
    (folder / "05.jpg").write_bytes(b"")
    stream = build_stream(DataConfig(str(folder), workers=0, max_bad_share=0.2), TRANSFORM, batch_size=1)
    batches = take(stream, 20)
    assert sorted(int(batch.indices) for batch in batches[:10]) == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert all(len(batch.names) == 1 for batch in batches)


def test_too_many_bad_pictures_stop_the_stream(folder: Path) -> None:
    for number in range(4):
        (folder / f"{number:02d}.jpg").write_bytes(b"no picture")
    stream = build_stream(DataConfig(str(folder), workers=0), TRANSFORM, batch_size=4)
    with pytest.raises(ValueError, match=r"[45] of 12 pictures skipped \([45] not a picture\)"):
        take(stream, 10)
    for number in range(11):
        (folder / f"{number:02d}.jpg").write_bytes(b"no picture")
    hopeless = build_stream(DataConfig(str(folder), workers=0, max_bad_share=1.0), TRANSFORM, batch_size=4)
    with pytest.raises(ValueError, match="not a picture"):
        take(hopeless, 1)


def test_one_process_of_several_does_not_judge_by_its_share(folder: Path) -> None:
    for number in range(4):
        (folder / f"{number:02d}.jpg").write_bytes(b"no picture")
    config = DataConfig(str(folder), workers=0, max_bad_share=0.1)
    for rank in range(2):
        assert len(take(build_stream(config, TRANSFORM, 2, rank, 2), 8)) == 8
    for number in range(12):
        (folder / f"{number:02d}.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="no picture in it can be used"):
        take(build_stream(config, TRANSFORM, 2, 0, 2), 8)


@pytest.mark.parametrize("workers", [0, 1])
def test_held_out_pictures_come_in_order_through_the_inference_transform(workers: int, folder: Path) -> None:
    (folder / "04.jpg").write_bytes(b"")
    source = open_source(DataConfig(str(folder)))
    assert isinstance(source, PictureSource)
    batches = list(read_in_order(source, TRANSFORM, batch_size=4, workers=workers))
    assert [len(batch.names) for batch in batches] == [4, 3, 3]
    assert torch.cat([batch.indices for batch in batches]).tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]
    from PIL import Image

    assert torch.equal(batches[1].images[0], ImageTransform(TRANSFORM)(Image.open(folder / "05.jpg")))
    chosen = list(read_in_order(source, TRANSFORM, batch_size=4, indices=[9, 2]))
    assert chosen[0].indices.tolist() == [9, 2]


# --- the kit ---


@pytest.mark.real_data
@pytest.mark.parametrize("place", ["imagenet_1000", "lcs_558k_sample", "tiny_imagenet"])
def test_real_pictures(place: str) -> None:
    root = Path(
        os.environ.get("SPARSE_VLM_REAL_DATA") or Path(__file__).parents[2].parent / "shared" / "data"
    )
    if not (root / place).is_dir():
        pytest.skip(f"no {place} in {root} (set SPARSE_VLM_REAL_DATA)")
    config = DataConfig(str(root / place), workers=0, max_bad_share=0.0)
    stream = build_stream(config, TransformConfig(64), batch_size=50)
    assert isinstance(stream.source, PictureSource)
    counts = {"imagenet_1000": 1000, "lcs_558k_sample": 2183, "tiny_imagenet": 4000}
    assert len(stream.source) == counts[place]
    batches = take(stream, 4)
    assert all(torch.isfinite(batch.images).all() for batch in batches)
    assert len({name for batch in batches for name in batch.names}) == 200
    again = build_stream(config, TransformConfig(64), batch_size=50)
    take(again, 2)
    resumed = build_stream(config, TransformConfig(64), batch_size=50)
    resumed.load_state_dict(again.state_dict())
    assert same(take(resumed, 2), batches[2:])
