"""The import hook: changes a few functions of LLaVA once their modules have run, and changes them back.

LLaVA binds ``build_vision_tower`` by name where it uses it, so the function has to be wrapped between the
moment its module has run and the moment another one copies it. A finder in ``sys.meta_path`` does that for
modules not yet imported; modules that already are get wrapped on the spot. Only the standard library is
imported here; what the wrappers do is in :mod:`llm_integration.llava.patches`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# LLaVA's modules that are changed, in the order in which LLaVA imports them, and the function of
# llm_integration.llava.patches that changes each.
PATCHED_MODULES = {
    "llava.model.multimodal_encoder.builder": "patch_builder",
    "llava.model.llava_arch": "patch_arch",
    "llava.train.llava_trainer": "patch_trainer",
}
_MISSING = object()


class Plug:
    """What is changed at the moment, and how to change it back."""

    def __init__(self) -> None:
        self.depth = 0
        self._finder = _Finder(self)
        self._undo: list[tuple[Any, str, Any]] = []

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of a module or class, remembering what was there.

        Args:
            owner: the module or class.
            name: its attribute, which has to be its own or inherited.
            value: the new value.
        """
        self._undo.append((owner, name, vars(owner).get(name, _MISSING)))
        setattr(owner, name, value)

    def put_in(self) -> None:
        """Start changing; a second time only counts."""
        self.depth += 1
        if self.depth > 1:
            return
        sys.meta_path.insert(0, self._finder)
        try:
            for name in PATCHED_MODULES:
                if name in sys.modules:
                    self.patch(sys.modules[name])
        except BaseException:
            self.take_out()
            raise

    def take_out(self) -> None:
        """Undo everything when the last of several plugs is taken out.

        Raises:
            RuntimeError: if it was not in.
        """
        if not self.depth:
            raise RuntimeError("llm_integration.llava is not plugged in")
        self.depth -= 1
        if self.depth:
            return
        sys.meta_path.remove(self._finder)
        copies = []
        while self._undo:
            owner, name, original = self._undo.pop()
            changed = vars(owner).get(name)
            if original is _MISSING:
                delattr(owner, name)
                continue
            setattr(owner, name, original)
            if isinstance(owner, ModuleType):
                copies.append((name, changed, original))
        # Modules that came by their copy while the function was wrapped: `from .builder import ...`.
        for module_name, module in list(sys.modules.items()):
            if module_name.partition(".")[0] in ("llava", "__main__"):
                for name, changed, original in copies:
                    if vars(module).get(name) is changed:
                        setattr(module, name, original)

    def patch(self, module: ModuleType) -> None:
        """Change one of LLaVA's modules that has just run."""
        patches = importlib.import_module("llm_integration.llava.patches")
        getattr(patches, PATCHED_MODULES[module.__name__])(module, self)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, plug: Plug) -> None:
        self._plug = plug

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in PATCHED_MODULES:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            if finder is self or find is None:
                continue
            spec: ModuleSpec | None = find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self._plug)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Another loader, followed by our change."""

    def __init__(self, loader: importlib.abc.Loader, plug: Plug) -> None:
        self._loader = loader
        self._plug = plug

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Whoever asks the module for its source later talks to the real loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if self._plug.depth:
            self._plug.patch(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


_PLUG = Plug()


def plug_in() -> None:
    """Make LLaVA accept encoder directories from here on, imported already or not."""
    _PLUG.put_in()


def unplug() -> None:
    """Undo one :func:`plug_in`; after the last one LLaVA is as it was.

    Raises:
        RuntimeError: if it was not plugged in.
    """
    _PLUG.take_out()


def is_plugged_in() -> bool:
    """Whether LLaVA accepts encoder directories at the moment."""
    return _PLUG.depth > 0


@contextlib.contextmanager
def plugged_in() -> Iterator[None]:
    """Make LLaVA accept encoder directories inside a ``with`` block; towers built there live on."""
    plug_in()
    try:
        yield
    finally:
        unplug()
