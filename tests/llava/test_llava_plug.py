"""The plug in an installed LLaVA: in and out again, for a whole environment, and what happens without it."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("llava", reason="LLaVA is not installed; see make test-llava")

if TYPE_CHECKING:
    from .conftest import Lab

UNFREEZE = ("--unfreeze_mm_vision_tower", "True")
IN_AND_OUT = """
import importlib, sys
from llm_integration.llava import plugged_in

def functions():
    arch = importlib.import_module("llava.model.llava_arch")
    return [
        importlib.import_module("llava.model.multimodal_encoder.builder").build_vision_tower,
        arch.build_vision_tower,
        arch.LlavaMetaModel.initialize_vision_modules,
        arch.LlavaMetaForCausalLM.initialize_vision_tokenizer,
        importlib.import_module("llava.train.llava_trainer").LLaVATrainer.__init__,
        importlib.import_module("transformers.hf_argparser").HfArgumentParser.__init__,
    ]

def compare(inside, outside, again):
    assert not any(a is b for a, b in zip(inside, outside)), "something is not changed, or not changed back"
    assert outside == again and outside[0] is outside[1]
    assert all(function.__code__.co_filename.find("llm_integration") < 0 for function in outside)

finders = list(sys.meta_path)
before = [] if "llava" not in sys.modules else functions()
with plugged_in():
    inside = functions()
outside = functions()
compare(inside, outside, before or outside)
with plugged_in():
    inside = functions()
compare(inside, functions(), outside)
assert sys.meta_path == finders
"""


def test_the_context_manager_is_undone_in_an_imported_llava_and_in_a_fresh_one(lab: Lab) -> None:
    lab.fork(exec, IN_AND_OUT, {})
    lab.run("-c", IN_AND_OUT)


def test_deepspeeds_launcher_passes_a_module_on() -> None:
    from deepspeed.launcher.runner import parse_args

    from llm_integration.llava.__main__ import split_command

    ours = ["-m", "llava.train.train", "--deepspeed", "zero3.json", "--lora_enable", "True"]
    parsed = parse_args(["--num_gpus", "2", "--module", "llm_integration.llava", *ours])
    assert (parsed.module, parsed.user_script, parsed.user_args) == (True, "llm_integration.llava", ours)
    started = ["--local_rank=1", *parsed.user_args]
    assert split_command(started) == ("llava.train.train", None, ["--local_rank=1", *ours[2:]])


def test_the_pth_file_lets_an_unmodified_command_line_train(lab: Lab) -> None:
    lab.run("-m", "venv", "--without-pip", str(lab.folder / "env"))
    python = str(lab.folder / "env" / "bin" / "python")
    packages = Path(
        lab.run("-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", python=python).strip()
    )
    assert packages.is_relative_to(lab.folder)
    # All that is installed in this environment, seen from one of its own.
    (packages / "all_the_rest.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pth = ("-m", "llm_integration.llava.pth")
    command = ("-m", "llava.train.train", *lab.flags("llava-pth", *UNFREEZE, *lab.cpu, "--max_steps", "1"))
    assert lab.run(*pth, "install", python=python).startswith("installed")
    lab.run(*command, python=python)
    lab.check_tuned(lab.folder / "llava-pth", lab.encoder)
    assert lab.run(*pth, "remove", python=python).startswith("removed")
    found = lab.run("-c", "import sys; print('llm_integration.llava' in sys.modules)", python=python)
    assert found.strip() == "False"


def test_without_the_plug_training_stops_instead_of_using_a_random_clip(lab: Lab) -> None:
    output = lab.train("llava-unplugged", "--tune_mm_mlp_adapter", "True", plugged=False, fails=True)
    assert "not a CLIP checkpoint" in output
    assert not (lab.folder / "llava-unplugged" / "mm_projector.bin").exists()


def test_anyres_tiles_with_the_flat_merge(lab: Lab) -> None:
    lab.fork(anyres, str(lab.encoder), str(lab.llm), str(lab.pictures / "7.png"))


def anyres(encoder: str, llm: str, picture: str) -> None:
    """Four tiles and the whole picture: 5 x 49 tokens in the place of one image mark."""
    from types import SimpleNamespace

    import torch
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import process_images
    from llava.model import LlavaLlamaForCausalLM
    from PIL import Image

    from llm_integration.llava import plugged_in

    values = SimpleNamespace(
        vision_tower=encoder, mm_vision_select_layer=-1, mm_vision_select_feature="patch",
        pretrain_mm_mlp_adapter=None, mm_patch_merge_type="flat", mm_projector_type="linear",
    )  # fmt: skip
    with plugged_in():
        model = LlavaLlamaForCausalLM.from_pretrained(llm)
        model.get_model().initialize_vision_modules(values)
    model.config.image_aspect_ratio = "anyres"
    model.config.image_grid_pinpoints = [[128, 128]]
    processor = model.get_vision_tower().image_processor
    tiles = process_images([Image.open(picture), Image.new("RGB", (60, 60))], processor, model.config)
    assert tiles.shape == (2, 5, 3, 64, 64)
    tokens = torch.tensor([[1, IMAGE_TOKEN_INDEX, 5, 6]] * 2)
    for images in (tiles, list(tiles)):
        _, _, _, _, embeddings, _ = model.prepare_inputs_labels_for_multimodal(
            tokens, None, None, None, None, images, image_sizes=[(150, 72), (60, 60)]
        )
        assert embeddings.shape == (2, 3 + 5 * 49, 64)
