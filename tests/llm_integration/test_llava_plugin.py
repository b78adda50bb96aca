"""The plug for LLaVA, on a stand-in package with LLaVA's module and function names."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import sparse_vlm
from llm_integration.llava import is_plugged_in, plug_in, plugged_in, unplug
from llm_integration.llava.__main__ import split_command
from llm_integration.llava.directories import check_fingerprint, find_encoder, is_encoder, read_fingerprint
from llm_integration.tower import SparseFormerVisionTower

ROOT = Path(__file__).resolve().parents[2]
SMALL = sparse_vlm.SparseFormerConfig(
    stem_channels=8, num_latents=4, cls_token=False, focusing_width=16, focusing_heads=2,
    focusing_mlp_width=16, focusing_repeats=1, num_points=4, mixing_points=4, generator_width=4,
    handover_generator_width=4, width=16, depth=1, heads=2, mlp_width=16, pooling="mean", output_width=0,
    head_bias=False,
)  # fmt: skip
BUILDER = """
def build_vision_tower(vision_tower_cfg, **kwargs):
    return ("theirs", vision_tower_cfg, kwargs)
"""
ARCH = """
from .multimodal_encoder.builder import build_vision_tower

class LlavaMetaModel:
    def __init__(self, config):
        self.config = config
        if hasattr(config, "mm_vision_tower"):
            self.vision_tower = build_vision_tower(config, delay_load=True)

    def get_vision_tower(self):
        return getattr(self, "vision_tower", None)

    def initialize_vision_modules(self, model_args, fsdp=None):
        self.config.mm_vision_tower = model_args.vision_tower
        if self.get_vision_tower() is None:
            self.vision_tower = build_vision_tower(model_args)
        else:
            self.vision_tower.load_model()

class LlavaMetaForCausalLM:
    def initialize_vision_tokenizer(self, model_args, tokenizer):
        pass
"""


@pytest.fixture
def llava(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package called llava on the path, not imported yet."""
    if any(name.partition(".")[0] == "llava" for name in sys.modules):
        pytest.skip("the real llava is imported in this process")
    folder = tmp_path / "site" / "llava"
    (folder / "model" / "multimodal_encoder").mkdir(parents=True)
    for package in (folder, folder / "model", folder / "model" / "multimodal_encoder"):
        (package / "__init__.py").write_text("")
    (folder / "model" / "multimodal_encoder" / "builder.py").write_text(BUILDER)
    (folder / "model" / "llava_arch.py").write_text(ARCH)
    monkeypatch.syspath_prepend(folder.parent)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "llava"]:
        del sys.modules[name]
    assert not is_plugged_in()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders") / "one"
    sparse_vlm.build_encoder(SMALL, sparse_vlm.TransformConfig(image_size=32)).save(folder)
    return folder


def modules() -> tuple[ModuleType, ModuleType]:
    return (
        importlib.import_module("llava.model.multimodal_encoder.builder"),
        importlib.import_module("llava.model.llava_arch"),
    )


def functions() -> list[Any]:
    builder, arch = modules()
    return [
        builder.build_vision_tower,
        arch.build_vision_tower,
        arch.LlavaMetaModel.initialize_vision_modules,
        arch.LlavaMetaForCausalLM.initialize_vision_tokenizer,
    ]


def arguments(path: Path, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(vision_tower=str(path), mm_vision_select_layer=-1, **more)


def test_plugged_in_before_the_import_and_undone(llava: Path, encoder: Path) -> None:
    with plugged_in():
        inside = functions()
        for module in modules():
            assert isinstance(module.build_vision_tower(arguments(encoder)), SparseFormerVisionTower)
    outside = functions()
    assert not any(changed is original for changed, original in zip(inside, outside, strict=True))
    assert outside[0] is outside[1]
    assert outside[0](arguments(encoder))[0] == "theirs"
    assert all(function.__module__.startswith("llava.") for function in outside)
    assert not any(hasattr(function, "__wrapped__") for function in outside)


def test_plugged_in_after_the_import_and_undone(llava: Path, encoder: Path) -> None:
    before = functions()
    plug_in()
    plug_in()
    try:
        for module in modules():
            assert isinstance(module.build_vision_tower(arguments(encoder)), SparseFormerVisionTower)
        unplug()
        assert is_plugged_in()
        assert functions()[0] is not before[0]
    finally:
        unplug()
    assert functions() == before
    with pytest.raises(RuntimeError, match="not plugged in"):
        unplug()


def test_undone_when_the_block_raises(llava: Path) -> None:
    before = functions()
    with pytest.raises(KeyError), plugged_in():
        raise KeyError
    assert functions() == before


def test_everything_else_passes_to_llava(llava: Path, tmp_path: Path) -> None:
    with plugged_in():
        build = modules()[1].build_vision_tower
        for name in ("openai/clip-vit-large-patch14-336", str(tmp_path)):
            cfg = SimpleNamespace(mm_vision_tower=name)
            assert build(cfg, delay_load=True) == ("theirs", cfg, {"delay_load": True})


def test_the_source_of_a_patched_module_can_still_be_read(llava: Path) -> None:
    import inspect

    with plugged_in():
        builder = modules()[0]
        assert inspect.getsource(builder) == BUILDER
        assert type(builder.__loader__).__name__ == "SourceFileLoader"


def test_another_package_called_llava_is_refused(llava: Path) -> None:
    (llava / "model" / "llava_arch.py").write_text("from .multimodal_encoder.builder import *\n")
    importlib.invalidate_caches()
    with plugged_in(), pytest.raises(RuntimeError, match=r"LlavaMetaModel.*another llava package"):
        modules()


def test_training_writes_path_and_hash_into_the_config(
    llava: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(encoder.parent)
    with plugged_in():
        model = modules()[1].LlavaMetaModel(SimpleNamespace())
        model.initialize_vision_modules(arguments(Path("one")))
    assert model.config.mm_vision_tower == str(encoder.resolve())
    assert model.config.mm_vision_tower_sha256 == read_fingerprint(encoder)


def test_swapping_the_tower_of_a_checkpoint_is_refused(llava: Path, encoder: Path, tmp_path: Path) -> None:
    other = tmp_path / "two"
    sparse_vlm.build_encoder(SMALL).save(other)
    with plugged_in():
        cls = modules()[1].LlavaMetaModel
        model = cls(SimpleNamespace(mm_vision_tower=str(encoder)))
        for wanted in (other, Path("openai/clip-vit-large-patch14-336")):
            with pytest.raises(ValueError, match="this checkpoint was trained with the vision tower"):
                model.initialize_vision_modules(arguments(wanted))
        assert model.config.mm_vision_tower == str(encoder)
        model.initialize_vision_modules(arguments(encoder))
        assert model.vision_tower.is_loaded
        clip = cls(SimpleNamespace())
        clip.vision_tower = SimpleNamespace(vision_tower_name="openai/clip-vit-large-patch14-336")
        with pytest.raises(ValueError, match="openai/clip"):
            clip.initialize_vision_modules(arguments(encoder))


def test_unfreezing_reaches_an_existing_tower_and_is_refused_where_it_cannot_work(
    llava: Path, encoder: Path
) -> None:
    with plugged_in():
        cls = modules()[1].LlavaMetaModel
        model = cls(SimpleNamespace(mm_vision_tower=str(encoder)))
        model.initialize_vision_modules(arguments(encoder, unfreeze_mm_vision_tower=True))
        assert list(model.vision_tower.parameters())
        clip = SimpleNamespace(vision_tower="openai/clip", unfreeze_mm_vision_tower=True)
        with pytest.raises(ValueError, match="needs an encoder directory"):
            cls(SimpleNamespace()).initialize_vision_modules(clip)
        with pytest.raises(ValueError, match="--fsdp"):
            cls(SimpleNamespace()).initialize_vision_modules(
                arguments(encoder, unfreeze_mm_vision_tower=True), fsdp=["full_shard"]
            )


def test_a_grid_merge_is_refused_on_an_existing_tower_too(llava: Path, encoder: Path) -> None:
    with plugged_in():
        model = modules()[1].LlavaMetaModel(SimpleNamespace(mm_vision_tower=str(encoder)))
        with pytest.raises(ValueError, match="use 'flat'"):
            model.initialize_vision_modules(arguments(encoder, mm_patch_merge_type="spatial_unpad"))


def test_a_projector_of_other_tower_weights_warns(llava: Path, encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"mm_vision_tower_sha256": "0"}')
    values = arguments(encoder, pretrain_mm_mlp_adapter=str(tmp_path / "mm_projector.bin"))
    with plugged_in(), pytest.warns(UserWarning, match="other tower weights"):
        modules()[1].LlavaMetaModel(SimpleNamespace()).initialize_vision_modules(values)


def test_a_projector_of_another_width_is_refused(llava: Path, encoder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "mm_projector.bin"
    values = arguments(encoder, pretrain_mm_mlp_adapter=str(adapter))
    for width in (16, 24):
        torch.save(
            {
                "model.mm_projector.0.weight": torch.zeros(8, width),
                "model.mm_projector.0.bias": torch.zeros(8),
                "model.mm_projector.2.weight": torch.zeros(8, 8),
            },
            adapter,
        )
        with plugged_in():
            model = modules()[1].LlavaMetaModel(SimpleNamespace())
            if width == SMALL.width:
                model.initialize_vision_modules(values)
                continue
            with pytest.raises(
                ValueError, match=r"mm_projector\.bin takes visual tokens of width 24.*width 16"
            ):
                model.initialize_vision_modules(values)


def test_a_checkpoint_whose_projector_has_another_width_is_refused(llava: Path, encoder: Path) -> None:
    with plugged_in():
        cls = modules()[1].LlavaMetaModel
        cls(SimpleNamespace(mm_vision_tower=str(encoder), mm_hidden_size=SMALL.width))
        with pytest.raises(ValueError, match=r"takes visual tokens of width 1024.*tokens of width 16"):
            cls(SimpleNamespace(mm_vision_tower=str(encoder), mm_hidden_size=1024))


def test_other_weights_under_the_same_path_are_refused(encoder: Path) -> None:
    check_fingerprint(encoder, SimpleNamespace(mm_vision_tower_sha256=read_fingerprint(encoder)))
    check_fingerprint(encoder, SimpleNamespace())
    with pytest.raises(ValueError, match="holds other weights"):
        check_fingerprint(encoder, SimpleNamespace(mm_vision_tower_sha256="0" * 64))


def test_a_moved_checkpoint_finds_the_tower_beside_it(encoder: Path, tmp_path: Path) -> None:
    sparse_vlm.load_encoder(encoder).save(tmp_path / "vision_tower")
    gone = {"mm_vision_tower_sha256": read_fingerprint(encoder)}
    moved = SimpleNamespace(_name_or_path=str(tmp_path), **gone)
    assert find_encoder("/gone/vision_tower", moved) == tmp_path / "vision_tower"
    with pytest.raises(FileNotFoundError, match="/gone/vision_tower, is not there any more"):
        find_encoder("/gone/vision_tower", SimpleNamespace(**gone))


def test_what_is_an_encoder_directory(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    assert is_encoder(str(encoder))
    for name in (None, "", "openai/clip-vit-base-patch16", str(tmp_path), str(tmp_path / "gone")):
        assert not is_encoder(name)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["train.py", "--lr", "1"], (None, "train.py", ["--lr", "1"])),
        (["-m", "a.b", "-m", "c"], ("a.b", None, ["-m", "c"])),
        (["--local_rank=3", "train.py", "--lr", "1"], (None, "train.py", ["--local_rank=3", "--lr", "1"])),
        (["--local_rank", "3", "-m", "a.b", "x"], ("a.b", None, ["--local_rank=3", "x"])),
    ],
)
def test_the_launcher_sorts_its_command_line(
    given: list[str], expected: tuple[str | None, str | None, list[str]]
) -> None:
    assert split_command(given) == expected


@pytest.mark.parametrize("given", [[], ["--vision_tower", "x"], ["-m"], ["--local_rank=0"]])
def test_the_launcher_wants_a_command(given: list[str]) -> None:
    with pytest.raises(SystemExit, match="expected a script, or -m and a module"):
        split_command(given)


def python(*command: str, executable: str = sys.executable, path: Path | None = ROOT, **more: Any) -> str:
    environment = {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run(
        [executable, *command], env=environment, text=True, check=False, capture_output=True, **more
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


def test_the_launcher_runs_scripts_and_modules_as_python_does(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "probe.py").write_text(
        "import sys, beside\n"
        "from llm_integration.llava import is_plugged_in\n"
        "print(__name__, sys.argv[1:], is_plugged_in(), sys.modules['__main__'].__file__ == __file__)\n"
    )
    expected = "__main__ ['--local_rank=0', '--x', '-m'] True True"
    launcher = ("-m", "llm_integration.llava", "--local_rank=0")
    assert python(*launcher, str(tmp_path / "probe.py"), "--x", "-m") == expected
    assert python(*launcher, "-m", "probe", "--x", "-m", cwd=tmp_path) == expected


def test_importing_changes_nothing_and_is_light() -> None:
    code = (
        "import sys; before = list(sys.meta_path); import llm_integration.llava as plug; "
        "print(before == sys.meta_path, plug.is_plugged_in(), "
        "[name for name in ('torch', 'numpy', 'transformers', 'llava') if name in sys.modules])"
    )
    assert python("-c", code) == "True False []"


def test_the_pth_file_comes_and_goes(tmp_path: Path) -> None:
    python("-m", "venv", "--without-pip", str(tmp_path / "env"))
    inside = str(tmp_path / "env" / "bin" / "python")
    ask = "import sys; print([type(finder).__module__ for finder in sys.meta_path][0])"
    command = ("-m", "llm_integration.llava.pth")
    assert python(*command, "status", executable=inside).startswith("not installed")
    assert python(*command, "install", executable=inside).startswith("installed")
    assert python(*command, "status", executable=inside).startswith("installed")
    assert python("-c", ask, executable=inside) == "llm_integration.llava.plugin"
    # An environment that lost the package starts as ever.
    assert python("-c", ask, executable=inside, path=None) != "llm_integration.llava.plugin"
    assert python(*command, "remove", executable=inside).startswith("removed")
    assert python("-c", ask, executable=inside) != "llm_integration.llava.plugin"
    assert python(*command, "remove", executable=inside).startswith("not installed")
