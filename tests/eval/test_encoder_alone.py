"""The encoder alone: every command on small files, every rule against a plain one."""

from __future__ import annotations

import json
import math
import os
import shutil
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from bootstrap.scenes.__main__ import main as write_scenes
from bootstrap.teacher import Teacher
from eval.agreement import find_own
from eval.agreement import main as agreement
from eval.answers import InputError
from eval.encoder import looks
from eval.encoder.captions import load_captioned
from eval.encoder.classes import classes_of, label_map, load_classes, template_set
from eval.encoder.classify import build_classifier, rank_classes, score_ranks
from eval.encoder.command import Sheet
from eval.encoder.features import extract
from eval.encoder.looks import load_encoder_look, load_teacher_look
from eval.encoder.neighbours import vote
from eval.encoder.open_clip_route import replace_visual
from eval.encoder.pictures import load_pictures
from eval.encoder.probe import fit_probe
from eval.encoder.recall import recall
from eval.encoder.sources import open_pictures
from eval.intervals import accuracy_figure
from eval.knn import main as knn
from eval.probe import main as probe
from eval.retrieval import main as retrieval
from eval.zeroshot import main as zeroshot
from sparse_vlm import build_encoder, load_encoder
from sparse_vlm.config import SparseFormerConfig
from sparse_vlm.transform import ImageTransform, TransformConfig

ROOT = Path(__file__).resolve().parents[2]
TEACHER = ROOT / "assets" / "scenes_clip"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "scenes"
    assert write_scenes(["--out", str(folder), "--train", "24", "--heldout", "20"]) == 0
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained encoder in the teacher's joint space."""
    config = SparseFormerConfig(
        stem_channels=8, num_latents=8, focusing_width=16, focusing_heads=2, focusing_mlp_width=32,
        focusing_repeats=2, num_points=4, mixing_points=4, generator_width=8, handover_generator_width=8,
        width=32, depth=2, heads=2, mlp_width=48, output_width=128,
    )  # fmt: skip
    torch.manual_seed(0)
    transform = TransformConfig(image_size=96, mean=(0.5,) * 3, std=(0.25,) * 3)
    directory = tmp_path_factory.mktemp("student") / "encoder"
    build_encoder(config, transform).save(directory, {"teacher": "none"})
    return directory


def in_class_folders(source: Path, out: Path) -> Path:
    """The generator's pictures, a folder a colour."""
    table = json.loads((source / "labels.json").read_text())
    for name, label in table["labels"].items():
        folder = out / table["classes"][label].split()[0]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((source / "images" / name).read_bytes())
    return out


def test_zero_shot_side_by_side(scenes: Path, student: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "z.json"
    heldout = scenes / "heldout"
    words = ["--encoder", str(student), "--teacher", str(TEACHER), "--pictures", str(heldout / "images")]
    words += ["--labels", str(heldout / "labels.json"), "--classes", str(TEACHER / "zeroshot.json")]
    assert zeroshot([*words, "--json", str(out), "--cache", str(tmp_path / "kept")]) == 0
    printed = capsys.readouterr().out
    assert "zero-shot, 64 classes, 4 templates" in printed
    made = json.loads(out.read_text())
    assert made["figures"]["teacher"]["top1"]["n"] == 20
    top1, top5 = (made["figures"]["teacher"][name]["value"] for name in ("top1", "top5"))
    assert 0 < top1 <= top5
    assert made["differences"]["top1"]["first"] == top1
    assert len(list((tmp_path / "kept").iterdir())) == 2
    assert zeroshot([*words, "--cache", str(tmp_path / "kept")]) == 0
    # The bootstrap's own evaluation of the same teacher gives the same figure.
    from bootstrap.config import HeldoutSettings
    from bootstrap.evaluate import HeldOut
    from bootstrap.teacher import load_teacher

    settings = HeldoutSettings(
        source=str(heldout / "images"),
        truth=str(heldout / "labels.json"),
        classes=str(TEACHER / "zeroshot.json"),
    )
    own = HeldOut(settings, load_teacher(str(TEACHER))).score(load_encoder(student))
    assert 100 * own["teacher_top1"] == pytest.approx(top1)
    assert 100 * own["top1"] == pytest.approx(made["figures"]["encoder"]["top1"]["value"])


def test_open_clips_own_zero_shot_code_gives_the_same(
    scenes: Path, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_clip = pytest.importorskip("open_clip")
    runner = pytest.importorskip("open_clip_train.zero_shot")
    from open_clip.model import get_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg, image_transform_v2

    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{TEACHER}")
    model = replace_visual(model.eval(), load_encoder(student).eval())
    classes = load_classes(str(TEACHER / "zeroshot.json"))
    tokenizer = open_clip.get_tokenizer(f"local-dir:{TEACHER}")
    theirs = open_clip.build_zero_shot_classifier(
        model, tokenizer, classes.names, [lambda name, t=t: t.replace("{}", name) for t in classes.templates]
    )
    _, teacher = load_teacher_look(str(TEACHER))
    ours = build_classifier(classes.names, classes.templates, teacher.encode_text)
    assert torch.allclose(theirs.T, ours, atol=1e-5)

    look = load_encoder_look(student)
    pictures = load_pictures(scenes / "heldout" / "images", scenes / "heldout" / "labels.json")
    assert pictures.labels is not None
    transform = image_transform_v2(PreprocessCfg(**get_model_preprocess_cfg(model)), is_train=False)
    pixels = torch.stack([transform(pictures.read(place)) for place in range(20)])
    assert torch.equal(pixels, torch.stack([look.prepare(pictures.read(place)) for place in range(20)]))
    labels = torch.tensor(pictures.labels)
    loader = [(pixels[:12], labels[:12]), (pixels[12:], labels[12:])]
    options = SimpleNamespace(device="cpu", precision="fp32", batch_size=12)
    # The loop is open_clip's; its counting makes floats of arrays of one element, which numpy 2.4 refuses.
    monkeypatch.setattr(
        runner,
        "accuracy",
        lambda output, target, topk: [
            float((output.topk(k).indices == target[:, None]).any(dim=1).sum()) for k in topk
        ],
    )
    top1, top5 = runner.run(model, theirs, loader, options)
    hits = score_ranks(rank_classes(look.embed(pixels), ours), labels)
    assert (top1, top5) == (sum(hits[1]) / 20, sum(hits[5]) / 20)

    narrow = build_encoder(load_encoder(student).config.replace(output_width=64))
    with pytest.raises(InputError, match="joint space has width 128, the encoder's 64"):
        replace_visual(model, narrow)
    cropped = TransformConfig(image_size=96, resize_size=110)
    with pytest.raises(InputError, match="open_clip's transform resizes to the crop's size only"):
        replace_visual(model, build_encoder(load_encoder(student).config, cropped))


def test_neighbours_and_probe(scenes: Path, student: Path, tmp_path: Path, capsys: Any) -> None:
    train = in_class_folders(scenes / "train", tmp_path / "train")
    test = in_class_folders(scenes / "train", tmp_path / "test")
    words = ["--encoder", str(student), "--teacher", str(TEACHER), "--train", str(train), "--test", str(test)]
    assert knn([*words, "--k", "1", "--json", str(tmp_path / "k.json")]) == 0
    made = json.loads((tmp_path / "k.json").read_text())
    assert made["figures"]["teacher"]["top1"]["value"] == 100.0  # each picture is its own nearest neighbour
    assert probe([*words, "--json", str(tmp_path / "p.json")]) == 0
    made = json.loads((tmp_path / "p.json").read_text())
    assert made["figures"]["teacher"]["top1"]["value"] > 60  # colours are what this teacher knows
    assert made["notes"][0].startswith("teacher: C = ")
    first, *others = sorted(test.iterdir())
    for folder in others:
        shutil.rmtree(folder)
        folder.mkdir()
    shutil.rmtree(train / first.name)
    labels = tmp_path / "labels.json"
    for place, root in enumerate((train, test)):
        names = [path.relative_to(root).as_posix() for path in root.rglob("*.png")]
        labels.with_stem(f"labels_{place}").write_text(json.dumps(dict.fromkeys(names, place)))
    words += ["--train-labels", str(tmp_path / "labels_0.json")]
    words += ["--test-labels", str(tmp_path / "labels_1.json")]
    capsys.readouterr()
    assert knn(words) == 2
    assert "No class of --test" in capsys.readouterr().err
    capsys.readouterr()
    assert knn([*words[:-2], "--test", str(train)]) == 2
    assert "are the same folder" in capsys.readouterr().err


def test_the_vote_is_dinos() -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(30, 6, generator=generator), torch.randn(7, 6, generator=generator)
    labels = torch.randint(0, 4, (30,), generator=generator)
    made = vote(train, labels, test, k=5, temperature=0.1, chunk=3)
    for row in range(7):
        cosines = [
            (float(F.cosine_similarity(test[row], train[i], dim=0)), int(labels[i])) for i in range(30)
        ]
        votes: dict[int, float] = {}
        for cosine, label in sorted(cosines, reverse=True)[:5]:
            votes[label] = votes.get(label, 0.0) + math.exp(cosine / 0.1)
        scale = max(math.exp(cosine / 0.1) for cosine, _ in cosines)
        wanted = [votes[label] / scale if label in votes else -math.inf for label in range(4)]
        assert made[row].tolist() == pytest.approx(wanted, rel=1e-4)
    assert (vote(train, labels, test, temperature=1e-4) <= len(train)).all()
    # Of one neighbour there is one answer, and what nobody voted for is not among the five best.
    alone = score_ranks(vote(train, labels, test, k=1), labels[:7])
    assert alone[1] == score_ranks(vote(train, labels, test, k=1), labels[:7], tops=(4,))[4]


def test_the_probe_stands_where_its_loss_is_smallest() -> None:
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(60) % 3
    train = torch.randn(60, 4, generator=generator) + 2 * F.one_hot(labels, 4)
    made = fit_probe(train, labels, classes=5, strengths=(0.5,))
    values = ((train.double() - made.mean) / made.scale).requires_grad_(False)
    weight, bias = made.weight[:3].clone().requires_grad_(), made.bias[:3].clone().requires_grad_()
    loss = (
        0.5 * F.cross_entropy(values @ weight.T + bias, labels, reduction="sum") + weight.square().sum() / 2
    )
    for part in torch.autograd.grad(loss, (weight, bias)):
        assert part.abs().max() < 1e-3
    scores = made.scores(train)
    assert (scores.argmax(-1) == labels).float().mean() > 0.8
    assert scores[:, 3:].isneginf().all()  # classes that training never saw
    with pytest.raises(InputError, match="needs two training pictures at least, and there is 1"):
        fit_probe(train[:1], labels[:1], classes=3)


def test_recall_is_that_of_a_plain_search() -> None:
    generator = torch.Generator().manual_seed(1)
    images, texts = torch.randn(9, 5, generator=generator), torch.randn(21, 5, generator=generator)
    owners = [place % 9 for place in range(21)]
    made = recall(images, texts, owners, (1, 3, 50))
    for k in (1, 3):
        for text in range(21):
            near = sorted(range(9), key=lambda i: -float(F.cosine_similarity(texts[text], images[i], dim=0)))
            assert made[f"text_to_image@{k}"][text] == int(owners[text] in near[:k])
        for image in range(9):
            near = sorted(
                range(21), key=lambda t: -float(F.cosine_similarity(images[image], texts[t], dim=0))
            )
            assert made[f"image_to_text@{k}"][image] == int(image in [owners[t] for t in near[:k]])
    assert set(made["text_to_image@50"]) == {1}


def test_embeddings_that_are_no_numbers_find_nothing() -> None:
    images, texts = torch.eye(3), torch.eye(3)
    images[1] = torch.nan
    made = recall(images, texts, [0, 1, 2], (1, 3))
    assert made["image_to_text@1"] == [1, 0, 1]
    assert made["image_to_text@3"] == [1, 0, 1]
    assert made["text_to_image@3"] == [1, 0, 1]
    assert recall(torch.eye(2), torch.full((2, 2), torch.inf), [0, 1], (1,))["text_to_image@1"] == [0, 0]


def test_retrieval_and_agreement(scenes: Path, student: Path, tmp_path: Path, capsys: Any) -> None:
    heldout = scenes / "heldout"
    both = ["--encoder", str(student), "--teacher", str(TEACHER)]
    files = ["--annotations", str(heldout / "captions.json"), "--images", str(heldout / "images")]
    assert retrieval([*both, *files, "--json", str(tmp_path / "r.json")]) == 0
    made = json.loads((tmp_path / "r.json").read_text())["figures"]["teacher"]
    assert made["image_to_text@10"]["value"] > made["image_to_text@1"]["value"] > 5
    pictures = ["--pictures", str(heldout / "images"), "--classes", str(TEACHER / "zeroshot.json")]
    assert agreement([*both, *pictures, "--json", str(tmp_path / "a.json")]) == 0
    assert agreement([*both, *pictures, "--num-tokens", "1"]) == 2
    assert "num_tokens must be at least 2" in capsys.readouterr().err
    made = json.loads((tmp_path / "a.json").read_text())["figures"]["encoder"]
    assert set(made) == {"same_picture", "same_class", "cosine"}
    capsys.readouterr()
    assert retrieval([*both, *files, "--limit", "3", "--captions-per-picture", "1"]) == 0
    assert "3 pictures, 3 captions" in capsys.readouterr().out
    assert retrieval([*both, *files, "--limit", "3", "--template", "a photo of {}"]) == 0
    assert "template 'a photo of {}'" in capsys.readouterr().out
    assert retrieval([*both, *files, "--template", "a photo"]) == 2
    assert "--template has no {} for the caption" in capsys.readouterr().err


def constant_student(directory: Path, answer: list[float]) -> Path:
    """An encoder in a space of five logits that gives every picture the same ones."""
    config = SparseFormerConfig(
        stem_channels=8, num_latents=4, focusing_width=16, focusing_heads=2, focusing_mlp_width=32,
        focusing_repeats=1, num_points=4, mixing_points=4, generator_width=8, handover_generator_width=8,
        width=32, depth=1, heads=2, mlp_width=48, output_width=5,
    )  # fmt: skip
    encoder = build_encoder(config, TransformConfig(image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3))
    last = [module for module in encoder.modules() if isinstance(module, torch.nn.Linear)][-1]
    assert last.out_features == 5
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor(answer))
    encoder.save(directory, {"teacher": "none"})
    return directory


@pytest.mark.parametrize("bias", [True, False])
def test_agreement_on_the_classes_of_the_teachers_own_head(
    bias: bool, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits agree where their largest one is the same; a projection without a bias makes no logits."""
    timm = pytest.importorskip("timm.models.vision_transformer")
    from bootstrap.teachers.timm_vit import TimmTrunk

    torch.manual_seed(0)
    size = {"img_size": 224, "patch_size": 56, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}
    vit = timm.VisionTransformer(**size)
    for weight in (parameter for parameter in vit.parameters() if parameter.ndim > 1):
        torch.nn.init.normal_(weight, std=0.5)  # an untrained head would call all pictures alike
    vit.head.bias = torch.nn.Parameter(torch.zeros(5)) if bias else None
    teacher = Teacher(TimmTrunk(vit, "timm:test"))
    monkeypatch.setattr(looks, "load_teacher", lambda name, weights, device: teacher)
    folder = scenes / "heldout" / "images"
    prepare = ImageTransform(teacher.spec.transform)
    pixels = torch.stack([prepare(Image.open(path).convert("RGB")) for path in sorted(folder.iterdir())])
    named = teacher(pixels).pooled.argmax(-1).tolist()
    often = Counter(named).most_common(1)[0][0]
    share = 100 * named.count(often) / len(named)
    assert 0 < share < 100  # or the figure would not tell pictures apart
    student = constant_student(tmp_path / "student", [float(place == often) for place in range(5)])
    out = tmp_path / "a.json"
    words = ["--encoder", str(student), "--teacher", "timm:test", "--pictures", str(folder)]
    assert agreement([*words, "--json", str(out)]) == 0
    figures = json.loads(out.read_text())["figures"]["encoder"]
    assert set(figures) == {"same_picture", "cosine", *(["same_class"] if bias else [])}
    if bias:
        assert (figures["same_class"]["value"], figures["same_class"]["n"]) == (share, len(named))


def karpathy(tmp_path: Path) -> Path:
    images = [
        {
            "filepath": "val2014",
            "filename": f"{n}.png",
            "split": "test" if n else "train",
            "sentences": [{"raw": f"a {n} "}, {"raw": "b"}],
        }
        for n in range(3)
    ]
    (tmp_path / "val2014").mkdir()
    for n in range(3):
        Image.new("RGB", (9, 9)).save(tmp_path / "val2014" / f"{n}.png")
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return path


def test_karpathys_files(tmp_path: Path) -> None:
    path = karpathy(tmp_path)
    made = load_captioned(path, tmp_path)
    assert made.pictures.names == ("val2014/1.png", "val2014/2.png")
    assert made.captions == ("a 1", "b", "a 2", "b")
    assert made.owners == (0, 0, 1, 1)
    assert load_captioned(path, tmp_path, per_picture=1).captions == ("a 1", "a 2")
    with pytest.raises(InputError, match="has no split 'val'; it has test, train"):
        load_captioned(path, tmp_path, "val")
    listed = [{"image": f"val2014/{n}.png", "caption": [f"a {n}", "b"]} for n in (1, 2)]
    other = tmp_path / "coco_karpathy_test.json"
    other.write_text(json.dumps(listed))
    assert load_captioned(other, tmp_path).captions == made.captions
    other.write_text(json.dumps([*listed, listed[0]]))
    with pytest.raises(InputError, match=r"1 pictures more than once \(val2014/1.png\)"):
        load_captioned(other, tmp_path)
    other.write_text(json.dumps([*listed, {"caption": "no picture"}]))
    with pytest.raises(InputError, match="an entry that is not whole"):
        load_captioned(other, tmp_path)
    other.write_text(json.dumps([{"image": 7, "caption": "x"}]))
    with pytest.raises(InputError, match=r"1 pictures without a name \(7\)"):
        load_captioned(other, tmp_path)
    (tmp_path / "val2014" / "2.png").unlink()
    with pytest.raises(InputError, match=r"1 pictures of .* are not in .*2\.png"):
        load_captioned(path, tmp_path)


def cifar(folder: Path, hundred: bool, train: bool = False) -> Path:
    """One picture a split, red in row 3, column 5, of the second class."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((3, 32, 32), np.uint8)
    pixels[0, 3, 5] = 200
    record = bytes([9, 1] if hundred else [1]) + pixels.tobytes()
    names = ["test.bin" if hundred else "test_batch.bin"]
    if train:
        names += ["train.bin"] if hundred else [f"data_batch_{n}.bin" for n in range(1, 6)]
    for name in names:
        (folder / name).write_bytes(record)
    words = folder / ("fine_label_names.txt" if hundred else "batches.meta.txt")
    words.write_text("apple\nsweet_pepper\n\n")
    return folder / names[0]


@pytest.mark.parametrize("hundred", [False, True])
def test_cifars_binary_version(tmp_path: Path, hundred: bool) -> None:
    folder = tmp_path / ("cifar-100-binary" if hundred else "cifar-10-batches-bin")
    test = cifar(folder, hundred, train=True)
    made = open_pictures(tmp_path)
    assert (made.labels, made.classes) == ((1,), ("apple", "sweet_pepper"))
    assert made.read(0).getpixel((5, 3)) == (200, 0, 0)
    assert len(open_pictures(folder, split="train").names) == (1 if hundred else 5)
    classes = classes_of(made)
    assert classes.names[1] == "sweet pepper"
    assert len(classes.templates) == 18
    assert label_map(made, classes) == ([0, 1], "")
    test.write_bytes(b"123")
    with pytest.raises(InputError, match="no whole number of CIFAR records"):
        open_pictures(tmp_path)
    test.unlink()
    with pytest.raises(InputError, match=f"lacks CIFAR-{100 if hundred else 10}'s {test.name}"):
        open_pictures(tmp_path)


def test_cifars_prompts_are_those_of_clips_authors() -> None:
    made = template_set("cifar")
    assert len(set(made)) == 18
    assert {"a photo of a {}.", "a low contrast photo of the {}.", "a photo of a small {}."} <= set(made)
    with pytest.raises(InputError, match="no template set 'cifer'"):
        template_set("cifer")


def test_neighbours_on_cifars_own_splits(student: Path, tmp_path: Path, capsys: Any) -> None:
    cifar(tmp_path / "cifar-10-batches-bin", hundred=False, train=True)
    words = ["--encoder", str(student), "--train", str(tmp_path), "--test", str(tmp_path)]
    assert knn([*words, "--k", "3"]) == 0
    assert "3 nearest neighbours" in capsys.readouterr().out
    for temperature in ("0", "nan"):
        assert knn([*words, "--temperature", temperature]) == 2
        assert "--temperature must be above 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        knn([*words, "--k", "0"])


def test_cifars_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test_batch").write_bytes(b"")
    with pytest.raises(InputError, match="is a pickle; take the binary version"):
        open_pictures(tmp_path)


def test_class_folders_find_their_class_by_name(tmp_path: Path) -> None:
    def folders(*names: str) -> Any:
        root = tmp_path / "-".join(names)
        for name in names:
            (root / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(root / name / "a.png")
        return load_pictures(root)

    file = tmp_path / "classes.json"
    file.write_text(json.dumps({"classes": ["Polar bear", "ant"], "templates": ["a {}"]}))
    classes = load_classes(str(file))
    assert label_map(folders("ant", "polar_bear"), classes) == ([1, 0], "")
    places, note = label_map(folders("x", "y"), classes)
    assert (places, "in the order of their names" in note) == ([0, 1], True)
    with pytest.raises(InputError, match=r"1 of the 2 classes of .* are none of those named \(bee\)"):
        label_map(folders("ant", "bee"), classes)
    with pytest.raises(InputError, match="has 3 classes, none of which is among the 2"):
        label_map(folders("x", "y", "z"), classes)
    imagenet = load_classes("imagenet")
    some = folders("n01443537", "n02099601")  # not all thousand, and still the right ones
    assert [imagenet.names[place] for place in label_map(some, imagenet)[0]] == [
        "goldfish",
        "Golden Retriever",
    ]
    with pytest.raises(InputError, match="has WordNet ids for names; pass --classes imagenet"):
        classes_of(some)
    assert len(load_classes("imagenet", "simple").templates) == 7
    assert load_pictures(tmp_path / "ant-bee" / "ant").labels is None
    (tmp_path / "only").mkdir()
    (tmp_path / "ant-bee" / "ant").rename(tmp_path / "only" / "images")
    assert load_pictures(tmp_path / "only").labels is None  # one folder is no class


def in_folders(root: Path, *names: str) -> Path:
    """One picture in each of several class folders."""
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(root / name / "a.png")
    return root


def test_class_folders_that_are_numbers_are_class_indices(tmp_path: Path) -> None:
    file = tmp_path / "classes.json"
    file.write_text(json.dumps({"classes": [f"c{n}" for n in range(11)], "templates": ["a {}"]}))
    classes = load_classes(str(file))
    for name, folders in (("plain", ("2", "10", "0")), ("padded", ("02", "10", "00"))):
        made = load_pictures(in_folders(tmp_path / name, *folders))
        assert made.labels is not None
        places = label_map(made, classes)[0]
        named = {
            name: classes.names[places[label]] for name, label in zip(made.names, made.labels, strict=True)
        }
        assert named == {f"{folder}/a.png": f"c{int(folder)}" for folder in folders}
    dates = load_pictures(in_folders(tmp_path / "dates", "20260102", "20260103"))
    assert (dates.labels, dates.classes) == ((0, 1), ("20260102", "20260103"))
    with pytest.raises(InputError, match="Class folder 11 has no class: there are 11"):
        label_map(load_pictures(in_folders(tmp_path / "more", "0", "11")), classes)
    # Counted from one: as many as there are classes, or nobody knows.
    counted = [str(n) for n in range(1, 12)]
    places, note = label_map(load_pictures(in_folders(tmp_path / "one", *counted)), classes)
    assert (places, "in the order of their names" in note) == (list(range(11)), True)
    with pytest.raises(InputError, match="has 2 classes, none of which is among the 11"):
        label_map(load_pictures(in_folders(tmp_path / "some", "1", "2")), classes)
    assert classes_of(load_pictures(tmp_path / "plain")).names == ("0", "2", "10")


def test_classes_of_one_name_are_told_apart_by_their_place_alone(tmp_path: Path) -> None:
    names = ["crane", "red circle", "crane"]
    file = tmp_path / "classes.json"
    file.write_text(json.dumps({"classes": names, "templates": ["a {}"]}))
    folder = in_folders(tmp_path / "p", "x")
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"labels": {"x/a.png": 2}, "classes": ["Crane", "red_circle", "crane"]}))
    assert label_map(load_pictures(folder, labels), load_classes(str(file))) == ([0, 1, 2], "")
    named = load_pictures(in_folders(tmp_path / "q", "crane", "red circle"))
    with pytest.raises(InputError, match=r"Several classes have the same name \(crane\)"):
        label_map(named, load_classes(str(file)))


def test_accents_match_however_they_are_written(tmp_path: Path) -> None:
    names = ["naïve", "café crème", "dog"]
    file = tmp_path / "classes.json"
    file.write_text(json.dumps({"classes": names, "templates": ["a {}"]}))
    folders = [unicodedata.normalize("NFD", name) for name in names]  # as macOS writes them
    assert folders != names
    made = load_pictures(in_folders(tmp_path / "p", *folders))
    assert label_map(made, load_classes(str(file)))[0] == [1, 2, 0]


def test_hidden_files_and_folders_are_no_pictures(tmp_path: Path) -> None:
    root = in_folders(tmp_path / ".p", "ant", "bee", ".ipynb_checkpoints", "__MACOSX", "ant/.thumbs")
    (root / "ant" / "._a.png").write_bytes(b"of an archive")
    made = load_pictures(root)
    assert made.names == ("ant/a.png", "bee/a.png")
    assert made.classes == ("ant", "bee")


def test_labels_of_a_file_are_checked(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    file = tmp_path / "labels.json"
    for content, said in (
        ({"b.png": 1}, r"says nothing about 1 pictures .* \(a.png\)"),
        ({"a.png": "cat"}, "must be a class index, and is 'cat'"),
        ({"labels": {"a.png": 2}, "classes": ["x", "y"]}, "must be a class index below 2, and is 2"),
        ([1], "must be an object of file names"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(InputError, match=said):
            load_pictures(tmp_path, file)
    file.write_text(json.dumps({"labels": {"a.png": 1}, "classes": ["x", "y"]}))
    made = load_pictures(tmp_path, file)
    assert (made.labels, made.classes) == ((1,), ("x", "y"))


def test_labels_from_names_and_even_limits(tmp_path: Path) -> None:
    for name in ("0_a.png", "0_b.png", "0_c.png", "7_a.png", "7_b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    made = load_pictures(tmp_path)
    assert made.labels == (0, 0, 0, 7, 7)
    assert made.first(4).names == ("0_a.png", "0_b.png", "7_a.png", "7_b.png")
    assert made.first(2).labels == (0, 7)


def test_bad_pictures_are_skipped_named_and_limited(tmp_path: Path, student: Path) -> None:
    for n in range(4):
        Image.new("RGB", (8, 8), (n * 50, 0, 0)).save(tmp_path / f"{n}.png")
    (tmp_path / "1.png").write_bytes(b"broken")
    look = load_encoder_look(student)
    made = extract(look, load_pictures(tmp_path), batch=3)
    assert made.places == (0, 2, 3)
    assert made.bad[0].startswith("1.png: ")
    with pytest.raises(InputError, match=r"1 pictures of .* cannot be read"):
        extract(look, load_pictures(tmp_path), max_bad=0)
    kept = tmp_path / "kept"
    extract(look, load_pictures(tmp_path), cache=kept)
    with pytest.raises(InputError, match=r"1 pictures of .* cannot be read"):  # from the cache as well
        extract(look, load_pictures(tmp_path), cache=kept, max_bad=0)


def test_the_cache_knows_its_pictures_and_its_look(tmp_path: Path, student: Path) -> None:
    folder, kept = tmp_path / "p", tmp_path / "kept"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    look = load_encoder_look(student)
    first = extract(look, load_pictures(folder), cache=kept)
    assert torch.equal(extract(look, load_pictures(folder), cache=kept).values, first.values)
    Image.new("RGB", (9, 9), (255, 0, 0)).save(folder / "a.png")
    assert not torch.equal(extract(look, load_pictures(folder), cache=kept).values, first.values)
    extract(load_encoder_look(student, 4), load_pictures(folder), cache=kept)
    assert len(list(kept.iterdir())) == 3


def test_errors_are_one_sentence(scenes: Path, student: Path, tmp_path: Path, capsys: Any) -> None:
    images = str(scenes / "heldout" / "images")
    for words, said in (
        (["--teacher", str(tmp_path), "--pictures", images], "cannot be loaded"),
        (["--teacher", str(TEACHER), "--pictures", images], "Name the classes"),
        (["--teacher", str(TEACHER), "--pictures", str(tmp_path)], "holds no pictures"),
        (
            ["--teacher", str(TEACHER), "--pictures", images, "--classes", str(TEACHER / "zeroshot.json")],
            "Nothing says what the pictures",
        ),
    ):
        assert zeroshot(words) == 2
        error = capsys.readouterr().err
        assert said in error
        assert "Traceback" not in error


def test_the_cache_knows_the_architecture(tmp_path: Path, student: Path, scenes: Path) -> None:
    """Activation and heads are in no weight."""
    pictures = load_pictures(scenes / "heldout" / "images").at(range(3))
    kept = tmp_path / "kept"
    encoder, teacher = tmp_path / "encoder", tmp_path / "teacher"
    shutil.copytree(student, encoder)
    shutil.copytree(TEACHER, teacher)
    before = extract(load_encoder_look(encoder), pictures, cache=kept).values
    config = json.loads((encoder / "config.json").read_text())
    config["architecture"]["heads"] = 4
    (encoder / "config.json").write_text(json.dumps(config))
    other = load_encoder_look(encoder)
    assert not torch.equal(extract(other, pictures, cache=kept).values, before)
    assert load_encoder_look(student).stamp != other.stamp

    pytest.importorskip("open_clip")
    before = extract(load_teacher_look(str(teacher))[0], pictures, cache=kept).values
    assert torch.equal(extract(load_teacher_look(str(TEACHER))[0], pictures, cache=kept).values, before)
    file = teacher / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["quick_gelu"] = not config["model_cfg"].get("quick_gelu", False)
    file.write_text(json.dumps(config))
    look = load_teacher_look(str(teacher))[0]
    assert not torch.equal(extract(look, pictures, cache=kept).values, before)
    assert len(list(kept.iterdir())) == 4


def test_a_copy_of_a_picture_is_the_same_picture() -> None:
    generator = torch.Generator().manual_seed(0)
    some = F.normalize(torch.randn(6, 16, generator=generator), dim=-1)
    theirs = torch.cat([some, some * (1 + 1e-7)])
    assert find_own(theirs @ theirs.T) == [1] * 12
    ours = theirs.clone()
    ours[2] = some[3]
    assert find_own(ours @ theirs.T) == [int(row != 2) for row in range(12)]


@pytest.mark.parametrize("command", [zeroshot, knn, probe, retrieval, agreement])
def test_what_cannot_be_is_said_before_the_work(command: Any, tmp_path: Path, capsys: Any) -> None:
    words = ["--teacher", "nobody"]
    words += {
        zeroshot: ["--pictures", "p"], agreement: ["--pictures", "p"],
        retrieval: ["--annotations", "a", "--images", "p"],
    }.get(command, ["--train", "p", "--test", "q"])  # fmt: skip
    cases = [(["--json", str(tmp_path)], f"--json {tmp_path} is a folder; name a file.")]
    read = tmp_path / "classes.json"
    named = ["--weights", str(read), "--json", str(read)]
    cases += [(named, f"--json {read} is named for something else, too; name another file.")]
    cases += [(["--device", "gpu"], "--device gpu is no device; use --device cpu, cuda")]
    if not torch.cuda.is_available():
        cases += [(["--device", "cuda"], "--device cuda, but PyTorch sees no GPU here; use --device cpu")]
    for more, said in cases:
        assert command([*words, *more]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {said}")
        assert error.count("\n") == 1


def test_captions_that_are_one_a_picture_are_questions(tmp_path: Path) -> None:
    sheet = Sheet("protocol")
    hits = {look: {"text_to_image@1": [1, 1, 0]} for look in ("teacher", "encoder")}
    sheet.add(hits, {"text_to_image@1": [0, 1, 2]})
    assert sheet.figures["teacher"]["text_to_image@1"] == accuracy_figure([1, 1, 0], "protocol")
    assert sheet.differences["text_to_image@1"].p == 1.0


def test_imagenets_names_and_templates() -> None:
    pytest.importorskip("open_clip")
    classes = load_classes("imagenet")
    assert (len(classes.names), len(classes.templates), len(classes.folders)) == (1000, 80, 1000)
    assert (classes.names[207].lower(), classes.folders[207]) == ("golden retriever", "n02099601")
    assert "a photo of a {}." in classes.templates


@pytest.mark.real_data
def test_a_real_clip_space() -> None:
    """OpenAI's CLIP ViT-B/32 on 500 pictures of CIFAR-10, classified with stored text rows: 90 %."""
    default = ROOT / "../shared/data"
    file = Path(os.environ.get("SPARSE_VLM_REAL_DATA", default)) / "clip_b32_space" / "clip_b32.safetensors"
    if not file.is_file():
        pytest.skip("no real CLIP space: set SPARSE_VLM_REAL_DATA to the folder of real data")
    space = load_file(file)
    # Rows of CIFAR-10's classes among the 500 of OpenImages:
    # airplane, car, bird, cat, deer, dog, frog, horse, boat, truck.
    rows = space["oid_text_embeddings"][[314, 63, 229, 258, 405, 488, 277, 308, 155, 67]].float()
    classifier = build_classifier(
        [str(n) for n in range(10)], ["{}"], lambda texts: rows[[int(t) for t in texts]]
    )
    scores = rank_classes(space["image_embeddings"], classifier)
    hits = score_ranks(scores, space["labels"])
    assert (len(hits[1]), sum(hits[1]), sum(hits[5])) == (500, 452, 499)
    # Neighbours and probe on the same embeddings, halves against each other.
    train, test = space["image_embeddings"].float().split(250)
    labels, asked = space["labels"].split(250)
    assert sum(score_ranks(vote(train, labels, test), asked)[1]) / 250 > 0.8
    assert sum(score_ranks(fit_probe(train, labels, 10).scores(test), asked)[1]) / 250 > 0.8
