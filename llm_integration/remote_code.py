"""Put the tower's code into a model directory, for machines without this package.

``python -m llm_integration.remote_code --model DIR``

Afterwards ``AutoModel.from_pretrained(DIR, trust_remote_code=True)`` reads a tower, and
``AutoModelForImageTextToText.from_pretrained(DIR, trust_remote_code=True)`` a whole LLaVA, with transformers
and torch alone. With ``llm_integration.hf`` imported the directory goes on working without that switch.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from sparse_vlm.atomic import write_atomic

from .load import read_json

_TOWER = {
    "AutoConfig": "configuration_sparseformer.SparseFormerVisionConfig",
    "AutoModel": "modeling_sparseformer.SparseFormerVisionModel",
}
_LLAVA = {
    "AutoConfig": "modeling_sparseformer_llava.SparseFormerLlavaConfig",
    "AutoModel": "modeling_sparseformer_llava.SparseFormerLlavaModel",
    "AutoModelForImageTextToText": "modeling_sparseformer_llava.SparseFormerLlava",
    "AutoModelForMultimodalLM": "modeling_sparseformer_llava.SparseFormerLlava",
}
# transformers asks for every package that the files of a repository import, but for those that are tried.
_OPTIONAL = re.compile(r"^import triton\nimport triton\.language as tl$", re.MULTILINE)
_TRIED = """try:
    import triton
    import triton.language as tl
except ImportError:
    raise"""
_LLAVA_FILE = "modeling_sparseformer_llava.py"
# A plain LLaVA looks its tower up among the registered models before any code of the tower has run.
_LLAVA_CODE = '''"""LLaVA with a SparseFormer for its vision tower: registers the tower, the rest is LLaVA."""

from transformers import AutoConfig, AutoModel, LlavaConfig, LlavaForConditionalGeneration, LlavaModel

from .configuration_sparseformer import SparseFormerVisionConfig
from .modeling_sparseformer import SparseFormerVisionModel

AutoConfig.register(SparseFormerVisionConfig.model_type, SparseFormerVisionConfig, exist_ok=True)
AutoModel.register(SparseFormerVisionConfig, SparseFormerVisionModel, exist_ok=True)


class SparseFormerLlavaConfig(LlavaConfig):
    """LlavaConfig, read after the tower was registered."""


class SparseFormerLlavaModel(LlavaModel):
    """LlavaModel, built after the tower was registered."""

    config_class = SparseFormerLlavaConfig

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, as below."""
        return False


class SparseFormerLlava(LlavaForConditionalGeneration):
    """LlavaForConditionalGeneration, built after the tower was registered."""

    config_class = SparseFormerLlavaConfig

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: its weights lie in files as those of any LLaVA, under names that transformers converts."""
        return False
'''


def collect_code() -> dict[str, str]:
    """The tower's source files by name, with relative imports only, all in one flat folder."""
    core, tower = files("sparse_vlm"), files("llm_integration.hf")
    wanted = ["configuration_sparseformer", "modeling_sparseformer"]
    code: dict[str, str] = {}
    while wanted:
        name = wanted.pop()
        if f"{name}.py" in code:
            continue
        place = tower if "sparseformer" in name else core
        text = place.joinpath(f"{name}.py").read_text(encoding="utf-8")
        text = re.sub(r"^from sparse_vlm\.(\w+) import", r"from .\1 import", text, flags=re.MULTILINE)
        code[f"{name}.py"] = _OPTIONAL.sub(_TRIED, text)
        wanted += re.findall(r"^\s*from \.(\w+) import", text, flags=re.MULTILINE)
    return code


def add_code(directory: Path) -> list[str]:
    """Write the code beside a model and name it in its configuration.

    Args:
        directory: a tower written by ``save_pretrained``, an encoder directory's copy, or a LLaVA directory.

    Returns:
        The names of the files written.

    Raises:
        ValueError: if the directory holds another kind of model.
    """
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"there is no model directory at {directory} (no config.json); of a run's result, make one with "
            "python -m llm_integration.export"
        )
    config = read_json(directory / "config.json")
    tower = config.get("vision_config", config)
    if tower.get("model_type") != "sparseformer_vision":
        raise ValueError(f"{directory} holds no SparseFormer (model type {tower.get('model_type')!r})")
    code = collect_code()
    if tower is not config:
        code[_LLAVA_FILE] = _LLAVA_CODE
    for name, text in code.items():
        write_atomic(directory / name, text)
    config["auto_map"] = _TOWER if tower is config else _LLAVA
    write_atomic(directory / "config.json", json.dumps(config, indent=2) + "\n")
    return sorted(code)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m llm_integration.remote_code", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="tower or LLaVA directory")
    options = parser.parse_args(arguments)
    try:
        names = add_code(options.model)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"added {', '.join(names)} to {options.model}")


if __name__ == "__main__":
    main()
