"""The comparison of towers: points differ in their tower only, a killed run goes on, faults are caught."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("open_clip")

from bootstrap.teacher import Teacher, load_teacher, spec_to_config
from eval import pareto
from eval.answers import InputError
from eval.baselines import comparison
from eval.baselines.combine import combine, name_figure, resample_pictures
from eval.baselines.common import load_start, take_turns
from eval.baselines.config import (
    LlamaSettings,
    ParetoSettings,
    SceneSettings,
    TrainSettings,
    load_settings,
)
from eval.baselines.data import (
    Quiz,
    all_texts,
    load_pixels,
    load_quiz,
    load_quizzes,
    plan_batches,
    without_pictures_of,
)
from eval.baselines.draw import draw_pareto, spread, style_methods
from eval.baselines.points import Looker, build_reader, check_alike, see_with
from eval.baselines.reader import collate, hash_weights
from eval.baselines.table import write_table
from eval.baselines.teach import answer_all, group_parameters, measure_answers, train
from eval.config import BenchmarkSettings
from eval.intervals import wilson_interval
from eval.tasks import load_task
from eval.towers import METHODS, OpenedVit, build_tower
from eval.towers.pooling import PoolingTower
from sparse_vlm import SparseFormer
from sparse_vlm.fingerprint import hash_tower
from sparse_vlm.transform import ImageTransform
from tests.eval.test_towers import clip_teacher

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ParetoSettings:
    teacher = clip_teacher()
    monkeypatch.setattr(comparison, "load_teacher", lambda name, weights: teacher)
    write_encoder(tmp_path / "encoder", teacher)
    return ParetoSettings(
        out=tmp_path / "run",
        teacher="tiny",
        encoder=tmp_path / "encoder",
        scenes=SceneSettings(train=6, test=3, size=32),
        methods=("vit", "pool", "resampler", "tome", "sparseformer"),
        tokens=(9, 100),
        language=LlamaSettings(width=16, depth=1, heads=2, mlp_width=16),
        training=TrainSettings(steps=3, batch=2, turns=2),
        limit=8,
        timing_rounds=2,
    )


def write_encoder(folder: Path, teacher: Teacher, tower_hash: str | None = None, seed: int = 0) -> None:
    torch.manual_seed(seed)
    config = spec_to_config(teacher.spec, focusing_width=32, num_points=4, mixing_points=4, num_latents=11)
    encoder = SparseFormer(config, teacher.spec.transform)
    made_from = {"tower_sha256": tower_hash or hash_tower(teacher.vision_state_dict())}
    encoder.save(folder, {"teacher": made_from})


def points(settings: ParetoSettings) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in (settings.out / "points").glob("*.json")}


def without_clock(made: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {k: v for k, v in point.items() if k != "cpu_seconds"} for name, point in made.items()}


def test_the_projector_and_what_a_tower_trains_may_learn_at_a_rate_of_their_own(
    settings: ParetoSettings,
) -> None:
    quiz, _ = load_quizzes(settings)
    vit = OpenedVit(clip_teacher())
    tower = build_tower("resampler", 9, vit)
    plan = plan_batches(quiz, 1, 2, 2, 0)

    def moved(training: TrainSettings) -> tuple[bool, bool, bool]:
        reader = build_reader(settings, all_texts(quiz), vit.spec.width, 0)
        parts = (reader.llm, torch.nn.ModuleList((reader.first, reader.second)), tower)
        before = [[p.detach().clone() for p in part.parameters()] for part in parts]
        look = Looker(load_pixels(quiz, ImageTransform(vit.spec.transform)))
        train(reader, tower, see_with(tower, look.see(tower)), plan, training)
        first, second, third = (
            any(not torch.equal(old, new) for old, new in zip(olds, part.parameters(), strict=True))
            for olds, part in zip(before, parts, strict=True)
        )
        return first, second, third

    still = replace(settings.training, warmup=1, weight_decay=0.0)
    assert moved(replace(still, lr=0.0, projector_lr=0.1)) == (False, True, True)
    assert moved(replace(still, lr=0.1, projector_lr=0.0)) == (True, False, False)
    reader = build_reader(settings, all_texts(quiz), vit.spec.width, 0)
    alike = group_parameters(reader, tower, replace(still, lr=0.1))
    assert {group["peak_lr"] for group in alike} == {0.1}
    assert sum(len(group["params"]) for group in alike) == sum(
        p.requires_grad for part in (reader, tower) for p in part.parameters()
    )
    reader.llm.requires_grad_(False)
    assert all(group["params"] for group in group_parameters(reader, tower, still))


def test_a_run_and_what_is_equal_in_it(settings: ParetoSettings) -> None:
    assert pareto.run(settings)
    made = {name.removesuffix("-seed0"): point for name, point in points(settings).items()}
    assert set(made) == {
        "vit-64",
        "pool-9",
        "resampler-9",
        "tome-9",
        "sparseformer-9",
        "sparseformer-100",
        "no-image",
    }
    for key in ("plan_sha256", "start_sha256", "training", "test_questions"):
        assert len({json.dumps(point[key]) for point in made.values()}) == 1, key
    assert {point["trained"] for name, point in made.items() if name != "resampler-9"} == {
        "projector, language model"
    }
    assert made["resampler-9"]["trained"] == "projector, language model, queries and cross-attention"
    assert "random-picture" in made["vit-64"]
    content = json.loads((settings.out / "pareto.json").read_text())
    assert [point["tokens"] for point in content["points"]] == [64, 9, 9, 9, 9, 100, 0]
    assert len(content["skipped"]) == 3
    assert all("of 64" in reason or "from 64" in reason for reason in content["skipped"])
    for point in content["points"]:
        for figure in (point["figures"]["accuracy"], point["nats"]):
            assert figure["n"] == 8
            assert figure["low"] <= figure["value"] <= figure["high"]
            assert figure["by_seed"] == pytest.approx([figure["value"]])
        assert ("ours_minus" in point) == (point["method"] in ("pool", "resampler", "tome"))
        parts = point["gmacs"]
        assert parts["total"] == pytest.approx(parts["tower"] + parts["projector"] + parts["prefill"])
        assert (parts["tower"] == 0) == (point["method"] == "no-image")
    by_name = {f"{point['method']}-{point['tokens']}": point for point in content["points"]}
    assert by_name["pool-9"]["gmacs"]["prefill"] == by_name["tome-9"]["gmacs"]["prefill"]
    assert by_name["pool-9"]["gmacs"]["prefill"] < by_name["vit-64"]["gmacs"]["prefill"]
    assert by_name["tome-9"]["gmacs"]["tower"] < by_name["pool-9"]["gmacs"]["tower"]
    table = (settings.out / "pareto.md").read_text()
    assert "**SparseFormer (ours)** | 100 |" in table
    assert "wrong picture" in table
    assert (settings.out / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_run_goes_on_and_ends_alike(
    settings: ParetoSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(settings, methods=("pool", "random"), tokens=(9, 16), encoder=None, floors=False)
    assert pareto.run(small)
    whole = points(small)
    (small.out / "points" / "random-9-seed0.json").unlink()
    asked = []
    original = pareto.run_point
    monkeypatch.setattr(
        pareto, "run_point", lambda point, *rest: asked.append(point.name) or original(point, *rest)
    )
    assert pareto.run(small)
    assert asked == ["random-9-seed0"]
    assert without_clock(points(small)) == without_clock(whole)
    with pytest.raises(InputError, match="limit: 8 there, 5 here"):
        pareto.run(replace(small, limit=5))
    with pytest.raises(InputError, match=r"training\.lr: 0\.002 there"):
        pareto.run(replace(small, training=replace(small.training, lr=0.1)))


def test_a_run_gets_further_points(settings: ParetoSettings) -> None:
    small = replace(settings, methods=("pool",), tokens=(9,), encoder=None, floors=False)
    assert pareto.run(small)
    before = points(small)
    more = replace(small, methods=("pool", "sparseformer"), encoder=settings.encoder)
    assert pareto.run(more)
    assert set(points(more)) == {"pool-9-seed0", "sparseformer-9-seed0"}
    assert points(more)["pool-9-seed0"] == before["pool-9-seed0"]
    assert settings.encoder is not None
    write_encoder(settings.encoder, clip_teacher(), seed=1)
    with pytest.raises(InputError, match=r"sparseformer-9-seed0.json is of another encoder"):
        pareto.run(more)


def test_processes_share_the_points(settings: ParetoSettings) -> None:
    small = replace(settings, methods=("pool",), tokens=(9, 16), encoder=None, floors=False)
    assert not pareto.run(small, share=(0, 2))
    assert set(points(small)) == {"pool-9-seed0"}
    assert pareto.run(small, share=(1, 2))
    assert set(points(small)) == {"pool-9-seed0", "pool-16-seed0"}


def test_a_planted_difference_is_caught(settings: ParetoSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(settings, methods=("pool",), tokens=(9, 16), encoder=None, floors=False)
    original = pareto.build_reader
    seeds = iter((0, 1))

    def unfair(settings: ParetoSettings, texts: Any, width: int, seed: int) -> Any:
        return original(settings, texts, width, next(seeds))

    monkeypatch.setattr(pareto, "build_reader", unfair)
    with pytest.raises(InputError, match="pool-9 and pool-16 differ in start_sha256"):
        pareto.run(small)
    ours = {"plan_sha256": 1, "start_sha256": 2, "training": {"lr": 1}, "test_questions": 8}
    named = {"method": "pool", "tokens": 9, "seed": 0, **ours}
    check_alike([named, dict(named), {**named, "plan_sha256": 0, "seed": 1}])
    for key in ours:
        with pytest.raises(InputError, match=key):
            check_alike([named, {**named, key: 0}])


def test_an_encoder_of_another_teacher_is_refused(settings: ParetoSettings) -> None:
    assert settings.encoder is not None
    write_encoder(settings.encoder, clip_teacher(), "0" * 64)
    with pytest.raises(InputError, match="bootstrapped from another teacher"):
        pareto.run(settings)


def test_a_tower_that_makes_too_many_tokens_is_caught(
    settings: ParetoSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PoolingTower, "reduce", lambda self, seen: seen.tokens[:, :10])
    small = replace(settings, methods=("pool",), tokens=(9,), encoder=None, floors=False)
    with pytest.raises(InputError, match="pool-9 made 10 tokens a picture, not 9"):
        pareto.run(small)


def test_no_picture_of_the_test_is_trained_on(settings: ParetoSettings) -> None:
    train, _ = load_quizzes(settings)
    some = replace(train, examples=train.examples[:3])
    left = without_pictures_of(train, some)
    assert left.examples
    assert not set(left.pictures) & set(some.pictures)
    assert without_pictures_of(train, replace(some, folder=train.folder / "other")) == train
    with pytest.raises(InputError, match="Every training picture"):
        without_pictures_of(train, train)


def test_damaged_settings_of_a_run_are_named(settings: ParetoSettings) -> None:
    settings.out.mkdir(exist_ok=True)
    (settings.out / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not JSON"):
        pareto.claim(settings, "0" * 64)


def test_questions_without_answers_are_none_to_compare_with(settings: ParetoSettings, tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"questions": [{"question_id": 1, "image_id": 2, "question": "What?"}]}))
    (tmp_path / "000000000002.jpg").touch()
    with pytest.raises(InputError, match="vqav2: none of 1 questions has both a picture and a gold answer"):
        load_quiz(BenchmarkSettings("vqav2", path, None, tmp_path))


def test_the_plan_shows_every_picture_before_any_comes_again(settings: ParetoSettings) -> None:
    train, _ = load_quizzes(settings)
    plan = plan_batches(train, steps=3, batch=4, turns=2, seed=0)
    assert sorted(plan.rows.flatten()[:6].tolist()) == list(range(6))
    assert plan.sha256 == plan_batches(train, 3, 4, 2, 0).sha256
    assert plan.sha256 != plan_batches(train, 3, 4, 2, 1).sha256
    names = train.pictures
    asked = {(e.image, e.question) for e in train.examples}
    firsts = []
    for rows, turns in zip(plan.rows.tolist(), plan.turns, strict=True):
        for row, conversation in zip(rows, turns, strict=True):
            assert len(conversation) == 3
            described = [turn == train.descriptions[names[row]] for turn in conversation]
            assert sum(described) == 1
            firsts.append(described[0])
            for (question, _), is_description in zip(conversation, described, strict=True):
                assert is_description or (names[row], question) in asked
    assert not all(firsts)
    assert any(firsts)
    bare = replace(settings, scenes=replace(settings.scenes, descriptions=False), out=settings.out / "bare")
    assert len(plan_batches(load_quizzes(bare)[0], 1, 1, 2, 0).turns[0][0]) == 2


def test_the_picture_stands_before_the_first_question_and_answers_alone_are_taught(
    settings: ParetoSettings,
) -> None:
    reader = build_reader(settings, ["red", "What color?"], 32, 0)
    ids, labels = reader.encode([("What color?", "red"), ("What color?", "red")])
    told = [label for label in labels if label != -100]
    red = reader.tokenizer("red")["input_ids"]
    assert told == [*red, reader.tokenizer.eos_token_id] * 2
    words = "USER : What color ? ASSISTANT :"
    assert reader.tokenizer.decode(ids[: labels.index(red[0])]) == words
    assert reader.encode_question("What color?") == ids[: labels.index(red[0])]
    assert reader.tokenizer.decode(ids).count("USER :") == 2
    visual = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    read = reader.embed(visual, torch.tensor([ids]))
    assert torch.equal(read[:, 2:11], reader.project(visual))
    assert torch.equal(read[:, :2], reader.embed(None, torch.tensor([ids]))[:, :2])
    # The loss is that of the language model itself with labels on the answers.
    where = torch.tensor([[-100] * 2 + [-100] * 9 + labels[2:]])
    losses, rows = reader.measure_tokens(visual, torch.tensor([ids]), torch.tensor([labels]))
    expected = reader.llm(inputs_embeds=read, labels=where).loss
    torch.testing.assert_close(losses.mean(), expected)
    assert rows.tolist() == [0] * 4


def test_padding_changes_no_loss(settings: ParetoSettings) -> None:
    reader = build_reader(settings, ["red", "What color is the big one?"], 32, 0).eval()
    long, short = reader.encode([("What color is the big one?", "red")]), reader.encode([("What?", "red")])
    visual = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    losses, rows = reader.measure_tokens(visual, *collate([long, short], reader.pad))
    alone, _ = reader.measure_tokens(visual[1:], *collate([short], reader.pad))
    torch.testing.assert_close(losses[rows == 1], alone)


def test_one_look_serves_all_towers_of_the_vit() -> None:
    vit = OpenedVit(clip_teacher())
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    looker = Looker(images)
    for method in METHODS[:-1]:
        tower = build_tower(method, 64 if method == "vit" else 16, vit)
        torch.testing.assert_close(tower.reduce(looker.see(tower)), tower(images), rtol=1e-4, atol=1e-5)


def test_answers_and_losses_do_not_depend_on_the_batch(settings: ParetoSettings) -> None:
    train, _ = load_quizzes(settings)
    reader = build_reader(settings, [e.question for e in train.examples], 32, 0)
    visual = torch.randn(6, 9, 32, generator=torch.Generator().manual_seed(0))
    numbers = {name: number for number, name in enumerate(train.pictures)}
    questions = [(e.question, numbers[str(e.image)]) for e in train.examples]
    answers = [e.answers[0] for e in train.examples]
    together = answer_all(reader, questions, visual.__getitem__, 4)
    assert together == answer_all(reader, questions, visual.__getitem__, 4, batch=1)
    nats = measure_answers(reader, questions, answers, visual.__getitem__)
    alone = measure_answers(reader, questions, answers, visual.__getitem__, batch=1)
    assert nats == pytest.approx(alone, rel=1e-4)
    blind = measure_answers(reader, questions, answers, lambda rows: None)
    assert blind != pytest.approx(nats, rel=1e-3)


def test_settings_refuse(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("out: o\nteacher: t\nscenes: {}\nmethods: [pool]\n")
    assert load_settings(file, ["tokens=[7]"]).tokens == (7,)
    for override, words in (
        ("methods=[pooling]", "unknown: pooling"),
        ("methods=[sparseformer]", "needs an encoder directory"),
        ("scenes=null", "either scenes, or both"),
        ("training.stepps=3", "training.steps"),
        ("tokens=[0]", "at least 1"),
        ("training.seeds=[1, 1]", "different"),
        ("tokens=[16, 9, 16]", "tokens must be different ones, and 16 comes more than once"),
        ("methods=[pool, pool]", "methods must be different ones, and pool comes more than once"),
        ("limit=0", "limit must be at least 1, and is 0"),
        ("limit=-5", "limit must be at least 1, and is -5"),
        ("scenes.test=0", "train and test must be at least 1"),
        ("scenes.size=31", "size at least 32"),
        ("language.heads=3", "heads must divide width, and 3 does not divide 128"),
        ("language.depth=0", "depth, heads, mlp_width and vocabulary must be at least 1"),
        ("training.lr=.nan", "lr must be a number of 0 or more, and is nan"),
        ("training.projector_lr=-1e-3", "projector_lr must be a number of 0 or more, and is -0.001"),
        ("training.warmup=-1", "warmup must be a number of 0 or more, and is -1"),
    ):
        with pytest.raises(InputError, match=words):
            load_settings(file, [override])


def test_the_shipped_settings_are_whole(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "configs" / "eval"
    for name in ("pareto_scenes.yaml", "pareto_daquar.yaml"):
        assert load_settings(folder / name).tokens
    teacher = load_teacher(str(folder.parents[1] / "assets" / "scenes_clip"))
    assert teacher.spec.grid == (12, 12)


def test_trainings_are_put_together(settings: ParetoSettings) -> None:
    many = replace(
        settings,
        methods=("pool", "sparseformer"),
        tokens=(9,),
        training=replace(settings.training, seeds=(0, 3)),
    )
    assert pareto.run(many)
    made = points(many)
    assert set(made) == {
        f"{name}-seed{seed}" for name in ("pool-9", "sparseformer-9", "no-image") for seed in (0, 3)
    }
    assert made["pool-9-seed0"]["start_sha256"] != made["pool-9-seed3"]["start_sha256"]
    content = json.loads((many.out / "pareto.json").read_text())
    for point in content["points"]:
        assert point["seeds"] == [0, 3]
        figure = point["figures"][content["primary"]]
        assert figure["value"] == pytest.approx(sum(figure["by_seed"]) / 2)


def test_all_points_begin_from_what_all_towers_trained(settings: ParetoSettings) -> None:
    training = replace(settings.training, common_steps=8)
    small = replace(settings, methods=("pool", "resampler"), tokens=(9,), encoder=None, training=training)
    with pytest.raises(InputError, match=r"seed0\.safetensors is not there yet; .* 0/N makes it"):
        pareto.run(small, share=(1, 2))
    assert pareto.run(small)
    made = points(small)
    starts = {point["start_sha256"] for point in made.values()}
    fresh = build_reader(small, all_texts(load_quizzes(small)[0]), 32, 0)
    assert len(starts) == 1
    assert starts != {hash_weights(fresh)}
    vit = OpenedVit(clip_teacher())
    tower = build_tower("resampler", 9, vit)
    untrained = tower.queries.detach().clone()
    path = small.out / "common" / "seed0.safetensors"
    start = load_start(path, ["pool-9", "resampler-9"], {"encoder": None})
    start.fill(fresh, tower, "resampler-9")
    assert not torch.equal(tower.queries, untrained)
    assert starts == {hash_weights(fresh)}
    (small.out / "points" / "no-image-seed0.json").unlink()
    with pytest.raises(InputError, match=r"holds a run with other settings or weights \(tokens: \[9\] there"):
        pareto.run(replace(small, tokens=(9, 16)))
    with pytest.raises(InputError, match="was trained with other towers than are compared now"):
        load_start(path, ["pool-9", "resampler-16"], {"encoder": None})
    path.write_bytes(b"half")
    with pytest.raises(InputError, match="cannot be read"):
        pareto.run(small)


def test_towers_take_turns_in_the_common_start() -> None:
    order = take_turns(["a", "b", "c"], 8, seed=0)
    assert len(order) == 8
    assert sorted(order[:3]) == sorted(order[3:6]) == ["a", "b", "c"]
    assert take_turns(["a", "b", "c"], 8, seed=0) == order


def test_intervals_draw_whole_pictures() -> None:
    values = {f"{picture}{question}": float(picture == "a") for picture in "abcd" for question in range(25)}
    alike = resample_pictures(values, {key: key[0] for key in values})
    apart = resample_pictures(values, {})
    assert alike["value"] == apart["value"] == 0.25
    assert (alike["n"], alike["pictures"], apart["pictures"]) == (100, 4, 100)
    assert alike["high"] - alike["low"] > 2 * (apart["high"] - apart["low"])


@pytest.mark.parametrize("right", [0.0, 100.0, 50.0])
def test_towers_that_are_all_right_or_all_wrong_are_no_certainty(right: float) -> None:
    """Half: each picture has one of its two questions right."""
    pair = {0.0: (0.0, 0.0), 100.0: (100.0, 100.0), 50.0: (0.0, 100.0)}[right]
    values = {f"{picture}{place}": pair[place] for picture in range(40) for place in (0, 1)}
    made = resample_pictures(values, {key: key[:-1] for key in values}, (0.0, 100.0))
    share = wilson_interval(0, 40)[1]
    assert (made["value"], made["method"], made["pictures"]) == (right, "wilson over pictures", 40)
    assert made["low"] == pytest.approx(right - share * right)
    assert made["high"] == pytest.approx(right + share * (100 - right))
    # Bits have no most.
    free = resample_pictures(values, {key: key[:-1] for key in values})
    assert (free["low"], free["high"], free["method"]) == (right, right, "bootstrap over pictures")


def test_a_point_that_is_always_right_has_a_width_and_so_has_what_it_gains(
    settings: ParetoSettings,
) -> None:
    _, test = load_quizzes(settings)
    keys = [example.key for example in test.examples]
    pictures = len({example.image for example in test.examples})
    common = {"seed": 0, "trained": "", "training": {}, "loss": {"last": 0.0}, "figures": {}}
    points = [
        {"method": method, "tokens": 9, "units": dict.fromkeys(keys, 1.0), "nats": dict.fromkeys(keys, 0.1)}
        for method in ("pool", "sparseformer")
    ]
    pool, ours = combine([{**point, **common} for point in points], test)
    low, _ = wilson_interval(pictures, pictures)
    for made in (pool, ours):
        (figure,) = made["figures"].values()
        assert (figure["low"], figure["high"]) == (pytest.approx(100 * low), 100.0)
    gap = pool["ours_minus"]
    assert (gap["value"], gap["method"]) == (0.0, "wilson over pictures")
    assert (gap["low"], gap["high"]) == pytest.approx((100 * low - 100, 100 - 100 * low))


def test_ours_is_compared_on_the_same_questions(settings: ParetoSettings) -> None:
    _, test = load_quizzes(settings)
    keys = [example.key for example in test.examples]

    def result(method: str, tokens: int, right: int) -> dict[str, Any]:
        units = {key: float(place < right) for place, key in enumerate(keys)}
        fields = {
            "seed": 0,
            "trained": "",
            "training": {},
            "loss": {"last": 0.0},
            "figures": {"accuracy": 0.0},
            "nats": units,
        }
        return {"method": method, "tokens": tokens, "units": units, **fields}

    results = [result("vit", 64, 6), result("pool", 9, 2), result("sparseformer", 9, 4)]
    vit, pool, ours = combine(results, test, own_tokens=9)
    assert pool["ours_minus"]["value"] == pytest.approx(100 * 2 / len(keys))
    assert vit["ours_minus"]["value"] == pytest.approx(-100 * 2 / len(keys))
    assert "ours_minus" not in ours
    assert "ours_minus" not in combine(results, test)[0]


def test_seeing_is_measured_against_not_seeing(settings: ParetoSettings) -> None:
    _, test = load_quizzes(settings)
    keys = [example.key for example in test.examples]

    def result(method: str, tokens: int, nats: list[float]) -> dict[str, Any]:
        fields = {"seed": 0, "trained": "", "training": {}, "loss": {"last": 0.0}, "figures": {}}
        units = dict.fromkeys(keys, 0.0)
        named = dict(zip(keys, nats, strict=True))
        return {"method": method, "tokens": tokens, "units": units, "nats": named, **fields}

    blind = [float(place) for place in range(len(keys))]
    seeing = [nats - math.log(2) for nats in blind]
    pool, none = combine([result("pool", 9, seeing), result("no-image", 0, blind)], test)
    # One bit for every question, whatever the question costs: pairing leaves no width.
    assert [pool["gain"][key] for key in ("value", "low", "high")] == pytest.approx([1, 1, 1])
    assert none["gain"]["value"] == 0
    assert "gain" not in combine([result("pool", 9, seeing)], test)[0]


def test_a_mean_of_scores_is_called_by_its_name(tmp_path: Path) -> None:
    """POPE's primary figure is an F1: of a model that always says no it is 0, whatever share is right."""
    gold = tmp_path / "coco_pope_random.json"
    rows = [
        {"question_id": n, "image": f"{n}.jpg", "text": f"Is there a cat {n}?", "label": label}
        for n, label in enumerate(("yes", "no", "no"))
    ]
    gold.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    task = load_task("pope")
    examples = task.load_examples(None, tmp_path)
    judged = [task.judge(example, "no") for example in examples]
    result = {
        "method": "pool", "tokens": 9, "seed": 0, "trained": "", "training": {}, "loss": {"last": 0.0},
        "figures": {name: figure.value for name, figure in task.aggregate(judged).items()},
        "units": task.units(judged), "nats": dict.fromkeys(task.units(judged), 0.0),
    }  # fmt: skip
    (made,) = combine([result], Quiz(task, tuple(examples), tmp_path))
    assert list(made["figures"]) == ["accuracy"]
    assert made["figures"]["accuracy"]["value"] == pytest.approx(200 / 3)
    assert made["details"][task.primary] == 0.0
    assert (
        name_figure([{"units": {"a": 0.3, "b": 1.0}, "figures": {"accuracy": 65.0}}], "accuracy")
        == "accuracy"
    )
    assert name_figure([{"units": {"a": 1.0}, "figures": {"img": 100.0}}], "img") == "img"


def test_benchmarks_whose_answers_are_letters_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.jpg")
    row = {"question_id": 0, "question": "q?", "answer": "B", "data_type": "image", "data_id": "0.jpg"}
    file = tmp_path / "SEED.json"
    file.write_text(json.dumps({"questions": [row | {f"choice_{letter}": letter for letter in "abcd"}]}))
    with pytest.raises(InputError, match="seedbench: its answers are letters of options"):
        load_quiz(BenchmarkSettings("seedbench", annotations=file, images=tmp_path))


def test_textvqa_without_its_reference_tokens_is_a_quiz(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.jpg")
    row = {"question_id": 0, "image_id": "0", "question": "q?", "answers": ["red"] * 10}
    file = tmp_path / "val.json"
    file.write_text(json.dumps({"data": [row]}))
    assert len(load_quiz(BenchmarkSettings("textvqa", annotations=file, images=tmp_path)).examples) == 1


def test_a_broken_picture_is_named(settings: ParetoSettings) -> None:
    train, _ = load_quizzes(settings)
    path = train.folder / train.pictures[1]
    transform = ImageTransform(clip_teacher().spec.transform)
    whole = load_pixels(train, transform)
    with Image.open(path) as picture:
        assert torch.equal(whole[1], transform(picture))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(
        InputError, match=f"A picture of scenes cannot be used: {path} is no picture that can"
    ):
        load_pixels(train, transform)


def test_picture_and_table_show_every_point() -> None:
    figure = {"value": 50.0, "low": 40.0, "high": 60.0, "n": 9, "pictures": 3, "by_seed": [50.0]}
    cost = {"gmacs": {"tower": 1.0, "projector": 0.1, "prefill": 0.2, "total": 1.3}}
    clock = {"ms": {"tower": 3.0, "total": 4.0, "quartiles": [3.9, 4.2], "rounds": 3}}
    bits = {**figure, "value": 0.5, "low": 0.25, "high": 1.0}
    both = {"figures": {"accuracy": figure}, "gain": bits, **cost, **clock}
    gain = {"ours_minus": {"value": 1.0, "low": -2.0, "high": 3.0}}
    methods = ("vit", "pool", "sparseformer", "no-image")
    results = [{"method": method, "tokens": 9, **both} for method in methods]
    results[1] |= gain
    table = write_table(results, "accuracy", ["tome at 3 (too few)"])
    assert table.count("| 50.0 | 40.0 to 60.0 | one |") == 4
    assert table.count("| +1.0 (-2.0 to +3.0) | +0.500 (+0.250 to +1.000) | 1.000 | 0.300 | 1.300 |") == 1
    assert "9 questions about 3 pictures." in table
    assert "Not applicable: tome at 3 (too few)." in table
    drawn = [draw_pareto(results, "accuracy", "title", "note") for _ in range(2)]
    assert drawn[0] == drawn[1]


def test_a_tower_of_ones_own_is_shown_by_its_name() -> None:
    figure = {"value": 50.0, "low": 40.0, "high": 60.0, "n": 9, "pictures": 3, "by_seed": [50.0]}
    cost = {"tower": 1.0, "projector": 0.1, "prefill": 0.2, "total": 1.3, "quartiles": [1.2, 1.4]}
    methods = ("no-image", "vit", "mine", "other")
    results = [
        {"method": m, "tokens": 9, "figures": {"accuracy": figure}, "gmacs": cost, "ms": cost}
        for m in methods
    ]
    assert "| mine | 9 | 50.0 |" in write_table(results, "accuracy", [])
    with_mine, without = (draw_pareto(results[:end], "accuracy", "title", "note") for end in (3, 2))
    assert with_mine != without
    styles = style_methods(methods)
    assert styles.keys() - style_methods([]).keys() == {"mine", "other"}
    assert len(set(styles.values())) == len(styles)
    assert list(styles)[-1] == "sparseformer"


def test_labels_are_moved_apart() -> None:
    assert spread([1.0, 5.0], 1.0, 0.0, 10.0) == [1.0, 5.0]
    assert spread([1.0, 1.0, 1.0], 1.0, 0.0, 10.0) == [1.0, 2.0, 3.0]
    assert spread([9.9, 9.9], 1.0, 0.0, 10.0) == [9.0, 10.0]


def test_the_command_trains_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(
        f"out: {tmp_path / 'run'}\nteacher: {ROOT / 'assets' / 'scenes_clip'}\nmethods: [pool]\ntokens: [9]\n"
        "scenes: {train: 3, test: 2}\nlanguage: {width: 16, depth: 1, heads: 2, mlp_width: 16}\n"
        "training: {steps: 1, batch: 2, turns: 1}\nfloors: false\nlimit: 3\ntiming_rounds: 1\n"
    )
    assert pareto.main([str(file), "--share", "2/2"]) == 2
    assert "--share 2/2: expected I/N" in capsys.readouterr().err
    assert pareto.main([str(file), "--share", "0/1"]) == 0
    assert "average pooling" in capsys.readouterr().out
