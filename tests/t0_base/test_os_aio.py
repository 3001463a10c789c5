"""Asynchronous reads, on a real disk."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfs_base import os_aio
from kvfs_base.os_aio import Read, ReadQueue, borrowed_queue, open_queue

PAGE = 4096
PAGES = 64


@pytest.fixture
def data() -> bytes:
    return b"".join(bytes([n]) * PAGE for n in range(PAGES))


@pytest.fixture
def descriptor(tmp_path: Path, data: bytes) -> Iterator[int]:
    path = tmp_path / "data"
    path.write_bytes(data)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("no O_DIRECT here")
    yield fd
    os.close(fd)


@pytest.fixture
def queue() -> Iterator[ReadQueue]:
    queue = ReadQueue(8)
    yield queue
    queue.close()


def memory(pages: int = PAGES) -> memoryview:
    return memoryview(mmap.mmap(-1, pages * PAGE))


def all_of(queue: ReadQueue, reads: list[Read]) -> dict[int, int]:
    """What ``wait`` said of each, by tag."""
    left, found = list(reads), {}
    while left or not queue.is_idle:
        queue.begin([left.pop(0) for _ in range(min(queue.room, len(left)))])
        found.update({read.tag: nbytes for read, nbytes in queue.wait()})
    return found


def test_more_reads_than_there_is_room_for(queue: ReadQueue, descriptor: int, data: bytes) -> None:
    view = memory()
    places = range(0, PAGES * PAGE, PAGE)
    reads = [Read(descriptor, at, (view[at : at + PAGE],), at) for at in places]
    assert all_of(queue, reads) == dict.fromkeys(places, PAGE)
    assert view == data
    assert (queue.room, queue.is_idle) == (8, True)


def test_one_read_into_several_places(queue: ReadQueue, descriptor: int, data: bytes) -> None:
    view = memory(3)
    parts = (view[2 * PAGE :], view[: 2 * PAGE])
    assert all_of(queue, [Read(descriptor, PAGE, parts, 0)]) == {0: 3 * PAGE}
    assert view[2 * PAGE :] == data[PAGE : 2 * PAGE]
    assert view[: 2 * PAGE] == data[2 * PAGE : 4 * PAGE]


def test_the_end_of_a_file_is_a_short_read(queue: ReadQueue, descriptor: int) -> None:
    view = memory(2)
    beyond = Read(descriptor, PAGES * PAGE, (view,), 1)
    assert all_of(queue, [Read(descriptor, (PAGES - 1) * PAGE, (view,), 0), beyond]) == {
        0: PAGE,
        1: 0,
    }


def test_what_is_wrong_with_one_read_is_said_of_that_one(
    queue: ReadQueue, descriptor: int, data: bytes
) -> None:
    good, other = memory(1), memory(2)
    closed = os.dup(descriptor)
    os.close(closed)
    reads = [
        Read(descriptor, 0, (memoryview(bytes(PAGE)),), "cannot be written to"),
        Read(closed, 0, (other[:PAGE],), "closed"),
        Read(descriptor, PAGE, (good,), "good"),
        Read(descriptor, 0, (other[1 : PAGE + 1],), "not aligned"),
    ]
    found = all_of(queue, reads)
    assert found == {
        "cannot be written to": -errno.EINVAL,
        "closed": -errno.EBADF,
        "good": PAGE,
        "not aligned": -errno.EINVAL,
    }
    assert good == data[PAGE : 2 * PAGE]
    assert queue.room == 8


def test_memory_stays_where_it_is_while_it_is_read_into(queue: ReadQueue, descriptor: int) -> None:
    room = mmap.mmap(-1, PAGE)
    with memoryview(room) as view:
        queue.begin([Read(descriptor, 0, (view,), 0)])
    with pytest.raises(BufferError):
        room.close()
    queue.drain()
    room.close()


def test_a_borrowed_queue_is_idle_when_it_is_given_back(descriptor: int) -> None:
    view = memory()
    with pytest.raises(RuntimeError), borrowed_queue() as queue:
        assert queue is not None
        queue.begin([Read(descriptor, 0, (view,), 0)])
        raise RuntimeError
    assert queue.is_idle
    with borrowed_queue() as again, borrowed_queue() as another:
        assert again is queue
        assert another is not queue


def test_threads_borrow_different_queues() -> None:
    both = threading.Barrier(2)
    seen: list[object] = []

    def borrow() -> None:
        with borrowed_queue() as queue:
            seen.append(queue)
            both.wait()

    threads = [threading.Thread(target=borrow) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in seen
    assert seen[0] is not seen[1]


@pytest.mark.parametrize("machine", ["riscv64", "x86_64"])
def test_where_the_kernel_refuses_there_is_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, machine: str
) -> None:
    """Another machine, and a container that may not make the call."""

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(os_aio, "_refusal", None)
    monkeypatch.setattr(os_aio, "_spare", [])
    monkeypatch.setattr(os_aio.platform, "machine", lambda: machine)
    monkeypatch.setattr(ReadQueue, "_call", refuse)
    caplog.set_level("INFO")
    assert open_queue() is None
    with borrowed_queue() as queue:
        assert queue is None
    assert caplog.text.count("threads read instead") == 1
