"""A loader on the CPU device: the same code as on a GPU, with a stream that tests can hold up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from kvfs_base.os_env import os_env
from kvfs_gds.device import CpuDevice, CpuStream
from kvfs_gds.load import Pages
from kvfs_gds.loader import Loader
from kvfs_gds.paged import PagedLayout
from loader_fakes import MemoryNamespace

LAYERS, PAGES, PAGE_BYTES = 3, 64, 2048
BLOCK_BYTES = LAYERS * 2 * PAGE_BYTES
EXTENT_BYTES = 12288
POISON = 0xA5
WAIT_SECONDS = 60.0
NEVER = 1e9


def wait_until(condition: Any) -> None:
    clock = os_env().clock
    deadline = clock.monotonic() + WAIT_SECONDS
    pause = threading.Event()
    while not condition():
        assert clock.monotonic() < deadline, "waited in vain"
        pause.wait(0.005)


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


class Rig:
    """A namespace with ``PAGES`` blocks, a poisoned cache, and a loader whose stream is ours."""

    def __init__(self, arena_blocks: int = 4 * PAGES) -> None:
        self.namespace = MemoryNamespace(arena_blocks * EXTENT_BYTES)
        rng = np.random.default_rng(3)
        self.blocks = rng.integers(0, 256, (PAGES, BLOCK_BYTES), dtype=np.uint8)
        self.keys = [key(number) for number in range(PAGES)]
        self.namespace.put(self.keys, [block.tobytes() for block in self.blocks])
        self.cache = [
            np.full((2, PAGES, PAGE_BYTES), POISON, dtype=np.uint8) for _ in range(LAYERS)
        ]
        self.layout = PagedLayout.vllm(self.cache)
        self.device = CpuDevice()
        self.stream = CpuStream()
        self.loader = Loader.open(
            self.namespace, self.device, stream=self.stream, ring_bytes=8 * EXTENT_BYTES
        )

    def pages(self, numbers: Any) -> Pages:
        return Pages(self.layout, np.asarray(numbers, dtype=np.int32).reshape(-1, 1))

    def page(self, number: int) -> bytes:
        """What lies in a page, in the order of a block."""
        return b"".join(t[kv, number].tobytes() for t in self.cache for kv in (0, 1))

    def hold(self) -> threading.Event:
        """Holds the stream up until the event is set."""
        event = threading.Event()
        self.stream.queue(lambda: void(event.wait(WAIT_SECONDS)))
        return event

    def close(self) -> None:
        self.loader.close()
        self.stream.close()
        self.namespace.close()


def void(_: object) -> None:
    pass


class Device(CpuDevice):
    """Calls ``before`` with the first layer of each copy, before it is queued."""

    def __init__(self, before: Callable[[int], None]) -> None:
        self.before = before

    def copy(
        self, plan: Any, first_layer: int, end_layer: int, stream: Any, *, store: bool
    ) -> None:
        self.before(first_layer)
        super().copy(plan, first_layer, end_layer, stream, store=store)


class SlowClock:
    """Each look at it is a second later than the one before."""

    def __init__(self) -> None:
        self.now = 0.0

    def time_ns(self) -> int:
        return 0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now
