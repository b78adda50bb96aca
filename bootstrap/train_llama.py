"""Trains the small Llama of the embedded default: to talk about scenes, and to look an answer up.

    python -m bootstrap.train_llama configs/scenes/llama.yaml [key=value ...]

It never sees a picture. In a picture's place stand symbols (`bootstrap.scenes.symbols`), which are thrown
away afterwards; a vision tower takes their place. The result is a directory that `AutoModelForCausalLM` and
`AutoTokenizer` load without a network.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from bootstrap.config import read_settings
from bootstrap.memory import keep_freed_memory
from bootstrap.scenes.questions import AnswerBalance, ask
from bootstrap.scenes.scene import Scene, build_scene
from bootstrap.scenes.symbols import SymbolicEye, describe_cells
from bootstrap.scenes.text import chat_record
from sparse_vlm.atomic import atomic_directory, write_atomic
from sparse_vlm.settings import settings_to_dict

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
        grids: Sides of the grid of symbols; each step draws one.
        blind: Share of conversations without symbols.
        question_weight: Of the questions' tokens in the loss; an answer's token counts one.
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
    grids: tuple[int, ...] = (7, 7, 7, 9)
    blind: float = 0.1
    question_weight: float = 0.2
    lr: float = 3e-3
    weight_decay: float = 0.05
    warmup_steps: int = 50
    final_scenes: int = 300
    model: LlamaShape = field(default_factory=LlamaShape)

    def __post_init__(self) -> None:
        counts = (self.steps, self.batch_size, self.tokenizer_scenes, self.final_scenes, *self.grids)
        if not self.grids or min(counts) < 1:
            raise ValueError(
                "steps, batch_size, grids (one or more), tokenizer_scenes and final_scenes must be at least 1"
            )
        if self.warmup_steps < 1:
            raise ValueError("warmup_steps must be at least 1")
        if not 0 <= self.blind < 1:
            raise ValueError("blind must be in [0, 1)")
        for name in ("question_weight", "lr", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number of 0 or more, got {getattr(self, name)}")
        if self.model.width % self.model.heads or self.model.heads % self.model.key_value_heads:
            raise ValueError("model: heads must divide width, and key_value_heads must divide heads")


Turns = list[tuple[str, str]]


def talks(seed: int, first: int, split: str = "train") -> Iterator[tuple[Scene, Turns]]:
    """One scene after another with its questions and answers; the description stands anywhere among them."""
    balance = AnswerBalance()
    for index in count(first):
        scene = build_scene(seed, index, split)
        asked = [(question.text, question.answer) for question in ask(scene, balance)]
        said = [turn["value"] for turn in chat_record(scene, "", asked)["conversations"]]
        turns = list(zip(said[::2], said[1::2], strict=True))
        turns[0] = (turns[0][0].replace("<image>\n", ""), turns[0][1])
        random.Random(f"{seed}/{split}/{index}").shuffle(turns)
        yield scene, turns


def spell(turns: Turns) -> str:
    """A conversation as the chat template puts it, without a picture."""
    return "".join(f"USER: {asked} ASSISTANT: {said}{END}" for asked, said in turns)


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
    scenes = islice(talks(config.data_seed, config.first_scene), config.tokenizer_scenes)
    texts = (spell(turns) for _, turns in scenes)
    tokenizer.train_from_iterator((text.replace(END, " ") for text in texts), trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token="<pad>")
    made.chat_template = TEMPLATE
    return made


class Batch(NamedTuple):
    """Conversations, padded on the right.

    Attributes:
        ids: (B, T) tokens; the padding token where a symbol stands.
        weights: (B, T) of each token as a target.
        answers: (B, T) whether it is an answer's token.
        symbols: (B, T) whether a symbol stands there.
        kinds: (number of pictures, cells, 4), see `describe_cells`.
        numbers: (number of pictures, cells, 5).
    """

    ids: torch.Tensor
    weights: torch.Tensor
    answers: torch.Tensor
    symbols: torch.Tensor
    kinds: torch.Tensor
    numbers: torch.Tensor


def build_batch(
    scenes: Sequence[tuple[Scene, Turns]], tokenizer: Any, side: int, sighted: Sequence[bool], weight: float
) -> Batch:
    """Puts conversations into tokens, the symbols where LLaVA puts the picture: before the first question."""
    rows: list[list[int]] = []
    marks: list[list[float]] = []
    told: list[list[bool]] = []
    cells = side * side
    for (_, turns), sees in zip(scenes, sighted, strict=True):
        ids: list[int] = []
        weights: list[float] = []
        answers: list[bool] = []
        for place, (asked, said) in enumerate(turns):
            pieces = [f"USER: {asked} ASSISTANT:"]
            if sees and place == 0:
                pieces = ["USER: ", f"\n{asked} ASSISTANT:"]
                ids = tokenizer(pieces[0])["input_ids"] + [tokenizer.pad_token_id] * cells
                weights, answers = [0.0] * len(ids), [False] * len(ids)
            question = tokenizer(pieces[-1])["input_ids"]
            answer = tokenizer(f" {said}{END}")["input_ids"]
            ids += question + answer
            weights += [weight] * len(question) + [1.0] * len(answer)
            answers += [False] * len(question) + [True] * len(answer)
        rows.append(ids)
        marks.append(weights)
        told.append(answers)
    longest = max(map(len, rows))
    start = len(tokenizer("USER: ")["input_ids"])
    symbols = torch.zeros(len(rows), longest, dtype=torch.bool)
    symbols[torch.tensor(list(sighted)), start : start + cells] = True
    seen = [describe_cells(scene, side) for (scene, _), sees in zip(scenes, sighted, strict=True) if sees]
    return Batch(
        torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows]),
        torch.tensor([row + [0.0] * (longest - len(row)) for row in marks]),
        torch.tensor([row + [False] * (longest - len(row)) for row in told]),
        symbols,
        torch.stack([kinds for kinds, _ in seen]) if seen else torch.zeros(0, cells, 4, dtype=torch.long),
        torch.stack([numbers for _, numbers in seen]) if seen else torch.zeros(0, cells, 5),
    )


def compute_loss(model: Any, eye: SymbolicEye, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean loss, and the share of answer tokens that are the likeliest."""
    embeddings = model.get_input_embeddings()(batch.ids)
    embeddings = embeddings.masked_scatter(batch.symbols[..., None], eye(batch.kinds, batch.numbers))
    logits = model(inputs_embeds=embeddings).logits[:, :-1]
    targets, weights = batch.ids[:, 1:], batch.weights[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    right = (logits.argmax(-1) == targets)[batch.answers[:, 1:]].float().mean()
    return (losses * weights).sum() / weights.sum(), right


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
    """Mean loss a token of a saved model, on conversations about new scenes, without symbols."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    total, tokens = 0.0, 0
    for _, turns in islice(talks(config.data_seed, 0, "valid"), scenes):
        ids = tokenizer(spell(turns), return_tensors="pt")["input_ids"]
        logits = model(ids).logits[0, :-1]
        total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
    return total / tokens


def train(config: TrainLlamaConfig) -> dict[str, Any]:
    """Trains, saves, and returns the closing figures."""
    started = time.monotonic()
    config.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(config)
    torch.manual_seed(config.seed)
    model = build_model(config, tokenizer).train()
    eye = SymbolicEye(config.model.width)
    trained = [*model.parameters(), *eye.parameters()]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))
    scenes = talks(config.data_seed, config.first_scene)
    rng = random.Random(config.seed)
    rights: list[float] = []
    with (
        (config.out.parent / f"{config.out.name}.jsonl").open("w", encoding="utf-8") as log,
        tqdm(total=config.steps, unit="step", disable=None) as bar,
    ):
        for step in range(config.steps):
            sighted = [rng.random() >= config.blind for _ in range(config.batch_size)]
            part = list(islice(scenes, config.batch_size))
            batch = build_batch(part, tokenizer, rng.choice(config.grids), sighted, config.question_weight)
            scale = min((step + 1) / config.warmup_steps, 0.5 + 0.5 * math.cos(math.pi * step / config.steps))
            for group in optimiser.param_groups:
                group["lr"] = config.lr * scale
            loss, right = compute_loss(model, eye, batch)
            rights = [*rights[-49:], right.item()]
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"The loss is {loss.item()} at step {step}: lower lr.")
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", right=f"{sum(rights) / len(rights):.3f}")
                row = {"step": step, "loss": loss.item(), "answer_tokens_right": sum(rights) / len(rights)}
                print(json.dumps(row), file=log, flush=True)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            norm = float(torch.nn.utils.clip_grad_norm_(trained, 1.0))
            if not math.isfinite(norm):  # the weights would be spoiled a step before the loss shows it
                raise FloatingPointError(f"The gradient norm is {norm} at step {step}: lower lr.")
            optimiser.step()
            bar.update()
    model.half()  # what is saved
    broken = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if broken:
        raise FloatingPointError(f"{len(broken)} weights are no numbers after the last step: lower lr.")
    with atomic_directory(config.out, owned=OWNED) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    result = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "conversations_seen": config.steps * config.batch_size,
        "answer_tokens_right": sum(rights) / len(rights),
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
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    given = parser.parse_args(arguments)
    keep_freed_memory()
    try:
        config = read_settings(TrainLlamaConfig, given.config, given.overrides)
        print(json.dumps(train(config), indent=2, default=str))
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
