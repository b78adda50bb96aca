"""Everything public says what it is, and every function says what it returns."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("sparse_vlm", "bootstrap", "llm_integration", "eval")
Function = (ast.FunctionDef, ast.AsyncFunctionDef)


def find_silence(root: Path) -> list[str]:
    """Modules, public functions and public classes without a docstring; functions without a return type."""
    found = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            found += [f"{path.relative_to(root)}{complaint}" for complaint in _silence(path)]
    return found


def _silence(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text("utf-8"))
    if not ast.get_docstring(tree):
        yield ": the module has no docstring"
    public = [n for n in tree.body if isinstance(n, (*Function, ast.ClassDef)) and not n.name.startswith("_")]
    for node in public:
        if not ast.get_docstring(node):
            yield f":{node.lineno}: {node.name} has no docstring"
    for inner in ast.walk(tree):
        if isinstance(inner, Function) and inner.returns is None:
            yield f":{inner.lineno}: {inner.name} has no return type"


def test_everything_public_is_documented() -> None:
    assert find_silence(ROOT) == []


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("", "the module has no docstring"),
        ('"""A."""\ndef build() -> int:\n    return 1', "build has no docstring"),
        ('"""A."""\nclass Thing:\n    pass', "Thing has no docstring"),
        ('"""A."""\ndef _hidden():\n    return 1', "_hidden has no return type"),
        ('"""A."""\nclass _T:\n    def m(self):\n        return 1', "m has no return type"),
    ],
)
def test_planted_silence_is_heard(tmp_path: Path, code: str, complaint: str) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "a.py").write_text(code)
    (heard,) = find_silence(tmp_path)
    assert heard.endswith(complaint)
