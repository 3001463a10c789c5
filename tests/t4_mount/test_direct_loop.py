"""The direct front end's loop, over a socket instead of the kernel: it answers everything once and
outlives anything."""

from __future__ import annotations

import contextlib
import errno
import random
import socket
import struct
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from kvfs.mount import direct_frontend
from kvfs.mount import fuse_wire as wire
from kvfs.mount.adoptions import Adoptions
from kvfs.mount.backend import Backend
from kvfs.mount.config import MountConfig
from kvfs.mount.device import Device
from kvfs.mount.direct_frontend import DirectFrontend
from kvfs.mount.filesystem import Filesystem
from kvfs.mount.fuse_wire import Opcode
from kvfs.mount.limits import MOUNT_STALE_OPENS, MOUNT_TASKS
from kvfs_base.errors import ConnectionLost, EntryNotFound, InodeStale, KvfsError, NotADirectory
from kvfs_base.testing import memory_env
from kvfs_base.types import Address, Attr
from kvfs_metadata.messages import Touched
from t4_mount.test_fuse_wire import REQUESTS

INIT = REQUESTS[Opcode.INIT][0]


class Names:
    """A metadata service that knows one directory, answers look-ups when it is told to, and has
    nothing else."""

    def __init__(self) -> None:
        self.gate = trio.Event()
        self.waiting = 0
        self.connected = False
        self.asked: dict[int, Any] = {}
        self.given_up: list[int] = []
        self.missing: type[KvfsError] = EntryNotFound
        self.arrived, self.service = socket.socketpair()
        """What is sent by the service becomes readable here, and answers the last question."""
        self.descriptor = -1
        self.adoptions = Adoptions()
        self.at_once: Attr | None = None
        """What everybody is told before the question returns."""

    async def call(self, request: Any) -> Any:
        if type(request).__name__ == "Lookup" and request.name == b"slow":
            self.waiting += 1
            await self.gate.wait()
            return Attr(5, 0o040755)
        await trio.lowlevel.checkpoint()
        raise self.missing()

    def ask_soon(self, request: Any, done: Any) -> int:
        if not self.connected or request.name == b"slow":
            return 0
        self.asked[len(self.asked) + 1] = done
        self._tell_at_once(done)
        return len(self.asked)

    def give_up(self, number: int) -> None:
        self.given_up.append(number)

    def call_soon(self, request: Any, done: Any) -> bool:
        self.asked[len(self.asked) + 1] = done
        self._tell_at_once(done)
        return self.connected

    def _tell_at_once(self, done: Any) -> None:
        if self.at_once is not None:
            done(self.at_once, None)

    def send_soon(self) -> None:
        pass

    def receive_now(self) -> bool:
        self.asked[len(self.asked)](Attr(5, 0o100644), None)
        return bool(self.arrived.recv(1))

    def close(self) -> None:
        self.arrived.close()
        self.service.close()


class Kernel:
    """The other end of the device."""

    def __init__(self, end: socket.socket) -> None:
        self.end = trio.socket.from_stdlib_socket(end)
        self.unique = 0

    async def send(
        self, opcode: int, body: bytes = b"", inode: int = 1, cut: int = 0, thread: int = 1
    ) -> int:
        self.unique += 2
        whole = 40 + len(body)
        header = struct.pack("=IIQQIIIHH", whole, opcode, self.unique, inode, 0, 0, thread, 0, 0)
        await self.end.send((header + body)[: whole - cut])
        return self.unique

    async def answer(self) -> tuple[int, int, bytes]:
        """unique, errno, body"""
        raw = await self.end.recv(1 << 21)
        length, error, unique = struct.unpack_from("=IiQ", raw)
        assert length == len(raw)
        return unique, -error, raw[16:]


@contextlib.asynccontextmanager
async def served() -> AsyncIterator[tuple[Kernel, Names]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    names = Names()
    env, _ = memory_env()
    chunks: Any = SimpleNamespace(staged=SimpleNamespace(prepare=lambda: None))
    config = MountConfig("/nowhere", (Address.unix("/nowhere.sock"),))
    filesystem = Filesystem(Backend(env, names, chunks))
    names.adoptions = filesystem.adoptions
    frontend = DirectFrontend(filesystem, config)
    frontend.attach(Device(theirs.detach()))
    ours.setblocking(False)
    try:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(frontend.serve)
                kernel = Kernel(ours)
                unique = await kernel.send(Opcode.INIT, INIT)
                assert (await kernel.answer())[:2] == (unique, 0)
                yield kernel, names
                names.gate.set()
                frontend.stop()
    finally:
        frontend.close()
        ours.close()
        names.close()


@pytest.mark.logs_warnings
@pytest.mark.parametrize("seed", range(4))
def test_nothing_that_arrives_ends_it(seed: int) -> None:
    rng = random.Random(seed)

    def damaged(opcode: Opcode) -> tuple[bytes, int]:
        body = bytearray(REQUESTS[opcode][0])
        for _ in range(rng.randrange(4) if body else 0):
            body[rng.randrange(len(body))] ^= rng.randrange(1, 256)
        return bytes(body), rng.choice([0, 0, 0, 1, 7])

    async def scenario() -> None:
        async with served() as (kernel, _):
            opcodes = [o for o in Opcode if o != Opcode.INIT]
            for _ in range(400):
                opcode = rng.choice(opcodes)
                body, cut = damaged(opcode)
                inode = rng.choice([0, 1, 2**63, rng.getrandbits(64)])
                unique = await kernel.send(opcode, body, inode, min(cut, len(body)))
                # Answered where an answer is due, and nothing else is.
                if opcode not in wire.UNANSWERED:
                    assert (await kernel.answer())[0] == unique
            unique = await kernel.send(Opcode.LOOKUP, b"missing\0")
            assert await kernel.answer() == (unique, errno.ENOENT, b"")

    trio.run(scenario)


def test_unknown_requests_are_not_implemented() -> None:
    async def scenario() -> None:
        async with served() as (kernel, _):
            unique = await kernel.send(4711, b"whatever")
            assert await kernel.answer() == (unique, errno.ENOSYS, b"")

    trio.run(scenario)


def test_requests_overtake_one_that_waits() -> None:
    async def scenario() -> None:
        async with served() as (kernel, names):
            slow = await kernel.send(Opcode.LOOKUP, b"slow\0")
            quick = await kernel.send(Opcode.LOOKUP, b"missing\0")
            assert (await kernel.answer())[:2] == (quick, errno.ENOENT)
            names.gate.set()
            unique, error, body = await kernel.answer()
            assert (unique, error, len(body)) == (slow, 0, 128)

    trio.run(scenario)


def test_a_look_up_without_a_task() -> None:
    async def scenario() -> None:
        async with served() as (kernel, names):
            names.connected = True
            sent = [await kernel.send(Opcode.LOOKUP, b"name\0") for _ in range(4)]
            while len(names.asked) < len(sent):
                await trio.lowlevel.checkpoint()
            for number, error in ((3, EntryNotFound()), (1, None), (4, NotADirectory())):
                names.asked[number](None if error else Attr(5, 0o100644), error)
            # Lost with the connection: a task asks again, and is told that it is missing.
            names.asked[2](None, ConnectionLost())
            answers = [await kernel.answer() for _ in sent]
            assert [(a[0], a[1], len(a[2])) for a in answers] == [
                (sent[2], errno.ENOENT, 0),
                (sent[0], 0, 128),
                (sent[3], errno.ENOTDIR, 0),
                (sent[1], errno.ENOENT, 0),
            ]
            too_long = await kernel.send(Opcode.LOOKUP, b"n" * 256 + b"\0")
            assert (await kernel.answer())[:2] == (too_long, errno.ENAMETOOLONG)

    trio.run(scenario)


def test_a_change_without_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told of in any case: no task takes it over, and no signal."""
    monkeypatch.setattr(direct_frontend, "ASKED_SECONDS", 0.01)

    async def scenario() -> None:
        async with served() as (kernel, names):
            names.connected = True
            sent = [await kernel.send(Opcode.UNLINK, b"name\0") for _ in range(3)]
            while len(names.asked) < len(sent):
                await trio.lowlevel.checkpoint()
            await kernel.send(Opcode.INTERRUPT, struct.pack("=Q", sent[0]))
            await trio.sleep(0.05)
            names.asked[2](None, ConnectionLost())
            names.asked[3](Attr(5, 0o100644), None)
            names.asked[1](Attr(6, 0o100644), None)
            answers = [(await kernel.answer())[:2] for _ in sent]
            assert answers == [(sent[1], errno.EIO), (sent[2], 0), (sent[0], 0)]
            assert names.given_up == []

    trio.run(scenario)


def test_an_answer_may_be_there_before_the_question_returns() -> None:
    async def scenario() -> None:
        async with served() as (kernel, names):
            names.connected, names.at_once = True, Attr(5, 0o100644)
            for opcode in (Opcode.LOOKUP, Opcode.UNLINK) * 2:
                sent = await kernel.send(opcode, b"name\0")
                assert (await kernel.answer())[:2] == (sent, 0)

    trio.run(scenario)


SET_MODE = struct.pack("=II", wire.SetAttrValid.MODE, 0) + bytes(80)
DIRECTORY = Attr(6, 0o040755)


@pytest.mark.parametrize(
    ("opcode", "body", "reply", "size"),
    [
        (Opcode.SETATTR, SET_MODE, DIRECTORY, 104),
        (Opcode.SYMLINK, b"name\0target\0", Attr(6, 0o120777), 128),
        (Opcode.MKNOD, struct.pack("=IIII", 0o010644, 0, 0, 0) + b"name\0", DIRECTORY, 128),
        (Opcode.MKDIR, struct.pack("=II", 0o755, 0) + b"name\0", DIRECTORY, 128),
        (Opcode.LINK, struct.pack("=Q", 6) + b"name\0", Attr(6, 0o100644), 128),
        (Opcode.UNLINK, b"name\0", Attr(6, 0o100644), 0),
        (Opcode.RMDIR, b"name\0", Touched((6,)), 0),
        (Opcode.RENAME, struct.pack("=Q", 1) + b"name\0new\0", Touched((6,)), 0),
    ],
)
def test_changes_of_names_have_no_task(opcode: int, body: bytes, reply: Any, size: int) -> None:
    async def scenario() -> None:
        async with served() as (kernel, names):
            names.connected = True
            for error in (None, NotADirectory()):
                names.asked.clear()
                unique = await kernel.send(opcode, body)
                while not names.asked:
                    await trio.lowlevel.checkpoint()
                names.asked[1](None if error else reply, error)
                answer = await kernel.answer()
                assert (answer[0], len(answer[2])) == (unique, 0 if error else size)
                assert answer[1] == (errno.ENOTDIR if error else 0)

    trio.run(scenario)


def test_the_service_answers_without_a_turn_of_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody else in this test waits for what the service sends."""
    monkeypatch.setattr(direct_frontend, "LINGER_SECONDS_MAX", 60.0)

    async def scenario() -> None:
        async with served() as (kernel, names):
            names.connected = True
            names.descriptor = names.arrived.fileno()
            for _ in range(2):
                names.service.send(b"x")
                unique = await kernel.send(Opcode.LOOKUP, b"name\0")
                assert (await kernel.answer())[:2] == (unique, 0)

    trio.run(scenario)


@pytest.mark.parametrize(
    ("seconds", "left", "answer", "told"),
    [
        ({"COLLECT_SECONDS": 60.0}, False, b"x", True),
        ({"LINGER_SECONDS_MAX": 0.0, "COLLECT_SECONDS": 60.0}, False, b"x", True),
        ({"COLLECT_SECONDS": 0.01, "CALL_SECONDS": 60.0}, True, b"x", True),
        ({"COLLECT_SECONDS": 0.01, "CALL_SECONDS": 0.01}, True, b"", False),
        ({"CALL_SECONDS": 0.01}, False, b"", False),
    ],
)
def test_what_chunk_servers_answer(
    monkeypatch: pytest.MonkeyPatch,
    seconds: dict[str, float],
    left: bool,
    answer: bytes,
    told: bool,
) -> None:
    """By the loop or by a task; what nobody waits for is taken in as well, and some time it is
    enough."""
    for name, value in seconds.items():
        monkeypatch.setattr(direct_frontend, name, value)

    async def scenario() -> None:
        ours, server = socket.socketpair()
        heard: list[bool] = []
        with ours, server:
            async with served() as (kernel, names):
                names.descriptor = names.arrived.fileno()
                server.send(answer)

                def answered(readable: bool) -> None:
                    ours.setblocking(False)
                    assert not readable or ours.recv(1) == answer
                    heard.append(readable)

                begin = names.adoptions.leave if left else names.adoptions.wait
                begin(ours.fileno(), answered)
                await kernel.send(Opcode.OPENDIR, REQUESTS[Opcode.OPENDIR][0])
                await kernel.answer()
                while not heard:
                    await trio.sleep(0.001)
        assert heard == [told]

    trio.run(scenario)


def test_an_end_does_not_leave_answers_behind() -> None:
    """Whoever closes the files afterwards would wait for them."""

    async def scenario() -> None:
        ours, server = socket.socketpair()
        heard: list[bool] = []
        with ours, server:
            async with served() as (kernel, names):
                names.adoptions.leave(ours.fileno(), heard.append)
                await kernel.send(Opcode.OPENDIR, REQUESTS[Opcode.OPENDIR][0])
                await kernel.answer()
                server.send(b"x")
        assert heard == [True]

    trio.run(scenario)


def test_what_the_service_says_unasked_does_not_wait_for_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(direct_frontend, "LINGER_SECONDS", 5.0)

    async def scenario() -> None:
        async with served() as (kernel, names):
            heard: list[Any] = []
            names.asked[1] = lambda *told: heard.append(told)
            names.descriptor = names.arrived.fileno()
            names.service.close()  # readable, and the event loop has to go on
            await kernel.send(Opcode.OPENDIR, REQUESTS[Opcode.OPENDIR][0])
            await kernel.answer()
            assert heard

    trio.run(scenario)


@pytest.mark.logs_warnings
def test_an_answer_that_is_not_understood_is_an_error() -> None:
    async def scenario() -> None:
        async with served() as (kernel, names):
            names.connected = True
            unique = await kernel.send(Opcode.UNLINK, b"name\0")
            while not names.asked:
                await trio.lowlevel.checkpoint()
            names.asked[1]("no attributes", None)
            assert (await kernel.answer())[:2] == (unique, errno.EIO)

    trio.run(scenario)


def test_a_silent_service_is_left_to_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_frontend, "ASKED_SECONDS", 0.01)

    async def scenario() -> None:
        async with served() as (kernel, names):
            names.connected = True
            unique = await kernel.send(Opcode.LOOKUP, b"name\0")
            assert (await kernel.answer())[:2] == (unique, errno.ENOENT)
            assert names.given_up == [1]
            names.asked[1](Attr(5, 0o100644), None)  # too late: nobody is told twice
            unique = await kernel.send(4711)
            assert (await kernel.answer())[0] == unique

    trio.run(scenario)


def test_as_many_at_work_as_there_may_be() -> None:
    async def scenario() -> None:
        async with served() as (kernel, names):
            sent = [await kernel.send(Opcode.LOOKUP, b"slow\0") for _ in range(MOUNT_TASKS + 10)]
            with trio.move_on_after(60):
                while names.waiting < MOUNT_TASKS:
                    await trio.sleep(0.01)
            await trio.testing.wait_all_tasks_blocked()
            assert names.waiting == MOUNT_TASKS
            names.gate.set()
            answered = [(await kernel.answer())[0] for _ in sent]
            assert sorted(answered) == sorted(sent)

    trio.run(scenario)


def test_an_interrupted_look_up_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_frontend, "MOUNT_INTERRUPT_SECONDS", 0.01)

    async def scenario() -> None:
        async with served() as (kernel, _):
            unique = await kernel.send(Opcode.LOOKUP, b"slow\0")
            await kernel.send(Opcode.INTERRUPT, struct.pack("=Q", 12345))  # of nobody
            await kernel.send(Opcode.INTERRUPT, struct.pack("=Q", unique))
            assert await kernel.answer() == (unique, errno.EINTR, b"")

    trio.run(scenario)


@pytest.mark.logs_warnings
def test_a_kernel_that_speaks_another_version() -> None:
    async def scenario() -> None:
        async with served() as (kernel, _):
            unique = await kernel.send(Opcode.INIT, struct.pack("=IIIII44x", 8, 1, 0, 0, 0))
            assert (await kernel.answer())[:2] == (unique, errno.EPROTO)

    trio.run(scenario)


def test_a_file_that_goes_twice_while_it_is_opened_is_missing() -> None:
    """The kernel takes the first ESTALE for "look again"; programs would see the second."""

    async def scenario() -> None:
        async with served() as (kernel, names):
            body = REQUESTS[Opcode.OPEN][0]
            names.missing = InodeStale

            async def open_as(thread: int) -> int:
                unique = await kernel.send(Opcode.OPEN, body, 7, thread=thread)
                answer = await kernel.answer()
                assert answer[0] == unique
                return answer[1]

            assert await open_as(1) == errno.ESTALE
            assert await open_as(2) == errno.ESTALE
            assert await open_as(1) == errno.ENOENT
            assert await open_as(1) == errno.ESTALE
            names.missing = EntryNotFound
            for thread in (1, 2):  # there was nothing when they looked again
                unique = await kernel.send(Opcode.LOOKUP, b"missing\0", thread=thread)
                assert await kernel.answer() == (unique, errno.ENOENT, b"")
            names.missing = InodeStale
            assert await open_as(1) == errno.ESTALE
            assert await open_as(0) == errno.ESTALE
            assert await open_as(0) == errno.ESTALE  # nobody knows who
            for thread in range(2, MOUNT_STALE_OPENS + 2):
                assert await open_as(thread) == errno.ESTALE
            assert await open_as(1) == errno.ESTALE  # forgotten by now

    trio.run(scenario)
