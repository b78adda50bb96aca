"""Every command in README, docs and configurations is real: program, module, flags, files and settings.

Each module of ours that a document runs is also run by some test; `--help` alone is not enough.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PACKAGES = ("sparse_vlm", "bootstrap", "llm_integration", "eval")

# Other people's programs; what they do with their flags is theirs to test.
FOREIGN = {"git", "cd", "pip", "tar", "mkdir", "export", "source", "curl", "wget", "lmms_eval", "tensorboard"}
TOOLS = {"pytest", "ruff", "mypy", "pre-commit"}
# A module that starts another program hands it every word after that program's name.
WRAPPERS = {"llm_integration.llava"}
# Reads (configuration, overrides) and refuses what is wrong; its module takes CONFIG.yaml key=value ...
READERS = {
    "bootstrap.train": "bootstrap.config:read_config",
    "llm_integration.train": "llm_integration.config:load_settings",
    "eval.run": "eval.config:load_settings",
    "eval.pareto": "eval.baselines.config:load_settings",
}


def _load_commands() -> tuple[Callable[..., list], Callable[..., list]]:
    # Loaded by path: under importlib mode the tests' folder is not on the search path.
    spec = importlib.util.spec_from_file_location(
        "contract_commands", Path(__file__).with_name("commands.py")
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.read_document, module.split_commands


read_document, split_commands = _load_commands()
COMMANDS = [c for path in [*DOCUMENTS, *CONFIGS] for c in read_document(path, str(path.relative_to(ROOT)))]
MODULES = sorted({c.module for c in COMMANDS if c.module and c.module.partition(".")[0] in PACKAGES})


# One interpreter for all: what costs is importing torch and transformers, not saying what one's flags are.
_SAY_HELP = """
import contextlib, io, json, runpy, sys
said = {}
for module in sys.argv[1:]:
    sys.argv, out, status = [module, "--help"], io.StringIO(), "no SystemExit"
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code
        except Exception as error:
            status = repr(error)
    said[module] = [status, out.getvalue()]
print(json.dumps(said))
"""


@functools.cache
def _read_all_help() -> dict[str, tuple[object, str]]:
    modules = sorted({c.module for c in COMMANDS if c.module in MODULES and c.flags} - WRAPPERS)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SAY_HELP, *modules],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )
    assert done.returncode == 0, f"asking {', '.join(modules)} for --help failed:\n{done.stderr}"
    return {name: tuple(said) for name, said in json.loads(done.stdout.splitlines()[-1]).items()}


def read_help(module: str) -> str:
    """What `python -m module --help` prints."""
    status, said = _read_all_help()[module]
    assert status in (0, None), f"python -m {module} --help ended with {status}"
    return said


def find_faults(command, help_of: Callable[[str], str] = read_help) -> Iterator[str]:
    """What is wrong with a command, one sentence each."""
    module, program = command.module, Path(command.program).name
    if module:
        if module.partition(".")[0] not in PACKAGES:
            if module.partition(".")[0] not in ("pip", "pytest", "venv", "llava", "lmms_eval"):
                yield f"{module} is neither ours nor known"
            return
        path = ROOT.joinpath(*module.split("."))
        if not (path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()):
            yield f"there is no module {module}"
            return
        flags = [] if module in WRAPPERS else command.flags
        for flag in flags:
            if not re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", help_of(module)):
                yield f"{module} has no flag {flag}"
        configs = [word for word in command.arguments if word.startswith("configs/")]
        yield from (f"there is no file {word}" for word in configs if not (ROOT / word).is_file())
        if module in READERS and configs and (ROOT / configs[0]).is_file():
            yield from _read_settings(READERS[module], configs[0], command.arguments)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        for word in command.arguments:
            name, equals, _ = word.partition("=")
            if not re.search(
                rf"^{re.escape(name)} \?=" if equals else rf"^{re.escape(name)}:", makefile, re.M
            ):
                yield f"the Makefile has no {'variable' if equals else 'target'} {name}"
    elif "/" in command.program or command.program.endswith((".py", ".sh")):
        if not command.program.startswith(".venv/") and not (ROOT / command.program).is_file():
            yield f"there is no file {command.program}"
    elif program in ("python", "python3"):
        yield f"write {program} -m MODULE, so that it can be checked"
    elif program not in FOREIGN | TOOLS:
        yield f"the program {program} is not known"


def _read_settings(reader: str, config: str, arguments: tuple[str, ...]) -> Iterator[str]:
    name, _, function = reader.partition(":")
    overrides = tuple(w for w in arguments if re.match(r"[a-z_0-9.]+=", w))
    try:
        getattr(importlib.import_module(name), function)(ROOT / config, overrides)
    except ValueError as error:
        yield str(error)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.place}: {' '.join(c.words)[:60]}")
def test_a_documented_command_is_real(command) -> None:
    assert list(find_faults(command)) == []


def test_the_readme_says_how_to_begin() -> None:
    said = {c.words for c in COMMANDS if c.place == "README.md"}
    assert {("make", "quickstart"), ("make", "test")} <= said


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_configuration_says_what_it_is(path: Path) -> None:
    head = "\n".join(path.read_text("utf-8").splitlines()[:12])
    for words in (("# Reproduces:", "# Makes "), ("# Hardware:",), ("# Launch:",)):
        assert any(word in head for word in words), f"{path.name} lacks {words[0]!r} in its first lines"


@pytest.mark.parametrize("module", MODULES)
def test_a_documented_module_is_run_by_a_test(module: str) -> None:
    paths = [p for p in (ROOT / "tests").rglob("test_*.py") if p != Path(__file__)]
    assert any(runs_module(ast.parse(path.read_text("utf-8")), module) for path in paths), (
        f"no test runs {module}; name it after '-m' in a subprocess, or call its main()"
    )


def runs_module(tree: ast.AST, module: str) -> bool:
    """Whether a test file names the module to a subprocess or imports its `main`."""
    package, _, last = module.rpartition(".")
    whole = main_of = False
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value == module or f"-m {module} " in f"{node.value} ":
                return True
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            if node.module in (module, f"{module}.__main__") and "main" in names:
                return True
            whole |= node.module == package and last in names
        elif isinstance(node, ast.Import):
            whole |= any(alias.name == module for alias in node.names)
        elif isinstance(node, ast.Attribute):
            main_of |= node.attr == "main"
    return whole and main_of


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("python -m bootstrap.no_such_thing", "there is no module bootstrap.no_such_thing"),
        ("torchrun --nproc-per-node 8 -m sparse_vlm.convert --fast", "sparse_vlm.convert has no flag --fast"),
        ("python -m sparse_vlm.convert configs/none.yaml", "there is no file configs/none.yaml"),
        ("make no-such-target", "the Makefile has no target no-such-target"),
        ("make test NOTHING=1", "the Makefile has no variable NOTHING"),
        ("./none.sh", "there is no file ./none.sh"),
        ("frobnicate --all", "the program frobnicate is not known"),
        ("python train.py", "write python -m MODULE, so that it can be checked"),
        ("python -m strangers.thing", "strangers.thing is neither ours nor known"),
    ],
)
def test_a_planted_fault_is_found(line: str, fault: str) -> None:
    (command,) = split_commands(line, "here")
    assert list(find_faults(command, help_of=lambda module: "usage: --faster --strict")) == [fault]


def test_blocks_are_taken_apart(tmp_path: Path) -> None:
    text = (
        "```bash\nA=1 make test && cd x  # go there\npython -m a.b \\\n  --c=1 'd e'\n```\n"
        "```python\nmake()\n```\n```console\n$ git status\non branch\n```\n"
    )
    (tmp_path / "a.md").write_text(text)
    words = [c.words for c in read_document(tmp_path / "a.md", "a.md")]
    assert words == [
        ("make", "test"),
        ("cd", "x"),
        ("python", "-m", "a.b", "--c=1", "d e"),
        ("git", "status"),
    ]
    (tmp_path / "a.yaml").write_text(
        "# Reproduces: x\n# Launch: python -m a.b \\\n#   c=1 \\\n#   d=2\ne: 1\n"
    )
    assert [c.words for c in read_document(tmp_path / "a.yaml", "a.yaml")] == [
        ("python", "-m", "a.b", "c=1", "d=2")
    ]


@pytest.mark.parametrize(
    ("code", "runs"),
    [
        ("run([sys.executable, '-m', 'eval.compare'])", True),
        ("from eval.compare import main", True),
        ("from eval import compare\ncompare.main([])", True),
        ("import eval.compare", False),
        ("from eval.compare import compare_runs", False),
    ],
)
def test_what_counts_as_running_a_module(code: str, runs: bool) -> None:
    assert runs_module(ast.parse(code), "eval.compare") is runs
