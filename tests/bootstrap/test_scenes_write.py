"""The generator's command line and the files it leaves."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from bootstrap.scenes.__main__ import main


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def generate(out: Path, *more: str) -> int:
    return main(["--out", str(out), "--train", "5", "--heldout", "3", "--seed", "4", "--size", "48", *more])


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path):
    assert generate(tmp_path / "a", "--shard-size", "2") == 0
    assert generate(tmp_path / "b", "--shard-size", "2") == 0
    first = contents(tmp_path / "a")
    assert first == contents(tmp_path / "b")
    assert sum(name.endswith(".png") for name in first) == 8
    assert sum(name.endswith(".tar") for name in first) == 3 + 2


def test_files_agree_with_each_other(tmp_path: Path):
    assert generate(tmp_path / "a", "--shard-size", "4") == 0
    folder = tmp_path / "a" / "heldout"
    read = {
        name: json.loads((folder / f"{name}.json").read_text()) for name in ("captions", "chat", "labels")
    }
    names = sorted(path.name for path in (folder / "images").iterdir())
    assert sorted(read["labels"]["labels"]) == names
    assert sorted(image["file_name"] for image in read["captions"]["images"]) == names
    assert sorted(record["image"] for record in read["chat"]) == names
    for record in read["chat"]:
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert turns[0]["value"].startswith("<image>\n")
        assert sum(turn["value"].count("<image>") for turn in turns) == 1
    with Image.open(folder / "images" / names[0]) as picture:
        assert picture.size == (48, 48)
    questions = json.loads((folder / "questions.json").read_text())["questions"]
    image_ids = {image["id"] for image in read["captions"]["images"]}
    assert {question["image_id"] for question in questions} == image_ids
    assert main(["--out", str(tmp_path / "c"), "--valid", "1", "--questions", "0"]) == 0
    assert len(json.loads((tmp_path / "c" / "valid" / "chat.json").read_text())[0]["conversations"]) == 2


def test_shards_are_webdataset_samples(tmp_path: Path):
    assert generate(tmp_path / "a", "--shard-size", "4") == 0
    with tarfile.open(tmp_path / "a" / "train" / "shards" / "00001.tar") as tar:
        names = tar.getnames()
        assert names == ["000004.png", "000004.txt", "000004.cls"]
        picture = tar.extractfile("000004.png")
        assert picture is not None
        assert Image.open(io.BytesIO(picture.read())).size == (48, 48)


def test_an_existing_folder_is_kept_unless_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert generate(tmp_path / "a") == 0
    before = contents(tmp_path / "a")
    assert main(["--out", str(tmp_path / "a"), "--train", "1"]) == 1
    assert "--replace" in capsys.readouterr().err
    assert contents(tmp_path / "a") == before
    assert main(["--out", str(tmp_path / "a"), "--train", "1", "--replace"]) == 0
    assert not (tmp_path / "a" / "heldout").exists()


@pytest.mark.parametrize("beside", ["scenes.json", "photograph.jpg"])
def test_replacing_never_deletes_what_is_not_scenes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], beside: str
):
    (tmp_path / "train").mkdir()
    for name in ("photograph.jpg", beside):
        (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    assert main(["--out", str(tmp_path), "--train", "1", "--replace"]) == 1
    assert "other" in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "at least one scene"),
        (["--train", "-1", "--heldout", "2"], "at least one scene"),
        (["--train", "1", "--size", "8"], "at least 32 pixels"),
        (["--train", "1", "--shard-size", "-2"], "cannot be negative"),
    ],
)
def test_bad_numbers_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "a"), *arguments])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
