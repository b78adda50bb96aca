"""The options that every command about costs has."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from eval.costs.shapes import list_llms, list_towers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_cost_options(
    parser: argparse.ArgumentParser, rounds: int, dtypes: Sequence[str] = tuple(DTYPES)
) -> None:
    """Add what is measured, behind which language model, on what, and where the record goes.

    Args:
        parser: the command's.
        rounds: how many timed rounds there are by default.
        dtypes: the names of :data:`DTYPES` that the command can work in.
    """
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        help=f"{', '.join(list_towers())}, an encoder directory or a LLaVA directory; may be given again",
    )
    parser.add_argument("--baseline", default="vit_l_14_336", help="the tower that ratios refer to")
    parser.add_argument("--llm", default="7b", help=f"{', '.join(list_llms())} (default 7b)")
    parser.add_argument("--words", type=int, default=64, help="tokens of a question (default 64)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="conversations at once")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"timed rounds (default {rounds})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(dtypes), default="fp32")
    parser.add_argument("--json", type=Path, help="append the record to this file of JSON lines")
