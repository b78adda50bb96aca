"""Runs a command of LLaVA with encoder directories plugged in.

    deepspeed --module llm_integration.llava llava/train/train_mem.py --vision_tower ENCODER_DIR ...
    python -m llm_integration.llava -m llava.eval.model_vqa_loader --model-path ...
    torchrun --nproc_per_node 2 -m llm_integration.llava -m llava.train.train ...

The first argument is a script, or ``-m`` and a module; everything after it is that command's own.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from llm_integration.processes import leave_process_group

from .plugin import plug_in


def split_command(arguments: list[str]) -> tuple[str | None, str | None, list[str]]:
    """Sort a command line.

    deepspeed puts ``--local_rank=N`` before the name of what it runs; it goes behind, to LLaVA.

    Args:
        arguments: what follows ``llm_integration.llava``.

    Returns:
        The module or None, the script or None, and its arguments.

    Raises:
        SystemExit: with the usage, if there is no command.
    """
    ours: list[str] = []
    rest = list(arguments)
    while rest and rest[0].startswith("--local"):
        ours.append(rest.pop(0))
        if "=" not in ours[-1] and rest:
            ours[-1] = f"{ours[-1]}={rest.pop(0)}"
    if rest[:1] in (["-h"], ["--help"]):
        sys.stdout.write(__doc__ or "")
        raise SystemExit(0)
    if rest[:1] == ["-m"] and len(rest) > 1:
        return rest[1], None, [*ours, *rest[2:]]
    if not rest or rest[0].startswith("-"):
        named = repr(rest[0]) if rest else "nothing"
        raise SystemExit(
            f"expected a script, or -m and a module, before LLaVA's flags, got {named}\n{__doc__}"
        )
    return None, rest[0], [*ours, *rest[1:]]


def main(arguments: list[str]) -> None:
    """Plug in and run the command in this process, as Python itself would."""
    module, script, rest = split_command(arguments)
    root = str(Path(__file__).resolve().parents[2])
    if script is not None:
        if not Path(script).is_file():
            raise SystemExit(f"there is no script {script!r}; to run a module, write -m before its name")
        sys.path[0] = str(Path(script).resolve().parent)
    if not any(Path(entry or ".").resolve() == Path(root) for entry in sys.path):
        sys.path.append(root)  # run from a checkout that is not installed: its folder was sys.path[0]
    plug_in()
    sys.argv = [script or str(module), *rest]
    if script is not None:
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(str(module), run_name="__main__", alter_sys=True)
    leave_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
