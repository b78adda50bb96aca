"""The language model of a comparison: from a directory, or a small one with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from eval.answers import InputError
from eval.baselines.config import LlamaSettings
from eval.baselines.reader import OPENING, ask


def load_language(settings: LlamaSettings, texts: Sequence[str], seed: int) -> tuple[Any, Any]:
    """A fresh copy of the language model, in fp32, and its tokenizer.

    Args:
        settings: Which one.
        texts: Words for the tokenizer of a random one.
        seed: Of a random one's weights.

    Raises:
        InputError: If the directory holds no language model.
    """
    if settings.directory is not None:
        try:
            llm = AutoModelForCausalLM.from_pretrained(
                settings.directory, dtype=torch.float32, local_files_only=True
            )
            return llm, AutoTokenizer.from_pretrained(settings.directory, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(f"{settings.directory} holds no language model: {error}") from None
    tokenizer = build_tokenizer(texts, settings.vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        llm = AutoModelForCausalLM.from_config(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=settings.width,
                intermediate_size=settings.mlp_width,
                num_hidden_layers=settings.depth,
                num_attention_heads=settings.heads,
                num_key_value_heads=settings.heads,
                max_position_embeddings=1024,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    return llm, tokenizer


def build_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """One token a word."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.WordLevelTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([OPENING + ask(text, first=True) for text in texts], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
