"""Held-out figures: the three kinds of labels, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bootstrap.config import HeldoutSettings
from bootstrap.cost import count_gmacs, measure_speed
from bootstrap.data import DataConfig, open_source
from bootstrap.evaluate import HeldOut, choose_evenly
from bootstrap.teacher import Teacher, inherit_teacher, load_teacher, spec_to_config
from sparse_vlm import SparseFormer, build_encoder
from sparse_vlm.inherit import InheritPlan
from tests.bootstrap.conftest import TINY_STUDENT
from tests.bootstrap.picture_files import write_tar


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> Teacher:
    return load_teacher(str(tiny_teacher))


@pytest.fixture(scope="module")
def student(teacher: Teacher) -> SparseFormer:
    torch.manual_seed(0)
    encoder = build_encoder(spec_to_config(teacher.spec, **TINY_STUDENT), teacher.spec.transform)
    inherit_teacher(encoder, teacher, InheritPlan.thirds(3))
    return encoder


class _Same(torch.nn.Module):
    """A student that says what the teacher says."""

    device = torch.device("cpu")

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, images: torch.Tensor, num_tokens: int | None = None) -> Any:
        return self.teacher(images)


class _Speaking(Teacher):
    """The tiny CLIP has no tokenizer; three fixed directions stand for the class texts."""

    has_text = True  # type: ignore[assignment]

    def encode_text(self, texts: Any) -> torch.Tensor:
        return torch.stack([torch.eye(16)[int(text[-1])] for text in texts])


@pytest.fixture
def classes(tmp_path: Path) -> str:
    """The class file that goes with it."""
    return _write_json(
        tmp_path / "classes.json", {"classes": ["0", "1", "2"], "templates": ["a {}", "one {}"]}
    )


def _write_json(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_a_perfect_student_scores_one(teacher: Teacher, picture_folder: Path) -> None:
    heldout = HeldOut(HeldoutSettings(source=str(picture_folder), batch_size=5), teacher)
    assert heldout.label_kind == "retrieval"
    scores = heldout.score(_Same(teacher))  # type: ignore[arg-type]
    # Without labels there is nothing to agree on.
    assert scores == {"cosine": pytest.approx(1.0), "retrieval": 1.0, "pictures": 12}


def test_scores_are_those_of_a_plain_loop(
    teacher: Teacher, student: SparseFormer, picture_folder: Path
) -> None:
    heldout = HeldOut(HeldoutSettings(source=str(picture_folder), limit=7, batch_size=3), teacher)
    student.train()
    scores = heldout.score(student, num_tokens=3)
    assert student.training
    student.eval()
    cosines, right = [], 0
    with torch.no_grad():
        images = [
            student.transform(heldout.picture(str(picture_folder / heldout.source.name(i))))
            for i in (0, 1, 3, 5, 6, 8, 10)  # seven of twelve, evenly spaced
        ]
        ours = [student(image.unsqueeze(0), 3).pooled[0] for image in images]
        theirs = [teacher(image.unsqueeze(0)).pooled[0] for image in images]
    for index in range(7):
        similarity = [float(F.cosine_similarity(ours[index], other, dim=0)) for other in theirs]
        cosines.append(similarity[index])
        right += similarity.index(max(similarity)) == index
    assert scores["cosine"] == pytest.approx(sum(cosines) / 7, abs=1e-5)
    assert scores["retrieval"] == pytest.approx(right / 7)
    assert scores["pictures"] == 7


class _Products(TorchDispatchMode):
    """Remembers how many elements the largest matrix product had."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.matmul):
            self.largest = max(self.largest, result.numel())
        return result


def test_similarities_of_all_pictures_are_never_held_at_once(
    teacher: Teacher, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heldout = HeldOut(HeldoutSettings(source=str(picture_folder)), teacher)
    rows = torch.arange(12)
    monkeypatch.setattr(heldout, "_look_with", lambda *_: (rows, heldout.teacher_pooled[rows]))
    monkeypatch.setattr("bootstrap.evaluate._COMPARED_AT_ONCE", 5, raising=False)
    with _Products() as products:
        scores = heldout.score(_Same(teacher))  # type: ignore[arg-type]
    assert products.largest == 5 * 12
    assert scores["retrieval"] == 1.0


def test_held_out_pictures_are_decoded_by_workers_too(
    teacher: Teacher, student: SparseFormer, picture_folder: Path
) -> None:
    settings = HeldoutSettings(source=str(picture_folder), batch_size=5)
    plain = HeldOut(settings, teacher).score(student)
    before = torch.get_rng_state()
    heldout = HeldOut(settings, teacher, workers=2)
    assert heldout.score(student) == plain
    assert torch.equal(torch.get_rng_state(), before)


def test_a_limit_takes_pictures_of_every_class() -> None:
    assert choose_evenly(6, 10) == choose_evenly(6, 6) == [0, 1, 2, 3, 4, 5]
    chosen = choose_evenly(1000 * 50, 1000)
    assert {place // 50 for place in chosen} == set(range(1000))
    assert choose_evenly(7, 3) == [0, 2, 4]


def test_pictures_that_come_and_go_are_compared_with_themselves(
    teacher: Teacher, picture_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(picture_folder, tmp_path / "some"))
    names = sorted(path.name for path in folder.iterdir())
    whole = (folder / names[2]).read_bytes()
    (folder / names[2]).write_bytes(b"broken")
    heldout = HeldOut(HeldoutSettings(source=str(folder), batch_size=5), teacher)
    assert "held-out figures are of 11 pictures" in caplog.text
    assert "1 of 12 pictures skipped (1 not a picture)" in caplog.text
    perfect = {"cosine": pytest.approx(1.0), "retrieval": 1.0}
    same: Any = _Same(teacher)
    assert heldout.score(same) == {**perfect, "pictures": 11}
    # One is back and another is gone: as many as before, but not the same.
    (folder / names[2]).write_bytes(whole)
    (folder / names[7]).unlink()
    assert heldout.score(same) == {**perfect, "pictures": 10}
    assert "these held-out figures are of 10 pictures and not of 11" in caplog.text
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"none of its 11 pictures can be read any more; put them back"):
        heldout.score(same)


@pytest.mark.parametrize("kind", ["folder", "link", "tar", "list", "rows"])
def test_held_out_pictures_are_not_those_of_the_training(
    kind: str, teacher: Teacher, picture_folder: Path, tmp_path: Path
) -> None:
    below = Path(shutil.copytree(picture_folder, tmp_path / "all" / "val"))
    training, heldout = [str(tmp_path / "all")], str(below)
    if kind == "link":
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "one.png").symlink_to(next(below.iterdir()))
        training = [str(tmp_path / "other")]
    elif kind == "tar":
        write_tar(tmp_path / "a.tar", {path.name: path.read_bytes() for path in below.iterdir()})
        training, heldout = [str(tmp_path / "*.tar")], str(tmp_path / "a.tar")
    elif kind == "list":
        training.insert(0, str(picture_folder))
    elif kind == "rows":
        datasets = pytest.importorskip("datasets")
        rows = [{"jpg": path.read_bytes()} for path in below.iterdir()]
        table = datasets.Dataset.from_list(rows)
        datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "hf")
        other = DataConfig(str(tmp_path / "hf"), split="train")
        settings = HeldoutSettings(source=str(tmp_path / "hf"), split="test")
        HeldOut(settings, teacher, open_source(other))
        with pytest.raises(ValueError, match=r"and data\.source share"):
            HeldOut(dataclasses.replace(settings, split="train"), teacher, open_source(other))
        return
    source = open_source(DataConfig(training[0] if len(training) == 1 else tuple(training)))
    with pytest.raises(ValueError, match=r"heldout\.source '.*' and data\.source share /"):
        HeldOut(HeldoutSettings(source=heldout), teacher, source)
    HeldOut(HeldoutSettings(source=str(picture_folder)), teacher, open_source(DataConfig(str(below))))


def test_zero_shot_labels_and_truth(
    teacher: Teacher, classes: str, picture_folder: Path, tmp_path: Path
) -> None:
    settings = HeldoutSettings(source=str(picture_folder), truth="index_prefix", classes=classes)
    heldout = HeldOut(settings, _Speaking(teacher.trunk))
    assert heldout.label_kind == "zero-shot"
    assert heldout.truth is not None
    assert sorted(heldout.truth.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    scores = heldout.score(_Same(teacher))  # type: ignore[arg-type]
    wanted = (heldout.teacher_pooled[:, :3].argmax(dim=1) == heldout.truth).float().mean()
    assert scores["top1"] == scores["teacher_top1"] == pytest.approx(float(wanted))
    table = tmp_path / "labels.json"
    names = {Path(heldout.source.name(i)).name: 1 for i in range(12)}
    table.write_text(json.dumps({"labels": names}))
    by_file = HeldoutSettings(source=str(picture_folder), truth=str(table), classes=classes)
    assert HeldOut(by_file, _Speaking(teacher.trunk)).truth.tolist() == [1] * 12  # type: ignore[union-attr]
    table.write_text(json.dumps({}))
    with pytest.raises(ValueError, match="says nothing about 12 pictures"):
        HeldOut(by_file, _Speaking(teacher.trunk))
    table.write_text(json.dumps([1, 2]))
    with pytest.raises(ValueError, match=r"must be a JSON object .*found a list"):
        HeldOut(by_file, _Speaking(teacher.trunk))
    (tmp_path / "odd").mkdir()
    shutil.copy(next(picture_folder.glob("*.*")), tmp_path / "odd" / "\u00b2_two.png")  # no number
    odd = HeldoutSettings(source=str(tmp_path / "odd"), truth="index_prefix", classes=classes)
    with pytest.raises(ValueError, match=r"expects file names like .*found '\u00b2_two\.png'"):
        HeldOut(odd, _Speaking(teacher.trunk))


def test_truth_needs_a_teacher_that_names_classes(teacher: Teacher, picture_folder: Path) -> None:
    with pytest.raises(ValueError, match="needs a teacher that names classes"):
        HeldOut(HeldoutSettings(source=str(picture_folder), truth="index_prefix"), teacher)


@pytest.fixture
def twins(picture_folder: Path, tmp_path: Path) -> Path:
    """Two classes whose pictures have the same file names."""
    for name, number in (("cat", 0), ("dog", 1)):
        (tmp_path / "twins" / name).mkdir(parents=True)
        picture = next(picture_folder.glob(f"*_x{number}.png"))
        shutil.copy(picture, tmp_path / "twins" / name / "1.png")
    return tmp_path / "twins"


def test_pictures_of_one_name_are_told_apart_by_their_paths(
    teacher: Teacher, classes: str, twins: Path, tmp_path: Path
) -> None:
    speaking = _Speaking(teacher.trunk)

    def read(labels: Any) -> Any:
        truth = _write_json(tmp_path / "truth.json", labels)
        return HeldOut(HeldoutSettings(source=str(twins), truth=truth, classes=classes), speaking).truth

    assert read({"cat/1.png": 0, "dog/1.png": 1}).tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"'1\.png' is the name of several pictures"):
        read({"1.png": 0})
    with pytest.raises(ValueError, match=r"says nothing about 1 pictures, such as 'dog/1\.png'"):
        read({"cat/1.png": 0})
    with pytest.raises(ValueError, match="must be a JSON object"):
        read([0, 1])


def test_folders_are_classes_in_the_order_of_their_names(
    teacher: Teacher, classes: str, twins: Path, tmp_path: Path
) -> None:
    speaking = _Speaking(teacher.trunk)

    def read(place: Path, limit: int = 1000) -> Any:
        settings = HeldoutSettings(source=str(place), truth="folders", classes=classes, limit=limit)
        return HeldOut(settings, speaking).truth

    with pytest.raises(ValueError, match=r"a folder with 3 folders of pictures, .*twins' has 2$"):
        read(twins)
    (twins / "bird" / "below").mkdir(parents=True)
    shutil.copy(twins / "cat" / "1.png", twins / "bird" / "below" / "2.png")
    assert read(twins).tolist() == [0, 1, 2]
    assert read(twins, limit=2).tolist() == [0, 1]  # a folder whose pictures are not looked at counts
    shutil.copy(twins / "cat" / "1.png", twins / "1.png")
    with pytest.raises(ValueError, match="has pictures that lie in none"):
        read(twins)
    write_tar(tmp_path / "a.tar", {"cat/1.png": (twins / "1.png").read_bytes()})
    with pytest.raises(ValueError, match=r"a\.tar' is no folder"):
        read(tmp_path / "a.tar")


def test_held_out_rows_of_a_split_are_known_by_their_pictures(
    teacher: Teacher, classes: str, picture_folder: Path, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [
        {"image": {"bytes": path.read_bytes(), "path": path.name}}
        for path in sorted(picture_folder.iterdir())
    ]
    features = datasets.Features({"image": datasets.Image()})
    table = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict({"train": table, "test": table.select(range(5))}).save_to_disk(tmp_path / "hf")
    settings = {"source": str(tmp_path / "hf"), "truth": "index_prefix", "classes": classes}
    with pytest.raises(ValueError, match=r"heldout\.split must be one of test, train"):
        HeldOut(HeldoutSettings(**settings), _Speaking(teacher.trunk))
    heldout = HeldOut(HeldoutSettings(**settings, split="test"), _Speaking(teacher.trunk))
    assert heldout.truth is not None
    assert heldout.truth.tolist() == [int(row["image"]["path"][0]) for row in rows[:5]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "/nowhere"}, r"heldout\.source '/nowhere' does not exist"),
        ({"classes": "/nowhere.json"}, r"heldout\.classes=/nowhere\.json cannot be read: No such file"),
        ({"classes": "LIST"}, r"must hold 'classes' and 'templates', found a list"),
        (
            {"classes": {"classes": ["a", "b"], "templates": ["a photo of a {c}."]}},
            r"of a \{c\}\.' has no \{\}",
        ),
        (
            {"classes": {"classes": ["a"], "templates": "a {}"}},
            r"'templates' must be a list of texts, found 'a",
        ),
        (
            {"classes": {"classes": [], "templates": ["a {}"]}},
            r"'classes' must be a list of texts, found \[\]",
        ),
        (
            {"classes": {"classes": [1], "templates": ["a {}"]}},
            r"'classes' must be a list of texts, found \[1\]",
        ),
        ({"truth": {"number": 3}}, r"the class of '.*' must be a whole number from 0 to 2, and is 3"),
        ({"truth": {"number": -1}}, r"from 0 to 2, and is -1"),
        ({"truth": {"number": None}}, r"from 0 to 2, and is None"),
        ({"truth": {"number": 1.5}}, r"from 0 to 2, and is 1\.5"),
        ({"truth": "/nowhere.json"}, r"heldout\.truth=/nowhere\.json cannot be read: No such file"),
    ],
)
def test_what_is_wrong_is_said_in_the_settings_own_names(
    settings: dict[str, Any],
    message: str,
    teacher: Teacher,
    classes: str,
    picture_folder: Path,
    tmp_path: Path,
) -> None:
    settings = {"source": str(picture_folder), "classes": classes, **settings}
    if settings["classes"] == "LIST":
        settings["classes"] = _write_json(tmp_path / "list.json", [1])
    if isinstance(settings["classes"], dict):
        settings["classes"] = _write_json(tmp_path / "own.json", settings["classes"])
    if isinstance(settings.get("truth"), dict):
        numbers = {path.name: settings["truth"]["number"] for path in picture_folder.iterdir()}
        settings["truth"] = _write_json(tmp_path / "truth.json", numbers)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        HeldOut(HeldoutSettings(**settings), _Speaking(teacher.trunk))


def test_classes_need_a_text_side(teacher: Teacher, picture_folder: Path, tmp_path: Path) -> None:
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps({"classes": ["a"], "templates": ["{}"]}))

    class Mute(Teacher):
        """A teacher without a text side."""

        has_text = False  # type: ignore[assignment]

    with pytest.raises(ValueError, match="needs a teacher with a text side"):
        HeldOut(HeldoutSettings(source=str(picture_folder), classes=classes), Mute(teacher.trunk))


def test_multiply_adds_are_counted(student: SparseFormer) -> None:
    linear = torch.nn.Linear(12, 5)
    assert count_gmacs(lambda images: linear(images.flatten(1)), (2, 2)) == pytest.approx(60e-9)
    few, many = (count_gmacs(lambda x, n=n: student(x, n), (32, 32)) for n in (3, 9))
    assert few < many


def test_speeds_are_measured_in_turn() -> None:
    calls: list[str] = []
    looks = {name: (lambda images, name=name: calls.append(name)) for name in ("a", "b")}
    speeds = measure_speed(looks, torch.zeros(4, 3, 2, 2), rounds=2)
    assert calls == ["a", "b"] * 3
    assert all(speed > 0 for speed in speeds.values())
