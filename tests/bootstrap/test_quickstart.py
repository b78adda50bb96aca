"""`python -m bootstrap.quickstart` and `python -m bootstrap.report` on a handful of scenes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bootstrap import quickstart
from bootstrap.config import BootstrapConfig, TeacherSettings
from bootstrap.data.config import DataConfig
from bootstrap.report import main as write_report
from bootstrap.scenes.__main__ import main as write_scenes

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_quickstart_ends_with_a_table_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    scenes = tmp_path / "scenes"
    arguments = [
        *("--train", "12", "--heldout", "6"),
        *(f"out={tmp_path / 'run'}", f"data.source={scenes / 'train' / 'images'}"),
        *(
            f"heldout.source={scenes / 'heldout' / 'images'}",
            f"heldout.truth={scenes / 'heldout' / 'labels.json'}",
        ),
        *(
            f"targets.store={tmp_path / 'targets'}",
            "steps=3",
            "batch_size=4",
            "save_every=0",
            "heldout.every=2",
        ),
    ]
    quickstart.main(arguments)
    printed = capsys.readouterr().out
    assert "teacher (ViT)" in printed
    assert "student (SparseFormer)" in printed
    figures = json.loads((tmp_path / "run" / "quickstart.json").read_text())
    assert figures["n"] == 6
    assert figures["classes"] == 64
    assert figures["tokens"] == {"teacher": 145, "student": 49}
    assert figures["gmacs"]["student"] < figures["gmacs"]["teacher"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/svg+xml") == 1
    assert page.count("data:image/png") == 2
    assert "http://" not in page.replace("http://www.w3.org", "")
    before = (tmp_path / "run" / "encoder" / "model.safetensors").stat().st_mtime_ns
    quickstart.main(arguments)  # everything is there: only the comparison runs again
    assert (tmp_path / "run" / "encoder" / "model.safetensors").stat().st_mtime_ns == before
    write_report(
        [str(tmp_path / "run"), "-o", str(tmp_path / "page.html"), "--chart", str(tmp_path / "c.png")]
    )
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert "Provenance" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("source", ["mine", "mine/images", "train/images"])
def test_pictures_of_ones_own_are_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    (tmp_path / source).mkdir(parents=True)
    (tmp_path / source / "photograph.jpg").write_text("mine")
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "configs" / "bootstrap" / "quickstart.yaml")
    with pytest.raises(SystemExit, match=r"FOLDER/train/images"):
        quickstart.main(["--config", config, f"data.source={source}"])
    assert (tmp_path / source / "photograph.jpg").read_text() == "mine"


def test_scenes_of_another_kind_are_written_anew(tmp_path: Path) -> None:
    folder = tmp_path / "scenes"
    source = DataConfig(str(folder / "train" / "images"))
    config = BootstrapConfig(out="x", teacher=TeacherSettings("y"), data=source, steps=1)
    others = ["--out", str(folder), "--train", "3", "--heldout", "2", "--seed", "7", "--size", "32"]
    assert write_scenes(others) == 0
    quickstart._write_scenes(config, 3, 2)
    summary = json.loads((folder / "scenes.json").read_text())
    assert (summary["seed"], summary["size"]) == (0, 96)
    made = (folder / "scenes.json").stat().st_mtime_ns
    quickstart._write_scenes(config, 3, 2)
    assert (folder / "scenes.json").stat().st_mtime_ns == made


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bootstrap.report", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 1
    assert "name a run directory" in done.stderr
    assert "Traceback" not in done.stderr
    for entries in ('{"step": 1, "loss": 2.0}\n', '{"kind": "step", "step": 1}\n{"step": 1, "loss": 2.0}\n'):
        (tmp_path / "log.jsonl").write_text(entries)
        with pytest.raises(
            SystemExit, match=r"log.jsonl is of another command: name a run directory of bootstrap"
        ):
            write_report([str(tmp_path)])
