"""What runs in processes of its own: LLaVA's training, its loader, its generation."""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
from typing import Any

from PIL import Image

# What has to come first under DeepSpeed on a CPU: LLaVA synchronises CUDA before it saves, where there is
# nothing to synchronise; DeepSpeed would compile collectives over shared memory for minutes; and where it
# puts several weights together it awaits the last one only, which is right on CUDA and repaired in later
# releases. The last lines are for the tests.
ON_CPU = """
import deepspeed, torch
torch.cuda.synchronize = lambda *args: None
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
from deepspeed.runtime.zero.partition_parameters import Init
gather = Init._allgather_params_coalesced
def gather_one_by_one(self, weights, *rest, **more):
    for weight in weights:
        gather(self, [weight], *rest, **more)
Init._allgather_params_coalesced = gather_one_by_one
initialize = deepspeed.initialize
def initialize_and_tell(**arguments):
    made = initialize(**arguments)
    print("DeepSpeed runs with ZeRO stage", made[0].zero_optimization_stage(), flush=True)
    return made
deepspeed.initialize = initialize_and_tell
"""
ASK = "<image>\nWhat colour is it?"


def train(flags: list[str], plugged: bool) -> None:
    """llava.train.train, through our launcher or without the plug."""
    from llm_integration.llava.__main__ import main

    if plugged:
        main(["-m", "llava.train.train", *flags])
        return
    sys.argv = ["train.py", *flags]
    runpy.run_module("llava.train.train", run_name="__main__", alter_sys=True)


def train_under_deepspeed(given: list[str], environment: dict[str, Any]) -> None:
    """What DeepSpeed's launcher starts: our launcher, with what is in the environment then."""
    from llm_integration.llava.__main__ import main

    os.environ.update({name: str(value) for name, value in environment.items()})
    exec(ON_CPU, {})
    main(given)


def load(folder: str, base: str | None, **more: Any) -> tuple[Any, Any, Any]:
    """LLaVA's own loading, on the CPU: tokenizer, model in fp32, image processor."""
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    name = get_model_name_from_path(folder)
    tokenizer, model, processor, _ = load_pretrained_model(folder, base, name, device="cpu", **more)
    return tokenizer, model.float(), processor


def generate(
    folder: str, base: str | None, picture: str, tower: str, out: str | None, plugged: bool,
    more: dict[str, Any],
) -> None:  # fmt: skip
    """LLaVA's own loading and generation; checks the tower, merges and saves if asked to."""
    import torch
    from llava.mm_utils import process_images, tokenizer_image_token

    import sparse_vlm
    from llm_integration.llava import plugged_in

    with plugged_in() if plugged else contextlib.nullcontext():
        tokenizer, model, processor = load(folder, base, **more)
    expected = sparse_vlm.load_encoder(tower).state_dict()
    found = model.get_vision_tower().encoder.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key].float(), found[key]) for key in found)
    assert all(value.numel() and torch.isfinite(value).all() for value in model.state_dict().values())
    images = process_images([Image.open(picture)], processor, model.config)
    tokens = tokenizer_image_token(f"USER: {ASK} ASSISTANT:", tokenizer, return_tensors="pt")[None]
    with torch.inference_mode():
        seen = [
            model.generate(
                tokens, images=batch, do_sample=False, max_new_tokens=5, min_new_tokens=5,
                output_scores=True, return_dict_in_generate=True,
            )
            for batch in (images, -images)
        ]  # fmt: skip
    assert len(seen[0].scores) == 5
    assert not torch.equal(seen[0].scores[0], seen[1].scores[0]), "the picture makes no difference"
    if out is not None:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


def record(folder: str, picture: str, out: str) -> None:
    """What LLaVA makes of a picture and a question: tokens, pixels, logits in fp32, for another Python."""
    import torch
    from llava.conversation import conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token

    from llm_integration.llava import plugged_in

    with plugged_in():
        tokenizer, model, processor = load(folder, None)
    talk = conv_templates["vicuna_v1"].copy()
    talk.append_message(talk.roles[0], ASK)
    talk.append_message(talk.roles[1], None)
    tokens = tokenizer_image_token(talk.get_prompt(), tokenizer, return_tensors="pt")
    pixels = process_images([Image.open(picture)], processor, model.config)
    with torch.inference_mode():
        logits = model(input_ids=tokens[None], images=pixels).logits[0]
    torch.save({"tokens": tokens, "pixels": pixels, "logits": logits.clone()}, out)
