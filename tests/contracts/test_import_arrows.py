"""Who may import whom, read off the syntax tree: imports inside functions count too."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {
    "sparse_vlm": set[str](),
    "bootstrap": {"sparse_vlm"},
    "llm_integration": {"sparse_vlm"},
    "eval": {"bootstrap", "llm_integration", "sparse_vlm"},
}
OURS = {*ALLOWED, "tests", "configs"}
# Triton comes with torch where there is a GPU to run it on, and is imported only there.
THIRD_PARTY_OF_THE_LIBRARY = {"torch", "triton", "numpy", "PIL", "safetensors"}


def imported_names(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a module imports; `package` resolves relative imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            yield node.lineno, ".".join([*base, *([node.module] if node.module else [])]) or "(above the top)"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = (
                node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            )
            if function in ("import_module", "__import__", "importorskip"):
                yield node.lineno, str(node.args[0].value)


def find_violations(root: Path) -> list[str]:
    """One line for each import that points the wrong way."""
    found = []
    for package, allowed in ALLOWED.items():
        for path in sorted((root / package).rglob("*.py")):
            place = path.relative_to(root)
            for line, name in imported_names(ast.parse(path.read_text("utf-8")), ".".join(place.parts[:-1])):
                top = name.partition(".")[0]
                if top == package or top in allowed or top in sys.stdlib_module_names:
                    continue
                if top in OURS or top == "(above the top)":
                    found.append(f"{place}:{line}: {package} must not import {name}")
                elif package == "sparse_vlm" and top not in THIRD_PARTY_OF_THE_LIBRARY:
                    found.append(f"{place}:{line}: sparse_vlm must not import the third-party package {name}")
    return found


def test_imports_point_down() -> None:
    for package in ALLOWED:
        assert list((ROOT / package).rglob("*.py")), f"{package} holds no Python file"
    assert find_violations(ROOT) == []


@pytest.mark.parametrize(
    ("package", "code", "found"),
    [
        ("sparse_vlm", "import bootstrap", "bootstrap"),
        ("sparse_vlm", "from llm_integration.tower import Tower", "llm_integration.tower"),
        ("sparse_vlm", "def late():\n    import timm", "timm"),
        ("sparse_vlm", "import importlib\nimportlib.import_module('transformers.models')", "transformers"),
        ("sparse_vlm", "from ... import bootstrap", "above the top"),
        ("sparse_vlm", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import yaml", "yaml"),
        ("bootstrap", "from llm_integration import config", "llm_integration"),
        ("bootstrap", "async def late():\n    from eval.engine import run", "eval.engine"),
        ("llm_integration", "import bootstrap.teacher as teacher", "bootstrap.teacher"),
        ("llm_integration", "import eval", "eval"),
        ("bootstrap", "__import__('eval')", "eval"),
        ("eval", "import tests.conftest", "tests.conftest"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, package: str, code: str, found: str) -> None:
    folder = tmp_path / package / "deep"
    folder.mkdir(parents=True)
    (folder / "module.py").write_text(code)
    (violation,) = find_violations(tmp_path)
    assert violation.startswith(f"{package}/deep/module.py:")
    assert found in violation


@pytest.mark.parametrize(
    ("package", "code"),
    [
        (
            "sparse_vlm",
            "import torch.nn, numpy, json\nfrom PIL import Image\nfrom ..rois import x\nfrom . import y",
        ),
        ("bootstrap", "import timm\nfrom sparse_vlm import load_encoder\nfrom bootstrap.data import folder"),
        (
            "eval",
            "from llm_integration.generate import generate\nfrom bootstrap.teacher import load_teacher\n"
            "import sparse_vlm",
        ),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, package: str, code: str) -> None:
    folder = tmp_path / package / "deep"
    folder.mkdir(parents=True)
    (folder / "module.py").write_text(code)
    assert find_violations(tmp_path) == []
