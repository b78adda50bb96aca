"""From a teacher's name, folder or file to its model; only names that say so touch the network."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sparse_vlm.checkpoint import FORMAT

from .files import read_json
from .spec import TeacherError
from .trunk import Trunk

_LIBRARIES = ("open_clip", "timm", "hf")


def load_trunk(name: str, weights: str | PathLike[str] | None = None) -> Trunk:
    """Find and load a teacher's model; see :func:`bootstrap.teacher.load_teacher` for the names.

    Raises:
        TeacherError: with one clear sentence.
    """
    file = None if weights is None else _weights_file(Path(weights))
    library, colon, rest = name.partition(":")
    if colon and library in _LIBRARIES:
        if not rest:
            raise TeacherError(f"teacher {name!r} names a library but no model")
        if library == "open_clip":
            return _load_open_clip(name, rest, file)
        if library == "timm":
            return _load_timm(name, rest, file)
        _no_weights(name, file)
        from .hf_load import load_hf

        return load_hf(rest, name)
    path = Path(name)
    if not path.exists():
        raise TeacherError(_ambiguous(name))
    _no_weights(name, file)
    return _load_local(path)


def _load_open_clip(name: str, rest: str, file: Path | None) -> Trunk:
    from .open_clip_load import load_open_clip_file, load_open_clip_tag

    model, slash, tag = rest.partition("/")
    if slash:
        _no_weights(name, file)
        return load_open_clip_tag(model, tag, name)
    if file is None:
        raise TeacherError(
            f"teacher {name!r} names an architecture without weights: add a checkpoint file "
            f"(weights=FILE), or a tag to download ({name}/TAG)"
        )
    return load_open_clip_file(model, file, name)


def _load_timm(name: str, rest: str, file: Path | None) -> Trunk:
    from .timm_load import load_timm_file, load_timm_pretrained

    model, at, word = rest.partition("@")
    if at:
        if word != "pretrained":
            raise TeacherError(f"teacher {name!r}: after @ comes 'pretrained', got {word!r}")
        _no_weights(name, file)
        return load_timm_pretrained(model, name)
    if file is None:
        raise TeacherError(
            f"teacher {name!r} names an architecture without weights: add a checkpoint file "
            f"(weights=FILE), or have them downloaded ({name}@pretrained)"
        )
    return load_timm_file(model, file, name)


def _load_local(path: Path) -> Trunk:
    """A folder in a library's own format, or a safetensors file that names its timm model."""
    if path.is_file():
        return _load_named_file(path, path)
    if (path / "open_clip_config.json").is_file():
        from .open_clip_load import load_open_clip_folder

        return load_open_clip_folder(path)
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        if config.get("format") == FORMAT:
            raise TeacherError(
                f"{path} is an encoder directory, and no ViT to bootstrap from; student.start_from takes it"
            )
        if "architecture" in config:
            from .timm_load import load_timm_folder

            return load_timm_folder(path, config)
        if "model_type" in config:
            from .hf_load import load_hf

            return load_hf(str(path), str(path))
        raise TeacherError(
            f"{path / 'config.json'} is neither timm's (it would have 'architecture') nor transformers' "
            "(it would have 'model_type')"
        )
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return _load_named_file(files[0], path)
    raise TeacherError(
        f"folder {path} holds no teacher: expected open_clip_config.json (open_clip), config.json (timm, "
        "transformers), or one safetensors file whose metadata names its timm model"
    )


def _load_named_file(file: Path, asked: Path) -> Trunk:
    model = read_metadata(file).get("timm")
    if model is None:
        raise TeacherError(
            f"{file} does not say which model it belongs to (safetensors metadata with a 'timm' name): name "
            f"the architecture and give the file beside it: timm:MODEL or open_clip:MODEL with weights={file}"
        )
    from .timm_load import load_timm_file

    return load_timm_file(model, file, str(asked))


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty for a file of another kind."""
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise TeacherError(f"{file} is not a readable safetensors file: {error}") from None


def _weights_file(path: Path) -> Path:
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin")) + sorted(path.glob("*.pt"))
        if len(files) != 1:
            raise TeacherError(f"weights folder {path} holds {len(files)} checkpoint files, one was expected")
        return files[0]
    if not path.is_file():
        raise TeacherError(f"weights file {path} does not exist")
    return path


def _no_weights(name: str, file: Path | None) -> None:
    if file is not None:
        raise TeacherError(f"teacher {name!r} brings its own weights: leave weights={file} out")


def _ambiguous(name: str) -> str:
    """A plain string that is no path: which spellings would be right."""
    if name.startswith((".", "/", "~")):
        return f"teacher {name!r}: there is no such folder or file"
    guesses = []
    try:
        import open_clip

        if name.partition("/")[0] in open_clip.list_models():
            guesses.append(f"open_clip:{name}" + ("" if "/" in name else "/TAG"))
    except ImportError:
        pass
    try:
        import timm

        if timm.is_model(name.partition(".")[0]):
            guesses.append(f"timm:{name}@pretrained")
    except ImportError:
        pass
    if not guesses:
        guesses = [f"hf:{name}"] if "/" in name else [f"open_clip:{name}/TAG", f"timm:{name}@pretrained"]
    return (
        f"teacher {name!r} is ambiguous: there is no such folder or file (./{name}); "
        f"to name a model for download write {' or '.join(guesses)}"
    )
