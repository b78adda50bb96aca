"""A whole CLIP ViT in a LLaVA: the other side of every comparison."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from llm_integration.assemble import main
from llm_integration.clip_vision import convert_open_clip, count_patches, load_clip_vision
from llm_integration.generate import answer, load_chat
from sparse_vlm import TransformConfig

SHIPPED = Path(__file__).resolve().parents[2] / "assets" / "scenes_clip"


def test_open_clips_tower_gives_open_clips_tokens() -> None:
    open_clip = pytest.importorskip("open_clip")
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{SHIPPED}")
    visual = theirs.eval().visual
    visual.output_tokens = True
    ours, transform = load_clip_vision(SHIPPED)
    from sparse_vlm.transform import ImageTransform

    picture = Image.effect_mandelbrot((130, 110), (-2.0, -1.2, 1.0, 1.2), 40).convert("RGB")
    pixels = ImageTransform(transform)(picture)
    assert torch.equal(pixels, preprocess(picture))
    with torch.no_grad():
        pooled, tokens = visual(pixels[None])
        output = ours(pixel_values=pixels[None], output_hidden_states=True)
    assert count_patches(ours) == 144 == tokens.shape[1]
    # open_clip's tokens are normalised by the last norm; transformers normalises the class token only.
    last = ours.post_layernorm(output.last_hidden_state)
    assert torch.allclose(last[:, 1:], tokens, atol=1e-5)
    assert torch.allclose(last[:, 0] @ visual.proj, pooled, atol=1e-5)
    assert len(output.hidden_states) == 10


def test_a_llava_with_a_whole_vit_answers(
    build_llm_dir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--vit", str(SHIPPED), "--llm", str(build_llm_dir("llama")), "--out", str(tmp_path / "llava")])
    chat = load_chat(tmp_path / "llava", "cpu")
    assert chat.visual_tokens == 144
    assert (chat.model.config.vision_feature_layer, chat.model.config.image_seq_length) == (-2, 144)
    one, other = (
        chat.model.get_image_features(pixel_values=torch.full((1, 3, 96, 96), value)).pooler_output[0]
        for value in (0.0, 1.0)
    )
    assert one.shape == (144, 32)
    assert not torch.allclose(one, other)
    assert isinstance(answer(Image.new("RGB", (70, 30)), "what?", chat, 4), str)
    assert json.loads((tmp_path / "llava" / "assembly.json").read_text())["vit"] == str(SHIPPED)
    with pytest.raises(SystemExit):
        main(["--vit", str(SHIPPED), "--num-tokens", "3", "--llm", "x", "--out", "y"])
    assert "num_tokens is for encoders" in capsys.readouterr().err


def test_a_directory_of_transformers(tmp_path: Path) -> None:
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32,
        patch_size=8,
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"holds no CLIP: expected config\.json with preprocessor"):
        load_clip_vision(tmp_path / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path / "clip")
    model, transform = load_clip_vision(tmp_path / "clip")
    assert (count_patches(model), transform.height) == (16, 32)
    (tmp_path / "clip" / "preprocessor_config.json").write_text('{"image_processor_type": "Strange"}')
    with pytest.raises(ValueError, match=r"clip/preprocessor_config\.json: image processor 'Strange' is not"):
        load_clip_vision(tmp_path / "clip")


def test_open_clips_pixel_settings_are_read_as_open_clip_reads_them(tmp_path: Path) -> None:
    pixels = {"interpolation": "random", "mean": None, "std": None, "resize_mode": None}
    folder = tmp_path / "clip"
    shutil.copytree(SHIPPED, folder)
    path = folder / "open_clip_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "preprocess_cfg": pixels}))
    assert load_clip_vision(folder)[1].prepares_like(TransformConfig(image_size=96))


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(SHIPPED, folder)
    path = folder / "open_clip_config.json"
    content = json.loads(path.read_text())
    change(content["model_cfg"]["vision_cfg"])
    path.write_text(json.dumps(content))
    return folder


def test_what_is_no_plain_vit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attentional_pool in its vision_cfg"):
        load_clip_vision(change_config(tmp_path / "a", lambda c: c.update(attentional_pool=True)))
    with pytest.raises(ValueError, match="layers in its vision_cfg"):
        load_clip_vision(change_config(tmp_path / "b", lambda c: c.update(layers=[2, 2])))
    with pytest.raises(ValueError, match="its vision_cfg lacks patch_size, width"):
        load_clip_vision(change_config(tmp_path / "c", lambda c: (c.pop("width"), c.pop("patch_size"))))  # type: ignore[func-returns-value]
    (tmp_path / "c" / "open_clip_config.json").write_text("{}")
    with pytest.raises(ValueError, match="describes no CLIP: 'model_cfg'"):
        load_clip_vision(tmp_path / "c")
    weights = load_file(SHIPPED / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=r"a plain CLIP ViT has no visual\.strange"):
        convert_open_clip({**weights, "visual.strange": torch.zeros(1)})
