"""Chat records: reading, encoding, batching, and what is done about bad ones."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from llm_integration.assemble import load_llm
from llm_integration.data import (
    IGNORED,
    BadRecordError,
    ChatCollator,
    ChatDataset,
    ChatEncoder,
    FolderSource,
    GroupedSampler,
    JoinedSource,
    TarSource,
    TooManyBadRecordsError,
    parse_record,
)
from llm_integration.templates import IMAGE_MARK, TEMPLATES, build_template

N = 3
OWN = (
    "{{ bos_token or '' }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def _turn(who: str, text: str) -> dict[str, str]:
    return {"from": who, "value": text}


def _record(*turns: str, image: Any = None, **more: Any) -> dict[str, Any]:
    speakers = ("human", "gpt")
    raw: dict[str, Any] = {"id": "x7", **more}
    raw["conversations"] = [_turn(speakers[i % 2], text) for i, text in enumerate(turns)]
    return raw if image is None else {**raw, "image": image}


def _messages(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


@pytest.fixture(scope="module", params=["bpe", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, bpe_tokenizer: Any) -> Any:
    import copy

    if request.param == "bpe":
        chosen = copy.deepcopy(bpe_tokenizer)
    else:
        real_data = request.getfixturevalue("real_data")
        chosen = load_llm(str(real_data / "babyllama"), None)[1]
        chosen.pad_token = chosen.unk_token
    chosen.add_special_tokens({"additional_special_tokens": [IMAGE_MARK]}, replace_extra_special_tokens=False)
    return chosen


def _learned(encoder: ChatEncoder, labels: list[int]) -> list[str]:
    """The text under the loss, piece by piece."""
    runs: list[list[int]] = [[]]
    for label in labels:
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [encoder.tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("name", ["vicuna_v1", "chatml", "own", "plain"])
def test_the_loss_covers_the_answers_and_nothing_else(tokenizer: Any, name: str) -> None:
    encoder = ChatEncoder(tokenizer, build_template(name, OWN), N, 4096)
    turns = ("<image>\nWhat is it?", "a red square", "And <image> now?", "two chairs")
    encoded = encoder.encode(_messages(*turns))
    assert encoded.input_ids.count(encoder.image_id) == 2 * N
    assert encoder.image_id not in encoded.labels
    learned = _learned(encoder, encoded.labels)
    eos = tokenizer.eos_token
    ends = {"vicuna_v1": eos, "own": eos, "chatml": "<|im_end|>", "plain": ""}
    # Without a token for ChatML's signs they are text, which is learned up to the end of the line.
    exact = name != "chatml" or "<|im_end|>" in encoder.specials
    for text, answer in zip(learned, ("a red square", "two chairs"), strict=True):
        rest = text.strip().removeprefix(answer)
        assert rest != text.strip()
        if exact:
            assert rest.replace(tokenizer.unk_token or "\n", "").strip() == ends[name]
        else:
            assert len(rest) < len("<|im_end|>") * 6
            assert "user" not in rest


@pytest.mark.parametrize("name", ["vicuna_v1", "chatml", "own"])
def test_the_prompt_is_the_prompt_of_inference(tokenizer: Any, name: str) -> None:
    encoder = ChatEncoder(tokenizer, build_template(name, OWN), N, 4096)
    encoded = encoder.encode(_messages("<image>\nWhat colour?", "brown"))
    begin = next(i for i, label in enumerate(encoded.labels) if label != IGNORED)
    prompt = encoder._apply(_messages(IMAGE_MARK * N + "\nWhat colour?", "")[:1], True, "")
    bos = tokenizer.bos_token
    ids = tokenizer(prompt, add_special_tokens=not (bos and prompt.startswith(bos)))["input_ids"]
    assert encoded.input_ids[:begin] == ids


def test_bos_is_there_once(tokenizer: Any) -> None:
    for template in (TEMPLATES["vicuna_v1"], build_template("own", OWN)):
        ids = ChatEncoder(tokenizer, template, N, 4096).encode(_messages("hi", "ho")).input_ids
        if tokenizer.bos_token_id is not None:
            assert ids[0] == tokenizer.bos_token_id
            assert ids.count(tokenizer.bos_token_id) == 1


def test_answers_that_are_cut_away(tokenizer: Any) -> None:
    encoder = ChatEncoder(tokenizer, TEMPLATES["vicuna_v1"], N, 12)
    with pytest.raises(BadRecordError, match="no answer left after it was cut at max_length=12"):
        encoder.encode(_messages("What is it?", "a dog"), "record 3 of a.json")
    with pytest.raises(BadRecordError, match="cut inside a picture"):
        encoder.encode(_messages("<image>\nWhat is it?", "a dog"))


def test_a_template_that_rewrites_history_is_named(tokenizer: Any) -> None:
    template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(BadRecordError, match="choose another template"):
        ChatEncoder(tokenizer, template, N, 99).encode(_messages("a", "b", "c", "d"))


def test_unknown_template_is_refused() -> None:
    with pytest.raises(ValueError, match="vicuna_v1"):
        build_template("vicuna")
    with pytest.raises(ValueError, match="has no chat template"):
        build_template("own", None)


def test_reads_llavas_records() -> None:
    single = parse_record(_record("What?\n<image>", "a cat", image="a.jpg"), "r")
    assert single.messages[0]["content"] == "<image>\nWhat?"
    several = parse_record(_record("<image> or <image>?", "b", image=["a.jpg", "b.jpg"]), "r")
    assert several.messages[0]["content"] == "<image> or <image>?"
    assert several.pictures == ("a.jpg", "b.jpg")
    text = parse_record(_record("hi", "ho", "he", "ha", "unanswered"), "r")
    assert len(text.messages) == 4
    late = parse_record({"conversations": [_turn("gpt", "x"), _turn("human", "y"), _turn("gpt", "z")]}, "r")
    assert [m["content"] for m in late.messages] == ["y", "z"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"id": 1, "conversations": []}, "empty conversation"),
        ({"id": 1}, "empty conversation"),
        (["x"], "no JSON object"),
        (_record("<image> and <image>", "x", image="a.jpg"), "2 <image> marks for 1 picture"),
        (_record("nothing", "x", image=["a.jpg"]), "0 <image> marks for 1 picture"),
        (_record("<image>\nwhat?", "x"), "1 <image> mark for 0 pictures"),
        (_record("what?", ""), "no answer"),
        (_record("what?"), "no answer"),
        (_record("what?", "an <image>"), "in an answer"),
        ({"conversations": [_turn("bot", "x")]}, "has a turn that is not"),
        ({"conversations": [_turn("human", "x"), _turn("human", "y")]}, "two turns of the user in a row"),
        (_record("<image>", "x", image=7), "names its picture as 7"),
    ],
)
def test_bad_records_are_named(raw: Any, message: str) -> None:
    with pytest.raises(BadRecordError, match=message) as caught:
        parse_record(raw, "record 5 (id 'x7') of chat.json")
    assert str(caught.value).startswith("record 5 (id 'x7') of chat.json")


@pytest.fixture
def folder(tmp_path: Path, picture: Image.Image) -> Callable[..., Path]:
    """Writes a chat file beside a few pictures."""
    picture.save(tmp_path / "good.jpg")
    picture.convert("L").save(tmp_path / "grey.png")
    whole = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("not a picture")

    def write(*records: Any) -> Path:
        path = tmp_path / "chat.json"
        path.write_text(json.dumps(records))
        return path

    return write


def _dataset(source: Any, tokenizer: Any, limit: int = 100, max_length: int = 4096) -> ChatDataset:
    encoder = ChatEncoder(tokenizer, TEMPLATES["vicuna_v1"], N, max_length)
    size = {"height": 16, "width": 16}
    return ChatDataset(source, encoder, CLIPImageProcessorPil(size=size, crop_size=size), limit)


def _read_all(source: Any, tokenizer: Any) -> None:
    strict = _dataset(source, tokenizer, limit=0, max_length=400)
    for index in range(len(strict)):
        strict[index]


GOOD = _record("<image>\nWhat?", "a cat", image="good.jpg")


@pytest.mark.parametrize(
    ("raw", "message", "early"),
    [
        (_record("<image>\nWhat?", "x", image="gone.jpg"), "gone.jpg is missing", True),
        (_record("<image>\nWhat?", "x", image="half.jpg"), "half.jpg is broken", False),
        (_record("<image>\nWhat?", "x", image="text.jpg"), r"text.jpg is broken (13 bytes in none of", False),
        (_record("<image>\nWhat?" + " so" * 900, "x", image="good.jpg"), "no answer left", False),
        ({"id": "e", "conversations": []}, "empty conversation", True),
    ],
)
def test_bad_records_are_counted_and_skipped(
    folder: Any, bpe: Any, raw: Any, message: str, early: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder(GOOD, raw, GOOD)
    dataset = _dataset(FolderSource(path), bpe, max_length=400)
    assert len(dataset) == (2 if early else 3)
    shapes = {tuple(dataset[i]["pixel_values"].shape) for i in range(len(dataset))}
    dataset[len(dataset) - 1]
    assert shapes == {(1, 3, 16, 16)}
    assert dataset.bad_records == 1
    assert message in caplog.text
    assert f"record 1 (id '{raw['id']}') of {path}" in caplog.text
    with pytest.raises(TooManyBadRecordsError, match="1 bad records, 0 are allowed"):
        _read_all(FolderSource(path), bpe)


@pytest.fixture(scope="module")
def bpe(bpe_tokenizer: Any) -> Any:
    import copy

    chosen = copy.deepcopy(bpe_tokenizer)
    chosen.add_special_tokens({"additional_special_tokens": [IMAGE_MARK]})
    return chosen


def test_files_that_are_not_there(tmp_path: Path, bpe: Any, folder: Any) -> None:
    with pytest.raises(ValueError, match="no chat file"):
        FolderSource(tmp_path / "none.json")
    with pytest.raises(ValueError, match="no picture folder"):
        FolderSource(folder(GOOD), tmp_path / "none")
    with pytest.raises(ValueError, match="no tar matches"):
        TarSource([tmp_path / "*.tar"])
    (tmp_path / "bad.json").write_text("[{")
    with pytest.raises(ValueError, match="not valid JSON"):
        FolderSource(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="no good record"):
        _dataset(FolderSource(folder({"id": "e"})), bpe)


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    rows = [_record("one\u2028two", "three\x85four"), _record("hi", "ho")]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert [FolderSource(path).read(0).messages[0]["content"], len(FolderSource(path))] == ["one\u2028two", 2]


def test_a_compressed_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("0.json"))
    with pytest.raises(ValueError, match="has to be decompressed first"):
        TarSource([tmp_path / "s.tar.gz"])


def test_a_bad_record_counts_once_whichever_worker_meets_it(folder: Any, bpe: Any) -> None:
    broken = _record("<image>\nWhat?", "x", image="half.jpg")
    dataset = _dataset(FolderSource(folder(GOOD, broken, GOOD)), bpe, limit=1)
    for _ in range(3):  # epochs, each with new workers
        assert len(list(torch.utils.data.DataLoader(dataset, num_workers=2, batch_size=None))) == 3
    assert dataset.bad_records == 1


def _tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.mark.parametrize("damage", ["overwritten", "cut"])
def test_a_damaged_tar_is_refused(damage: str, tmp_path: Path) -> None:
    path = _tar(tmp_path / "s.tar", {f"{number}.json": b"{}" for number in range(6)})
    data = path.read_bytes()
    header = 4 * 1024
    path.write_bytes(data[:header] if damage == "cut" else data[:header] + b"?" * 512 + data[header + 512 :])
    with pytest.raises(ValueError, match=r"s\.tar is no whole tar file \(no header at byte 4096"):
        TarSource([path])


def test_a_second_picture_is_not_taken_for_the_first(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "yes"}]
    record = {"id": "0", "image": ["a.png", "b.png"], "conversations": turns}
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    members = {"0.json": json.dumps(record).encode(), "0.png": buffer.getvalue()}
    source = TarSource([_tar(tmp_path / "s.tar", members)])
    with pytest.raises(BadRecordError, match=r"its picture a\.png is missing from the tar"):
        source.read(0)


PARTS = (
    "{% for m in messages %}{{ m.role | upper }}: "
    "{% for c in m.content | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def test_templates_that_want_parts_get_them(tokenizer: Any) -> None:
    template = build_template("own", PARTS)
    assert build_template("own", template) == template
    encoder = ChatEncoder(tokenizer, template, N, 4096)
    turns = ("<image>\nWhat is it?", "a red square", "And <image> now?", "two chairs")
    encoded = encoder.encode(_messages(*turns))
    assert encoded.input_ids.count(encoder.image_id) == 2 * N
    text = tokenizer.decode(encoded.input_ids)
    for part in ("What is it?", "a red square", "two chairs"):
        assert text.count(part) == 1
    first, second = _learned(encoder, encoded.labels)
    # Nothing in the template ends an answer: the last one is ended by the tokenizer's own sign.
    assert first.lstrip() == "a red square"  # and nothing of the next turn
    assert second.replace(tokenizer.eos_token, "") == second.removesuffix(tokenizer.eos_token)
    assert second.removesuffix(tokenizer.eos_token).lstrip() == "two chairs"
    assert encoded.labels[-1] == encoded.input_ids[-1] == tokenizer.eos_token_id
    text, spans = encoder.render(_messages("<image>\nWhat is it?", "two\nchairs"), "")
    assert text == "USER: <image>\nWhat is it? ASSISTANT: two\nchairs "
    assert [text[slice(*span)] for span in spans] == [" two\nchairs"]


def test_an_answer_that_names_a_special_token_is_learned_to_its_end(tokenizer: Any) -> None:
    sign = tokenizer.eos_token
    for name, own in (("own", PARTS), ("vicuna_v1", None)):
        encoder = ChatEncoder(tokenizer, build_template(name, own), N, 4096)
        encoded = encoder.encode(_messages("Strike it?", f"a {sign} b c", "And?", f"two {sign} chairs"))
        learned = _learned(encoder, encoded.labels)
        assert [text.count(sign) for text in learned] == ([1, 2] if own else [2, 2])
        assert [text.rstrip().removesuffix(sign).rstrip()[-1] for text in learned] == ["c", "s"]


def test_an_answer_that_was_cut_is_not_ended(tokenizer: Any) -> None:
    whole = ChatEncoder(tokenizer, build_template("own", PARTS), N, 4096).encode(_messages("hi", "ho ho ho"))
    short = len(whole.input_ids) - 2
    cut = ChatEncoder(tokenizer, build_template("own", PARTS), N, short).encode(_messages("hi", "ho ho ho"))
    assert cut.input_ids == whole.input_ids[:short]
    assert tokenizer.eos_token_id not in cut.labels


# As Qwen3's: thoughts before the last answer only, closed in the prompt where nobody is to think.
THINKING = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ m.content | trim }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
# As Phi-3's: the end of the text behind everything that is no prompt.
CLOSING = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% else %}{{ eos_token }}{% endif %}"""


# As Llama 3.2's: what day it is.
DATED = """\
{% if not date_string is defined %}
{% if strftime_now is defined %}{% set date_string = strftime_now("%d %b %Y") %}
{% else %}{% set date_string = "26 Jul 2024" %}{% endif %}{% endif %}Today: {{ date_string }}
{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"""


def test_prompts_do_not_change_from_day_to_day(bpe: Any) -> None:
    template = build_template("own", DATED)
    text = bpe.apply_chat_template(_messages("What?"), chat_template=template, tokenize=False)
    assert text.split("\n")[-2:] == ["Today: 26 Jul 2024", "What?<|endoftext|>"]


@pytest.mark.parametrize("template", [THINKING, CLOSING])
@pytest.mark.parametrize("turns", [1, 3])
def test_templates_that_write_earlier_turns_anew_are_learned_from(
    bpe: Any, template: str, turns: int
) -> None:
    encoder = ChatEncoder(bpe, build_template("own", template), N, 4096)
    said = [text for n in range(turns) for text in (f"<image>\nWhat is {n}?", f" a red square {n} ")]
    encoded = encoder.encode(_messages(*said))
    learned = _learned(encoder, encoded.labels)
    wanted = [f"a red square {n}" for n in range(turns)]
    assert [
        text.removesuffix("<|endoftext|>").strip().removesuffix("<|im_end|>").strip() for text in learned
    ] == wanted
    assert all("<|im_end|>" in text and "think" not in text for text in learned)
    assert build_template("own", build_template("own", template)) == build_template("own", template)


def test_a_template_with_another_mark_for_pictures_is_named(tokenizer: Any) -> None:
    encoder = ChatEncoder(tokenizer, build_template("own", PARTS.replace("<image>", "[img]")), N, 4096)
    with pytest.raises(BadRecordError, match="r: the chat template writes 0 of 2 pictures as <image>"):
        encoder.encode(_messages("<image><image>Which?", "the first"), "r")


def test_a_template_that_leaves_answers_out_is_named(tokenizer: Any) -> None:
    template = build_template("own", "{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(BadRecordError, match="leaves the answer out; choose another template"):
        ChatEncoder(tokenizer, template, N, 99).encode(_messages("How many?", "Three."))


def test_tars_give_the_same_as_a_folder(tmp_path: Path, folder: Any, bpe: Any) -> None:
    several = _record("<image> or <image>?", "the first", image=["good.jpg", "grey.png"])
    text = _record("hi", "ho")
    unnamed = _record("<image>\nWhat?", "a cat")
    path = folder(GOOD, several, text)
    jpg, png = (path.parent / "good.jpg").read_bytes(), (path.parent / "grey.png").read_bytes()
    members = {
        "a/0.json": json.dumps({**GOOD, "image": "elsewhere/good.jpg"}).encode(),
        "a/0.jpg": jpg,
        "a/1.json": json.dumps({**several, "image": ["a/1.0.jpg", "a/1.1.png"]}).encode(),
        "a/1.0.jpg": jpg,
        "a/1.1.png": png,
        "a/2.json": json.dumps(text).encode(),
        "a/3.json": json.dumps(unnamed["conversations"]).encode(),
        "a/3.jpg": jpg,
    }
    tars = _dataset(TarSource([_tar(tmp_path / "s.tar", members)]), bpe)
    files = _dataset(FolderSource(path), bpe)
    assert len(tars) == 4
    for left, right in ((0, 0), (1, 1), (2, 2), (3, 0)):
        assert tars[left].keys() == files[right].keys()
        assert all(torch.equal(value, files[right][key]) for key, value in tars[left].items())
    joined = JoinedSource([FolderSource(path), TarSource([tmp_path / "s.tar"])])
    assert len(joined) == 7
    assert joined.read(4).pictures == ("a/1.0.jpg", "a/1.1.png")


def test_bad_records_in_tars_are_named(tmp_path: Path, bpe: Any, caplog: pytest.LogCaptureFixture) -> None:
    members = {
        "0.json": b"{",
        "1.json": json.dumps(GOOD).encode(),
        "2.json": json.dumps(GOOD).encode(),
        "2.jpg": b"no",
        "3.json": json.dumps(_record("hi", "ho")).encode(),
    }
    path = _tar(tmp_path / "s.tar", members)
    dataset = _dataset(TarSource([path]), bpe)
    assert dataset.bad_records == 2
    with pytest.raises(TooManyBadRecordsError):
        dataset[0]
    for wanted in (f"record '0' of {path} is not valid JSON", "good.jpg is missing", "good.jpg is broken"):
        assert wanted in caplog.text


def test_a_picture_is_broken_alike_in_a_tar_and_in_a_folder(folder: Any, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    # An empty gamma chunk before the end: Pillow raises struct.error as it loads.
    empty = struct.pack(">I4sI", 0, b"gAMA", zlib.crc32(b"gAMA"))
    broken = buffer.getvalue()[:-12] + empty + buffer.getvalue()[-12:]
    path = folder({**GOOD, "image": "0.png"})
    (path.parent / "0.png").write_bytes(broken)
    members = {"0.json": json.dumps({**GOOD, "image": "0.png"}).encode(), "0.png": broken}
    for source in (FolderSource(path), TarSource([_tar(tmp_path / "s.tar", members)])):
        with pytest.raises(BadRecordError, match=r"its picture \S*0\.png is broken"):
            source.open_picture(0, "0.png")


def test_batches(folder: Any, bpe: Any) -> None:
    text = _record("hi", "ho")
    several = _record("<image> or <image>?", "the first", image=["good.jpg", "grey.png"])
    dataset = _dataset(FolderSource(folder(GOOD, several, text)), bpe)
    image_id = dataset.encoder.image_id
    collate = ChatCollator(bpe.pad_token_id, image_id, N, (3, 16, 16))
    batch = collate([dataset[0], dataset[1], dataset[2]])
    assert batch["pixel_values"].shape == (3, 3, 16, 16)
    assert int((batch["input_ids"] == image_id).sum()) == 3 * N
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    alone = collate([dataset[2]])
    assert alone["input_ids"].shape[0] == 2
    assert int((alone["input_ids"] == image_id).sum()) == N
    assert (alone["labels"][1] == IGNORED).all()
    assert alone["pixel_values"].shape == (1, 3, 16, 16)


def test_grouped_batches_hold_one_modality_and_similar_lengths() -> None:
    lengths = [(i * 37) % 100 for i in range(200)]
    kinds = [i % 3 != 0 for i in range(200)]
    sampler = GroupedSampler(lengths, kinds, global_batch=8, seed=1, pool=4)
    order = list(sampler)
    assert sorted(order) == list(range(200))
    assert list(sampler) == order
    batches = [order[i : i + 8] for i in range(0, 200, 8)]
    pure = [batch for batch in batches if len({kinds[i] for i in batch}) == 1]
    assert len(pure) >= len(batches) - 2
    spread = sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in pure) / len(pure)
    assert spread < 45
    assert not hasattr(sampler, "set_epoch"), "accelerate would call it, with 0 after a restart"
    sampler.begin_epoch(1)
    assert list(sampler) != order
