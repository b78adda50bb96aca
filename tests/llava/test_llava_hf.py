"""What an installed LLaVA has trained, converted by and asked through today's transformers.

Two environments take part: LLaVA's, where this runs, and the project's own, whose Python `make test-llava`
names.
"""

from __future__ import annotations

import json
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

THEIRS = """
import json
from llava.conversation import conv_templates

prompts = {}
for name in ("vicuna_v1", "chatml_direct", "mpt"):
    talk = conv_templates[name].copy()
    for role, text in zip(2 * talk.roles, ("<image>\\nWhat colour is it?", "Red.", "And now?", None)):
        talk.append_message(role, text)
    prompts[name] = talk.get_prompt()
print("prompts:" + json.dumps(prompts))
"""

OURS = """
import json
from llm_integration.from_upstream import CONVERSATIONS
from llm_integration.templates import build_template
from transformers.utils.chat_template_utils import render_jinja_template

texts = ("<image>\\nWhat colour is it?", "Red.", "And now?")
turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), texts)]
prompts = {}
for name in ("vicuna_v1", "chatml_direct", "mpt"):
    jinja = build_template("own", CONVERSATIONS[name]) if CONVERSATIONS[name] else build_template(name)
    rendered, _ = render_jinja_template(
        [turns], chat_template=jinja, add_generation_prompt=True, eos_token="</s>"
    )
    prompts[name] = rendered[0]
print("prompts:" + json.dumps(prompts))
"""


def _find_ours() -> str:
    """The Python of the project's own environment."""
    ours = os.environ.get("SPARSE_VLM_PYTHON", "")
    if not Path(ours).is_file():
        pytest.skip("the project's own environment is not there; see make test-llava")
    return ours


def test_conversations_are_written_as_the_original_writes_them(lab: Lab) -> None:
    theirs, ours = (
        json.loads(said.rpartition("prompts:")[2].splitlines()[0])
        for said in (lab.run("-c", THEIRS), lab.run("-c", OURS, python=_find_ours()))
    )
    assert ours == theirs


@pytest.mark.parametrize("tuned", [False, True])
def test_a_converted_checkpoint_answers_as_the_original(lab: Lab, tuned: bool) -> None:
    ours = _find_ours()
    name = f"llava-for-hf-{tuned}"
    more = ("--unfreeze_mm_vision_tower", "True", "--mm_vision_select_feature", "cls_patch") if tuned else ()
    lab.train(name, "--image_aspect_ratio", "pad", *more)
    picture, recorded = lab.pictures / "7.png", lab.folder / f"{name}.pt"
    lab.fork(lab.record, str(lab.folder / name), str(picture), str(recorded))
    places = (lab.folder / name, lab.folder / f"{name}-hf", picture, recorded)
    assert "the same answers" in lab.run("-c", COMPARE, *map(str, places), python=ours)
