"""A tiny LLaVA that was taught its answers, POPE files for both engines, and lmms-eval's command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from tests.llm_integration.conftest import (  # noqa: F401 - fixtures
    bpe_tokenizer,
    build_llm_dir,
    encoder_dir,
    tiny_encoder_config,
)

CATEGORIES = ("random", "popular", "adversarial")
INSTRUCTION = "\nAnswer the question using a single word or phrase."
PARAGRAPHS = "Yes\n\nIt is red"
# Category, picture, object, label, and what the model is taught to say: right, wrong, and neither word.
QUIZ = (
    ("random", 0, "square", "yes", "Yes"),
    ("random", 1, "square", "no", "No"),  # the question before, about another picture
    ("random", 1, "dog", "no", "Yes"),
    ("random", 2, "table", "yes", "No"),
    ("random", 3, "big red chair on the grass", "yes", "There is"),
    ("popular", 0, "table", "no", "no"),
    ("popular", 2, "circle", "yes", "yes"),
    ("popular", 3, "dog", "yes", PARAGRAPHS),
    ("popular", 1, "chair", "no", "No, there is none"),
    ("adversarial", 2, "square", "yes", "Yes"),
    ("adversarial", 3, "square", "no", "Yes"),
    ("adversarial", 0, "small dog that runs over the green table", "no", "Not at all"),
    ("adversarial", 0, "chair", "yes", "YES"),
)


@dataclass(frozen=True)
class Lab:
    """Where everything lies.

    Attributes:
        folder: the laboratory.
        model: a LLaVA directory.
        labels: POPE's label files as they are distributed, one a category.
        pictures: picture folder.
        tasks: task definitions for lmms-eval: its own, on local data.
    """

    folder: Path
    model: Path
    labels: Path
    pictures: Path
    tasks: Path

    def lmms_eval(self, out: str, *words: str, tasks: str, launcher: Sequence[str] = ()) -> tuple[str, Path]:
        """Run lmms-eval's command offline: what it prints, and the folder that it was to write to.

        It exits with 0 whatever happens: only what lies in the folder tells.
        """
        command = [
            sys.executable, *launcher, "-m", "lmms_eval", "--model", "sparse_vlm", "--device", "cpu",
            "--model_args", f"pretrained={self.model}", "--tasks", tasks, "--include_path", str(self.tasks),
            "--output_path", str(self.folder / out), "--log_samples", *words,
        ]  # fmt: skip
        env = {
            **os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
            "HF_HOME": str(self.folder / "hf"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "NO_COLOR": "1",
        }  # fmt: skip
        done = subprocess.run(
            command, cwd=self.folder, env=env, text=True, check=False, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        return done.stdout, self.folder / out


@pytest.fixture(scope="session")
def lab(
    tmp_path_factory: pytest.TempPathFactory,
    encoder_dir: Path,  # noqa: F811 - a fixture
    build_llm_dir: Callable[..., Path],  # noqa: F811 - a fixture
) -> Lab:
    """The laboratory, built once."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; see make test-lmms")
    from llm_integration.assemble import assemble

    folder = tmp_path_factory.mktemp("lmms")
    made = Lab(*(folder / name for name in (".", "llava", "labels", "pictures", "tasks")))
    for path in (made.labels, made.pictures, made.tasks, folder / "data"):
        path.mkdir()
    pictures = []
    for number, colour in enumerate(("red", "green", "blue", "white")):
        picture = Image.new("RGB", (60 + 9 * number, 48), colour)
        ImageDraw.Draw(picture).rectangle(
            (8, 8, 20 + 9 * number, 24), fill=("white", "red", "black", "blue")[number]
        )
        picture.save(made.pictures / f"{number}.png")
        pictures.append(Image.open(made.pictures / f"{number}.png"))
    write_labels(made.labels)
    write_tasks(made)
    assemble(encoder_dir, str(build_llm_dir("llama")), folder / "untaught", template="chatml")
    teach(folder / "untaught", made.model, [(ask(thing), pictures[n], said) for _, n, thing, _, said in QUIZ])
    return made


def ask(thing: str) -> str:
    """POPE's question."""
    return f"Is there a {thing} in the image?"


def write_labels(folder: Path) -> None:
    """POPE's label files, as its authors distribute them."""
    for category in CATEGORIES:
        rows = [row for row in QUIZ if row[0] == category]
        lines = [
            {"question_id": place, "image": f"{picture}.png", "text": ask(thing), "label": label}
            for place, (_, picture, thing, label, _) in enumerate(rows, start=1)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"coco_pope_{category}.json").write_text(text, encoding="utf-8")


def write_tasks(lab: Lab) -> None:
    """The data set in lmms-eval's form, and its own POPE definitions put on it by `include`."""
    import datasets
    import lmms_eval

    official = Path(lmms_eval.__file__).parent / "tasks" / "pope"
    data = lab.folder / "data"
    columns: dict[str, list[dict[str, Any]]] = {"test": [], **{category: [] for category in CATEGORIES}}
    for place, (category, picture, thing, label, _) in enumerate(QUIZ):
        row = {"question_id": str(place), "question": ask(thing), "answer": label, "category": category}
        row |= {"id": str(place), "image_source": f"{picture}.png"}
        row |= {"image": {"path": f"{picture}.png", "bytes": (lab.pictures / f"{picture}.png").read_bytes()}}
        columns["test"].append(row)
        columns[category].append(row)
    for split, rows in columns.items():
        features = datasets.Features(
            {name: datasets.Value("string") for name in rows[0] if name != "image"}
            | {"image": datasets.Image()}
        )
        datasets.Dataset.from_list(rows, features=features).to_parquet(data / f"{split}.parquet")
    names = {"test": "pope", "random": "pope_random", "popular": "pope_pop", "adversarial": "pope_adv"}
    for split, name in names.items():
        (lab.tasks / f"local_{name}.yaml").write_text(
            f"include: {official / name}.yaml\ntask: local_{name}\ndataset_path: parquet\n"
            f"dataset_name: null\ndataset_kwargs:\n  data_files:\n    {split}: {data / split}.parquet\n",
            encoding="utf-8",
        )


def teach(source: Path, out: Path, lessons: list[tuple[str, Image.Image, str]]) -> None:
    """Train a LLaVA until it answers these questions so, and no others."""
    from llm_integration.generate import build_message, load_chat

    chat = load_chat(source, "cpu")
    model, processor = chat.model, chat.processor
    tokenizer = processor.tokenizer
    ids, labels, pixels = [], [], []
    for question, picture, said in lessons:
        inputs = processor.apply_chat_template(
            [build_message(question + INSTRUCTION, (picture.convert("RGB"),))],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        prompt, answer = inputs["input_ids"][0], torch.tensor(tokenizer.encode(said + "<|im_end|>"))
        ids.append(torch.cat([prompt, answer]))
        labels.append(torch.cat([torch.full_like(prompt, -100), answer]))
        pixels.append(inputs["pixel_values"])
    pad = torch.nn.utils.rnn.pad_sequence
    padded = pad(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    mask = pad([torch.ones_like(row) for row in ids], batch_first=True)
    batch = {"input_ids": padded, "attention_mask": mask, "pixel_values": torch.cat(pixels)}
    targets = pad(labels, batch_first=True, padding_value=-100)
    model.model.vision_tower.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    for _ in range(400):
        loss = model(**batch, labels=targets).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.01:
            break
    assert loss < 0.01, f"the tiny model has not learnt its answers (loss {float(loss):.3f})"
    model.save_pretrained(out)
    processor.save_pretrained(out)
