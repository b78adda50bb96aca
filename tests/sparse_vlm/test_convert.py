"""Official checkpoints of all three generations of names, and the ones that are refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_vlm import PRESETS, SparseFormer, SparseFormerConfig, TransformConfig, load_encoder
from sparse_vlm.checkpoint import load_provenance
from sparse_vlm.convert import ConversionError, convert_state_dict, guess_preset, main, name_table

Official = Callable[[SparseFormer], dict[str, Tensor]]

# Newest official names back to the v1 training code's, as that code spells them.
_TO_V1 = (
    (r"^initial_roi\.", "token_roi."),
    (r"^initial_embedding\.", "token_embedding."),
    (r"^norm\.", "head.norm."),
    (r"^proj\.", "head.classifier."),
    (r"\.out_proj\.", ".tuo_proj."),
    (r"\.norm1\.", ".ln_attn."),
    (r"\.attn\.qkv\.", ".attn.in_proj_"),
    (r"\.attn\.proj\.", ".attn.out_proj."),
    (r"\.norm2\.", ".ffn.0."),
    (r"\.mlp\.fc1\.", ".ffn.1."),
    (r"\.mlp\.fc2\.", ".ffn.3."),
)


def _to_v1(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state_dict.items():
        for pattern, older in _TO_V1:
            new = re.sub(pattern, older, name)
            if new != name:
                name = new
                break
        renamed[name] = value
    return renamed


def _to_first_bootstrapped(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Centre and size, `blocks`, and other words for class token and head."""
    renamed = {}
    for name, value in state_dict.items():
        block = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
        if name == "initial_roi.weight":
            renamed["token_roi_cc.weight"] = (value[:, 2:] + value[:, :2]) / 2
            renamed["token_roi_wh.weight"] = value[:, 2:] - value[:, :2]
        elif name == "cls_embedding.weight":
            renamed["global_embedding.weight"] = value
        elif block and int(block[1]) >= 3:
            renamed[f"blocks.{int(block[1]) - 3}.{block[2]}"] = value
        elif name.startswith(("norm.", "proj.")):
            renamed[name.replace("norm.", "ln_post.").replace("proj.", "cls_head.")] = value
        else:
            renamed[name.replace("initial_embedding", "token_embedding").replace("out_proj", "tuo_proj")] = (
                value
            )
    renamed["global_roi.weight"] = torch.tensor([[0.5, 0.5, 1.0, 1.0]])
    return renamed


@pytest.fixture
def presets(monkeypatch: pytest.MonkeyPatch, tiny_configs: dict[str, SparseFormerConfig]) -> None:
    """Tiny models in place of the published ones."""
    for name in list(PRESETS):
        monkeypatch.delitem(PRESETS, name)
    for family in ("v1", "bootstrapped"):
        monkeypatch.setitem(PRESETS, f"tiny_{family}", (tiny_configs[family], TransformConfig(image_size=32)))


@pytest.mark.parametrize("name", PRESETS)
def test_published_models_are_told_by_their_shapes(name: str) -> None:
    config = PRESETS[name][0]
    with torch.device("meta"):
        weights = SparseFormer(config).state_dict()
    state_dict = {official: weights[ours] for official, ours in name_table(config).items()}
    for key, value in state_dict.items():
        if key.endswith("roi_offset_bias"):
            state_dict[key] = value.flatten()
        elif key == "cls_embedding.weight":
            state_dict[key] = value[0]
    assert guess_preset(state_dict) == (name, config)


@pytest.mark.parametrize("nesting", ["plain", "model", "state_dict", "module"])
@pytest.mark.parametrize(
    ("family", "older"),
    [("v1", None), ("v1", _to_v1), ("bootstrapped", None), ("bootstrapped", _to_first_bootstrapped)],
)
@pytest.mark.usefixtures("presets")
def test_command_converts_every_style(
    family: str,
    older: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None,
    nesting: str,
    build_tiny: Callable[..., SparseFormer],
    to_official: Official,
    pictures: Tensor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    encoder = build_tiny(family)
    state_dict: dict[str, Any] = to_official(encoder)
    if older:
        renamed = older(state_dict)
        assert not {"initial_roi.weight", "initial_embedding.weight", "norm.weight"} & renamed.keys()
        state_dict = renamed
    if nesting == "module":
        state_dict = {"model": {f"module.{name}": value for name, value in state_dict.items()}, "epoch": 3}
    elif nesting != "plain":
        state_dict = {nesting: state_dict, "epoch": 3}
    torch.save(state_dict, tmp_path / "official.pth")
    assert main([str(tmp_path / "official.pth"), str(tmp_path / "out")]) == 0
    assert f"tiny_{family}" in capsys.readouterr().out
    loaded = load_encoder(tmp_path / "out")
    assert loaded.config == encoder.config
    for name, value in encoder.state_dict().items():
        # Official files may hold an RoI as centre and size, which rounds its corners.
        slack = 1e-6 if name == "focusing.initial_rois" else 0.0
        torch.testing.assert_close(loaded.state_dict()[name], value, atol=slack, rtol=0, msg=name)
    tokens = encoder(pictures).tokens.detach()
    torch.testing.assert_close(loaded(pictures).tokens, tokens, atol=1e-5 * float(tokens.abs().max()), rtol=0)
    torch.testing.assert_close(loaded(pictures).rois[-1], encoder(pictures).rois[-1], atol=1e-6, rtol=1e-6)
    provenance = load_provenance(tmp_path / "out")
    assert provenance["preset"] == f"tiny_{family}"
    assert provenance["checkpoint"] == "official.pth"
    assert len(provenance["checkpoint_sha256"]) == 64


@pytest.mark.usefixtures("presets")
def test_token_count_is_read_off_the_checkpoint(
    build_tiny: Callable[..., SparseFormer], to_official: Official
) -> None:
    name, config = guess_preset(to_official(build_tiny("bootstrapped", num_latents=63)))
    assert (name, config.num_tokens) == ("tiny_bootstrapped", 64)


@pytest.mark.usefixtures("presets")
@pytest.mark.parametrize("preset", [None, "tiny_bootstrapped"])
def test_every_wrong_tensor_is_named_at_once(
    preset: str | None,
    build_tiny: Callable[..., SparseFormer],
    to_official: Official,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state_dict = to_official(build_tiny("bootstrapped"))
    del state_dict["layers.3.attn.qkv.bias"], state_dict["layers.0.stage_embedding.weight"]
    state_dict["layers.9.stranger"] = torch.zeros(3)
    state_dict["proj.weight"] = torch.zeros(4, 32)
    torch.save(state_dict, tmp_path / "official.pth")
    arguments = [str(tmp_path / "official.pth"), str(tmp_path / "out")]
    assert main(arguments + (["--preset", preset] if preset else [])) == 1
    message = capsys.readouterr().err
    for part in (
        "official.pth",
        "missing layers.3.attn.qkv.bias [96]",
        "missing layers.0.stage_embedding.weight [2, 16]",
        "extra layers.9.stranger [3]",
        "proj.weight is [4, 32], the architecture has [10, 32]",
        "4 tensors",
    ):
        assert part in message, message
    assert ("nearest, tiny_bootstrapped" in message) == (preset is None)
    assert not (tmp_path / "out").exists()


class _Surprise:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no checkpoint file at"),
        (b"not a checkpoint", "cannot be read as tensors alone"),
        (b"", "cannot be read as tensors alone"),
        (b"hello", "cannot be read as tensors alone"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "it is a web page"),
        (_Surprise(), "cannot be read as tensors alone"),
        ([1, 2], "holds no state dict but a list"),
        ({"initial_roi.weight": "text"}, "entries that are no tensors: initial_roi.weight"),
        ({"visual.conv1.weight": torch.zeros(2)}, "is not an official SparseFormer checkpoint"),
    ],
)
def test_other_files_are_refused(
    content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "official.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert main([str(path), str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert "code ran" not in captured.out


def test_unknown_preset(
    build_tiny: Callable[..., SparseFormer],
    to_official: Official,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save(to_official(build_tiny("v1")), tmp_path / "official.pth")
    arguments = [str(tmp_path / "official.pth"), str(tmp_path / "out"), "--preset", "sparseformer_v1_tin"]
    assert main(arguments) == 1
    assert "did you mean 'sparseformer_v1_tiny'" in capsys.readouterr().err


def test_foreign_architectures_and_doubles_are_refused(
    build_tiny: Callable[..., SparseFormer], to_official: Official
) -> None:
    with pytest.raises(ConversionError, match=r"nothing like head\.pool"):
        name_table(build_tiny("siglip").config)
    state_dict = to_official(build_tiny("v1"))
    state_dict["head.norm.weight"] = state_dict["norm.weight"]
    with pytest.raises(ConversionError, match=r"holds norm\.weight twice"):
        convert_state_dict(state_dict, build_tiny("v1").config)
