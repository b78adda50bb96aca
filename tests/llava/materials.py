"""A tiny encoder, a tiny language model, pictures and conversations in LLaVA's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "white": (250, 250, 250)}


def make_encoder(folder: Path, seed: int = 0, **changes: Any) -> None:
    """A random encoder of 49 tokens, 64 wide."""
    import torch

    import sparse_vlm

    torch.manual_seed(seed)
    config = sparse_vlm.SparseFormerConfig(
        stem_channels=16, num_latents=49, cls_token=False, focusing_width=32, focusing_heads=2,
        focusing_mlp_width=64, focusing_repeats=2, num_points=4, mixing_points=8, generator_width=16,
        handover_generator_width=16, width=64, depth=2, heads=2, mlp_width=128, pooling="mean",
        output_width=0, head_bias=False,
    )  # fmt: skip
    transform = sparse_vlm.TransformConfig(image_size=64)
    sparse_vlm.build_encoder(config.replace(**changes), transform).save(folder, {"teacher": "none"})


def make_llm(folder: Path) -> None:
    """A random two-layer Llama with a real SentencePiece tokenizer, as Vicuna's files are."""
    import sentencepiece
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

    folder.mkdir()
    corpus = folder.parent / "corpus.txt"
    sentences = [
        "A chat between a curious user and an artificial intelligence assistant.",
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        "USER: What colour is it? ASSISTANT: It is red. It is green. It is blue. It is white.",
    ]
    corpus.write_text("\n".join(sentences * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=400, model_type="bpe",
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2, hard_vocab_limit=False,
        normalization_rule_name="identity", character_coverage=1.0, remove_extra_whitespaces=False,
    )  # fmt: skip
    tokenizer = LlamaTokenizer(str(folder / "tokenizer.model"), legacy=False)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def make_pictures(folder: Path, captions: Path, chats: Path) -> None:
    """Eight pictures, a conversation about each, and some without a picture for all but pre-training."""
    folder.mkdir()
    records = []
    for number in range(8):
        name, colour = list(COLOURS.items())[number % 4]
        Image.new("RGB", (80 + 10 * number, 72), colour).save(folder / f"{number}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhat colour is it?"},
            {"from": "gpt", "value": f"It is {name}."},
        ]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    captions.write_text(json.dumps(records), encoding="utf-8")
    for number in range(8, 12):  # without a picture, as some of LLaVA's own mix are
        turns = [{"from": "human", "value": "What colour is it?"}, {"from": "gpt", "value": "It is red."}]
        records.append({"id": str(number), "conversations": turns})
    chats.write_text(json.dumps(records), encoding="utf-8")
