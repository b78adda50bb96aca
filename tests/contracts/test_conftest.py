"""The suite's own promises: offline, seeded, pictures that repeat."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch


@pytest.mark.skipif(os.environ.get("SPARSE_VLM_NETWORK") == "1", reason="the network was asked for")
def test_hubs_are_offline() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("connect", socket.SOCK_STREAM, ()),
        ("connect_ex", socket.SOCK_STREAM, ()),
        ("sendto", socket.SOCK_DGRAM, (b"x",)),
    ],
)
def test_an_unmarked_test_cannot_leave_the_machine(
    name: str, kind: socket.SocketKind, words: tuple[bytes, ...]
) -> None:
    with (
        socket.socket(type=kind) as outside,
        pytest.raises(OSError, match=r"not marked 'network' tried to reach 192\.0\.2\.1"),
    ):
        getattr(outside, name)(*words, ("192.0.2.1", 80))


def test_this_machine_itself_can_be_reached() -> None:
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())


@pytest.fixture(scope="module")
def draws() -> list[tuple[Any, ...]]:
    return []


class TestSeeds:
    """Two tests of one name, in two classes, draw the same numbers."""

    def test_draw(self, draws: list[tuple[Any, ...]]) -> None:
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(1))))
        assert len(set(draws)) == 1


class TestSeedsAgain(TestSeeds):
    """As above, after it."""


def test_pictures_repeat(random_picture: Callable[..., Any]) -> None:
    picture = random_picture(20, 10, seed=3, mode="L")
    assert (picture.size, picture.mode) == ((20, 10), "L")
    assert picture.tobytes() == random_picture(20, 10, seed=3, mode="L").tobytes()
    assert picture.tobytes() != random_picture(20, 10, seed=4, mode="L").tobytes()
