"""Trains the small Llama of the embedded default on the words of scenes, without a picture.

    python -m bootstrap.train_llama configs/scenes/llama.yaml [key=value ...]

It learns how questions about scenes are asked and what kind of answer follows, not what is in a picture.
The result is a directory that `AutoModelForCausalLM` and `AutoTokenizer` load without a network.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from bootstrap.memory import keep_freed_memory
from bootstrap.scenes.questions import AnswerBalance, ask
from bootstrap.scenes.scene import build_scene
from bootstrap.scenes.text import chat_record
from sparse_vlm.atomic import atomic_directory, write_atomic
from sparse_vlm.settings import build_settings, settings_to_dict

END = "</s>"
OWNED = ("*.json", "*.jinja", "*.safetensors")
# Vicuna's turns without its opening sentence, which would cost a small model more than the question does.
TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- 'USER: ' + message['content'] + ' ' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- 'ASSISTANT: ' + message['content'] + eos_token -}}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class LlamaShape:
    """Size of the model; the vocabulary is what the tokenizer's training makes of it."""

    width: int = 160
    mlp_width: int = 432
    depth: int = 4
    heads: int = 5
    key_value_heads: int = 1
    vocabulary: int = 512
    positions: int = 1024


@dataclass(frozen=True)
class TrainLlamaConfig:
    """The recipe.

    Attributes:
        out: Where the model goes.
        seed: Of weights and of the order of scenes.
        data_seed: Of the scenes.
        first_scene: Number of the first scene.
        tokenizer_scenes: Scenes whose words the tokenizer is trained on.
        steps: Updates.
        batch_size: Sequences an update.
        length: Tokens a sequence.
        lr: Peak learning rate.
        weight_decay: On matrices.
        warmup_steps: Until the peak.
        final_scenes: New scenes (split "valid") for the closing figure.
        model: Size.
    """

    out: Path = Path("runs/scenes_llama")
    seed: int = 0
    data_seed: int = 0
    first_scene: int = 0
    tokenizer_scenes: int = 2000
    steps: int = 900
    batch_size: int = 32
    length: int = 192
    lr: float = 3e-3
    weight_decay: float = 0.05
    warmup_steps: int = 50
    final_scenes: int = 300
    model: LlamaShape = field(default_factory=LlamaShape)

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.length, self.tokenizer_scenes, self.final_scenes) < 1:
            raise ValueError(
                "steps, batch_size, length, tokenizer_scenes and final_scenes must be at least 1"
            )
        if self.model.width % self.model.heads or self.model.heads % self.model.key_value_heads:
            raise ValueError("model: heads must divide width, and key_value_heads must divide heads")


def conversations(seed: int, first: int, split: str = "train") -> Iterator[str]:
    """One scene's conversation after another, as the chat template puts it, pictures left out."""
    balance = AnswerBalance()
    for index in count(first):
        scene = build_scene(seed, index, split)
        asked = [(question.text, question.answer) for question in ask(scene, balance)]
        words = []
        for turn in chat_record(scene, "", asked)["conversations"]:
            said = turn["value"].replace("<image>\n", "").replace("\n<image>", "")
            words.append(f"USER: {said} " if turn["from"] == "human" else f"ASSISTANT: {said}{END}")
        yield "".join(words)


def build_tokenizer(config: TrainLlamaConfig) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with single digits, so that every text and every number has its tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.model.vocabulary,
        special_tokens=["<pad>", END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = islice(conversations(config.data_seed, config.first_scene), config.tokenizer_scenes)
    tokenizer.train_from_iterator((text.replace(END, " ") for text in texts), trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token="<pad>")
    made.chat_template = TEMPLATE
    return made


def token_stream(config: TrainLlamaConfig, tokenizer: Any) -> Iterator[int]:
    """Tokens of one conversation after another, without end."""
    for text in conversations(config.data_seed, config.first_scene):
        yield from tokenizer(text)["input_ids"]


def build_model(config: TrainLlamaConfig, tokenizer: Any) -> Any:
    """A Llama with random weights."""
    shape = config.model
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.width,
            intermediate_size=shape.mlp_width,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_value_heads,
            max_position_embeddings=shape.positions,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@torch.no_grad()
def measure_loss(directory: Path, config: TrainLlamaConfig, scenes: int) -> float:
    """Mean loss a token of a saved model, on conversations about new scenes."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    total, tokens = 0.0, 0
    for text in islice(conversations(config.data_seed, 0, "valid"), scenes):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        logits = model(ids).logits[0, :-1]
        total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
    return total / tokens


def train(config: TrainLlamaConfig) -> dict[str, Any]:
    """Trains, saves, and returns the closing figures."""
    started = time.monotonic()
    tokenizer = build_tokenizer(config)
    torch.manual_seed(config.seed)
    model = build_model(config, tokenizer).train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))
    tokens = token_stream(config, tokenizer)
    with tqdm(total=config.steps, unit="step", disable=None) as bar:
        for step in range(config.steps):
            flat = [next(tokens) for _ in range(config.batch_size * config.length)]
            ids = torch.tensor(flat).view(config.batch_size, config.length)
            scale = min((step + 1) / config.warmup_steps, 0.5 + 0.5 * math.cos(math.pi * step / config.steps))
            for group in optimiser.param_groups:
                group["lr"] = config.lr * scale
            loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            if step % 20 == 0:
                if not math.isfinite(loss.item()):
                    raise FloatingPointError(f"The loss is {loss.item()} at step {step}: lower lr.")
                bar.set_postfix(loss=f"{loss.item():.3f}")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            bar.update()
    with atomic_directory(config.out, owned=OWNED) as folder:
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    result = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_seen": config.steps * config.batch_size * config.length,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "loss_on_new_scenes": measure_loss(config.out, config, config.final_scenes),
        "settings": settings_to_dict(config),
    }
    write_atomic(config.out / "result.json", json.dumps(result, indent=2, default=str) + "\n")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Command line: a YAML file and `key.sub=value` overrides."""
    parser = argparse.ArgumentParser(
        prog="python -m bootstrap.train_llama", description=__doc__.splitlines()[0]
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_args(arguments)
    keep_freed_memory()
    try:
        content = yaml.safe_load(given.config.read_text(encoding="utf-8"))
        config = build_settings(TrainLlamaConfig, content, given.overrides, given.config)
        print(json.dumps(train(config), indent=2, default=str))
    except (OSError, ValueError, FloatingPointError, yaml.YAMLError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
