"""The encoder directory: bit-equal round trip, strict reading, atomic writing, and no mistaken identity."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_vlm import EncoderDirectoryError, SparseFormer, load_encoder
from sparse_vlm.checkpoint import OWNED, load_provenance


@pytest.fixture
def directory(tmp_path: Path, build_tiny: Callable[..., SparseFormer]) -> Path:
    folder = tmp_path / "encoder"
    build_tiny().save(folder, provenance={"teacher": "formula", "steps": 3})
    return folder


def _edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_round_trip_is_bit_equal(
    family: str, build_tiny: Callable[..., SparseFormer], pictures: Tensor, tmp_path: Path
) -> None:
    encoder = build_tiny(family)
    encoder.save(tmp_path / "encoder")
    assert sorted(path.name for path in (tmp_path / "encoder").iterdir()) == sorted(OWNED)
    loaded = load_encoder(tmp_path / "encoder")
    assert loaded.config == encoder.config
    assert loaded.transform.config == encoder.transform.config
    assert loaded.state_dict().keys() == encoder.state_dict().keys()
    for name, value in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded(pictures).pooled, encoder(pictures).pooled)
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_precision_is_kept_or_chosen(
    build_tiny: Callable[..., SparseFormer], directory: Path, tmp_path: Path
) -> None:
    build_tiny().bfloat16().save(tmp_path / "half")
    assert load_encoder(tmp_path / "half").dtype == torch.bfloat16
    assert load_encoder(tmp_path / "half", dtype=torch.float32).dtype == torch.float32
    assert load_encoder(directory, device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_what_is_loaded_in_inference_mode_is_like_any_other(directory: Path, pictures: Tensor) -> None:
    with torch.inference_mode():
        encoder, half = load_encoder(directory), load_encoder(directory, dtype=torch.bfloat16)
    assert not any(parameter.is_inference() for parameter in (*encoder.parameters(), *half.parameters()))
    encoder(pictures).pooled.sum().backward()
    assert encoder.head.proj.weight.grad is not None


def test_provenance_is_kept_beside_versions(directory: Path) -> None:
    provenance = load_provenance(directory)
    assert provenance["teacher"] == "formula"
    assert provenance["steps"] == 3
    assert provenance["versions"]["torch"] == torch.__version__
    config = json.loads((directory / "config.json").read_text())
    assert (config["format"], config["format_version"], config["num_tokens"]) == ("sparse_vlm.encoder", 1, 49)


def test_no_pickle_in_it(directory: Path) -> None:
    for name in OWNED:
        if name.endswith(".json"):
            json.loads((directory / name).read_text())
    assert (
        load_file(str(directory / "model.safetensors")).keys() == load_encoder(directory).state_dict().keys()
    )


def test_every_wrong_tensor_is_named_at_once(directory: Path) -> None:
    weights = load_file(str(directory / "model.safetensors"))
    del weights["stem.conv.bias"], weights["cortex.blocks.0.norm1.weight"]
    weights["stranger"] = torch.zeros(2)
    weights["head.norm.weight"] = torch.zeros(5)
    save_file(weights, str(directory / "model.safetensors"))
    with pytest.raises(EncoderDirectoryError) as error:
        load_encoder(directory)
    message = str(error.value)
    for part in (
        "(4 tensors)",
        "missing stem.conv.bias [8]",
        "missing cortex.blocks.0.norm1.weight [32]",
        "extra stranger [2]",
        "head.norm.weight is [5], the architecture has [32]",
        str(directory / "model.safetensors"),
    ):
        assert part in message


def _break_truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated weights": (_break_truncate, r"model\.safetensors is not a whole safetensors file"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    "no config": (lambda d: (d / "config.json").unlink(), r"config\.json is missing"),
    "no preprocessor": (
        lambda d: (d / "preprocessor_config.json").unlink(),
        "preprocessor_config.json is missing",
    ),
    "half a config": (
        lambda d: (d / "config.json").write_text('{"format": '),
        r"config\.json is not valid JSON",
    ),
    "a list": (lambda d: (d / "config.json").write_text("[]"), "must hold a JSON object, found list"),
    "newer": (
        lambda d: _edit_json(d / "config.json", format_version=2),
        "format version 2; this sparse_vlm reads version 1: update sparse_vlm",
    ),
    "foreign": (
        lambda d: (d / "config.json").write_text('{"model_type": "clip_vision_model"}'),
        r"does not describe a sparse_vlm encoder .*clip_vision_model.*encoder\.save",
    ),
    "unknown field": (
        lambda d: _edit_json(d / "config.json", architecture={"num_latnets": 4}),
        "unknown architecture field 'num_latnets'; did you mean 'num_latents'",
    ),
    "gone": (shutil.rmtree, "there is no encoder directory at"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_directories_are_refused(case: str, directory: Path) -> None:
    spoil, message = BROKEN[case]
    spoil(directory)
    with pytest.raises(EncoderDirectoryError, match=message):
        load_encoder(directory)


def test_saving_replaces_an_encoder_but_no_other_folder(
    directory: Path, build_tiny: Callable[..., SparseFormer], tmp_path: Path
) -> None:
    build_tiny("latents").save(directory)
    assert load_encoder(directory).config.pooling == "mean"
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"chapter1\.tex"):
        build_tiny().save(foreign)
    assert [path.name for path in foreign.iterdir()] == ["chapter1.tex"]


class _Quantised(torch.nn.Linear):
    """Keeps more than tensors in its state, as PyTorch's quantised layers do."""

    def get_extra_state(self) -> torch.dtype:
        return torch.qint8

    def set_extra_state(self, state: torch.dtype) -> None:
        pass


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("shard", r"stem\.conv\.bias is \[0\], the architecture has \[8\]"),
        ("adapt", r"\(4 tensors\); .*missing head\.proj\.weight .*extra head\.proj\.base\.weight"),
        ("quantise", r"\(1 tensors\); .*undo quantisation first: extra head\.proj\._extra_state a dtype$"),
    ],
)
def test_what_could_not_be_loaded_replaces_nothing(spoil: str, message: str, directory: Path) -> None:
    encoder = load_encoder(directory)
    head = encoder.head.proj
    if spoil == "shard":  # as DeepSpeed's ZeRO-3 leaves them between calls
        for parameter in encoder.parameters():
            parameter.data = torch.empty(0)
    elif spoil == "adapt":
        encoder.head.proj = torch.nn.ModuleDict({"base": head})
    else:
        encoder.head.proj = _Quantised(head.in_features, head.out_features)
    with pytest.raises(ValueError, match=message):
        encoder.save(directory)
    load_encoder(directory)


def test_a_run_directory_says_where_its_encoder_is(directory: Path) -> None:
    assert directory.name == "encoder"
    with pytest.raises(EncoderDirectoryError, match=f"holds one: name {directory}$"):
        load_encoder(directory.parent)


def test_killed_while_saving_leaves_the_old_encoder(directory: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    program = (
        "import os, signal, sys\n"
        "import sparse_vlm, sparse_vlm.checkpoint as checkpoint\n"
        "encoder = sparse_vlm.load_encoder(sys.argv[1])\n"
        "checkpoint._write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "encoder.save(sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(directory)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    load_encoder(directory).save(directory)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]  # what the killed writer left is gone


def test_transformers_does_not_take_it_for_a_clip(directory: Path) -> None:
    transformers = pytest.importorskip("transformers")
    with pytest.raises((ValueError, KeyError), match="not a CLIP checkpoint"):
        transformers.CLIPVisionModel.from_pretrained(str(directory))
