"""Chat files: as they are written, record by record, and not as objects that every process holds."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from llm_integration.data import BadRecordError, FolderSource
from llm_integration.data.chat_file import ChatFile

RECORDS: list[Any] = [
    {"id": 1, "conversations": [{"from": "human", "value": 'Wie heißt "]," auf Straße 7?\n'}]},
    {"id": "é\u2028\u0085", "conversations": []},
    ["a", {"b": [1, 2.5e3, None]}],
    "\U0001f600 \\ }",
    17,
    {},
]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 2, "\t"])
def test_records_are_those_that_were_written(tmp_path: Path, ascii_only: bool, indent: Any) -> None:
    path = tmp_path / "chat.json"
    for records in (RECORDS, []):
        text = json.dumps(records, ensure_ascii=ascii_only, indent=indent)
        path.write_text(f" \r\n{text}\r\n", encoding="utf-8", newline="")
        file = ChatFile(path)
        assert [file[index] for index in range(len(file))] == records


def test_lines_are_records(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    path.write_bytes(("\n\r\n".join(lines) + "\r\n  \n").encode())
    file = ChatFile(path)
    assert [file[index] for index in range(len(file))] == RECORDS
    path.write_text(lines[0])
    assert len(ChatFile(path)) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '[{"a": 1}, {"b": ', "is not valid JSON"),
        ("a.json", '[{"a": 1} {"b": 2}]', "Expecting ',' delimiter: line 1 column 11"),
        ("a.json", '[{"a": 1},]', "is not valid JSON: Expecting value"),
        ("a.json", '[{"a": 1}] x', "Extra data"),
        ("a.json", "[", "is not valid JSON"),
        ("a.json", "", "is not valid JSON"),
        ("a.json", '{"a": 1}', "must hold a list of records, found dict"),
        ("a.json", '{"a": 1', "is not valid JSON"),
        ("a.jsonl", '{"a": 1}\n{"b"\n', "is not valid JSON"),
        ("a.jsonl", '{"a": 1} {"b": 2}\n', "Extra data"),
        (".", "", "there is no chat file"),
    ],
)
def test_what_is_no_chat_file_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    if name != ".":
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        ChatFile(path)
    assert str(path) in str(caught.value)


def test_a_record_that_is_no_utf8_is_a_bad_record(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes('[{"id": "a"}, {"id": "café"}]'.encode("latin-1"))
    with pytest.raises(BadRecordError, match=r"record 1 of .*chat\.json is not written in UTF-8"):
        FolderSource(path).read(1)


def test_a_chat_file_takes_its_own_size_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    turns = [{"from": who, "value": f"{n} words"} for n in range(4) for who in ("human", "gpt")]
    path.write_text(json.dumps([{"id": str(n), "conversations": turns} for n in range(4000)]))
    size = path.stat().st_size
    tracemalloc.start()
    try:
        source = FolderSource(path)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(source) == 4000
    assert held < 1.3 * size
    assert peak < 2.5 * size
