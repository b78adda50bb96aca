"""The half of a LLaVA that every tower gets: projector and language model, and how text becomes tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100
# Vicuna's turns, without its opening sentence; the picture stands where LLaVA puts it.
OPENING = "USER: "


class Reader(nn.Module):
    """Visual tokens through a projector into a language model, between "USER: " and the first question.

    The projector is a layer norm without weights, so that no tower gains or loses by the scale of its tokens,
    and LLaVA 1.5's two linear layers with a GELU between.

    Args:
        llm: A Llama-type causal language model.
        tokenizer: Its tokenizer.
        width: D of the towers' tokens.
        seed: Of the projector's weights.
    """

    def __init__(self, llm: Any, tokenizer: Any, width: int, seed: int) -> None:
        super().__init__()
        self.llm = llm
        self.tokenizer = tokenizer
        hidden = int(llm.config.hidden_size)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, hidden)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for linear in (self.first, self.second):
                linear.weight.normal_(std=linear.in_features**-0.5, generator=generator)
                linear.bias.zero_()
            # What leaves the projector is as large as the embeddings of words.
            self.second.weight.mul_(float(llm.get_input_embeddings().weight.std()))
        # With what the tokenizer itself puts at the beginning of a text.
        self.opening: list[int] = tokenizer(OPENING)["input_ids"]
        pad = tokenizer.pad_token_id
        self.pad = int(tokenizer.eos_token_id if pad is None else pad)

    def project(self, visual: Tensor) -> Tensor:
        """Visual tokens (B, N, D) into the language model's space."""
        return self.second(F.gelu(self.first(self.norm(visual))))

    def embed(self, visual: Tensor | None, ids: Tensor) -> Tensor:
        """What the language model reads, (B, N + T, hidden): opening, visual tokens, the rest of T ids."""
        words = self.llm.get_input_embeddings()(ids)
        if visual is None:
            return words
        place = len(self.opening)
        return torch.cat((words[:, :place], self.project(visual), words[:, place:]), dim=1)

    def encode(self, turns: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Ids of questions and answers in a row, and labels that are set on answers only."""
        ids, labels = list(self.opening), [IGNORED] * len(self.opening)
        for number, (question, answer) in enumerate(turns):
            prompt = self._tokenize(ask(question, first=not number))
            told = [*self._tokenize(f" {answer}"), self.tokenizer.eos_token_id]
            ids += prompt + told
            labels += [IGNORED] * len(prompt) + told
        return ids, labels

    def encode_question(self, question: str) -> list[int]:
        """Ids of a prompt."""
        return [*self.opening, *self._tokenize(ask(question, first=True))]

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def measure_tokens(self, visual: Tensor | None, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every labelled token (n,), and the row of the batch it stands in (n,).

        Args:
            visual: (B, N, D); None without pictures.
            ids: (B, T), padded at the end, where nobody looks back from.
            labels: (B, T).
        """
        inputs = self.embed(visual, ids)
        place = len(self.opening)
        blank = labels.new_full((labels.shape[0], inputs.shape[1] - ids.shape[1]), IGNORED)
        wanted = torch.cat((labels[:, :place], blank, labels[:, place:]), dim=1)[:, 1:]
        told = wanted != IGNORED
        states = self.llm.model(inputs_embeds=inputs).last_hidden_state[:, :-1]  # (B, N + T - 1, hidden)
        losses = F.cross_entropy(self.llm.lm_head(states[told]).float(), wanted[told], reduction="none")
        return losses, told.nonzero()[:, 0]

    @torch.no_grad()
    def answer(self, visual: Tensor | None, ids: Tensor, max_new_tokens: int) -> list[str]:
        """Greedy answers to prompts of one length, (B, T)."""
        inputs = self.embed(visual, ids)
        cache, given = None, []
        done = torch.zeros(ids.shape[0], dtype=torch.bool)
        for _ in range(max_new_tokens):
            output = self.llm.model(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            chosen = self.llm.lm_head(output.last_hidden_state[:, -1]).argmax(dim=-1)
            chosen[done] = self.tokenizer.eos_token_id
            done |= chosen == self.tokenizer.eos_token_id
            given.append(chosen)
            if bool(done.all()):
                break
            inputs = self.llm.get_input_embeddings()(chosen[:, None])
        rows = torch.stack(given, dim=1)
        return [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]


def ask(question: str, first: bool) -> str:
    """The bare question in its turn; the first one follows the picture, which has a line of its own."""
    return f"\n{question} ASSISTANT:" if first else f"{OPENING}{question} ASSISTANT:"


def collate(rows: Sequence[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and labels of a batch, padded at the end."""
    longest = max(len(ids) for ids, _ in rows)
    ids = [row + [pad] * (longest - len(row)) for row, _ in rows]
    labels = [row + [IGNORED] * (longest - len(row)) for _, row in rows]
    return torch.tensor(ids), torch.tensor(labels)


def hash_weights(module: nn.Module) -> str:
    """SHA-256 of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
