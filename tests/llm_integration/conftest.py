"""Tiny encoders, language models and tokenizers, made on the spot."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import sparse_vlm
from sparse_vlm import SparseFormerConfig, TransformConfig

CORPUS = [
    "USER: What is in the picture? ASSISTANT: a red square and a blue circle on a white ground",
    "How many chairs are there? Three. What colour is the table? It is brown and round.",
    "Describe the image briefly. a photo of a small dog that runs over the green grass",
]
# By name: the tower's tests run beside transformers 4.37 too, which lacks some of them.
CONFIGS = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "gemma3_text": "Gemma3TextConfig",
}


@pytest.fixture(scope="session")
def tiny_encoder_config() -> SparseFormerConfig:
    """Nine tokens of width 32."""
    return SparseFormerConfig(
        stem_channels=8,
        num_latents=8,
        focusing_width=16,
        focusing_heads=2,
        focusing_mlp_width=32,
        focusing_repeats=2,
        num_points=4,
        mixing_points=4,
        generator_width=8,
        handover_generator_width=8,
        width=32,
        depth=2,
        heads=2,
        mlp_width=48,
        output_width=12,
    )


@pytest.fixture(scope="session")
def encoder_dir(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_encoder_config: SparseFormerConfig,
    fill_by_formula: Callable[..., Any],
) -> Path:
    """An encoder directory."""
    encoder = fill_by_formula(sparse_vlm.build_encoder(tiny_encoder_config, TransformConfig(image_size=32)))
    directory = tmp_path_factory.mktemp("encoder") / "tiny"
    encoder.save(directory, {"teacher": "none: formula weights"})
    return directory


@pytest.fixture(scope="session")
def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in GPT-2's manner, trained on three lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


@pytest.fixture(scope="session")
def build_llm_dir(
    tmp_path_factory: pytest.TempPathFactory, bpe_tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Path]:
    """Write a tiny random language model of a kind, with the BPE tokenizer, and return where."""

    def build(kind: str = "llama", tied: bool = False) -> Path:
        torch.manual_seed(0)
        config = getattr(transformers, CONFIGS[kind])(
            vocab_size=len(bpe_tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=512,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=bpe_tokenizer.eos_token_id,
            pad_token_id=None,
            initializer_range=0.2,
        )
        directory = tmp_path_factory.mktemp(kind) / "llm"
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        bpe_tokenizer.save_pretrained(directory)
        return directory

    return build


@pytest.fixture(scope="session")
def llava_dir(
    tmp_path_factory: pytest.TempPathFactory, encoder_dir: Path, build_llm_dir: Callable[..., Path]
) -> Path:
    """An assembled LLaVA: tiny Llama, nine visual tokens, Vicuna template."""
    from llm_integration.assemble import assemble

    directory = tmp_path_factory.mktemp("assembled") / "llava"
    assemble(encoder_dir, str(build_llm_dir("llama")), directory)
    return directory


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    """A picture with something in it."""
    image = Image.new("RGB", (50, 40), (200, 30, 30))
    image.paste((20, 90, 220), (10, 5, 30, 25))
    return image


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real material."""
    root = Path(os.environ.get("SPARSE_VLM_REAL_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip("set SPARSE_VLM_REAL_DATA to the folder of real material")
    return root
