"""Batches: each answer as if it were alone, cut at stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from llm_integration import replies as replies_module
from llm_integration.decoding import Draws
from llm_integration.generate import Chat, build_message, load_chat
from llm_integration.replies import Answered, BatchReply, _StopAt, answer_many, cut_at, reply_to_all


@pytest.fixture(scope="module")
def chat(llava_dir: Path) -> Chat:
    return load_chat(llava_dir, device="cpu")


@pytest.fixture(scope="module")
def talks(picture: Image.Image) -> list[list[dict[str, Any]]]:
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    return [
        [build_message("Which one?", [picture])],
        [build_message("No picture, and a much longer question about the small dog on the green grass")],
        [system, build_message("Compare.", [picture, picture.rotate(90)])],
    ]


def test_an_answer_does_not_depend_on_its_neighbours(chat: Chat, talks: Any) -> None:
    together = reply_to_all(chat, talks, 8)
    for talk, given in zip(talks, together, strict=True):
        alone = chat.reply(talk, 8)
        assert given == BatchReply(alone.text, alone.visual_tokens, alone.prompt_tokens, alone.new_tokens)
    assert [given.visual_tokens for given in together] == [9, 0, 18]


def test_an_answer_ends_before_its_stop(chat: Chat, talks: Any) -> None:
    whole = reply_to_all(chat, talks, 24)
    stop = whole[0].text[2:4]
    cut = reply_to_all(chat, talks, 24, ["", "never said", stop])
    assert [reply.text for reply in cut] == [reply.text.split(stop)[0].strip() for reply in whole]
    assert cut[0].new_tokens < whole[0].new_tokens  # it really stopped there
    assert cut[0].text == whole[0].text[:2].strip()


def test_padding_that_looks_like_an_end_mark_is_not_counted(
    chat: Chat, talks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = reply_to_all(chat, talks, 24)[0].text[2:4]
    config = chat.model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    counts = []
    for padding in (chat.model.config.image_token_id, ends[0]):  # the former is never said
        monkeypatch.setattr(config, "pad_token_id", padding)
        counts.append([reply.new_tokens for reply in reply_to_all(chat, talks, 24, [stop])])
    assert counts[0] == counts[1]
    assert counts[0][0] < max(counts[0])  # its row has padding


def test_a_stop_across_the_border_of_prompt_and_answer_is_none(chat: Chat) -> None:
    tokenizer = chat.processor.tokenizer
    ids = torch.tensor([tokenizer.encode("assistant\n") + tokenizer.encode("\n")])
    ends = [
        _StopAt(["\n\n"], tokenizer, start)(ids, torch.empty(0)).tolist() for start in (0, ids.shape[1] - 1)
    ]
    assert ends == [[True], [False]]


def test_the_first_of_several_stops_counts() -> None:
    assert cut_at("one, two. three", [". ", ", "]) == "one"
    assert cut_at("one", ["two"]) == "one"
    assert cut_at("\n\none", ["\n\n"]) == ""
    assert cut_at("one", []) == "one"


def test_sampling_is_passed_on(chat: Chat, talks: Any) -> None:
    greedy = reply_to_all(chat, talks, 12)
    assert reply_to_all(chat, talks, 12, do_sample=True, temperature=1e-4) == greedy
    assert reply_to_all(chat, talks, 12, do_sample=True, temperature=9.0, top_k=0) != greedy


def test_greedy_answers_are_not_bent_by_the_language_models_own_penalty(
    llava_dir: Path, chat: Chat, talks: Any
) -> None:
    plain = reply_to_all(chat, talks, 24)
    bent = load_chat(llava_dir, device="cpu")  # as Qwen2.5's settings are, and stronger
    settings = {"do_sample": True, "repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "num_beams": 2}
    bent.model.generation_config.update(**settings)
    assert reply_to_all(bent, talks, 24) == plain
    assert [bent.reply(talk, 24).text for talk in talks] == [reply.text for reply in plain]
    asked = {"do_sample": True, "temperature": 1e-4}
    assert reply_to_all(bent, talks, 24, **asked) != plain  # drawn answers keep it
    assert reply_to_all(chat, talks, 24, repetition_penalty=3.0) != plain


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_many_answers_do_not_depend_on_the_batch(
    chat: Chat, picture: Image.Image, tmp_path: Path, temperature: float
) -> None:
    picture.save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    asked: list[Any] = [
        (tmp_path / "a.png", "Which one?"),
        (None, "No picture, and a much longer question about the small dog on the green grass"),
        (str(tmp_path / "b.png"), "What is it?"),
        ([picture, picture.rotate(90)], "Compare."),
        (tmp_path / "gone.png", "What is it?"),
        (picture, "Which one?"),
    ]

    def answer(batch: int, start: int = 0, seed: int = 0) -> list[Answered]:
        rest = (one for one in asked[start:])
        return list(answer_many(rest, chat, batch, 12, temperature, seed, start))

    alone = answer(1)
    for batch in (2, 4, 100):
        assert answer(batch) == alone
    assert answer(3, start=2) == alone[2:]
    assert [one.text is None for one in alone] == [False, False, True, False, True, False]
    assert "b.png is no picture that can be read" in str(alone[2].skipped)
    assert "there is no picture" in str(alone[4].skipped)
    assert (answer(1, seed=1) == alone) == (not temperature)
    if not temperature:
        assert alone[0].text == alone[5].text == chat.reply([build_message("Which one?", [picture])], 12).text
    else:
        assert alone[0].text != alone[5].text  # the same question is drawn anew in another place


def test_a_question_with_the_image_mark_costs_its_own_answer_only(chat: Chat, picture: Image.Image) -> None:
    asked = [(picture, "<image>\nWhich one?"), (picture, "Which one?"), (None, "What is <image>?")]
    marked, answered, alone = answer_many(asked, chat, 3, 4)
    assert answered.text == chat.reply([build_message("Which one?", [picture])], 4).text
    assert "leave <image> out of the question" in str(marked.skipped)
    assert "leave <image> out of the question" in str(alone.skipped)
    with pytest.raises(ValueError, match="batch must be 1 or more, got 0"):
        list(answer_many(asked, chat, 0))


def test_a_question_that_is_too_long_costs_its_own_answer_only(chat: Chat, picture: Image.Image) -> None:
    asked: list[Any] = [
        (picture, "Which one?"),
        (None, "dog " * 600),
        (picture, "What?"),
        ([picture] * 60, "All?"),
    ]
    for temperature in (0.0, 5.0):
        alone = list(answer_many(asked, chat, 1, 4, temperature))
        assert list(answer_many(asked, chat, 4, 4, temperature)) == alone
        assert [one.skipped is None for one in alone] == [True, False, True, False]
        assert "540 of them for pictures, and the language model has 512 positions" in str(alone[3].skipped)


def test_answers_end_with_the_last_position_each_for_itself(
    chat: Chat, talks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = reply_to_all(chat, talks, 12)
    assert [reply.new_tokens for reply in whole] == [12, 12, 12]
    longest = max(reply.prompt_tokens for reply in whole)
    monkeypatch.setattr(chat, "positions", longest + 5)
    rooms = [min(12, longest + 5 - reply.prompt_tokens) for reply in whole]
    assert [reply.new_tokens for reply in reply_to_all(chat, talks, 12)] == rooms
    beams = reply_to_all(chat, talks, 12, num_beams=2)
    assert all(reply.new_tokens <= room for reply, room in zip(beams, rooms, strict=True))
    monkeypatch.setattr(chat, "positions", longest)
    with pytest.warns(UserWarning, match=f"of no use: the prompt is {longest} tokens long"):
        assert max(reply_to_all(chat, talks, 12), key=lambda reply: reply.prompt_tokens).new_tokens == 12


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    shares = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    scores = shares.log().expand(4000, -1)
    ids = torch.zeros((4000, 1), dtype=torch.long)

    def draw(temperature: float = 1.0, **settings: Any) -> torch.Tensor:
        draws = Draws(GenerationConfig(**settings), temperature, [f"0 {row}" for row in range(4000)])
        taken = draws(ids, scores)
        assert (taken == 0).sum(dim=1).eq(1).all()
        return taken.argmax(dim=1).bincount(minlength=5) / 4000

    torch.testing.assert_close(draw(), shares, atol=0.03, rtol=0)
    colder = (shares**2) / (shares**2).sum()
    torch.testing.assert_close(draw(temperature=0.5), colder, atol=0.03, rtol=0)
    assert draw(top_k=2).count_nonzero() == 2
    assert draw(top_p=0.7).count_nonzero() == 2
    assert draw(temperature=1e-3)[0] == 1


def test_the_largest_number_draws_no_token_that_cannot_be() -> None:
    draws = Draws(GenerationConfig(top_k=0), 1.0, ["a"])

    class Largest:
        def random(self) -> float:
            return 1 - 2**-53

    draws.streams = [Largest()]  # type: ignore[list-item]
    scores = torch.tensor([[0.0, 1.0, -torch.inf]])
    assert draws(torch.zeros(1, 1, dtype=torch.long), scores).argmax() == 1


def test_pictures_of_the_next_batch_are_read_while_one_is_answered(
    chat: Chat, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    asked = ((read.append(place) or picture, "What?") for place in range(9))
    batches: list[tuple[int, int]] = []
    monkeypatch.setattr(
        replies_module,
        "reply_to_all",
        lambda chat, talks, *rest, **more: (
            batches.append((len(talks), len(read))) or [BatchReply("a", 9, 9, 1)] * len(talks)
        ),
    )
    assert len(list(answer_many(asked, chat, 2))) == 9
    assert batches == [(2, 4), (2, 6), (2, 8), (2, 9), (1, 9)]
