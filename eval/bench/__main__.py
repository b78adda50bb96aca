"""Benchmarks that anyone can run: ``python -m eval.bench encoder --batch 1 8``.

Everything that is compared runs in turn in one process. Printed are ratios, medians and quartiles; one JSON
record with device, versions and commit is appended to a file.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from eval.answers import InputError
from eval.cost import append_record
from eval.device import choose_device
from eval.outputs import check_output
from eval.provenance import describe_origin

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Flags that a command has no use for, so that none is accepted and left unread.
_UNREAD = {
    "memory": ("rounds",),
    "data": ("device", "dtype"),
    "kernels": ("threads",),
    "estimate": ("device", "dtype", "threads", "rounds"),
}
COMMANDS = {
    "encoder": "our encoder, the official one and ViTs",
    "parts": "where the time goes, beside the floor of arithmetic and bytes",
    "kernels": "our kernels against the plain PyTorch that they stand for (GPU)",
    "memory": "peak memory of a training step per picture",
    "data": "pictures per second of the data path",
    "training": "a bootstrap training step against a straightforward loop",
    "answer": "time to the first token and questions per second",
    "growth": "how cost grows, as charts",
    "estimate": "bootstrapping a large encoder on many GPUs, on paper",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(words)
    command = import_module(f"eval.bench.{options.command}")
    before = torch.get_num_threads()
    try:
        _check(options)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        report = command.run(options)
        settings = {key: str(value) for key, value in vars(options).items() if key != "json"}
        report["bench"] = options.command
        report["load_average"] = os.getloadavg()[0]
        report["provenance"] = describe_origin("eval.bench", words, settings, options.device)
        print(command.show(report))
        append_record(options.json, report)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(before)
    print(f"\n{report['provenance']['device']}; load average {report['load_average']:.1f}; {options.json}")
    return 0


def _check(options: argparse.Namespace) -> None:
    if options.rounds < 1 or (options.threads is not None and options.threads < 1):
        raise InputError("--rounds and --threads must be at least 1.")
    options.device = str(choose_device(options.device, "--device "))
    check_output(options.json, "--json")
    options.torch_dtype = _DTYPES[options.dtype]


def _add_common(parser: argparse.ArgumentParser, unread: Sequence[str]) -> None:
    """The flags of all commands but those that this one does not read."""
    flags: dict[str, dict[str, Any]] = {
        "device": {"default": "cpu", "help": "cpu (default) or cuda"},
        "dtype": {"choices": list(_DTYPES), "default": "fp32"},
        "threads": {"type": int, "help": "CPU threads; by default PyTorch's choice"},
        "rounds": {"type": int, "default": 7, "help": "timed rounds (default 7)"},
    }
    for name, settings in flags.items():
        if name in unread:
            parser.set_defaults(**{name: settings.get("default")})
        else:
            parser.add_argument(f"--{name}", **settings)
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("runs/bench.jsonl"),
        help="file of JSON lines to append the record to",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.bench",
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    usages = []
    for name, purpose in COMMANDS.items():
        part = commands.add_parser(name, help=purpose, description=purpose)
        _add_common(part, _UNREAD.get(name, ()))
        import_module(f"eval.bench.{name}").add_arguments(part)
        usages.append(part.format_usage())
    parser.epilog = "".join(usages)
    return parser


if __name__ == "__main__":
    sys.exit(main())
