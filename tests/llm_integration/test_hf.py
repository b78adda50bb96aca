"""The SparseFormer as a transformers model."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel

import sparse_vlm
from llm_integration.hf import SparseFormerVisionConfig, SparseFormerVisionModel, build_vision_model
from sparse_vlm import SparseFormerConfig


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))


def test_automodel_reads_an_encoder_directory(encoder_dir: Path, pictures: torch.Tensor) -> None:
    encoder = sparse_vlm.load_encoder(encoder_dir)
    model = AutoModel.from_pretrained(encoder_dir)
    assert type(model) is SparseFormerVisionModel
    with torch.no_grad():
        expected, got = encoder(pictures, hidden_states=True), model(pictures, output_hidden_states=True)
    assert torch.equal(got.last_hidden_state, expected.tokens)
    assert torch.equal(got.pooler_output, expected.pooled)
    assert all(torch.equal(a, b) for a, b in zip(got.rois, expected.rois, strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(got.hidden_states[:-1], expected.hidden_states[:-1], strict=True)
    )


def test_hidden_states_contract(encoder_dir: Path, pictures: torch.Tensor) -> None:
    model = SparseFormerVisionModel.from_encoder_directory(encoder_dir)
    output = model(pictures, output_hidden_states=-2)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert {state.shape for state in output.hidden_states} == {(2, 9, model.config.hidden_size)}
    assert output.hidden_states[-1] is output.last_hidden_state
    assert model(pictures).hidden_states is None
    assert isinstance(model(pictures, return_dict=False), tuple)


def test_the_token_count_belongs_to_the_call(encoder_dir: Path, pictures: torch.Tensor) -> None:
    model, encoder = AutoModel.from_pretrained(encoder_dir), sparse_vlm.load_encoder(encoder_dir)
    for count in (2, 5, 17, None):
        tokens = model(pictures, num_tokens=count).last_hidden_state
        assert torch.equal(tokens, encoder(pictures, count).tokens)
    with pytest.raises(ValueError, match="num_tokens must be at least 2, got 1"):
        model(pictures, num_tokens=1)


def test_save_and_load_are_bit_equal(encoder_dir: Path, tmp_path: Path, pictures: torch.Tensor) -> None:
    model = SparseFormerVisionModel.from_encoder_directory(encoder_dir, num_tokens=5)
    model.save_pretrained(tmp_path / "tower")
    again = AutoModel.from_pretrained(tmp_path / "tower")
    assert again.config.num_tokens == 5
    assert torch.equal(again(pictures).last_hidden_state, model(pictures).last_hidden_state)
    assert AutoConfig.from_pretrained(tmp_path / "tower").hidden_size == 32


def test_back_to_an_encoder_directory(encoder_dir: Path, tmp_path: Path, pictures: torch.Tensor) -> None:
    model = SparseFormerVisionModel.from_encoder_directory(encoder_dir, pooling_head=False)
    assert not any(name.startswith(("head.proj", "head.pool")) for name, _ in model.named_parameters())
    assert model(pictures).pooler_output is None
    with pytest.raises(ValueError, match="head_from"):
        model.save_encoder_directory(tmp_path / "back")
    with torch.no_grad():
        model.stem.conv.weight.mul_(2)
    model.save_encoder_directory(tmp_path / "back", {"tuned": True}, head_from=encoder_dir)
    before, after = sparse_vlm.load_encoder(encoder_dir), sparse_vlm.load_encoder(tmp_path / "back")
    assert after.transform.config == before.transform.config
    assert torch.equal(after.head.proj.weight, before.head.proj.weight)
    assert torch.equal(after(pictures).tokens, model(pictures).last_hidden_state)


def test_what_automodel_has_read_goes_back_too(
    encoder_dir: Path, tmp_path: Path, pictures: torch.Tensor
) -> None:
    model = AutoModel.from_pretrained(encoder_dir)
    model.save_encoder_directory(tmp_path / "back")
    before, after = sparse_vlm.load_encoder(encoder_dir), sparse_vlm.load_encoder(tmp_path / "back")
    assert after.transform.config == before.transform.config
    assert torch.equal(after(pictures).pooled, before(pictures).pooled)
    model.save_pretrained(tmp_path / "tower")
    again = AutoModel.from_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match="does not know its image transform"):
        again.save_encoder_directory(tmp_path / "again")
    again.save_encoder_directory(tmp_path / "again", head_from=encoder_dir)
    assert sparse_vlm.load_encoder(tmp_path / "again").transform.config == before.transform.config


def test_missing_parameters_are_initialised_and_loaded_ones_kept(encoder_dir: Path, tmp_path: Path) -> None:
    SparseFormerVisionModel.from_encoder_directory(encoder_dir).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = ["focusing.stage.offset_bias", "focusing.initial_rois", "cortex.cls_token"]
    kept = {name: value for name, value in weights.items() if name not in lost}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    state = AutoModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(state[name], value) for name, value in kept.items())
    fresh = sparse_vlm.build_encoder(sparse_vlm.load_encoder(encoder_dir).config).state_dict()
    for name in lost[:2]:
        assert torch.equal(state[name], fresh[name])
    assert 0 < state[lost[2]].abs().max() < 0.2


def test_built_from_a_config_it_is_initialised_like_the_encoder(
    tiny_encoder_config: SparseFormerConfig,
) -> None:
    config = SparseFormerVisionConfig(architecture=tiny_encoder_config.to_dict())
    state = AutoModel.from_config(config).state_dict()
    fresh = sparse_vlm.build_encoder(tiny_encoder_config).state_dict()
    assert state.keys() == fresh.keys()
    for name, value in fresh.items():
        if value.std() == 0 or name.endswith(("offset_bias", "initial_rois")):
            assert torch.equal(state[name], value), name
        else:
            assert state[name].std() == pytest.approx(float(value.std()), rel=0.8), name


def test_parts_outside_the_checkpoint_keep_their_own_initialisation_on_meta(encoder_dir: Path) -> None:
    with torch.device("meta"):
        model = SparseFormerVisionModel(AutoConfig.from_pretrained(encoder_dir))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert not list(model.named_buffers())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 1}, "at least 2"),
        ({"architecture": {"num_latent": 3}}, "num_latents"),
        ({"architecture": {"token_embedding": "per_token", "num_latents": 8}, "num_tokens": 5}, "exactly 9"),
    ],
)
def test_config_refuses(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseFormerVisionConfig(**changes)  # type: ignore[arg-type]


def test_refuses_pictures_of_another_shape_or_kind(encoder_dir: Path) -> None:
    model = AutoModel.from_pretrained(encoder_dir)
    with pytest.raises(ValueError, match="pixel_values must have the shape"):
        model(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"normalised floating-point pictures .*, got torch.uint8"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_gradient_checkpointing_gives_the_same_gradients(encoder_dir: Path, pictures: torch.Tensor) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = SparseFormerVisionModel.from_encoder_directory(encoder_dir, pooling_head=False).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert model.focusing.grad_checkpointing
            assert model.cortex.grad_checkpointing
        model(pictures).last_hidden_state.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_dtype(encoder_dir: Path, pictures: torch.Tensor) -> None:
    model = AutoModel.from_pretrained(encoder_dir, dtype=torch.bfloat16)
    assert model(pictures).last_hidden_state.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph(encoder_dir: Path, pictures: torch.Tensor, backend: str) -> None:
    model = SparseFormerVisionModel.from_encoder_directory(encoder_dir, pooling_head=False)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        got, expected = compiled(pictures, output_hidden_states=-1), model(pictures)
    torch.testing.assert_close(got.hidden_states[-1], expected.last_hidden_state)


def test_graphs_say_what_the_plain_tower_says(
    encoder_dir: Path,
    pictures: torch.Tensor,
    stand_in_graphs: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = SparseFormerVisionModel.from_encoder_directory(encoder_dir).eval()
    model.use_graphs()
    with torch.no_grad():
        plain = model(pictures, output_hidden_states=True)
    assert not stand_in_graphs  # on a CPU nothing is recorded
    monkeypatch.setattr(model, "_may_replay", lambda: not torch.is_grad_enabled())
    with torch.no_grad():
        for _ in range(2):
            graphed = model(pictures, output_hidden_states=True)
            torch.testing.assert_close(dict(graphed), dict(plain), rtol=0, atol=0)
        assert model(pictures).hidden_states is None
    assert stand_in_graphs == [tuple(pictures.shape)] * 2  # with the states and without
    assert model(pictures).last_hidden_state.requires_grad
    copied = copy.deepcopy(model)
    model.use_graphs(False)
    with torch.no_grad():
        model(pictures[:1])
        assert len(stand_in_graphs) == 2
        copied.stem.conv.weight.zero_()
        assert not torch.equal(copied(pictures).last_hidden_state, plain.last_hidden_state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_on_a_gpu(encoder_dir: Path, pictures: torch.Tensor) -> None:
    model = SparseFormerVisionModel.from_encoder_directory(encoder_dir).eval().cuda()
    with torch.no_grad():
        plain = model(pictures.cuda(), output_hidden_states=True)
        model.use_graphs()
        for _ in range(2):
            graphed = model(pictures.cuda(), output_hidden_states=True)
            torch.testing.assert_close(dict(graphed), dict(plain), rtol=1e-5, atol=1e-5)


def test_image_processor_is_the_encoders_transform(encoder_dir: Path, picture: object) -> None:
    processor = AutoImageProcessor.from_pretrained(encoder_dir, backend="pil")
    expected = sparse_vlm.load_encoder(encoder_dir).transform(picture)  # type: ignore[arg-type]
    assert torch.equal(processor(picture, return_tensors="pt")["pixel_values"][0], expected)


def test_encoder_config_is_one_of_ours(encoder_dir: Path) -> None:
    values = json.loads((encoder_dir / "config.json").read_text())
    assert values["model_type"] == SparseFormerVisionConfig.model_type


def test_model_shares_the_encoders_weights(encoder_dir: Path) -> None:
    encoder = sparse_vlm.load_encoder(encoder_dir)
    model = build_vision_model(encoder)
    assert model.stem.conv.weight.data_ptr() == encoder.stem.conv.weight.data_ptr()
