"""Model directories that bring their own code."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.dynamic_module_utils import get_imports

from llm_integration.hf import SparseFormerVisionModel
from llm_integration.load import load_llava
from llm_integration.remote_code import add_code, collect_code, main

# Our packages are made unimportable, as on a machine that does not have them.
_READ = """
import sys
sys.modules["sparse_vlm"] = sys.modules["llm_integration"] = None
import torch
from transformers import AutoModel, AutoModelForImageTextToText
kind, tower, llava, out = sys.argv[1:]
x = torch.linspace(-1, 1, 3 * 30 * 40).reshape(1, 3, 30, 40)
if kind == "tower":
    model = AutoModel.from_pretrained(tower, trust_remote_code=True)
    torch.save(model(x).last_hidden_state, out)
else:
    model = AutoModelForImageTextToText.from_pretrained(llava, trust_remote_code=True)
    seen = model.model.vision_tower(x).last_hidden_state
    body = AutoModel.from_pretrained(llava, trust_remote_code=True)
    assert torch.equal(body.vision_tower(x).last_hidden_state, seen)
    assert torch.equal(body.language_model.embed_tokens.weight, model.get_input_embeddings().weight)
    torch.save((seen, model(input_ids=torch.arange(5, 9)[None]).logits), out)
"""


def test_code_is_flat_and_relative() -> None:
    code = collect_code()
    assert {"configuration_sparseformer.py", "modeling_sparseformer.py", "focusing.py"} <= code.keys()
    for name, text in code.items():
        assert "from sparse_vlm" not in text, name
        assert "import sparse_vlm" not in text, name


def test_code_asks_for_torch_and_transformers_only(tmp_path: Path) -> None:
    """What transformers asks for before it reads code of a repository; Triton is not for every machine."""
    asked: set[str] = set()
    for name, text in collect_code().items():
        (tmp_path / name).write_text(text)
        asked |= set(get_imports(tmp_path / name))
    assert "triton" not in asked
    assert asked - set(sys.stdlib_module_names) <= {"torch", "transformers", "numpy", "PIL", "safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tower", "llava"])
def test_a_machine_without_us_reads_it(encoder_dir: Path, llava_dir: Path, tmp_path: Path, kind: str) -> None:
    tower, llava = tmp_path / "tower", tmp_path / "llava"
    model = SparseFormerVisionModel.from_encoder_directory(encoder_dir)
    model.save_pretrained(tower)
    shutil.copytree(llava_dir, llava)
    add_code(tower)
    main(["--model", str(llava)])
    script = tmp_path / "read.py"
    script.write_text(_READ)
    words = [sys.executable, str(script), kind, str(tower), str(llava), str(tmp_path / "out.pt")]
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    x = torch.linspace(-1, 1, 3 * 30 * 40).reshape(1, 3, 30, 40)
    read = torch.load(tmp_path / "out.pt")
    if kind == "llava":
        read, logits = read
        ours = load_llava(llava_dir)
        assert not ours.config.text_config.tie_word_embeddings  # an output layer of its own is read, too
        torch.testing.assert_close(logits, ours(input_ids=torch.arange(5, 9)[None]).logits)
    torch.testing.assert_close(read, model(x).last_hidden_state)


def test_other_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="holds no SparseFormer"):
        add_code(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["--model", str(tmp_path)])
    assert stopped.value.code == 2
