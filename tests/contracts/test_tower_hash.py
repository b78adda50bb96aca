"""What a bootstrap writes down about its teacher is what a swap looks for in a LLaVA."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from bootstrap.teacher import load_teacher
from sparse_vlm.fingerprint import hash_file, hash_tensors, hash_tower, sample_files


def test_a_teacher_and_the_tower_of_a_llava_have_one_hash(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=32,
        patch_size=8, projection_dim=16,
    )  # fmt: skip
    clip = CLIPVisionModelWithProjection(vision)
    clip.save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text(
        '{"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, '
        '"crop_size": {"height": 32, "width": 32}}'
    )
    teacher = hash_tower(load_teacher(f"hf:{tmp_path / 'clip'}").vision_state_dict())
    text = LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    llava = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=19)
    )
    tower = llava.model.vision_tower
    assert hash_tower(tower.state_dict()) != teacher
    vision_weights = {
        name.removeprefix("vision_model."): value
        for name, value in clip.state_dict().items()
        if name.startswith("vision_model.")
    }
    tower.load_state_dict(vision_weights, strict=True)
    assert hash_tower(tower.state_dict()) == teacher
    assert hash_tower(tower.half().state_dict()) == teacher
    assert hash_tower({f"model.vision_tower.{k}": v for k, v in tower.state_dict().items()}) == teacher


def test_hash_of_tensors_tells_names_types_and_values_apart() -> None:
    base = {"a": torch.arange(4.0), "b": torch.ones(2)}
    assert hash_tensors(base) == hash_tensors(dict(reversed(base.items())))
    for other in (
        {"a": base["a"] + 1e-6, "b": base["b"]},
        {"a": base["a"].double(), "b": base["b"]},
        {"a": base["a"].reshape(2, 2), "b": base["b"]},
        {"c": base["a"], "b": base["b"]},
    ):
        assert hash_tensors(other) != hash_tensors(base)


def test_hash_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert hash_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_sample_of_files_sees_names_sizes_and_blocks_all_over(tmp_path: Path) -> None:
    whole = bytes(range(256)) * 40  # 10,240 bytes: ten blocks of 1,024, of which three are read
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        path.write_bytes(whole)

    def sample() -> str:
        return sample_files(paths, blocks=3, block=1024)

    before = sample()
    assert sample_files(reversed(paths), blocks=3, block=1024) == before
    for place in (0, 5000, len(whole) - 1):
        paths[1].write_bytes(whole[:place] + b"!" + whole[place + 1 :])
        assert sample() != before, place
    paths[1].write_bytes(whole[:2000] + b"!" + whole[2001:])
    assert sample() == before, "what lies between the blocks is not read"
    paths[1].write_bytes(whole + whole[-1:])
    assert sample() != before
    paths[1].write_bytes(whole)
    assert sample_files([paths[0], paths[1].rename(tmp_path / "c")], blocks=3, block=1024) != before
    (tmp_path / "empty").touch()
    sample_files([tmp_path / "empty"])
