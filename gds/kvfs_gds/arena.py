"""Memory shared between processes: one owner writes, any number of readers map it read-only.

The owner creates a memfd, maps it, and then seals it: against shrinking (a reader would get
SIGBUS), growing, further seals, and every *future* way to write (F_SEAL_FUTURE_WRITE, Linux 5.1).
From then on the owner's mapping is the only one that can change a byte, whoever holds a descriptor
and whatever user they run as; a descriptor reopened through /proc/self/fd gives no more than that.

Its pages are allocated when first touched, so a large arena costs nothing until it is used, and are
large ones (2 MiB) where whoever uses them says so first (``view_to_fill``).
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from types import TracebackType
from typing import Self

from kvfs_base.errors import ArenaFull, InvalidRequest
from kvfs_base.large_pages import SharedMapping
from kvfs_base.limits import PAGE_BYTES

F_SEAL_FUTURE_WRITE = 0x0010
"""include/uapi/linux/fcntl.h; Python 3.11 has no name for it."""

_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_READ_ONLY_SEALS = _SIZE_SEALS | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL


class _PyBuffer(ctypes.Structure):
    """Py_buffer of the C API; only its first member is looked at."""

    _fields_ = [("buf", ctypes.c_void_p), ("obj", ctypes.c_void_p), ("rest", ctypes.c_byte * 128)]


def address_of(buffer: mmap.mmap | memoryview) -> int:
    """Where a contiguous buffer lies in this process, also if it is read-only (what CUDA registers,
    and what ctypes' own ``from_buffer`` refuses). Valid while the buffer is not closed."""
    found = _PyBuffer()
    api = ctypes.pythonapi
    api.PyObject_GetBuffer(ctypes.py_object(buffer), ctypes.byref(found), 0)
    api.PyBuffer_Release(ctypes.byref(found))
    return int(found.buf)


def copy(to: memoryview, data: memoryview) -> None:
    """As many bytes from one place in memory to another, without the interpreter's lock. Both are
    contiguous. A copy by the kernel (``pwrite`` to a memfd) goes by pages of 4 KiB and takes twice
    as long."""
    if to.readonly or to.nbytes != data.nbytes:
        raise InvalidRequest(detail=f"{data.nbytes} bytes into {to.nbytes} (or read-only ones)")
    ctypes.memmove(address_of(to), address_of(data), data.nbytes)


def _create_memfd(name: str, size_bytes: int) -> int:
    if size_bytes <= 0 or size_bytes % PAGE_BYTES:
        raise InvalidRequest(detail=f"{size_bytes} bytes are not whole pages")
    # A memfd is memory, not a disk: the seams for files do not apply.
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
    except OSError as exc:
        os.close(fd)
        raise ArenaFull(needed_bytes=size_bytes) from exc
    return fd


def _map(fd: int, size_bytes: int, *, writable: bool) -> SharedMapping:
    try:
        return SharedMapping(fd, size_bytes, writable=writable)
    except OSError as exc:
        raise ArenaFull(needed_bytes=size_bytes) from exc


def _sealed_size(fd: int) -> int:
    """Bytes of a memfd that can no longer shrink. Raises InvalidRequest for anything else: reading
    a file that its owner truncates would kill this process."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as exc:
        raise InvalidRequest(detail="not a sealable memory file") from exc
    if seals & _SIZE_SEALS != _SIZE_SEALS:
        raise InvalidRequest(detail="a memory file that could still change its size")
    return os.fstat(fd).st_size


class _Mapping:
    """What owners and readers share: memory that outlives ``close`` while views of it exist."""

    def __init__(self, fd: int, mapping: SharedMapping) -> None:
        self.fd = fd
        self.size_bytes = len(mapping.view)
        self._mapping = mapping
        self._closed = False

    def view(self, offset: int, length: int) -> memoryview:
        """``length`` bytes from ``offset``, without a copy. Raises InvalidRequest out of bounds."""
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise InvalidRequest(detail=f"[{offset}, +{length}) of {self.size_bytes} bytes")
        return self._mapping.view[offset : offset + length]

    def view_to_fill(self, offset: int, length: int) -> memoryview:
        """As ``view``, of bytes that are about to be used: in large pages, which are faster to copy
        and to read into from disk (``SharedMapping.make_large``)."""
        view = self.view(offset, length)
        self._mapping.make_large(offset, length)
        return view

    def close(self) -> None:
        """Closes the descriptor. Views stay valid; the memory is unmapped with the last one."""
        if self._closed:
            return
        self._closed = True
        os.close(self.fd)
        self._mapping.view.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Arena(_Mapping):
    """The owner's side. ``fd`` is read-only: it is what readers are sent."""

    @classmethod
    def create(cls, size_bytes: int, name: str = "kvfs-arena") -> Arena:
        """An arena of ``size_bytes`` (whole pages). Raises InvalidRequest, or ArenaFull if the
        address space or a memory limit does not allow it."""
        fd = _create_memfd(name, size_bytes)
        try:
            mapping = _map(fd, size_bytes, writable=True)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _READ_ONLY_SEALS)
            reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(fd)
        return cls(reader, mapping)


class ArenaView(_Mapping):
    """A reader's side."""

    @classmethod
    def open(cls, fd: int) -> ArenaView:
        """Maps the arena behind ``fd`` and takes over the descriptor. Raises InvalidRequest unless
        it is a memory file that was sealed as Arena.create does it."""
        try:
            mapping = _map(fd, _sealed_size(fd), writable=False)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, mapping)

    @property
    def address(self) -> int:
        """Where the arena starts in this process."""
        return self._mapping.address


class SharedMemory(_Mapping):
    """Memory that both sides may write: staging areas, lease boards. Its size is sealed; its
    contents are never to be trusted, and may change while they are looked at."""

    @classmethod
    def create(cls, size_bytes: int, name: str) -> SharedMemory:
        """Raises as Arena.create."""
        fd = _create_memfd(name, size_bytes)
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZE_SEALS | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(fd)
            raise
        return cls.open(fd)

    @classmethod
    def open(cls, fd: int) -> SharedMemory:
        """Maps what the other side created and takes over the descriptor. Raises as
        ArenaView.open."""
        try:
            mapping = _map(fd, _sealed_size(fd), writable=True)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, mapping)


__all__ = ["Arena", "ArenaView", "SharedMemory", "address_of", "copy"]
