"""Folders, tars and Hugging Face datasets: what they list, read, remember and refuse."""

from __future__ import annotations

import errno
import http.client
import http.server
import os
import pickle
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from bootstrap.data.config import DataConfig
from bootstrap.data.decode import BadPictureError
from bootstrap.data.folder import FolderSource
from bootstrap.data.places import guess_kind, open_source
from bootstrap.data.shards import StreamedShards
from bootstrap.data.source import PictureSource, ShardSource
from bootstrap.data.tars import TarSource, build_index, expand_shards, index_folder, open_tars
from tests.bootstrap import picture_files as files


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    for number, name in enumerate(
        ["b.JPG", "a.png", "deep/er/c.jpeg", "notes.txt", ".hidden.jpg", ".git/x.jpg"]
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files.jpeg(number))
    return root


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    root = tmp_path / "shards"
    root.mkdir()
    for shard in range(3):
        members = {}
        for number in range(4):
            members[f"{shard}{number}.jpg"] = files.jpeg(10 * shard + number)
            members[f"{shard}{number}.seg.png"] = b"not the picture"
            members[f"{shard}{number}.cls"] = b"7"
        files.write_tar(root / f"train-{shard:03d}.tar", members)
    return root


@pytest.fixture
def server(shards: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, directory=str(shards), **kwargs)

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


# --- folders ---


def test_folder_lists_pictures_recursively_and_sorted(folder: Path) -> None:
    source = open_source(DataConfig(str(folder)))
    assert isinstance(source, PictureSource)
    assert [source.name(index) for index in range(len(source))] == ["a.png", "b.JPG", "deep/er/c.jpeg"]
    assert source.read(2) == files.jpeg(2)
    before = source.fingerprint()
    (folder / "z.jpg").write_bytes(b"")
    assert FolderSource(folder).fingerprint() != before


@pytest.mark.parametrize("suffix", [".jpe", ".jfif", ".JPEG"])
def test_a_jpeg_is_one_by_any_of_its_suffixes(folder: Path, tmp_path: Path, suffix: str) -> None:
    before = len(FolderSource(str(folder)))
    another = folder / f"another{suffix}"
    another.write_bytes(files.jpeg())
    assert len(FolderSource(str(folder))) == before + 1
    with tarfile.open(tmp_path / "one.tar", "w") as tar:
        tar.add(another, f"one{suffix}")
    assert len(TarSource([str(tmp_path / "one.tar")], "one")) == 1


def test_folder_follows_links_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d.jpg").write_bytes(files.jpeg())
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "deep" / "loop").symlink_to(folder)
    assert "linked/d.jpg" in FolderSource(folder).paths
    assert len(FolderSource(folder)) == 4


def test_a_fingerprint_tells_other_pictures_of_the_same_names(folder: Path, shards: Path) -> None:
    def replace() -> None:
        picture = folder / FolderSource(folder).paths[0]
        picture.write_bytes(picture.read_bytes() + b"more")
        files.write_tar(shards / "train-001.tar", {"new.png": files.jpeg(40)})

    files.write_tar(shards / "train-001.tar", {"new.png": files.jpeg(40) + b"more"})
    before = FolderSource(folder).fingerprint(), open_tars(str(shards)).fingerprint()
    assert before == (FolderSource(folder).fingerprint(), open_tars(str(shards)).fingerprint())
    replace()
    after = FolderSource(folder).fingerprint(), open_tars(str(shards)).fingerprint()
    assert before[0] != after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize("kind", ["folder", "tars", "hf"])
def test_a_source_looks_at_its_pictures_for_one_fingerprint_only(
    kind: str, folder: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"folder": folder, "tars": shards, "hf": tmp_path / "dataset"}[kind]
    if kind == "hf":
        make_dataset().save_to_disk(str(place))
    source = open_source(DataConfig(str(place)))
    first = source.fingerprint()
    monkeypatch.setattr(f"bootstrap.data.{kind}.digest", Mock(side_effect=AssertionError("once more")))
    assert source.fingerprint() == first


def test_vanished_file_is_a_bad_picture(folder: Path) -> None:
    source = FolderSource(folder)
    (folder / "a.png").unlink()
    with pytest.raises(BadPictureError, match="unreadable: No such file"):
        source.read(0)


def test_empty_folder_names_itself_and_the_extensions(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "readme.txt").write_text("x")
    with pytest.raises(
        ValueError, match=r"no pictures in folder '.*nothing'.*\.jpg \.jpeg \.jpe \.jfif \.png"
    ):
        open_source(DataConfig(str(tmp_path / "nothing")))


def test_missing_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'.*nowhere' does not exist; give a folder"):
        open_source(DataConfig(str(tmp_path / "nowhere")))
    with pytest.raises(FileNotFoundError, match=r"no tar shards at '.*none-\*\.tar'"):
        open_source(DataConfig(str(tmp_path / "none-*.tar")))
    (tmp_path / "a.zip").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"is a file, but neither a \.tar nor"):
        open_source(DataConfig(str(tmp_path / "a.zip")))


# --- tars ---


def test_expand_shards(shards: Path) -> None:
    names = [str(shards / f"train-{shard:03d}.tar") for shard in range(3)]
    assert expand_shards(str(shards)) == names
    assert expand_shards(f"{shards}/train-*.tar") == names
    assert expand_shards(f"{shards}/train-{{000..002}}.tar") == names
    assert expand_shards(f"{names[2]}::{names[0]}") == [names[2], names[0]]
    assert expand_shards("https://host/{00..01}.tar") == ["https://host/00.tar", "https://host/01.tar"]
    assert expand_shards("pipe:cat {1,2}.tar") == ["pipe:cat 1.tar", "pipe:cat 2.tar"]


def test_tars_have_random_access(shards: Path) -> None:
    source = open_source(DataConfig(str(shards)))
    assert isinstance(source, TarSource)
    assert isinstance(source, PictureSource)
    assert len(source) == 12
    for index in (11, 0, 5, 4):
        shard, number = divmod(index, 4)
        assert source.name(index) == f"train-{shard:03d}.tar/{shard}{number}.jpg"
        assert source.read(index) == files.jpeg(10 * shard + number)
    assert pickle.loads(pickle.dumps(source)).read(5) == source.read(5)
    with pytest.raises(IndexError, match="picture 12 of 12"):
        source.read(12)


def test_tar_index_is_remembered_until_the_tar_changes(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bootstrap.data.tars as module

    built: list[str] = []

    def counting(shard: str) -> Any:
        built.append(Path(shard).name)
        return build_index(shard)

    monkeypatch.setattr(module, "build_index", counting)
    open_tars(str(shards))
    assert len(built) == 3
    assert len(open_tars(str(shards))) == 12  # type: ignore[arg-type]
    assert len(built) == 3
    files.write_tar(shards / "train-001.tar", {"new.png": files.jpeg()})
    assert len(open_tars(str(shards))) == 9  # type: ignore[arg-type]
    assert built[3:] == ["train-001.tar"]
    for remembered in index_folder().iterdir():
        remembered.write_bytes(b"garbage")
    assert len(open_tars(str(shards))) == 9  # type: ignore[arg-type]
    for remembered in index_folder().iterdir():
        remembered.write_bytes(remembered.read_bytes()[:-40])
    assert len(open_tars(str(shards))) == 9  # type: ignore[arg-type]


def test_processes_list_tars_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(5):
        files.write_tar(tmp_path / f"{number}.tar", {f"{number}.jpg": files.jpeg(number)})
    listed: list[str] = []

    def build(shard: str) -> Any:
        listed.append(Path(shard).stem)
        return build_index(shard)

    monkeypatch.setattr("bootstrap.data.tars.build_index", build)
    monkeypatch.setattr("bootstrap.data.tars._QUIET_SECONDS", 0.0, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    fingerprints = []
    for rank, cache in (("1", "a"), ("0", "b"), ("0", "a")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        fingerprints.append(open_tars(str(tmp_path)).fingerprint())
        assert ("listing tars" in capsys.readouterr().err) == (rank == "0")
    assert "".join(listed) == "23401" + "01234"  # and none once more
    assert len(set(fingerprints)) == 1


def test_pictures_that_a_tar_hides_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = {f"img.{number:04}.jpg": files.jpeg(number) for number in range(3)}
    files.write_tar(tmp_path / "frames.tar", frames)
    files.write_tar(tmp_path / "samples.tar", {"a.jpg": files.jpeg(), "a.seg.png": files.jpeg(1)})
    with tarfile.open(tmp_path / "samples.tar", "a") as archive:
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
            link = tarfile.TarInfo(f"b{kind.decode()}.jpg")
            link.type, link.linkname = kind, "a.jpg"
            archive.addfile(link)
    for _ in range(2):  # listed, and remembered
        caplog.clear()
        assert len(open_tars(str(tmp_path / "frames.tar"))) == 1  # type: ignore[arg-type]
        assert "1 pictures, and 2 more left out whose names are the same up to the first dot" in caplog.text
        caplog.clear()
        assert len(open_tars(str(tmp_path / "samples.tar"))) == 1  # type: ignore[arg-type]
        assert "left out whose names" not in caplog.text
        assert "2 links to pictures are left out" in caplog.text


def test_a_folder_that_may_not_be_read_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, scandir = len(FolderSource(folder)), os.scandir
    (folder / "secret").mkdir()

    def refusing(path: Any) -> Any:
        if Path(path).name == "secret":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert len(FolderSource(folder)) == whole
    assert "secret cannot be read (Permission denied): its pictures are left out" in caplog.text


@pytest.mark.parametrize(
    ("name", "kind"), [("data/train-0.parquet", "hf"), ("x/a.arrow", "hf"), ("1.tar", "tars")]
)
def test_a_folder_of_something_else_says_how_to_read_it(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"no pictures in folder .*: set data.kind to {kind}$"):
        FolderSource(tmp_path)


def test_tars_further_down_are_found_by_what_is_said(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "all" / "deep").mkdir(parents=True)
    shards.rename(tmp_path / "all" / "deep" / "train")
    with pytest.raises(ValueError, match=r"; .* holds tars: set data\.source to it$") as refused:
        open_source(DataConfig(str(tmp_path / "all")))
    said = str(refused.value).partition("; ")[2].partition(" holds")[0]
    assert isinstance(open_source(DataConfig(said)), TarSource)


def test_damaged_tar_is_used_up_to_the_damage(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = shards / "train-001.tar"
    offset = int(build_index(str(path)).offsets[2])
    path.write_bytes(path.read_bytes()[: offset + 100])
    source = open_tars(str(path))
    assert isinstance(source, TarSource)
    assert source.read(1) == files.jpeg(11)
    assert "train-001.tar is damaged after" in caplog.text
    caplog.clear()
    open_tars(str(path))  # its list is remembered by now
    assert "train-001.tar is damaged after" in caplog.text
    with pytest.raises(BadPictureError, match="truncated: the tar ends"):
        source.read(2)


@pytest.mark.parametrize("damage", ["overwritten", "cut inside", "cut before"])
@pytest.mark.parametrize("way", ["file", "stream"])
def test_a_damaged_header_is_not_the_end(
    damage: str, way: str, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = shards / "train-001.tar"
    header = int(build_index(str(path)).offsets[2]) - 512
    data = path.read_bytes()
    path.write_bytes(
        {
            "overwritten": data[:header] + b"?" * 512 + data[header + 512 :],
            "cut inside": data[: header + 100],
            "cut before": data[:header],
        }[damage]
    )
    if way == "file":
        assert len(open_tars(str(path))) == 2  # type: ignore[arg-type]
        assert "train-001.tar is damaged after 2 pictures" in caplog.text
    else:
        source = StreamedShards([str(path)], "remote", pause_seconds=0.0)
        assert [picture.member for picture in source.stream(0)] == [0, 1]
        assert "train-001.tar given up after 2 pictures and 3 attempts" in caplog.text


def test_a_broken_chunked_connection_is_given_up_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import bootstrap.data.shards as module

    monkeypatch.setattr(module, "_read_tar", Mock(side_effect=http.client.IncompleteRead(b"")))
    assert list(StreamedShards(["http://x/a.tar"], "remote", pause_seconds=0.0).stream(0)) == []
    assert "a.tar given up after 0 pictures and 3 attempts" in caplog.text


def test_tars_without_pictures_are_refused(tmp_path: Path) -> None:
    files.write_tar(tmp_path / "a.tar", {"a.txt": b"x"})
    with pytest.raises(ValueError, match=r"no pictures in the 1 tar\(s\) of '.*a\.tar'"):
        open_source(DataConfig(str(tmp_path / "a.tar")))


@pytest.mark.parametrize("way", ["http", "pipe", "gz"])
def test_remote_and_compressed_tars_are_streamed(way: str, shards: Path, server: str, tmp_path: Path) -> None:
    place = {
        "http": f"{server}/train-{{000..002}}.tar",
        "pipe": f"pipe:cat {shards}/train-{{000..002}}.tar",
        "gz": str(tmp_path / "all.tar.gz"),
    }[way]
    files.write_tar(tmp_path / "all.tar.gz", {f"{n}.jpg": files.jpeg(n) for n in range(4)})
    source = open_source(DataConfig(place))
    assert isinstance(source, ShardSource)
    assert not isinstance(source, PictureSource)
    assert len(source.shards) == (1 if way == "gz" else 3)
    pictures = list(source.stream(0))
    assert [picture.member for picture in pictures] == [0, 1, 2, 3]
    assert [picture.data for picture in pictures] == [files.jpeg(n) for n in range(4)]
    assert list(source.stream(0, start=3)) == pictures[3:]
    assert pictures[0].name.endswith("/0.jpg" if way == "gz" else "train-000.tar/00.jpg")
    next(source.stream(0))  # leaving early is fine


def test_unreachable_shard_is_given_up_with_its_name(server: str, caplog: pytest.LogCaptureFixture) -> None:
    source = StreamedShards([f"{server}/train-009.tar"], "remote", pause_seconds=0.0)
    assert list(source.stream(0)) == []
    assert "train-009.tar given up after 0 pictures and 3 attempts" in caplog.text


def test_broken_connection_is_taken_up_where_it_broke(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bootstrap.data.shards as module

    real = module._read_tar
    starts: list[int] = []

    def flaky(shard: str, start: int) -> Iterator[Any]:
        starts.append(start)
        for picture in real(shard, start):
            if picture.member == 2 and len(starts) == 1:
                raise ConnectionResetError("gone")
            yield picture

    monkeypatch.setattr(module, "_read_tar", flaky)
    source = StreamedShards([str(shards / "train-000.tar")], "remote", pause_seconds=0.0)
    assert [picture.member for picture in source.stream(0)] == [0, 1, 2, 3]
    assert starts == [0, 2]


# --- Hugging Face datasets ---


def make_dataset(count: int = 5) -> Any:
    datasets = pytest.importorskip("datasets")
    rows = [{"bytes": files.jpeg(number), "path": f"{number}.jpg"} for number in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": rows, "label": list(range(count))}, features=features)


@pytest.mark.parametrize("form", ["saved", "parquet", "parquet file", "arrow"])
def test_datasets_on_disk(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset()
    place = tmp_path / "dataset"
    if form == "saved":
        dataset.save_to_disk(str(place))
    else:
        place.mkdir()
        dataset.save_to_disk(str(tmp_path / "saved"))
        if form == "arrow":
            os.rename(next((tmp_path / "saved").glob("*.arrow")), place / "part.arrow")  # noqa: PTH104
        else:
            dataset.to_parquet(str(place / "train-00000-of-00001.parquet"))
    if form == "parquet file":
        place = place / "train-00000-of-00001.parquet"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hf"))
    source = open_source(DataConfig(str(place)))
    assert isinstance(source, PictureSource)
    assert len(source) == 5
    assert [source.read(index) for index in (4, 0)] == [files.jpeg(4), files.jpeg(0)]
    assert source.name(3) == "row 3 (3.jpg)"


def test_rows_without_names_are_known_by_what_they_hold(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    prints = []
    for name, order in (("a", (0, 1, 2)), ("b", (2, 1, 0)), ("c", (0, 1, 2))):
        rows = {"jpg": [files.jpeg(number) for number in order]}
        datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / name))
        prints.append(open_source(DataConfig(str(tmp_path / name))).fingerprint())
    assert prints[0] == prints[2] != prints[1]


@pytest.mark.parametrize("form", ["bytes", "images"])
def test_one_other_row_is_another_dataset(form: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    prints = []
    for name, last in (("a", 39), ("b", 40), ("c", 39)):
        pictures = [files.jpeg(number) for number in [*range(39), last]]
        rows = [{"jpg": {"bytes": data, "path": None} if form == "images" else data} for data in pictures]
        features = datasets.Features({"jpg": datasets.Image()}) if form == "images" else None
        datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / name))
        prints.append(open_source(DataConfig(str(tmp_path / name))).fingerprint())
    assert prints[0] == prints[2] != prints[1]


def test_dataset_splits_and_columns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    both = datasets.DatasetDict({"train": make_dataset(4), "test": make_dataset(2)})
    both.save_to_disk(str(tmp_path / "both"))
    assert len(open_source(DataConfig(str(tmp_path / "both"), split="test"))) == 2  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"data.split must be one of test, train .* got None"):
        open_source(DataConfig(str(tmp_path / "both")))
    with pytest.raises(
        ValueError, match=r"data.column 'photo' is not in the dataset .*; columns: image, label"
    ):
        open_source(DataConfig(str(tmp_path / "both"), split="train", column="photo"))
    make_dataset(3).remove_columns("image").save_to_disk(str(tmp_path / "bare"))
    with pytest.raises(ValueError, match=r"has no column of pictures: set data.column to one of label"):
        open_source(DataConfig(str(tmp_path / "bare")))


def test_parquet_folder_with_two_splits_asks_which(tmp_path: Path) -> None:
    for split in ("train", "test"):
        make_dataset(2).to_parquet(str(tmp_path / f"{split}-00000-of-00001.parquet"))
    with pytest.raises(ValueError, match=r"belong to the splits test, train: set data\.split"):
        open_source(DataConfig(str(tmp_path)))


def test_a_folder_of_the_cache_of_datasets_asks_which_split(tmp_path: Path) -> None:
    whole = make_dataset(9)
    for name, rows in (
        *(("my-test-set-train-00000-of-00002", (0, 1)), ("my-test-set-train-00001-of-00002", (2,))),
        *(("my-test-set-validation", (3, 4)), ("cache-0123456789abcdef", (5, 6, 7, 8))),
    ):
        whole.select(rows).save_to_disk(str(tmp_path / "saved"))
        (tmp_path / "cache").mkdir(exist_ok=True)
        saved = next((tmp_path / "saved").glob("*.arrow"))
        saved.rename(tmp_path / "cache" / f"{name}.arrow")
    place = str(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"belong to the splits train, validation: set data\.split"):
        open_source(DataConfig(place))
    source = open_source(DataConfig(place, split="train"))
    assert isinstance(source, PictureSource)
    assert [source.name(row) for row in range(len(source))] == [f"row {row} ({row}.jpg)" for row in range(3)]


def test_compressed_tars_in_a_folder_are_tars(tmp_path: Path) -> None:
    for name in ("a.tar.gz", "b.tgz", "c.tar.xz", "d.tar.bz2", "E.TAR"):
        (tmp_path / name).write_bytes(b"")
        assert guess_kind(str(tmp_path)) == guess_kind(str(tmp_path / name)) == "tars"
        assert expand_shards(str(tmp_path)) == [str(tmp_path / name)]
        (tmp_path / name).unlink()


def test_rows_that_hold_raw_bytes_or_nothing(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"jpg": [files.jpeg(1), None], "text": ["a", "b"]}).save_to_disk(
        str(tmp_path / "d")
    )
    source = open_source(DataConfig(str(tmp_path / "d")))
    assert isinstance(source, PictureSource)
    assert source.read(0) == files.jpeg(1)
    with pytest.raises(BadPictureError, match="the row holds NoneType"):
        source.read(1)


# --- choosing ---


def test_guess_kind(folder: Path, shards: Path, tmp_path: Path) -> None:
    assert guess_kind(str(folder)) == "folder"
    assert guess_kind(str(shards)) == "tars"
    assert guess_kind("pipe:cat x") == "tars"
    (shards / "stray.JPG").write_bytes(files.jpeg(0))
    with pytest.raises(
        ValueError, match=r"holds both pictures and tars: .*data\.kind=folder or data\.kind=tars"
    ):
        guess_kind(str(shards))
    (shards / "stray.JPG").unlink()
    assert guess_kind("s3://bucket/x.tar") == "tars"
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "x.parquet").write_bytes(b"")
    assert guess_kind(str(tmp_path / "p")) == "hf"
    folder.rename(tmp_path / "p" / "00000")
    with pytest.raises(
        ValueError, match=r"holds both pictures and tables: .*data\.kind=folder or data\.kind=hf"
    ):
        guess_kind(str(tmp_path / "p"))


@pytest.mark.parametrize("option", ["split", "column"])
def test_options_of_hugging_face_datasets_are_refused_elsewhere(
    folder: Path, shards: Path, option: str
) -> None:
    for source in (str(folder), str(shards), (str(folder), str(shards))):
        with pytest.raises(ValueError, match=f"data.{option} is for Hugging Face datasets"):
            open_source(DataConfig(source, **{option: "x"}))


def test_several_places_are_one_source(folder: Path, shards: Path) -> None:
    both = open_source(DataConfig((str(folder), str(shards))))
    assert isinstance(both, PictureSource)
    assert len(both) == 3 + 12
    assert [both.name(index) for index in (0, 2, 3)] == ["a.png", "deep/er/c.jpeg", "train-000.tar/00.jpg"]
    assert both.read(2) == files.jpeg(2)
    assert both.read(14) == files.jpeg(23)
    turned = open_source(DataConfig((str(shards), str(folder))))
    assert turned.fingerprint() != both.fingerprint()
    with pytest.raises(IndexError, match="has 15 pictures, no number 15"):
        both.read(15)
    with pytest.raises(ValueError, match="pipe:cat x can only be read as a stream"):
        open_source(DataConfig((str(folder), "pipe:cat x")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": ()}, "^source"),
        ({"source": ""}, "^source"),
        ({"kind": "zip"}, "^kind must be 'auto', 'folder', 'tars' or 'hf', got 'zip'"),
        ({"kind": "folder", "split": "train"}, "^split must be left out"),
        ({"kind": "tars", "column": "x"}, "^column must be left out"),
        ({"workers": -1}, "^workers must be zero or more"),
        ({"scale": (0.0, 1.0)}, "^scale"),
        ({"scale": (0.9, 0.5)}, "^scale"),
        ({"ratio": (2.0, 1.0)}, "^ratio"),
        ({"views": 0}, "^views must be one or more"),
        ({"max_pixels": 0}, "^max_pixels"),
        ({"max_bad_share": 1.5}, "^max_bad_share must be a share between 0 and 1, got 1.5"),
        ({"stream_block": 0}, "^stream_block"),
        ({"seed": -1}, "^seed"),
    ],
)
def test_contradictory_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"source": "x", **changes})
