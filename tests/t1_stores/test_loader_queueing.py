"""When, and by whom, a load's layers are queued on the device."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from kvfs_base.errors import ArenaFull, ConnectionLost, InvalidRequest
from kvfs_gds import load as load_module
from kvfs_gds.device import CpuEvent, CpuStream
from kvfs_gds.limits import LOADER_FETCH_THREADS
from kvfs_gds.load import Pages, Priority
from kvfs_gds.loader import Loader
from kvfs_gds.paged import PagedLayout
from loader_rig import (
    LAYERS,
    PAGE_BYTES,
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


def test_layers_come_one_after_the_other(rig: Rig) -> None:
    """The stream is held up between two layers: the first is there, the second is not."""
    gate = rig.hold()
    load = rig.loader.load(rig.keys[:8], rig.pages(range(8)))
    assert load.found() == [True] * 8
    assert not load.layer_done(0)
    compute = CpuStream()
    seen: list[bytes] = []
    for layer in range(LAYERS):
        load.wait_layer(layer, compute)  # queues a wait: this thread goes on
        compute.queue(lambda layer=layer: seen.append(rig.cache[layer][0, 3].tobytes()))
    assert seen == []
    gate.set()
    load.wait_layer(0)
    assert load.layer_done(0)
    assert load.result() == [True] * 8
    compute.close()
    expected = rig.blocks[3].reshape(LAYERS, 2, PAGE_BYTES)
    assert seen == [expected[layer, 0].tobytes() for layer in range(LAYERS)]


def test_the_first_layer_does_not_wait_until_the_last_one_is_queued(rig: Rig) -> None:
    gate, held = threading.Event(), threading.Event()
    device = Device(lambda first: void(first == 0 or held.set() or gate.wait(WAIT_SECONDS)))
    with Loader.open(rig.namespace, device, clock=SlowClock()) as loader:  # it takes long
        load = loader.load(rig.keys[:4], rig.pages(range(4)))
        assert load.found() == [True] * 4
        held.wait(WAIT_SECONDS)
        load.wait_layer(0)
        assert load.layer_done(0)
        assert not load.layer_done(LAYERS - 1)
        assert not load.cancel()  # nothing is left to be dropped
        gate.set()
        load.wait_layer(LAYERS - 1)
        assert load.result() == [True] * 4


def test_behind_the_first_layers_a_load_waits_until_somebody_comes_for_more(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "LOADER_QUIET_SECONDS", WAIT_SECONDS)
    firsts: list[int] = []
    with Loader.open(rig.namespace, Device(firsts.append)) as loader:
        for come in (lambda load: load.wait_layer(0), lambda load: load.result()):
            firsts.clear()
            load = loader.load(rig.keys[:4], rig.pages(range(4)))
            wait_until(lambda load=load: load.layer_done(0))
            assert firsts == [0]
            come(load)
            assert firsts == [0, 2]
            assert load.result() == [True] * 4


def test_a_load_that_nobody_comes_for_is_soon_done(rig: Rig) -> None:
    load = rig.loader.load(rig.keys[:4], rig.pages(range(4)))
    wait_until(lambda: load.layer_done(LAYERS - 1))


@pytest.mark.parametrize(
    ("first_bytes", "run_bytes", "wanted"),
    [
        (0, 0, [0, 2, 6, 10]),
        (3 * 8 * 32, 6 * 8 * 32, [0, 3, 9]),
        (6 * 8 * 32, 6 * 8 * 32, [0, 6]),  # one layer would be left
        (1 << 20, 1 << 20, [0]),
    ],
)
def test_layers_are_queued_in_runs(
    rig: Rig,
    monkeypatch: pytest.MonkeyPatch,
    first_bytes: int,
    run_bytes: int,
    wanted: list[int],
) -> None:
    """Two layers first and then four at a time, in order, and nothing twice; more where they are
    short."""
    monkeypatch.setattr(load_module, "LOADER_FIRST_RUN_BYTES", first_bytes)
    monkeypatch.setattr(load_module, "LOADER_RUN_BYTES", run_bytes)
    layers = 13
    cache = [np.full((2, 8, 16), POISON, dtype=np.uint8) for _ in range(layers)]
    table = np.arange(8, dtype=np.int32).reshape(-1, 1)
    rng = np.random.default_rng(5)
    blocks = rng.integers(0, 256, (8, layers, 2, 16), dtype=np.uint8)
    names = [key(500 + number) for number in range(8)]
    rig.namespace.put(names, [block.tobytes() for block in blocks])
    firsts: list[int] = []
    with Loader.open(rig.namespace, Device(firsts.append)) as loader:
        load = loader.load(names, Pages(PagedLayout.vllm(cache), table))
        assert load.result() == [True] * 8
        assert all(load.layer_done(layer) for layer in range(layers))
    assert firsts == wanted
    assert (np.stack(cache) == blocks.transpose(1, 2, 0, 3)).all()


def test_a_device_that_fails_half_way_fails_the_load_and_keeps_no_lease(rig: Rig) -> None:
    def fail(layer: int) -> None:
        if layer == 2:
            raise InvalidRequest(detail="no more")

    with Loader.open(rig.namespace, Device(fail)) as loader:
        load = loader.load(rig.keys[:4], rig.pages(range(4)))
        with pytest.raises(InvalidRequest, match="no more"):
            load.result()
        with pytest.raises(InvalidRequest):
            load.wait_layer(2)
        assert rig.namespace.leased_bytes == loader.statistics()["held_bytes"] == 0


def test_who_waits_for_a_load_needs_nobody_to_say_that_it_is_over(rig: Rig) -> None:
    gate = threading.Event()
    lane = rig.loader._lanes[Priority.DEMAND]
    lane.then(CpuEvent.happened(), lambda: void(gate.wait(WAIT_SECONDS)))
    load = rig.loader.load(rig.keys[:4], rig.pages(range(4)))
    assert load.result() == [True] * 4
    assert rig.namespace.leased_bytes == 0
    gate.set()


def test_a_stream_waits_once_for_layers_that_come_together(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "LOADER_FIRST_RUN_BYTES", 1 << 20)
    plain, waits = rig.device.wait_for, []
    monkeypatch.setattr(rig.device, "wait_for", lambda *of: waits.append(of) or plain(*of))
    streams = [CpuStream(), CpuStream()]
    gate = rig.hold()
    load = rig.loader.load(rig.keys[:4], rig.pages(range(4)))
    for stream in streams:
        for layer in range(LAYERS):
            load.wait_layer(layer, stream)
    assert [stream for stream, _ in waits] == streams
    gate.set()
    load.result()
    load.wait_layer(0, streams[0])  # it is there: nothing to wait for
    assert len(waits) == 2
    for stream in streams:
        stream.close()


def test_who_loads_asks_and_another_thread_takes_the_answer(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, threads = rig.namespace.ask, []

    def ask(keys: Any) -> Any:
        threads.append(threading.current_thread())
        answer = plain(keys)
        return answer.then(lambda blocks: threads.append(threading.current_thread()) or blocks)

    rig.loader.from_memory, rig.namespace.answers_soon = True, False
    wait_until(lambda: rig.loader._idle == LOADER_FETCH_THREADS)
    monkeypatch.setattr(rig.namespace, "ask", ask)
    assert rig.loader.load(rig.keys[:4], rig.pages(range(4))).result() == [True] * 4
    assert threads[0] is threading.current_thread()
    assert len(threads) == 2 and threads[1] in rig.loader._threads


def test_what_lies_in_memory_is_queued_by_who_loads_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layers at once, the others as it comes for them: no other thread has a part in it.
    If it never comes, one of the loader's queues them."""
    threads: list[threading.Thread] = []
    with Loader.open(
        rig.namespace, Device(lambda first: threads.append(threading.current_thread()))
    ) as loader:
        loader.from_memory = True
        wait_until(lambda: loader._idle == LOADER_FETCH_THREADS)
        load = loader.load(rig.keys[:4], rig.pages(range(4)))
        assert threads == [threading.current_thread()]
        assert load.found() == [True] * 4
        wait_until(lambda: load.layer_done(LAYERS - 1))
        assert len(threads) == 2 and threads[1] in loader._threads
        assert load.result() == [True] * 4
        threads.clear()
        monkeypatch.setattr(load_module, "LOADER_QUIET_SECONDS", WAIT_SECONDS)
        load = loader.load(rig.keys[:4], rig.pages(range(4, 8)))
        for layer in range(LAYERS):
            load.wait_layer(layer)
        assert threads == [threading.current_thread()] * 2
        assert load.result() == [True] * 4
    assert all(rig.page(p) == rig.blocks[p % 4].tobytes() for p in range(8))


def test_a_short_load_from_memory_wakes_nobody(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "LOADER_AT_ONCE_BYTES", 1 << 20)
    rig.loader.from_memory = True
    wait_until(lambda: rig.loader._idle == LOADER_FETCH_THREADS)
    woken: list[object] = []
    monkeypatch.setattr(rig.loader, "_push", lambda *of: woken.append(of))
    load = rig.loader.load(rig.keys[:4], rig.pages(range(4)))
    assert load.result() == [True] * 4 and not woken


def test_what_has_to_be_waited_for_is_left_to_other_threads(rig: Rig) -> None:
    """An arena that is full until another load gives something back, and a namespace that fails."""
    rig.loader.from_memory = True
    wait_until(lambda: rig.loader._idle == LOADER_FETCH_THREADS)
    gate = rig.hold()
    first = rig.loader.load(rig.keys[:4], rig.pages(range(4)))
    rig.namespace.error = ArenaFull(needed_bytes=1)
    second = rig.loader.load(rig.keys[4:8], rig.pages(range(4, 8)))  # returns
    assert not second.layer_done(0)
    rig.namespace.error = None
    gate.set()
    assert first.result() == second.result() == [True] * 4
    rig.loader.from_memory = True
    rig.namespace.error = ConnectionLost(address="there", detail="gone")
    with pytest.raises(ConnectionLost):
        rig.loader.load(rig.keys[:4], rig.pages(range(4))).wait_layer(0)
    rig.namespace.error = None
