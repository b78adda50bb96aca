"""Merge a run's result into one plain LLaVA directory.

``python -m llm_integration.export --run RUN_DIR/final --out OUT_DIR``
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from .assemble import DTYPES, check_place, save_llava
from .load import read_json, suggest_final
from .result import RUN_FILE, base_of, is_result, load_model, load_model_processor


def export(run: Path, out: Path, dtype: torch.dtype | None = None) -> None:
    """Write a run's result, adapters folded in, as a plain LLaVA directory.

    Args:
        run: the result of a run.
        out: where to.
        dtype: precision; by default the base model's.

    Raises:
        ValueError: if the directory is no result, or does not fit its base.
    """
    check_place(out, run, base_of(run), over="exported")
    if not is_result(run) and (run / "config.json").is_file():
        raise ValueError(f"{run} is a whole LLaVA directory already: there is nothing to export")
    if not is_result(run):
        raise ValueError(
            f"{run} holds no result of llm_integration.train (no {RUN_FILE}){suggest_final(run)}"
        )
    manifest = read_json(run / RUN_FILE)
    model = load_model(run, dtype)
    processor = load_model_processor(run)
    facts = {key: manifest[key] for key in manifest if key != "tower_sha256"}
    save_llava(model, processor, out, facts, over="exported")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m llm_integration.export", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the 'final' folder of a run")
    parser.add_argument("--out", type=Path, required=True, help="LLaVA directory to write")
    parser.add_argument("--dtype", choices=list(DTYPES), help="precision (default: the base model's)")
    options = parser.parse_args(arguments)
    try:
        export(options.run, options.out, DTYPES[options.dtype] if options.dtype else None)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
