"""The direct front end: requests of the kernel from /dev/fuse itself.

Each time that the device has something, all requests that are there are read before another task
gets its turn: an event-loop turn a request is what costs most of a small call. What can be answered
from what is known here (attributes of open files, cached pages, most closes) is answered on the
spot. Look-ups and changes of names send their question without a task, too, all of a turn in one
write, and are answered by whoever receives the answer. The rest becomes a task.

A request that its caller gave up (a signal) is left to end by itself for MOUNT_INTERRUPT_SECONDS.
Then those that change nothing end with EINTR. Those that change something always end as they do:
who is told EINTR takes them for not done.
"""

from __future__ import annotations

import errno
import logging
import mmap
from collections.abc import Callable
from typing import NamedTuple

import trio
from msgspec.structs import replace

from kvfs.mount import fuse_wire as wire
from kvfs.mount.config import MountConfig
from kvfs.mount.device import GONE, Device
from kvfs.mount.direct_handlers import Answer, Handlers, Later
from kvfs.mount.filesystem import Filesystem
from kvfs.mount.fuse_wire import Opcode, Request
from kvfs.mount.limits import (
    MOUNT_DRAIN_REQUESTS,
    MOUNT_INTERRUPT_SECONDS,
    MOUNT_TASKS,
)
from kvfs.mount.notices import Notices
from kvfs_base.errors import EntryNotFound, KvfsError, ProtocolError
from kvfs_base.limits import CALL_SECONDS, PAGE_BYTES

log = logging.getLogger(__name__)

INTERRUPTIBLE = frozenset(
    {
        Opcode.LOOKUP,
        Opcode.GETATTR,
        Opcode.STATX,
        Opcode.READ,
        Opcode.READDIR,
        Opcode.READDIRPLUS,
        Opcode.READLINK,
        Opcode.GETXATTR,
        Opcode.LISTXATTR,
        Opcode.STATFS,
    }
)

LINGER_SECONDS = 0.002
LINGER_SECONDS_MAX = 0.005
"""Whoever was answered asks again at once, mostly, or when he has read 2 MiB of what he opened,
which takes 0.1 to 0.3 ms, or written them, 1 ms; and the services answer soon. Waiting for that
here, and not in a turn of the event loop, takes 17 to 26 us of CPU for a ``stat``, instead of 32.
Everything else waits meanwhile: it ends after a while, and is done only while no request has a
task."""

COLLECT_SECONDS = 0.1
"""An answer that nobody waits for is taken in after this; most are before, when their file is
closed."""

ASKED_SECONDS = 1.0
"""A question that is not answered in this time, or in twice as much, gets a task, and is
repeated."""


class _Asked(NamedTuple):
    request: Request
    number: int
    round: int
    """Of ``_watch_asked``."""

    @property
    def may_be_repeated(self) -> bool:
        """By a task. Else the client sees to the end of it by itself."""
        return self.number is not True


class DirectFrontend:
    def __init__(self, filesystem: Filesystem, config: MountConfig) -> None:
        self._fs = filesystem
        self._config = config
        self._device: Device | None = None
        self._handlers: Handlers | None = None
        self._nursery: trio.Nursery | None = None
        self._reading = trio.CancelScope()
        self._running: dict[int, tuple[int, trio.CancelScope]] = {}
        """Opcode and scope by number, which the kernel uses again only after the answer."""
        self._lock_waits = 0
        """How many of these are for a lock."""
        self._asked: dict[int, _Asked] = {}
        """Requests that wait for an answer of the metadata service, and have no task."""
        self._round = 0
        self._room = trio.Event()
        self._collecting = False
        # The payload of a write begins on a page.
        before = wire.REQUEST_HEADER.size + wire.WRITE_ARGUMENTS.size
        size = PAGE_BYTES - before + wire.REQUEST_BYTES_MAX
        self._buffer = memoryview(mmap.mmap(-1, size))[PAGE_BYTES - before :]

    # --- the mount

    def mount(self) -> None:
        config = self._config
        self.attach(Device.mount(config.mountpoint, allow_other=config.allow_other))

    def attach(self, device: Device) -> None:
        """Serves a device that is mounted already."""
        self._device = device
        self._handlers = Handlers(self._fs, self._config, device)

    async def serve(self) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            assert self._device is not None
            notices = Notices(self._device)
            assert self._handlers is not None
            self._handlers.is_to_be_told = notices.is_to_be_told
            self._fs.when_gone(notices.is_gone)
            self._fs.when_changed(notices.changed)
            nursery.start_soon(notices.tell)
            async with trio.open_nursery() as watching:
                watching.start_soon(self._watch_asked)
                with self._reading:
                    await self._read_requests()
                while self._asked:
                    self._room = trio.Event()
                    await self._room.wait()
                watching.cancel_scope.cancel()
            notices.stop()

    def stop(self) -> None:
        self._reading.cancel()

    def close(self) -> None:
        if self._device is not None:
            self._device.close()

    # --- the loop

    async def _read_requests(self) -> None:
        assert self._device is not None and self._handlers is not None
        while True:
            await trio.lowlevel.wait_readable(self._device.descriptor)
            try:
                self._drain(self._device, self._handlers)
                self._linger(self._device, self._handlers)
            except OSError as exc:
                if exc.errno in GONE:
                    return
                raise
            finally:
                self._wait_for_adoptions()
            while self._room_left() <= 0:
                self._room = trio.Event()
                await self._room.wait()

    def _linger(self, device: Device, handlers: Handlers) -> None:
        now = self._fs.clock.monotonic()
        adoptions = self._fs.adoptions.awaited
        until = now + LINGER_SECONDS_MAX
        while now < until and not self._running and self._room_left() > 0:
            # Also if nothing was asked: others wait until we have dropped what they changed.
            answers = self._fs.answers_descriptor
            if answers >= 0:
                longest = until - now if self._asked else LINGER_SECONDS
                ready = handlers.lookout.wait(device, longest, answers, *adoptions)
            elif not self._asked:
                ready = handlers.lookout.wait(device, LINGER_SECONDS)
            else:
                return
            if not ready:
                return
            for descriptor in ready:
                if descriptor in adoptions:
                    adoptions.pop(descriptor)(True)
                    self._fs.send_soon()
            if answers in ready and not self._fs.receive_now():
                return
            if device.descriptor in ready:
                self._drain(device, handlers)
            now = self._fs.clock.monotonic()

    def _wait_for_adoptions(self) -> None:
        """Those that chunk servers have not answered yet get a task each."""
        adoptions, nursery = self._fs.adoptions, self._nursery
        assert nursery is not None
        if self._running:
            adoptions.need_all()  # whoever runs may need their connections
        while adoptions.awaited:
            nursery.start_soon(self._wait_for, *adoptions.awaited.popitem())
        if adoptions.left and not self._collecting:
            self._collecting = True
            nursery.start_soon(self._collect)

    async def _collect(self) -> None:
        """What nobody waits for does not keep its connection for long."""
        try:
            await trio.sleep(COLLECT_SECONDS)
        finally:
            self._collecting = False
            self._fs.adoptions.collect()
            self._fs.adoptions.need_all()
            self._wait_for_adoptions()

    async def _wait_for(self, descriptor: int, answered: Callable[[bool], None]) -> None:
        readable = False
        try:
            with trio.move_on_after(CALL_SECONDS):
                await trio.lowlevel.wait_readable(descriptor)
                readable = True
        finally:
            answered(readable)
        self._fs.send_soon()

    def _room_left(self) -> int:
        """For requests. Who waits for a lock does not count: what it waits for may come as one."""
        return MOUNT_TASKS - len(self._running) + self._lock_waits - len(self._asked)

    def _drain(self, device: Device, handlers: Handlers) -> None:
        try:
            for _ in range(min(MOUNT_DRAIN_REQUESTS, self._room_left())):
                length = device.receive(self._buffer)
                if not length:
                    return
                self._accept(device, handlers, self._buffer[:length])
        finally:
            self._fs.send_soon()

    def _accept(self, device: Device, handlers: Handlers, view: memoryview) -> None:
        try:
            request = wire.parse(view)
        except ProtocolError as exc:
            log.error("%s", exc)
            unique = wire.unique_of(view)
            if unique is not None:
                device.answer(unique, error=errno.EIO)
            return
        if request.opcode in wire.UNANSWERED:
            self._listen(request)
            return
        now = handlers.now.get(request.opcode)
        try:
            answer = None if now is None else now(request)
            if answer is None and self._ask(handlers, request):
                return
        except EntryNotFound:  # the most usual answer of all, after those that are right
            device.answer(request.unique, error=errno.ENOENT)
            return
        except Exception as exc:
            device.answer(request.unique, error=handlers.errno_of(request, exc))
            return
        if answer is None:
            self._start(request)
        elif not device.answer(request.unique, answer):
            handlers.take_back_now(request, answer)

    def _start(self, request: Request) -> None:
        """A task for what has to wait."""
        device, handlers, nursery = self._device, self._handlers, self._nursery
        assert device is not None and handlers is not None and nursery is not None
        later = handlers.later.get(request.opcode)
        if later is None:
            device.answer(request.unique, error=errno.ENOSYS)
            return
        if request.opcode == Opcode.WRITE:  # the buffer is for the next request
            data = memoryview(bytes(request.arguments.data))
            request = replace(request, arguments=request.arguments._replace(data=data))
        scope = trio.CancelScope()
        self._lock_waits += request.opcode == Opcode.SETLKW
        self._running[request.unique] = (request.opcode, scope)
        nursery.start_soon(self._carry_out, device, handlers, request, later, scope)

    async def _carry_out(
        self,
        device: Device,
        handlers: Handlers,
        request: Request,
        handler: Later,
        scope: trio.CancelScope,
    ) -> None:
        answer: Answer = ()
        error = errno.EINTR
        try:
            with scope:
                try:
                    answer = await handler(request)
                    error = 0
                except Exception as exc:
                    error = handlers.errno_of(request, exc)
            # Nothing waits between the handler's return and this: ``answer`` is still valid.
            if error:
                device.answer(request.unique, error=error)
            elif not device.answer(request.unique, answer):
                await handlers.take_back(request, answer)
        finally:
            del self._running[request.unique]
            self._lock_waits -= request.opcode == Opcode.SETLKW
            self._room.set()

    # --- asked without a task

    def _ask(self, handlers: Handlers, request: Request) -> bool:
        """A turn of the event loop for the question and one for the answer: with a task of its own
        a look-up takes five."""
        soon = handlers.soon.get(request.opcode)
        if soon is None:
            return False
        # Before: it may be told the answer at once.
        self._asked[request.unique] = _Asked(request, True, self._round)
        number = 0
        try:
            number = soon(request, self._told)
        finally:
            if not number:
                self._asked.pop(request.unique, None)
        if number and number is not True and request.unique in self._asked:
            self._asked[request.unique] = _Asked(request, number, self._round)
        return bool(number)

    def _told(self, request: Request, answer: Answer | None, error: KvfsError | None) -> None:
        asked = self._asked.pop(request.unique, None)
        if asked is None:
            return
        assert self._device is not None and self._handlers is not None
        if error is not None and not (error.temporary and asked.may_be_repeated):
            self._device.answer(request.unique, error=self._handlers.errno_of(request, error))
        elif error is not None or answer is None:
            self._start(request)
        elif not self._device.answer(request.unique, answer):
            assert self._nursery is not None
            self._nursery.start_soon(self._handlers.take_back, request, answer)
        self._room.set()

    def _take_over(self, asked: _Asked) -> None:
        """A task waits for it from now on."""
        del self._asked[asked.request.unique]
        self._fs.give_up(asked.number)
        self._start(asked.request)

    async def _watch_asked(self) -> None:
        """A service that is silent for long is a matter for tasks, which know when to give up."""
        while True:
            await trio.sleep(ASKED_SECONDS)
            late = [
                asked
                for asked in self._asked.values()
                if asked.round < self._round and asked.may_be_repeated
            ]
            self._round += 1
            for asked in late:
                self._take_over(asked)

    def _listen(self, request: Request) -> None:
        """What needs no answer."""
        if request.opcode == Opcode.INTERRUPT:
            self._interrupt(*request.arguments)
        elif request.opcode == Opcode.FORGET:
            self._fs.forget([request.inode])
        else:
            self._fs.forget(*request.arguments)

    def _interrupt(self, unique: int) -> None:
        asked = self._asked.get(unique)
        if asked is not None and asked.may_be_repeated:
            self._take_over(asked)
        opcode, scope = self._running.get(unique, (0, None))
        if scope is not None and opcode == Opcode.SETLKW:
            scope.cancel()
        elif scope is not None and opcode in INTERRUPTIBLE:
            scope.deadline = min(scope.deadline, trio.current_time() + MOUNT_INTERRUPT_SECONDS)
