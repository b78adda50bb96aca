"""The wheel claims only names that are ours to claim; a checkout offers all four packages."""

from __future__ import annotations

import configparser
import importlib.util
import re
import shutil
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from llm_integration import lmms_plugin

pytest.importorskip("hatchling", reason="building a wheel needs hatchling (it is in the dev extra)")

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("sparse_vlm", "llm_integration")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this checkout, built from a copy so that nothing is left behind here."""
    from hatchling.builders.wheel import WheelBuilder

    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for package in (*SHIPPED, "bootstrap", "eval", "tests"):
        shutil.copytree(
            ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__", "golden")
        )
    (path,) = WheelBuilder(str(copy)).build(directory=str(copy / "dist"), versions=["standard"])
    return zipfile.ZipFile(path)


def read_metadata(wheel: zipfile.ZipFile) -> str:
    """The wheel's METADATA."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return wheel.read(name).decode()


def test_the_wheel_holds_two_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(SHIPPED)


def test_the_wheel_holds_every_module_of_them(wheel: zipfile.ZipFile) -> None:
    ours = {str(p.relative_to(ROOT)) for package in SHIPPED for p in (ROOT / package).rglob("*.py")}
    assert ours == {name for name in wheel.namelist() if name.endswith(".py")}


def test_the_wheel_carries_the_licence(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("LICENSE"))
    assert b"Apache License" in wheel.read(name)


def test_requirements_have_lower_bounds_only(wheel: zipfile.ZipFile) -> None:
    requirements = re.findall(r"^Requires-Dist: ([^;\n]+)", read_metadata(wheel), re.MULTILINE)
    assert len(requirements) > 10
    bounded = [r for r in requirements if not r.startswith("sparse-vlm[")]
    assert [r for r in bounded if not re.fullmatch(r"[\w.-]+(\[[\w,]+\])?>=[\w.]+", r.strip())] == []


def test_the_library_requires_four_packages(wheel: zipfile.ZipFile) -> None:
    required = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", read_metadata(wheel), re.MULTILINE)
    assert sorted(name.lower() for name in required) == ["numpy", "pillow", "safetensors", "torch"]


def test_the_wheel_tells_lmms_eval_about_our_models(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    written = configparser.ConfigParser()
    written.read_string(wheel.read(name).decode())
    entry = EntryPoint("sparse_vlm", written["lmms_eval.models"]["sparse_vlm"], "lmms_eval.models")
    assert callable(entry.load())  # without lmms-eval too
    model_file, _, model_class = lmms_plugin.MODEL_CLASS.rpartition(".")
    source = wheel.read(f"{model_file.replace('.', '/')}.py").decode()
    assert f"class {model_class}(lmms):" in source


@pytest.mark.parametrize("package", [*SHIPPED, "bootstrap", "eval"])
def test_a_checkout_offers_all_four(package: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not importable; install the checkout with pip install -e ."
    assert Path(str(spec.origin)).is_relative_to(ROOT)
