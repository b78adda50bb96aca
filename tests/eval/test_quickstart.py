"""`python -m eval.quickstart` on a handful of scenes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bootstrap.scenes.__main__ import main as write_scenes
from eval.quickstart import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_both_models_are_tuned_and_asked(
    tmp_path: Path, encoder_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert write_scenes(["--out", str(tmp_path / "scenes"), "--train", "6", "--heldout", "4"]) == 0
    shutil.copytree(encoder_dir, tmp_path / "bootstrap" / "encoder")
    words = ["--folder", str(tmp_path), "--questions", "7", "max_steps=2", "batch=2"]
    main(words)
    printed = capsys.readouterr().out
    assert "whole ViT" in printed
    assert "; right: " in printed
    figures = json.loads((tmp_path / "language" / "quickstart.json").read_text())
    rows = figures["rows"]
    assert {name: row["visual_tokens"] for name, row in rows.items()} == {
        "vit": 144,
        "vit_no-image": 0,
        "sparseformer": 9,
        "sparseformer_no-image": 0,
    }
    assert all(row["n"] == 7 for row in rows.values())
    assert rows["sparseformer"]["seconds_to_first_token"] > 0
    for name in ("vit", "sparseformer"):
        settings = json.loads((tmp_path / "language" / name / "tuned" / "settings.json").read_text())
        assert (settings["max_steps"], settings["batch"], settings["seed"]) == (2, 2, 0)
    capsys.readouterr()
    main(words)  # everything is there: nothing is tuned or asked again
    assert json.loads((tmp_path / "language" / "quickstart.json").read_text())["minutes"] < figures["minutes"]
    with pytest.raises(SystemExit, match=r"with other settings \(batch\): delete .*language to tune again"):
        main([*words, "batch=3"])
    for option, what in (("--llm", "language model"), ("--teacher", "ViT")):
        with pytest.raises(SystemExit, match=rf"holds another {what} than .*nowhere"):
            main([*words, option, "nowhere"])


def test_it_needs_the_vision_half_and_names_what_failed(tmp_path: Path, encoder_dir: Path) -> None:
    with pytest.raises(SystemExit, match=r"run python -m bootstrap\.quickstart first"):
        main(["--folder", str(tmp_path)])
    shutil.copytree(encoder_dir, tmp_path / "bootstrap" / "encoder")
    with pytest.raises(SystemExit, match=r"no scenes .*; run python -m bootstrap\.quickstart first"):
        main(["--folder", str(tmp_path)])
    assert write_scenes(["--out", str(tmp_path / "scenes"), "--train", "2", "--heldout", "1"]) == 0
    with pytest.raises(SystemExit, match="unknown key 'max_stepz'; did you mean 'max_steps'"):
        main(["--folder", str(tmp_path), "max_stepz=2"])
    with pytest.raises(SystemExit, match=r"Tuning whole ViT ended with status \d+: .*nowhere"):
        main(["--folder", str(tmp_path), "model=nowhere"])
    provenance = tmp_path / "bootstrap" / "encoder" / "provenance.json"
    provenance.write_text(json.dumps({**json.loads(provenance.read_text()), "written_at": "later"}))
    with pytest.raises(SystemExit, match=r"holds another encoder than .*: delete .*language and run again"):
        main(["--folder", str(tmp_path), "max_stepz=2"])
