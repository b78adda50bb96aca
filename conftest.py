"""Test-suite housekeeping: offline, one thread per worker, fixed seeds, and what is skipped where.

It lies beside the tests' folder, not in it, so that it is read before anything a test file imports.
"""

from __future__ import annotations

import os
import random
import socket
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WITH_NETWORK = os.environ.get("SPARSE_VLM_NETWORK") == "1"
WITH_LAUNCHER = os.environ.get("SPARSE_VLM_LAUNCHER") == "1"
REAL_DATA = Path(
    os.environ.get("SPARSE_VLM_REAL_DATA") or Path(__file__).resolve().parent.parent / "shared" / "data"
)

if not WITH_NETWORK:
    # Hugging Face's libraries read these once, when they are first imported.
    for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[_name] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_configure(config: pytest.Config) -> None:
    """Give each of several test workers one thread; more would only stand in each other's way."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        import torch

        torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run, and say why."""
    if item.get_closest_marker("network") and not WITH_NETWORK:
        pytest.skip("needs the network; set SPARSE_VLM_NETWORK=1 to run it")
    if item.get_closest_marker("launcher") and not WITH_LAUNCHER:
        pytest.skip("starts the deepspeed launcher, which takes minutes; set SPARSE_VLM_LAUNCHER=1 to run it")
    if item.get_closest_marker("real_data") and not REAL_DATA.is_dir():
        pytest.skip(f"needs real weights and pictures; set SPARSE_VLM_REAL_DATA (looked in {REAL_DATA})")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _fixed_seeds(request: pytest.FixtureRequest) -> None:
    """Every test begins with random states that depend on its name alone, not on the tests before it."""
    import numpy as np
    import torch

    seed = zlib.crc32(request.node.name.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test reach beyond this machine unless it is marked `network`."""
    if request.node.get_closest_marker("network"):
        return
    for name in ("connect", "connect_ex", "sendto"):
        original = getattr(socket.socket, name)

        def stay_here(self: socket.socket, *arguments: Any, _original: Any = original) -> Any:
            address = arguments[-1]
            host = address[0] if isinstance(address, tuple) else ""
            if host not in ("", "localhost", "::1") and not str(host).startswith("127."):
                raise OSError(f"a test that is not marked 'network' tried to reach {host}")
            return _original(self, *arguments)

        monkeypatch.setattr(socket.socket, name, stay_here)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real weights and pictures; for tests marked `real_data`."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"needs real weights and pictures; set SPARSE_VLM_REAL_DATA (looked in {REAL_DATA})")
    return REAL_DATA


@pytest.fixture
def random_picture() -> Callable[..., Any]:
    """A maker of pictures: smooth colours with some noise, the same for the same arguments."""
    import numpy as np
    from PIL import Image

    def build(width: int = 64, height: int = 48, seed: int = 0, mode: str = "RGB") -> Image.Image:
        generator = np.random.default_rng(seed)
        coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = smooth + generator.integers(-8, 9, smooth.shape, dtype=np.int16)
        return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)

    return build
