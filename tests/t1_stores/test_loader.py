"""The loader on the CPU device: what reaches pages and store, and what becomes of the rest."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from kvfs_base.errors import ArenaFull, CacheFull, ConnectionLost, InvalidRequest
from kvfs_gds import load as load_module
from kvfs_gds import loader as loader_module
from kvfs_gds.device import CpuStream, open_device
from kvfs_gds.limits import LOADER_FETCH_THREADS
from kvfs_gds.load import Priority
from kvfs_gds.loader import Loader
from kvfs_gds.store import Store
from loader_rig import (
    BLOCK_BYTES,
    EXTENT_BYTES,
    NEVER,
    PAGES,
    POISON,
    WAIT_SECONDS,
    Device,
    Rig,
    SlowClock,
    key,
    void,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("short_runs")


def test_blocks_reach_their_pages_and_nothing_else(rig: Rig) -> None:
    order = np.random.default_rng(1).permutation(PAGES)[:40]
    load = rig.loader.load(rig.keys[:40], rig.pages(order))
    assert load.result() == [True] * 40
    for number, page in enumerate(order.tolist()):
        assert rig.page(page) == rig.blocks[number].tobytes()
    for page in set(range(PAGES)) - set(order.tolist()):
        assert rig.page(page) == bytes([POISON]) * BLOCK_BYTES
    assert rig.loader.statistics()["loaded_bytes"] == 40 * BLOCK_BYTES


def test_missing_blocks_leave_their_pages_alone(rig: Rig) -> None:
    keys = [rig.keys[0], key(1000), rig.keys[2]]
    load = rig.loader.load(keys, rig.pages([5, 6, 7]))
    assert load.found() == [True, False, True]
    assert load.result() == [True, False, True]
    assert rig.page(6) == bytes([POISON]) * BLOCK_BYTES
    nothing = rig.loader.load([key(1000)], rig.pages([6]))
    assert nothing.result() == [False]
    nothing.wait_layer(0)
    assert rig.loader.load([], rig.pages([])).result() == []


def test_a_load_larger_than_its_window_comes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """From memory, too: of what may be held at a time a part is asked for, and the rest when some
    was given back."""
    rig = Rig(arena_blocks=32)
    rig.loader.from_memory = True
    monkeypatch.setattr(load_module, "LOADER_GROUP_BYTES", BLOCK_BYTES)
    monkeypatch.setattr(load_module, "LOADER_MEMORY_FIRST_BYTES", 2 * BLOCK_BYTES)
    monkeypatch.setattr(loader_module, "LOADER_FAST_SECONDS", NEVER)
    sizes: list[int] = []
    plain = rig.namespace.get

    def get(keys: Any) -> Any:
        sizes.append(len(keys))
        assert rig.loader.statistics()["held_bytes"] <= 16 * BLOCK_BYTES
        return plain(keys)

    monkeypatch.setattr(rig.namespace, "get", get)
    rig.loader.load(rig.keys[:1], rig.pages([0])).result()  # the size of the arena is known now
    sizes.clear()
    load = rig.loader.load(rig.keys, rig.pages(range(PAGES)))
    assert load.result() == [True] * PAGES
    assert max(sizes) <= 16 and sum(sizes) == PAGES and len(sizes) > 4
    assert all(rig.page(p) == rig.blocks[p].tobytes() for p in range(PAGES))
    rig.close()


@pytest.mark.parametrize(
    ("clock", "answer_blocks", "wanted"),
    [(None, PAGES, [PAGES]), (None, 4, [2, PAGES - 2]), (SlowClock(), PAGES, [1] * PAGES)],
    ids=["memory", "much memory", "disk"],
)
def test_what_comes_from_memory_is_asked_for_at_once(
    rig: Rig,
    monkeypatch: pytest.MonkeyPatch,
    clock: SlowClock | None,
    answer_blocks: int,
    wanted: list[int],
) -> None:
    """The second load of a warm source is one request, or a small one and the rest; one of a disk
    is many small ones."""
    monkeypatch.setattr(load_module, "LOADER_ANSWER_BLOCKS", answer_blocks)
    monkeypatch.setattr(load_module, "LOADER_MEMORY_FIRST_BYTES", 2 * BLOCK_BYTES)
    monkeypatch.setattr(load_module, "LOADER_GROUP_BYTES", BLOCK_BYTES)
    monkeypatch.setattr(loader_module, "LOADER_FAST_SECONDS", 0.5)
    sizes: list[int] = []
    plain = rig.namespace.get

    def get(keys: Any) -> Any:
        sizes.append(len(keys))
        return plain(keys)

    monkeypatch.setattr(rig.namespace, "get", get)
    with Loader.open(rig.namespace, rig.device, clock=clock) as loader:
        loader.load(rig.keys, rig.pages(range(PAGES))).result()
        sizes.clear()
        loader.load(rig.keys, rig.pages(range(PAGES))).result()
        assert sizes == wanted


def test_the_first_group_from_memory_goes_alone(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer is what the link waits for: no other request is begun before it is there."""
    monkeypatch.setattr(load_module, "LOADER_GROUP_BYTES", BLOCK_BYTES)
    monkeypatch.setattr(load_module, "LOADER_ANSWER_BLOCKS", 4)
    monkeypatch.setattr(load_module, "LOADER_MEMORY_FIRST_BYTES", BLOCK_BYTES)
    rig.loader.from_memory = True
    begun: list[int] = []
    other = threading.Event()
    plain = rig.namespace.get

    def get(keys: Any) -> Any:
        begun.append(len(keys))
        if len(begun) > 1:
            other.set()
        elif other.wait(0.2):
            raise InvalidRequest(detail="another request was begun")
        return plain(keys)

    monkeypatch.setattr(rig.namespace, "get", get)
    load = rig.loader.load(rig.keys[:16], rig.pages(range(16)))
    assert load.result() == [True] * 16
    assert begun[0] == 1


def test_one_thread_brings_what_comes_from_memory(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the link waits for is queued first, and nobody else is woken up."""
    monkeypatch.setattr(load_module, "LOADER_GROUP_BYTES", 2 * BLOCK_BYTES)
    monkeypatch.setattr(load_module, "LOADER_ANSWER_BLOCKS", 4)
    monkeypatch.setattr(load_module, "LOADER_MEMORY_FIRST_BYTES", 2 * BLOCK_BYTES)
    monkeypatch.setattr(loader_module, "LOADER_FAST_SECONDS", NEVER)
    plain, done = rig.namespace.get, []

    def get(keys: Any) -> Any:
        done.append((threading.current_thread(), len(keys)))
        return plain(keys)

    monkeypatch.setattr(rig.namespace, "get", get)
    copied: list[int] = []
    with Loader.open(rig.namespace, Device(lambda layer: copied.append(len(done)))) as loader:
        loader.from_memory = True
        wait_until(lambda: loader._idle == LOADER_FETCH_THREADS)
        assert loader.load(rig.keys[:16], rig.pages(range(16))).result() == [True] * 16
    assert [count for _, count in done] == [2, 14]
    assert done[0][0] is done[1][0]
    assert copied[0] == 1


def test_a_lease_lasts_until_its_copies_have_happened(rig: Rig) -> None:
    gate = rig.hold()
    load = rig.loader.load(rig.keys[:8], rig.pages(range(8)))
    load.found()
    assert rig.namespace.leased_bytes == 8 * EXTENT_BYTES
    assert rig.loader.statistics()["held_bytes"] == 8 * BLOCK_BYTES
    gate.set()
    load.wait()
    assert rig.namespace.leased_bytes == 0
    assert rig.loader.statistics()["held_bytes"] == 0
    assert rig.page(0) == rig.blocks[0].tobytes()


def test_whole_blocks_are_copied_while_others_are_fetched(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of four blocks; the third get is held up, and what came before is copied by then."""
    monkeypatch.setattr(load_module, "LOADER_GROUP_BYTES", 4 * BLOCK_BYTES)
    monkeypatch.setattr(loader_module, "LOADER_FAST_SECONDS", -NEVER)
    gets, release = threading.Semaphore(2), threading.Event()
    plain = rig.namespace.get

    def get(keys: Any) -> Any:
        if not gets.acquire(blocking=False):
            assert release.wait(WAIT_SECONDS)
        return plain(keys)

    monkeypatch.setattr(rig.namespace, "get", get)
    load = rig.loader.load(rig.keys[:16], rig.pages(range(16)))
    wait_until(lambda: sum(rig.page(p) == rig.blocks[p].tobytes() for p in range(16)) == 8)
    assert not load.layer_done(0)
    release.set()
    assert load.result() == [True] * 16
    assert all(rig.page(p) == rig.blocks[p].tobytes() for p in range(16))


def test_an_arena_smaller_than_the_load_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "LOADER_GROUP_BYTES", 4 * BLOCK_BYTES)
    rig = Rig(arena_blocks=6)
    assert rig.loader.load(rig.keys, rig.pages(range(PAGES))).result() == [True] * PAGES
    assert all(rig.page(p) == rig.blocks[p].tobytes() for p in range(PAGES))
    rig.close()


def test_an_arena_that_others_hold_is_an_error(rig: Rig) -> None:
    held = [rig.namespace.get(rig.keys) for _ in range(4)]
    load = rig.loader.load(rig.keys[:2], rig.pages([0, 1]))
    with pytest.raises(ArenaFull):
        load.result()
    with pytest.raises(ArenaFull):
        load.wait_layer(0)
    for blocks in held:
        blocks.release()


def test_a_failed_fetch_fails_the_load(rig: Rig) -> None:
    rig.namespace.error = ConnectionLost(detail="gone")
    with pytest.raises(ConnectionLost):
        rig.loader.load(rig.keys[:2], rig.pages([0, 1])).result()
    rig.namespace.error = None
    assert rig.loader.load(rig.keys[:2], rig.pages([0, 1])).result() == [True, True]


def test_blocks_of_another_size_are_refused(rig: Rig) -> None:
    rig.namespace.put([key(77)], [bytes(BLOCK_BYTES + 16)])
    with pytest.raises(InvalidRequest):
        rig.loader.load([key(77)], rig.pages([0])).result()


def test_wrong_arguments_are_refused(rig: Rig) -> None:
    with pytest.raises(InvalidRequest):
        rig.loader.load(rig.keys[:2], rig.pages([0]))
    with pytest.raises(InvalidRequest):
        rig.pages([PAGES])
    with pytest.raises(InvalidRequest):
        rig.loader.load(rig.keys[:1], rig.pages([0]), after=object())
    with pytest.raises(InvalidRequest):
        rig.loader.store(rig.keys[:2], rig.pages([0]))


def test_nothing_is_written_before_the_callers_stream_is_ready(rig: Rig) -> None:
    mine, ready = CpuStream(), threading.Event()
    mine.queue(lambda: void(ready.wait(WAIT_SECONDS)))
    load = rig.loader.load(rig.keys[:2], rig.pages([0, 1]), after=mine)
    load.found()
    assert rig.page(0) == bytes([POISON]) * BLOCK_BYTES
    assert not load.layer_done(0)
    ready.set()
    assert load.result() == [True, True]
    mine.close()


def test_a_cancelled_load_writes_nothing_more(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.namespace.hold = threading.Event()
    load = rig.loader.load(rig.keys, rig.pages(range(PAGES)))
    assert load.cancel()
    rig.namespace.hold.set()
    assert load.result() == [False] * PAGES
    with pytest.raises(InvalidRequest):
        load.wait_layer(0)
    assert all((tensor == POISON).all() for tensor in rig.cache)
    done = rig.loader.load(rig.keys[:1], rig.pages([0]))
    done.result()
    assert not done.cancel()


def test_demand_goes_before_prefetch(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "LOADER_GROUP_BYTES", BLOCK_BYTES)
    monkeypatch.setattr(loader_module, "LOADER_FAST_SECONDS", -NEVER)
    order: list[int] = []
    plain = rig.namespace.get
    demanded = threading.Event()

    def get(keys: Any) -> Any:
        order.append(rig.keys.index(keys[0]))
        if {32, 33} <= {*order}:
            demanded.set()
        # Each of the other two threads may have begun one more get of the prefetch by now.
        assert len(order) <= 7 or demanded.wait(WAIT_SECONDS)
        return plain(keys)

    monkeypatch.setattr(rig.namespace, "get", get)
    rig.namespace.hold = threading.Event()
    later = rig.loader.load(rig.keys[:32], rig.pages(range(32)), priority=Priority.PREFETCH)
    wait_until(lambda: len(order) == 3)  # every thread waits in a get
    sooner = rig.loader.load(rig.keys[32:34], rig.pages([32, 33]))
    rig.namespace.hold.set()
    assert sooner.result() == [True, True]
    assert later.result() == [True] * 32


def test_a_prefetch_brings_blocks_and_holds_nothing(rig: Rig) -> None:
    assert rig.loader.prefetch([*rig.keys[:3], key(999)]).result() == [True] * 3 + [False]
    assert rig.namespace.gets == 1
    assert rig.namespace.leased_bytes == 0


def stored(rig: Rig, number: int, page: int) -> bool:
    return rig.namespace.stored[key(number)] == rig.page(page)


def fill(rig: Rig) -> None:
    rng = np.random.default_rng(9)
    for tensor in rig.cache:
        tensor[:] = rng.integers(0, 256, tensor.shape, dtype=np.uint8)


def test_pages_are_stored_under_their_keys(rig: Rig) -> None:
    """40 blocks through a ring of eight."""
    fill(rig)
    numbers = range(100, 140)
    order = np.random.default_rng(2).permutation(PAGES)[:40]
    store: Store = rig.loader.store([key(n) for n in numbers], rig.pages(order))
    store.wait_copied()
    assert store.result() == 40
    assert all(stored(rig, n, p) for n, p in zip(numbers, order.tolist(), strict=True))
    again = rig.loader.store([key(n) for n in numbers], rig.pages(order))
    assert again.result() == 0
    wait_until(lambda: rig.loader.statistics()["ring_used_bytes"] == 0)


def test_a_store_waits_for_the_callers_stream(rig: Rig) -> None:
    mine, ready = CpuStream(), threading.Event()
    mine.queue(lambda: void(ready.wait(WAIT_SECONDS)))
    mine.queue(lambda: fill(rig))
    store = rig.loader.store([key(200)], rig.pages([4]), after=mine)
    ready.set()
    assert store.result() == 1
    assert stored(rig, 200, 4)
    assert rig.page(4) != bytes([POISON]) * BLOCK_BYTES
    mine.close()


def test_a_failed_put_fails_the_store(rig: Rig) -> None:
    rig.namespace.error = CacheFull(needed_bytes=1)
    store = rig.loader.store([key(300)], rig.pages([0]))
    with pytest.raises(CacheFull):
        store.result()
    with pytest.raises(CacheFull):
        store.wait_copied()
    rig.namespace.error = None
    assert rig.loader.store([key(300)], rig.pages([0])).result() == 1


def test_random_loads_stores_and_cancels(rig: Rig) -> None:
    """Some loads are cancelled at a random moment. A page holds its block or, if its load did not
    say that it does, the poison or parts of the block; leases are all given back."""
    churn(rig, 300)


def churn(rig: Rig, count: int) -> None:
    rng = np.random.default_rng(11)
    expected: dict[bytes, bytes] = {k: rig.namespace.stored[k] for k in rig.keys}
    next_key = 10_000
    for number in range(count):
        size = int(rng.integers(1, 9))
        pages = rng.permutation(PAGES)[:size]
        if number % 4 == 3:
            names = [key(next_key + i) for i in range(size)]
            next_key += size
            store = rig.loader.store(names, rig.pages(pages))
            if rng.random() < 0.3:
                store.cancel()
            store.wait()
            for name, page in zip(names, pages.tolist(), strict=True):
                if name in rig.namespace.stored:
                    assert rig.namespace.stored[name] == rig.page(page)
                    expected[name] = rig.page(page)
            continue
        names = [list(expected)[i] for i in rng.integers(0, len(expected), size)]
        for page in pages:
            for tensor in rig.cache:
                tensor[:, page] = POISON
        load = rig.loader.load(names, rig.pages(pages))
        if rng.random() < 0.5:
            load.cancel()
        hits = load.result()
        assert load.cancelled or all(hits)
        for name, page, hit in zip(names, pages.tolist(), hits, strict=True):
            assert rig.page(page) == (expected[name] if hit else bytes([POISON]) * BLOCK_BYTES)
    assert rig.namespace.leased_bytes == 0


def test_open_device_says_why_it_is_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InvalidRequest):
        open_device("tpu")
    assert open_device("cpu").name == "cpu"
    with caplog.at_level("INFO", logger="kvfs_gds"):
        device = open_device("auto")
    assert device.name.startswith("cuda") or "cupy" in caplog.text or "CUDA" in caplog.text


def test_a_closed_loader_refuses_work() -> None:
    rig = Rig()
    rig.namespace.hold = threading.Event()
    load = rig.loader.load(rig.keys, rig.pages(range(PAGES)))
    closing = threading.Thread(target=rig.loader.close)
    closing.start()
    wait_until(lambda: load.cancelled)
    rig.namespace.hold.set()
    closing.join(WAIT_SECONDS)
    assert not closing.is_alive()
    assert load.result() == [False] * PAGES
    for refused in (rig.loader.load, rig.loader.store):
        with pytest.raises(InvalidRequest):
            refused(rig.keys[:1], rig.pages([0]))
    rig.close()
