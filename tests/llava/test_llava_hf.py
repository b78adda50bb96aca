"""What an installed LLaVA has trained, converted by and asked through today's transformers.

Two environments take part: LLaVA's, where this runs, and the project's own, whose Python `make test-llava`
names.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("llava", reason="LLaVA is not installed; see make test-llava")

if TYPE_CHECKING:
    from .conftest import Lab

COMPARE = """
import sys
import torch
from PIL import Image
from llm_integration.from_upstream import main
from llm_integration.load import load_checked_processor, load_llava

checkpoint, out, picture, recorded = sys.argv[1:]
main(["--llava", checkpoint, "--out", out, "--dtype", "float32"])
model = load_llava(out)
processor = load_checked_processor(out, model.config)
turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is it?"}]}
prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
batch = processor(text=prompt, images=[Image.open(picture)], return_tensors="pt")
wanted = torch.load(recorded)
assert torch.equal(batch["pixel_values"], wanted["pixels"])
tokens = batch["input_ids"][0]
seen = tokens == model.config.image_token_id
first = int(seen.nonzero()[0])
assert seen[first : first + int(seen.sum())].all()
assert torch.equal(torch.cat([tokens[:first], tokens[first + int(seen.sum()) :]]),
                   wanted["tokens"][wanted["tokens"] >= 0])
assert int((wanted["tokens"] < 0).nonzero()[0]) == first
with torch.no_grad():
    logits = model(**batch).logits[0]
# LLaVA's loader rounds to half precision on its way.
torch.testing.assert_close(logits[:, : wanted["logits"].shape[1]], wanted["logits"], rtol=1e-3, atol=2e-3)
print("the same answers")
"""


@pytest.mark.parametrize("tuned", [False, True])
def test_a_converted_checkpoint_answers_as_the_original(lab: Lab, tuned: bool) -> None:
    ours = os.environ.get("SPARSE_VLM_PYTHON", "")
    if not Path(ours).is_file():
        pytest.skip("the project's own environment is not there; see make test-llava")
    name = f"llava-for-hf-{tuned}"
    more = ("--unfreeze_mm_vision_tower", "True", "--mm_vision_select_feature", "cls_patch") if tuned else ()
    lab.train(name, "--image_aspect_ratio", "pad", *more)
    picture, recorded = lab.pictures / "7.png", lab.folder / f"{name}.pt"
    lab.fork(lab.record, str(lab.folder / name), str(picture), str(recorded))
    places = (lab.folder / name, lab.folder / f"{name}-hf", picture, recorded)
    assert "the same answers" in lab.run("-c", COMPARE, *map(str, places), python=ours)
