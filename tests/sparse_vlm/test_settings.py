"""Settings: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from sparse_vlm.settings import (
    SettingsError,
    build_settings,
    parse_override_value,
    refuse_twice,
    settings_to_dict,
)


@dataclass(frozen=True)
class Optim:
    learning_rate: float = 1e-3
    kind: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.kind == "sgd" and self.clip is not None:
            raise ValueError("clip has no meaning with kind 'sgd'; leave one of them out")


@dataclass(frozen=True)
class Run:
    folder: Path
    steps: int = 10
    resume: bool = False
    name: str | None = None
    sizes: tuple[int, ...] = (1, 2)
    tags: list[str] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    extra: Any = None
    optim: Optim = field(default_factory=lambda: Optim(learning_rate=5.0))
    warmup: Optim | None = None
    tune: Literal["all", "none"] | int = "all"


def refuse(mapping: Any, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        build_settings(Run, mapping, overrides, source="run.yaml")
    return caught.value.problems


def test_every_kind_of_field_is_read() -> None:
    run = build_settings(
        Run,
        {
            "folder": "pictures",
            "steps": 3,
            "resume": True,
            "name": "first",
            "sizes": [4, 5, 6],
            "tags": ["a"],
            "weights": {"cosine": 1, "tokens": 0.5},
            "extra": {"free": [1]},
            "optim": {"kind": "sgd", "betas": [0, 1]},
            "warmup": {"clip": 1},
            "tune": 4,
        },
    )
    assert run == Run(
        folder=Path("pictures"),
        steps=3,
        resume=True,
        name="first",
        sizes=(4, 5, 6),
        tags=["a"],
        weights={"cosine": 1.0, "tokens": 0.5},
        extra={"free": [1]},
        optim=Optim(learning_rate=5.0, kind="sgd", betas=(0.0, 1.0)),
        warmup=Optim(clip=1.0),
        tune=4,
    )
    assert type(run.weights["cosine"]) is float
    assert type(run.optim.betas[0]) is float


def test_keys_left_out_keep_the_default_instance_not_the_class_default() -> None:
    assert build_settings(Run, {"folder": "x", "optim": {"kind": "sgd"}}).optim.learning_rate == 5.0
    assert build_settings(Run, {"folder": "x"}, ["optim.kind=sgd"]).optim.learning_rate == 5.0
    assert build_settings(Run, {"folder": "x"}, ["warmup.kind=sgd"]).warmup == Optim(kind="sgd")


def test_settings_survive_the_way_through_json() -> None:
    run = build_settings(Run, {"folder": "a/b", "warmup": {"clip": 2.5}, "weights": {"a": 1}})
    assert build_settings(Run, json.loads(json.dumps(settings_to_dict(run)))) == run


@pytest.mark.parametrize(("text", "number"), [("1e-3", 1e-3), ("2E5", 2e5), (".5", 0.5), ("-3", -3.0)])
def test_numbers_that_yaml_reads_as_text_are_numbers(text: str, number: float) -> None:
    assert build_settings(Optim, {"learning_rate": text}).learning_rate == number
    assert build_settings(Optim, {"clip": text}).clip == number


def test_yaml_is_read_as_it_comes() -> None:
    yaml = pytest.importorskip("yaml")
    text = "folder: x\noptim:\n  learning_rate: 1e-4\n  clip: null\nsizes: [7]\n"
    run = build_settings(Run, yaml.safe_load(text), ["optim.learning_rate=3e-4"], parse_value=yaml.safe_load)
    assert (run.optim.learning_rate, run.optim.clip, run.sizes) == (3e-4, None, (7,))
    assert build_settings(Optim, yaml.safe_load("# nothing but a comment\n")) == Optim()


@pytest.mark.parametrize(
    ("mapping", "sentence"),
    [
        ({"step": 3}, "unknown key 'step'; did you mean 'steps'?"),
        ({"optim": {"be-tas": 3}}, "unknown key 'optim.be-tas'; did you mean 'optim.betas'?"),
        ({"betas": [0, 1]}, "unknown key 'betas'; did you mean 'optim.betas'?"),
        ({"optim": {"zzz": 1}}, "unknown key 'optim.zzz'; valid here: learning_rate, kind, betas, clip"),
        ({True: 1}, "key 'True' is True (boolean), not text; YAML needs quotes around it"),
        ({"steps": True}, "'steps' must be an integer, got True (boolean)"),
        ({"steps": 3.0}, "'steps' must be an integer, got 3.0 (number)"),
        ({"steps": "3"}, "'steps' must be an integer, got '3' (text)"),
        ({"steps": None}, "'steps' must be an integer, got null"),
        ({"resume": 1}, "'resume' must be true or false, got 1 (integer)"),
        ({"name": 49}, "'name' must be text or null, got 49 (integer)"),
        ({"folder": 3}, "'folder' must be a path, got 3 (integer)"),
        ({"tags": "a"}, "'tags' must be a list, got 'a' (text)"),
        ({"sizes": [1, "b"]}, "'sizes[1]' must be an integer, got 'b' (text)"),
        ({"weights": {"a": "b"}}, "'weights.a' must be a number, got 'b' (text)"),
        ({"weights": [1]}, "'weights' must be a mapping, got [1] (list)"),
        ({"weights": [1] * 9999}, f"'weights' must be a mapping, got {str([1] * 9999)[:200]}... (list)"),
        ({"optim": {"learning_rate": True}}, "'optim.learning_rate' must be a number, got True (boolean)"),
        ({"optim": {"learning_rate": "fast"}}, "'optim.learning_rate' must be a number, got 'fast' (text)"),
        ({"optim": {"betas": [1]}}, "'optim.betas' must be a list of 2 values, got 1: [1]"),
        (
            {"optim": {"kind": "adam"}},
            "'optim.kind' must be one of 'adamw', 'sgd', got 'adam' (text); did you mean 'adamw'?",
        ),
        (
            {"optim": 3},
            "'optim' must be a mapping with the keys learning_rate, kind, betas, clip, got 3 (integer)",
        ),
        ({"warmup": {"clip": "x"}}, "'warmup.clip' must be a number or null, got 'x' (text)"),
        ({"tune": True}, "'tune' must be one of 'all', 'none' or an integer, got True (boolean)"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(mapping: dict[Any, Any], sentence: str) -> None:
    assert refuse({"folder": "x", **mapping}) == (f"run.yaml: {sentence}",)


def test_a_missing_key_is_named_with_what_it_expects() -> None:
    assert refuse({}) == ("run.yaml: missing required key 'folder' (a path)",)
    assert refuse(None) == ("run.yaml: missing required key 'folder' (a path)",)


def test_all_problems_are_reported_at_once() -> None:
    problems = refuse({"steps": True, "optim": {"lr": 1, "kind": "x"}}, "sizes=[a]")
    assert len(problems) == 5
    assert all(problem.startswith(("run.yaml: ", "override 'sizes=[a]': ")) for problem in problems)


def test_the_whole_file_must_be_a_mapping() -> None:
    assert "expected a mapping" in refuse(["folder"])[0]


def test_contradictions_name_the_file_the_section_and_the_override() -> None:
    said = "optim: clip has no meaning with kind 'sgd'; leave one of them out"
    assert refuse({"folder": "x", "optim": {"kind": "sgd", "clip": 1}}) == (f"run.yaml: {said}",)
    both = refuse({"folder": "x", "optim": {"kind": "sgd"}}, "steps=3", "optim.clip=1")
    assert both == (f"run.yaml (with 'optim.clip=1'): {said}",)


def test_overrides_win_over_the_file_and_later_ones_over_earlier_ones() -> None:
    run = build_settings(
        Run,
        {"folder": "x", "steps": 1, "optim": {"kind": "sgd"}},
        ["steps=2", "steps=3", "optim.learning_rate=1e-2", "weights.cosine=2", "sizes=[8, 9]", "resume=True"],
    )
    assert (run.steps, run.optim, run.weights, run.sizes, run.resume) == (
        3,
        Optim(learning_rate=0.01, kind="sgd"),
        {"cosine": 2.0},
        (8, 9),
        True,
    )
    assert (
        build_settings(Run, {"folder": "x"}, ['optim={"kind": "sgd"}', "optim.clip=null"]).optim.kind == "sgd"
    )


def test_an_override_does_not_write_into_the_mapping_it_was_given() -> None:
    mapping = {"folder": "x", "optim": {"clip": 1.0}}
    build_settings(Run, mapping, ["optim.clip=2"])
    assert mapping == {"folder": "x", "optim": {"clip": 1.0}}


@pytest.mark.parametrize("raw", ["2024", "1.5"])
def test_a_folder_may_be_named_by_a_number(raw: str) -> None:
    assert build_settings(Run, {}, [f"folder={raw}"]).folder == Path(raw)
    with pytest.raises(SettingsError, match="'folder' must be a path, got True"):
        build_settings(Run, {}, ["folder=true"])


@pytest.mark.parametrize("raw", ["49", "true", "1e-3", "a=b", "open_clip:ViT-L-14", ""])
def test_a_text_field_takes_the_text_of_an_override(raw: str) -> None:
    assert build_settings(Run, {"folder": "x"}, [f"name={raw}"]).name == raw


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("steps", "override 'steps': expected the form key.sub=value"),
        ("=3", "override '=3': expected the form key.sub=value"),
        ("optim..kind=3", "override 'optim..kind=3': expected the form key.sub=value"),
        ("stepz=3", "override 'stepz=3': unknown key 'stepz'; did you mean 'steps'?"),
        ("steps=x", "override 'steps=x': 'steps' must be an integer, got 'x' (text)"),
        ("sizes=[1,x]", "override 'sizes=[1,x]': 'sizes[1]' must be an integer, got 'x' (text)"),
        ("name.sub=1", "override 'name.sub=1': 'name' is 'n' (text) in run.yaml, not a mapping"),
    ],
)
def test_a_wrong_override_is_named_itself(override: str, sentence: str) -> None:
    assert refuse({"folder": "x", "name": "n"}, override) == (sentence,)


def test_a_parser_that_fails_names_the_override() -> None:
    def parse(text: str) -> Any:
        raise RuntimeError("no closing bracket")

    with pytest.raises(
        SettingsError, match=r"override 'steps=\[': the value cannot be read \(no closing bracket\)"
    ):
        build_settings(Run, {"folder": "x"}, ["steps=["], parse_value=parse)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("True", True),
        ("null", None),
        ("[a, 2]", ["a", 2]),
        ("[]", []),
        ("a b", "a b"),
    ],
)
def test_override_values(text: str, value: Any) -> None:
    parsed = parse_override_value(text)
    assert (parsed, type(parsed)) == (value, type(value))


def test_a_field_type_that_cannot_be_read_is_the_programmers_error() -> None:
    with pytest.raises(TypeError, match="'codes' has the type"):
        build_settings(_Odd, {"codes": [1]})
    with pytest.raises(TypeError, match="needs a dataclass"):
        build_settings(dict, {})
    with pytest.raises(TypeError, match="needs a dataclass instance"):
        settings_to_dict(Run)


@dataclass(frozen=True)
class _Odd:
    codes: set[int] = field(default_factory=set)


@pytest.mark.parametrize(
    ("override", "field_name", "value"),
    [
        ("name=runs/exp #2", "name", "runs/exp #2"),
        ("folder=my #1 pictures", "folder", Path("my #1 pictures")),
        ("name=*.tar", "name", "*.tar"),
        ("name={0..3}.tar", "name", "{0..3}.tar"),
        ("name={0..3}", "name", "{0..3}"),
        ("name=a: b", "name", "a: b"),
        ("name='quoted #2' # comment", "name", "quoted #2"),
        ("name=null", "name", None),
        ("steps=010", "steps", 10),
        ("tags=[a, 'b #1']", "tags", ["a", "b #1"]),
        ("weights={a: 2}", "weights", {"a": 2.0}),
        ("weights={a: 2} # two", "weights", {"a": 2.0}),
        ("steps=7 # seven", "steps", 7),
        ("tags=- a", "tags", ["a"]),
    ],
)
def test_what_yaml_would_misread_in_an_override(override: str, field_name: str, value: Any) -> None:
    yaml = pytest.importorskip("yaml")
    run = build_settings(Run, {"folder": "x"}, [override], parse_value=yaml.safe_load)
    assert getattr(run, field_name) == value


def test_home_is_found_in_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    yaml = pytest.importorskip("yaml")
    monkeypatch.setenv("HOME", "/me")
    run = build_settings(
        Run, {"folder": "~/a", "tags": ["~/b", "a~/c"]}, ["name=~/d"], parse_value=yaml.safe_load
    )
    assert (run.folder, run.tags, run.name) == (Path("/me/a"), ["/me/b", "a~/c"], "/me/d")


def test_a_key_that_is_there_twice_is_refused() -> None:
    yaml = pytest.importorskip("yaml")
    loader = refuse_twice(yaml.SafeLoader)
    merged = "base: &a {x: 1}\ninner: &b {<<: *a, x: 2}\nc: {<<: *b}\n"
    assert yaml.load(merged, loader) == yaml.safe_load(merged)
    with pytest.raises(SettingsError, match=r"the key 'x' is there twice, again in line 3"):
        yaml.load("a:\n  x: 1\n  x: 2\n", loader)
    with pytest.raises(yaml.YAMLError):
        yaml.load("? [a, b]\n: 1\n", loader)
