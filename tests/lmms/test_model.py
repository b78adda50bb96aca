"""The model class by itself: what it is given, what it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; see make test-lmms")

from llm_integration.lmms_model import SparseVlm, group, read_generation, read_messages

from .conftest import Lab


def test_lmms_eval_knows_the_model_by_its_name() -> None:
    from lmms_eval.models import get_model

    assert get_model("sparse_vlm") is SparseVlm


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "needs a model directory"),
        ({"pretrained": "nowhere"}, "there is no model directory at nowhere"),
        (
            {"pretrained": "x", "batch_size": "auto"},
            "batch_size must be a whole number from 1 on, not 'auto'",
        ),
        ({"pretrained": "x", "batch_size": 0}, "batch_size"),
        ({"pretrained": "x", "dtype": "int8"}, "dtype must be one of auto, float32"),
        ({"pretrained": "x", "devise": "cpu"}, "has no argument devise"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SparseVlm(**arguments)


def test_what_tasks_do_not_get(lab: Lab) -> None:
    model = SparseVlm(str(lab.model), "2", "cpu", "bfloat16")
    assert str(model.chat.model.dtype) == "torch.bfloat16"
    with pytest.raises(NotImplementedError, match="several rounds"):
        model.generate_until_multi_round([])
    with pytest.raises(NotImplementedError, match="loglikelihood"):
        model.loglikelihood([])
    model.clean()
    assert model.chat is None


def test_generation_settings_of_tasks() -> None:
    pope = {"max_new_tokens": 128, "temperature": 0.0, "top_p": 0, "num_beams": 1, "do_sample": False}
    assert read_generation({**pope, "until": ["\n\n"]}) == (["\n\n"], {"max_new_tokens": 128, "num_beams": 1})
    assert read_generation({"until": None}) == ([], {"max_new_tokens": 1024})
    assert read_generation({"until": "ASSISTANT:", "image_aspect_ratio": "original"})[0] == ["ASSISTANT:"]
    sampled = {**pope, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.1}
    assert read_generation(sampled)[1] == {
        "max_new_tokens": 128,
        "num_beams": 1,
        "repetition_penalty": 1.1,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
    }
    assert read_generation({"do_sample": True})[1]["temperature"] == 1.0
    with pytest.raises(ValueError, match="cannot honour the generation setting temperatur; it knows"):
        read_generation({"temperatur": 0.7})


def test_requests_are_grouped_by_their_settings() -> None:
    kinds = [("long words", {"a": 1}), ("b", {"a": 2}), ("longest words", {"a": 1}), ("c", {"a": 1})]
    requests: list[Any] = [SimpleNamespace(args=(context, None, settings)) for context, settings in kinds]
    assert list(group(requests, 2)) == [[2, 0], [3], [1]]


def test_messages_become_pictures_and_words(tmp_path: Path) -> None:
    Image.new("L", (4, 3)).save(tmp_path / "a.png")
    parts = [{"type": "image", "url": str(tmp_path / "a.png")}, {"type": "text", "text": "What?"}]
    system, user = read_messages(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}], "quiz"
    )
    assert system == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert [part["type"] for part in user["content"]] == ["image", "text"]
    assert (user["content"][0]["image"].mode, user["content"][0]["image"].size) == ("RGB", (4, 3))
    with pytest.raises(
        ValueError, match="the task quiz shows its model a video; sparse_vlm sees pictures only"
    ):
        read_messages([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], "quiz")
    with pytest.raises(ValueError, match="there is no picture"):
        read_messages([{"role": "user", "content": [{"type": "image", "url": "gone.png"}]}], "quiz")
