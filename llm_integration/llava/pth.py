"""Switches encoder directories on for every Python of this environment, and off again.

    python -m llm_integration.llava.pth install
    python -m llm_integration.llava.pth status
    python -m llm_integration.llava.pth remove

For people who have to keep LLaVA's command lines exactly as they are. ``install`` writes one ``.pth`` file
into the environment's site-packages; Python reads it at each start and plugs in, which imports nothing heavy.
It stays until ``remove``.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

FILE_NAME = "sparse_vlm_llava.pth"
# One line, as site.py wants it. An environment from which sparse-vlm was uninstalled has to start as ever.
_LINE = (
    "import importlib.util; importlib.util.find_spec('llm_integration') and "
    "importlib.import_module('llm_integration.llava').plug_in()\n"
)


def path() -> Path:
    """Where the file goes: site-packages of the running Python's environment."""
    return Path(sysconfig.get_paths()["purelib"]) / FILE_NAME


def install() -> str:
    """Write the file and say so.

    Raises:
        SystemExit: if the environment cannot be written to.
    """
    target = path()
    # Half a line would be an error in every Python that starts; sparse_vlm.atomic would import torch here.
    temporary = target.with_name(f"{FILE_NAME}.new")
    try:
        temporary.write_text(_LINE, encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        raise SystemExit(f"cannot write {target}: {error.strerror}; use an environment of your own") from None
    return f"installed {target}"


def remove() -> str:
    """Delete the file and say so."""
    target = path()
    if not target.exists():
        return f"not installed: there is no {target}"
    target.unlink()
    return f"removed {target}"


def status() -> str:
    """Say whether the file is there."""
    target = path()
    return f"installed {target}" if target.exists() else f"not installed: there is no {target}"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llm_integration.llava.pth", description="Plug LLaVA in for a whole environment."
    )
    commands = {"install": install, "remove": remove, "status": status}
    parser.add_argument("command", choices=sorted(commands))
    print(commands[parser.parse_args(arguments).command]())


if __name__ == "__main__":
    main()
