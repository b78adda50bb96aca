"""LLaVA's vision tower contract, held without LLaVA; runs on any torch from 2.1 and any transformers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import sparse_vlm
from llm_integration.tower import SparseFormerVisionTower, _choose_device

SMALL = sparse_vlm.SparseFormerConfig(
    stem_channels=8, num_latents=9, cls_token=False, focusing_width=16, focusing_heads=2,
    focusing_mlp_width=32, focusing_repeats=2, num_points=4, mixing_points=4, generator_width=8,
    handover_generator_width=8, width=16, depth=3, heads=2, mlp_width=32, pooling="mean", output_width=8,
    head_bias=False,
)  # fmt: skip
TRANSFORM = sparse_vlm.TransformConfig(image_size=32, resize_size=36)


def make(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    encoder = sparse_vlm.build_encoder(SMALL.replace(**changes), TRANSFORM)
    for parameter in encoder.parameters():  # nothing starts at zero, so that every gradient can show
        torch.nn.init.normal_(parameter, std=0.1)
    if encoder.focusing.initial_rois is not None:
        with torch.no_grad():
            encoder.focusing.initial_rois.copy_(torch.tensor([0.1, 0.1, 0.8, 0.9]))
    encoder.save(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("plain") / "encoder")


@pytest.fixture(scope="module")
def with_cls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("cls") / "encoder", cls_token=True, pooling="cls")


def args(**values: Any) -> SimpleNamespace:
    return SimpleNamespace(mm_vision_select_layer=-1, **values)


def pictures(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def holder(tower: nn.Module) -> nn.Module:
    """A model around the tower, as LLaVA's is: whatever reaches the tower, reaches it through this."""
    return nn.ModuleDict({"vision_tower": tower, "mm_projector": nn.Linear(16, 16)})


def test_delay_load_has_no_parameters_and_knows_its_sizes(plain: Path) -> None:
    with torch.device("meta"):  # as from_pretrained(low_cpu_mem_usage=True) builds it
        tower = SparseFormerVisionTower(plain, args(), delay_load=True)
    assert not tower.is_loaded
    assert not list(tower.parameters())
    assert not list(tower.buffers())
    assert (tower.hidden_size, tower.num_patches, tower.num_patches_per_side) == (16, 9, 3)
    assert tower.config.image_size == 32
    with pytest.raises(RuntimeError, match="load_model"):
        tower(pictures())
    tower.load_model()
    assert tower.device.type == "cpu"
    expected = sparse_vlm.load_encoder(plain)(pictures()).tokens
    assert torch.equal(tower(pictures()), expected)


def test_unfreeze_in_a_config_loads_nothing_while_the_load_is_delayed(plain: Path) -> None:
    tower = SparseFormerVisionTower(plain, args(unfreeze_mm_vision_tower=True), delay_load=True)
    assert not list(tower.parameters())
    tower.load_model()
    assert list(tower.parameters())


def test_loading_twice_keeps_the_weights(plain: Path) -> None:
    tower = SparseFormerVisionTower(plain, args())
    first = tower.encoder
    tower.load_model(device_map="auto")
    assert tower.encoder is first


@pytest.mark.parametrize(
    "device_map", [None, "cpu", torch.device("cpu"), {"": "cpu"}, {"lm_head": "meta", "model": "cpu"}]
)
def test_every_spelling_of_a_device_map(plain: Path, device_map: Any) -> None:
    tower = SparseFormerVisionTower(plain, args(), delay_load=True)
    tower.load_model(device_map=device_map)
    assert tower.device.type == "cpu"
    assert tower(pictures()).device.type == "cpu"


def test_device_maps_of_a_machine_with_gpus() -> None:
    gpu = torch.device("cuda", 1)
    spellings: list[Any] = [1, "cuda:1", gpu, {"": 1}, {"model.vision_tower": 1, "model": 0, "lm_head": 0}]
    for device_map in spellings:
        assert _choose_device(device_map) == gpu, device_map


def test_missing_arguments_take_llavas_defaults(plain: Path) -> None:
    tower = SparseFormerVisionTower(plain, SimpleNamespace())
    assert (tower.select_layer, tower.select_feature, tower.tuned) == (-1, "patch", False)


def test_lists_of_pictures_of_several_sizes(plain: Path) -> None:
    tower = SparseFormerVisionTower(plain, args())
    batch = pictures()
    features = tower([batch[0], torch.randn(3, 48, 20)])
    assert [tuple(feature.shape) for feature in features] == [(1, 9, 16), (1, 9, 16)]
    torch.testing.assert_close(features[0], tower(batch)[:1], rtol=1e-4, atol=1e-5)
    assert tower.dummy_feature.shape == (1, 16)
    assert not tower.dummy_feature.any()


def test_a_frozen_tower_is_invisible_and_keeps_its_precision(plain: Path) -> None:
    tower = SparseFormerVisionTower(plain, args())
    model = holder(tower)
    before = tower(pictures())
    assert {name for name, _ in model.named_parameters()} == {"mm_projector.weight", "mm_projector.bias"}
    assert set(model.state_dict()) == {"mm_projector.weight", "mm_projector.bias"}
    model.to(torch.bfloat16)
    model.half()
    tower.to(dtype=torch.bfloat16, device="cpu")
    model.requires_grad_(True)
    assert tower.dtype == torch.float32
    assert torch.equal(tower(pictures()), before)
    assert not any(parameter.requires_grad for parameter in tower.encoder.parameters())
    assert tower(pictures().bfloat16()).dtype == torch.bfloat16


def test_a_frozen_tower_follows_device_moves_but_not_to_meta(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = SparseFormerVisionTower(plain, args())
    moves: list[torch.device] = []
    monkeypatch.setattr(tower.encoder, "to", moves.append)
    model = holder(tower)
    model.to("meta")
    assert moves == []
    # A CPU-only machine has no second real device: let the probe come back from one.
    tower._apply(lambda tensor: SimpleNamespace(device=torch.device("cuda", 0)))  # type: ignore[arg-type,return-value]
    assert moves == [torch.device("cuda", 0)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_frozen_tower_moves_to_the_gpu_with_its_model(plain: Path) -> None:
    tower = SparseFormerVisionTower(plain, args())
    holder(tower).half().cuda()
    assert (tower.device.type, tower.dtype) == ("cuda", torch.float32)
    assert tower(pictures().half().cuda()).dtype == torch.float16


def test_a_frozen_tower_computes_in_fp32_under_autocast(plain: Path) -> None:
    tower = SparseFormerVisionTower(plain, args())
    before = tower(pictures())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tower(pictures()), before)


def test_graphs_are_for_the_frozen_tower_on_a_gpu(
    plain: Path, stand_in_graphs: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = SparseFormerVisionTower(plain, args())
    before = tower(pictures())
    tower.use_graphs()
    assert torch.equal(tower(pictures()), before)
    assert not stand_in_graphs  # on a CPU nothing is recorded
    monkeypatch.setattr(tower, "_may_replay", lambda: True)
    for _ in range(2):
        assert torch.equal(tower(pictures()), before)
        assert tower(pictures().half()).dtype == torch.float16
    assert len(stand_in_graphs) == 2
    # A projector may be trained behind it.
    projector = nn.Linear(tower.hidden_size, 2)
    projector(tower(pictures())).sum().backward()
    tower.tune()
    assert tower(pictures()).requires_grad
    tower.use_graphs(False)
    tower.tune(False)
    assert torch.equal(tower(pictures()), before)
    assert len(stand_in_graphs) == 2
    with pytest.raises(RuntimeError, match="call load_model"):
        SparseFormerVisionTower(plain, args(), delay_load=True).use_graphs()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_on_a_gpu(plain: Path) -> None:
    tower = SparseFormerVisionTower(plain, args()).cuda()
    before = tower(pictures().cuda())
    tower.use_graphs()
    for _ in range(2):
        torch.testing.assert_close(tower(pictures().cuda()), before, rtol=1e-5, atol=1e-5)


def test_training_mode_does_not_reach_a_frozen_encoder(plain: Path) -> None:
    tower = SparseFormerVisionTower(plain, args())
    holder(tower).train()
    assert tower.training
    assert not tower.encoder.training
    assert not any(module.training for module in tower.encoder.modules())
    assert not tower(pictures().requires_grad_()).requires_grad


def test_no_layer_has_a_name_that_lora_for_the_language_model_aims_at(plain: Path) -> None:
    # peft goes by the end of a name. Those of Llama, Mistral, Qwen, Gemma, MPT and Phi:
    aimed_at = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    aimed_at |= {"Wqkv", "out_proj", "qkv_proj", "gate_up_proj", "dense", "lm_head"}
    tower = SparseFormerVisionTower(plain, args(unfreeze_mm_vision_tower=True))
    names = {name.rpartition(".")[2] for name, _ in tower.named_modules()}
    assert "qkv" in names
    assert not names & aimed_at


@pytest.mark.parametrize("layer", [-1, -2, 1, 0])
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_gradients_reach_exactly_what_is_declared_trainable(with_cls: Path, layer: int, feature: str) -> None:
    values = args(unfreeze_mm_vision_tower=True, mm_vision_select_feature=feature)
    values.mm_vision_select_layer = layer
    tower = SparseFormerVisionTower(with_cls, values)
    holder(tower).train()
    assert tower.encoder.training
    tower(pictures()).square().sum().backward()
    declared = {name for name, parameter in tower.encoder.named_parameters() if parameter.requires_grad}
    tower.encoder.zero_grad()
    tower.encoder.requires_grad_(True)
    tower(pictures()).square().sum().backward()
    reached = {name for name, parameter in tower.encoder.named_parameters() if parameter.grad is not None}
    assert declared == reached
    assert "stem.conv.weight" in declared


def test_a_hand_over_that_adjusts_last_declares_it_frozen(tmp_path: Path) -> None:
    folder = make(tmp_path / "encoder", handover_order=["sample", "position", "adjust"])
    tower = SparseFormerVisionTower(folder, args(unfreeze_mm_vision_tower=True))
    tower(pictures()).square().sum().backward()
    for name, parameter in tower.encoder.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name


def test_a_tuned_tower_is_registered_and_can_be_frozen_again(plain: Path) -> None:
    tower = SparseFormerVisionTower(plain, args(unfreeze_mm_vision_tower=True))
    names = {name for name, _ in holder(tower).named_parameters()}
    assert "vision_tower.encoder.stem.conv.weight" in names
    assert not tower.encoder.head.proj.weight.requires_grad
    tower.tune(False)
    assert not list(tower.parameters())
    assert not any(parameter.requires_grad for parameter in tower.encoder.parameters())
    tower.tune(True)
    assert tower.encoder.stem.conv.weight.requires_grad


def test_precision_of_a_tuned_tower(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = SparseFormerVisionTower(plain, args(unfreeze_mm_vision_tower=True))
    tower.to(dtype=torch.float16, device="cpu")  # LLaVA's call, in fp32 training too
    assert tower.dtype == torch.float32
    tower.to(torch.bfloat16)
    assert tower.dtype == torch.float32
    monkeypatch.setattr("llm_integration.tower._zero3_is_on", lambda: True)
    tower.to(dtype=torch.bfloat16)
    assert tower.dtype == torch.bfloat16
    assert torch.isfinite(tower(pictures())).all()


def test_deepspeeds_own_cast_reaches_a_tuned_tower(plain: Path) -> None:
    tower = SparseFormerVisionTower(plain, args(unfreeze_mm_vision_tower=True))
    holder(tower).bfloat16()
    assert tower.dtype == torch.bfloat16


def test_gradient_checkpointing_of_a_tuned_tower_changes_no_gradient(plain: Path) -> None:
    tower = SparseFormerVisionTower(plain, args(unfreeze_mm_vision_tower=True))
    tower(pictures()).sum().backward()
    before = tower.encoder.stem.conv.weight.grad.clone()  # type: ignore[union-attr]
    tower.zero_grad()
    tower.gradient_checkpointing = True
    assert tower.encoder.cortex.grad_checkpointing
    tower(pictures()).sum().backward()
    torch.testing.assert_close(tower.encoder.stem.conv.weight.grad, before)
    frozen = SparseFormerVisionTower(plain, args())
    frozen.gradient_checkpointing = True
    assert not frozen.gradient_checkpointing


def test_select_feature_tells_the_truth_about_the_class_token(with_cls: Path) -> None:
    tokens = sparse_vlm.load_encoder(with_cls)(pictures()).tokens
    dropping = SparseFormerVisionTower(with_cls, args(mm_vision_select_feature="patch"))
    assert dropping.num_patches == dropping(pictures()).shape[1] == 9
    assert torch.equal(dropping(pictures()), tokens[:, 1:])
    keeping = SparseFormerVisionTower(with_cls, args(mm_vision_select_feature="cls_patch"))
    assert keeping.num_patches == keeping(pictures()).shape[1] == 10
    assert torch.equal(keeping(pictures()), tokens)
    with pytest.raises(ValueError, match="not a square number"):
        _ = keeping.num_patches_per_side


@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_without_a_class_token_every_token_stays(plain: Path, feature: str) -> None:
    tower = SparseFormerVisionTower(plain, args(mm_vision_select_feature=feature))
    assert tower.num_patches == tower(pictures()).shape[1] == 9


def test_select_layer_counts_cortex_states(plain: Path) -> None:
    output = sparse_vlm.load_encoder(plain)(pictures(), hidden_states=True)
    assert output.hidden_states is not None
    for layer, expected in (
        (-1, output.tokens), (3, output.tokens), (-2, output.hidden_states[2]),
        (1, output.hidden_states[1]), (0, output.hidden_states[0]), (-4, output.hidden_states[0]),
    ):  # fmt: skip
        tower = SparseFormerVisionTower(plain, SimpleNamespace(mm_vision_select_layer=layer))
        assert torch.equal(tower(pictures()), expected), layer


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mm_vision_select_layer": 4}, "outside the cortex .* it has 3 blocks"),
        ({"mm_vision_select_layer": -5}, "outside the cortex"),
        ({"mm_vision_select_feature": "cls"}, "'patch' .* or 'cls_patch'"),
        ({"mm_patch_merge_type": "spatial"}, "use 'flat'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "use 'flat'"),
        ({"s2": True}, "s2=True"),
    ],
)
def test_settings_that_make_no_sense_are_refused(plain: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseFormerVisionTower(plain, SimpleNamespace(**values), delay_load=True)


def test_an_empty_directory_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(sparse_vlm.EncoderDirectoryError, match=r"config\.json"):
        SparseFormerVisionTower(tmp_path, args(), delay_load=True)


def test_the_image_processor_is_the_encoders_transform(plain: Path) -> None:
    pytest.importorskip("transformers", reason="the image processor answers with transformers' BatchFeature")
    processor = SparseFormerVisionTower(plain, args(), delay_load=True).image_processor
    picture = Image.effect_noise((50, 70), 80).convert("RGB")
    expected = sparse_vlm.load_encoder(plain).transform(picture)
    assert torch.equal(processor.preprocess(picture, return_tensors="pt")["pixel_values"][0], expected)
    assert torch.equal(processor([picture, picture], return_tensors="pt").pixel_values[1], expected)
    assert np.array_equal(processor(np.asarray(picture))["pixel_values"][0], expected.numpy())
    assert processor.crop_size == {"height": 32, "width": 32}
    assert processor.size["shortest_edge"] == 32
    assert [round(255 * mean) for mean in processor.image_mean] == [123, 117, 104]
    with pytest.raises(TypeError, match="Pillow picture"):
        processor("cat.png")
    with pytest.raises(ValueError, match="'pt'"):
        processor(picture, return_tensors="tf")


def test_no_timm_and_no_llava_is_imported() -> None:
    import subprocess
    import sys

    code = (
        "import sys, llm_integration.tower; "
        "print([name for name in ('timm', 'llava', 'transformers', 'open_clip') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
