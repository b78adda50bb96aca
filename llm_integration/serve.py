"""Answer over HTTP in OpenAI's manner: ``transformers serve``, which knows our tower.

``python -m llm_integration.serve --model LLAVA_DIR --port 8000``

Further options are those of ``transformers serve``. Pictures are prepared with the bits the encoder was
trained with.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

from transformers import AutoProcessor
from transformers.utils import is_serve_available

from .load import load_checked_processor, load_llava_config
from .result import is_result
from .templates import check_heard


def check_model(directory: Path) -> None:
    """See that a directory holds a LLaVA that can be served.

    Raises:
        ValueError: if it holds none, a run's result, or a template that leaves out what is asked.
    """
    if is_result(directory):
        raise ValueError(
            f"{directory} is the result of a run; make a plain model of it first: "
            f"python -m llm_integration.export --run {directory} --out DIR"
        )
    processor: Any = load_checked_processor(directory, load_llava_config(directory))
    check_heard(processor.tokenizer, processor.chat_template)


def find_server() -> Callable[[], None]:
    """The command line of transformers.

    Raises:
        ValueError: if what it serves with is not installed.
    """
    if not is_serve_available():
        raise ValueError('the server needs some packages more: pip install "sparse-vlm[serve]"')
    module = importlib.import_module("transformers.cli.transformers")
    return cast("Callable[[], None]", module.main)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m llm_integration.serve", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="plain LLaVA directory")
    options, others = parser.parse_known_args(arguments)
    try:
        check_model(options.model)
        serve = find_server()
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    # transformers would prefer torchvision's bits, which differ.
    exact = functools.partial(AutoProcessor.from_pretrained, backend="pil")
    words = ["transformers", "serve", str(options.model), *others]
    with patch.object(AutoProcessor, "from_pretrained", exact), patch.object(sys, "argv", words):
        serve()


if __name__ == "__main__":
    main()
