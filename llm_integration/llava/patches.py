"""What the plug changes in LLaVA's modules, once they have run."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from .directories import (
    TOWER_FOLDER,
    check_fingerprint,
    check_width,
    find_encoder,
    is_encoder,
    read_fingerprint,
)
from .plugin import Plug
from .tuned import build_callback

_FLAG = "unfreeze_mm_vision_tower"


def patch_builder(module: ModuleType, plug: Plug) -> None:
    """Wrap ``build_vision_tower``: encoder directories become our tower, everything else stays LLaVA's."""
    plug.replace(module, "build_vision_tower", _wrap_build(_need(module, "build_vision_tower")))


def patch_arch(module: ModuleType, plug: Plug) -> None:
    """Wrap the copy of ``build_vision_tower`` here, and the two methods that set a model up for training."""
    build = _need(module, "build_vision_tower")
    if not hasattr(build, "_sparse_vlm"):  # copied before the plug was in
        plug.replace(module, "build_vision_tower", _wrap_build(build))
    for owner, name, wrap in (
        ("LlavaMetaModel", "initialize_vision_modules", _wrap_initialize_modules),
        ("LlavaMetaForCausalLM", "initialize_vision_tokenizer", _wrap_initialize_tokenizer),
    ):
        cls = _need(module, owner)
        plug.replace(cls, name, wrap(_need(cls, name)))


def patch_trainer(module: ModuleType, plug: Plug) -> None:
    """Save tuned towers from LLaVA's trainer, and make ``--unfreeze_mm_vision_tower`` an argument."""
    from transformers.hf_argparser import HfArgumentParser

    trainer = _need(module, "LLaVATrainer")
    plug.replace(trainer, "__init__", _wrap_trainer_init(trainer.__init__))
    plug.replace(HfArgumentParser, "__init__", _wrap_parser_init(HfArgumentParser.__init__))


def _wrap_build(original: Any) -> Any:
    @functools.wraps(original)
    def build_vision_tower(vision_tower_cfg: Any, **kwargs: Any) -> Any:
        name = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
        directory = find_encoder(name, vision_tower_cfg)
        if directory is None:
            return original(vision_tower_cfg, **kwargs)
        check_fingerprint(directory, vision_tower_cfg)
        check_width(
            directory, getattr(vision_tower_cfg, "mm_hidden_size", None), "this checkpoint's projector"
        )
        from llm_integration.tower import SparseFormerVisionTower

        return SparseFormerVisionTower(directory, args=vision_tower_cfg, **kwargs)

    build_vision_tower._sparse_vlm = True  # type: ignore[attr-defined]
    return build_vision_tower


def _wrap_initialize_modules(original: Any) -> Any:
    @functools.wraps(original)
    def initialize_vision_modules(self: Any, model_args: Any, fsdp: Any = None) -> None:
        from llm_integration.tower import SparseFormerVisionTower, check_arguments

        unfreeze = bool(getattr(model_args, _FLAG, False))
        existing = self.get_vision_tower()
        if existing is not None:
            named = getattr(self.config, "mm_vision_tower", None)
            _refuse_swap(getattr(existing, "vision_tower_name", named), model_args.vision_tower)
        if isinstance(existing, SparseFormerVisionTower):
            existing.tune(unfreeze)
        ours = is_encoder(model_args.vision_tower)
        if ours:
            check_arguments(model_args)
            adapter = getattr(model_args, "pretrain_mm_mlp_adapter", None)
            if adapter:
                check_width(Path(model_args.vision_tower), _read_width(adapter), f"the projector {adapter}")
        if unfreeze and not ours:
            raise ValueError(
                f"--{_FLAG} True needs an encoder directory as --vision_tower, got "
                f"{model_args.vision_tower!r}: LLaVA's own tower runs without gradients and would not train"
            )
        if unfreeze and fsdp:
            raise ValueError(
                f"--{_FLAG} True does not work with --fsdp, where LLaVA hides the tower from the optimiser; "
                "use DeepSpeed"
            )
        original(self, model_args, fsdp=fsdp)
        if ours:
            directory = Path(model_args.vision_tower).resolve()
            # LLaVA reads this path again when the checkpoint is used, from whatever folder it is used in.
            self.config.mm_vision_tower = str(directory)
            self.config.mm_vision_tower_sha256 = read_fingerprint(directory)
            _warn_of_other_projector(model_args, self.config.mm_vision_tower_sha256)

    return initialize_vision_modules


def _wrap_initialize_tokenizer(original: Any) -> Any:
    @functools.wraps(original)
    def initialize_vision_tokenizer(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        from llm_integration.tower import SparseFormerVisionTower

        tower = self.get_vision_tower()
        if isinstance(tower, SparseFormerVisionTower):
            # Before this call, the last one of LLaVA's set-up, projector pre-training froze all the rest.
            tower.requires_grad_(tower.tuned)

    return initialize_vision_tokenizer


def _wrap_trainer_init(original: Any) -> Any:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        self.add_callback(build_callback())

    return __init__


def _wrap_parser_init(original: Any) -> Any:
    @functools.wraps(original)
    def __init__(self: Any, dataclass_types: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        if isinstance(dataclass_types, (list, tuple)):
            dataclass_types = tuple(_add_flag(cls) for cls in dataclass_types)
        original(self, dataclass_types, *args, **kwargs)

    return __init__


def _add_flag(cls: Any) -> Any:
    """LLaVA's ``ModelArguments`` with one field more; any other class as it is."""
    names = {field.name for field in dataclasses.fields(cls)}
    if not {"vision_tower", "mm_vision_select_layer", "tune_mm_mlp_adapter"} <= names or _FLAG in names:
        return cls
    flag = dataclasses.field(
        default=False, metadata={"help": "Tune the vision tower too (encoder directories of sparse_vlm)."}
    )
    return dataclasses.make_dataclass(
        cls.__name__, [(_FLAG, bool, flag)], bases=(cls,), namespace={"__module__": cls.__module__}
    )


def _refuse_swap(present: str | None, wanted: str | None) -> None:
    """LLaVA keeps the tower a checkpoint was built with and writes the new path into its config."""
    if present == wanted or present is None or wanted is None:
        return
    if not is_encoder(present) and not is_encoder(wanted):
        return  # LLaVA's own towers are LLaVA's affair
    both = is_encoder(present) and is_encoder(wanted)
    if both and read_fingerprint(Path(present)) == read_fingerprint(Path(wanted)):
        return
    raise ValueError(
        f"this checkpoint was trained with the vision tower {present}, and LLaVA would go on with that one "
        f"while its config names {wanted}: pass --vision_tower {present}, or start from a language model "
        f"without a tower to train with {wanted}"
    )


def _warn_of_other_projector(model_args: Any, fingerprint: str) -> None:
    adapter = getattr(model_args, "pretrain_mm_mlp_adapter", None)
    known = read_fingerprint(Path(adapter).parent, of_checkpoint=True) if adapter else None
    if known is not None and known != fingerprint:
        warnings.warn(
            f"the projector {adapter} was trained on other tower weights than {model_args.vision_tower} "
            f"holds; if the tower was tuned with it, pass the folder {TOWER_FOLDER} beside it",
            stacklevel=3,
        )


def _read_width(adapter: str) -> int | None:
    """The width that a saved projector takes: the columns of its first matrix, under any prefix of names."""
    import torch

    if not Path(adapter).is_file():
        return None  # LLaVA is about to say so itself
    weights = torch.load(adapter, map_location="cpu", weights_only=True)
    matrices = {name: value for name, value in weights.items() if "mm_projector" in name and value.ndim == 2}
    return int(matrices[min(matrices)].shape[1]) if matrices else None


def _need(owner: Any, name: str) -> Any:
    found = getattr(owner, name, None)
    if found is None:
        raise RuntimeError(
            f"{getattr(owner, '__name__', owner)} has no {name}: llm_integration.llava knows LLaVA 1.2 "
            "(haotian-liu/LLaVA, or llava-torch on PyPI), and this is another llava package"
        )
    return found
