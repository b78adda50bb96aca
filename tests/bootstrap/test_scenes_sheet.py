"""`python -m bootstrap.scenes.sheet` draws a contact sheet."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from bootstrap.scenes.sheet import main


def test_a_contact_sheet_is_written(tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    main(["--out", str(out)])
    with Image.open(out) as sheet:
        assert sheet.width > 300
        assert len(set(sheet.convert("RGB").resize((64, 64)).getdata())) > 100
