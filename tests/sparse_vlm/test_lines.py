"""Files of JSON lines that grow."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_vlm.lines import append_lines, cut_unfinished, read_lines


def test_lines_are_added_and_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": "é\u2028\n"}, {"text": None}]
    append_lines(path, rows[:1])
    append_lines(path, [])
    append_lines(path, rows[1:])
    assert read_lines(path) == rows
    assert not cut_unfinished(path)
    append_lines(path, [{"name": "\udce9"}])  # of a file whose name is no text
    assert read_lines(path)[2] == {"name": "?"}


def test_a_line_that_is_not_whole_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_lines(path, [{"text": "é"}])
    whole = path.read_bytes()
    for torn in (b'{"text": "\xc3', b"{", b"\xc3"):
        path.write_bytes(whole + torn)
        assert read_lines(path) == [{"text": "é"}]
        assert cut_unfinished(path)
        assert path.read_bytes() == whole
    path.write_bytes(b"{}\n{]\n")
    with pytest.raises(ValueError, match=r"Line 2 of .*a\.jsonl is not JSON"):
        read_lines(path)
