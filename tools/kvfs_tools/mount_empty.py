"""The least that a FUSE loop in Python can do for names: what the mount's rates are held against.

    python -m kvfs_tools.mount_empty MOUNTPOINT

Names are two dicts, files are empty, nothing is checked, written or kept; one thread reads a
request, answers it and reads the next. Only what ``kvfs bench-mount --part names`` asks for is
there.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import struct
import sys
from collections.abc import Callable

from kvfs.mount import fuse_wire as wire
from kvfs.mount.device import GONE, Device
from kvfs.mount.direct_handlers import WANTED
from kvfs.mount.fuse_wire import Opcode, OpenFlag
from kvfs_base.limits import PAGE_BYTES
from kvfs_base.types import ROOT_INODE

_HEAD = struct.Struct("=IiQ")
_REQUEST = struct.Struct("=IIQQ")
_ATTR = "QQQqqqIIIIIIIIII"
_ENTRY = struct.Struct("=IiQ" + "QQQQII" + _ATTR)
_CREATED = struct.Struct("=IiQ" + "QQQQII" + _ATTR + "QIi")
_GOT = struct.Struct("=IiQ" + "QII" + _ATTR)
_OPENED = struct.Struct("=IiQ" + "QIi")
_DIRENT = struct.Struct("=" + "QQQQII" + _ATTR + "QQII")
_READ = struct.Struct("=QQI")
_CREATE = struct.Struct("=IIII")
_MKDIR = struct.Struct("=II")
_RENAME = struct.Struct("=Q")

BODY = wire.REQUEST_HEADER.size
FILE = stat.S_IFREG | 0o600
DIRECTORY = stat.S_IFDIR | 0o755
Answer = Callable[[int, int, bytes], bytes]


class Loop:
    def __init__(self, device: Device) -> None:
        self._device = device
        os.set_blocking(device.descriptor, True)
        self._modes = {ROOT_INODE: DIRECTORY}
        self._names: dict[int, dict[bytes, int]] = {ROOT_INODE: {}}
        self._handlers: dict[int, Answer] = {
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: self._getattr,
            Opcode.CREATE: self._create,
            Opcode.MKDIR: self._mkdir,
            Opcode.UNLINK: self._remove,
            Opcode.RMDIR: self._remove,
            Opcode.RENAME: self._rename,
            Opcode.OPEN: self._open,
            Opcode.OPENDIR: self._open,
            Opcode.READDIRPLUS: self._list,
            Opcode.INIT: self._init,
        }
        for opcode in (Opcode.FLUSH, Opcode.RELEASE, Opcode.RELEASEDIR):
            self._handlers[opcode] = self._done

    def run(self) -> None:
        descriptor = self._device.descriptor
        buffer = memoryview(bytearray(wire.REQUEST_BYTES_MAX))
        while True:
            try:
                request = bytes(buffer[: os.readv(descriptor, [buffer])])
            except OSError as exc:
                if exc.errno in GONE:
                    return
                if exc.errno in (errno.ENOENT, errno.EINTR):
                    continue
                raise
            _, opcode, unique, inode = _REQUEST.unpack_from(request)
            if opcode in wire.UNANSWERED:
                continue
            handler = self._handlers.get(opcode)
            if handler is None:
                os.write(descriptor, _failed(unique, errno.ENOSYS))
                continue
            try:
                answer = handler(unique, inode, request)
            except KeyError:
                answer = _failed(unique, errno.ENOENT)
            os.write(descriptor, answer)

    def _attr(self, inode: int) -> tuple[int, ...]:
        return (inode, 0, 0, 0, 0, 0, 0, 0, 0, self._modes[inode], 1, 0, 0, 0, PAGE_BYTES, 0)

    def _entry(self, unique: int, inode: int) -> bytes:
        return _ENTRY.pack(_ENTRY.size, 0, unique, inode, 0, 1, 1, 0, 0, *self._attr(inode))

    def _lookup(self, unique: int, inode: int, request: bytes) -> bytes:
        return self._entry(unique, self._names[inode][request[BODY:-1]])

    def _getattr(self, unique: int, inode: int, request: bytes) -> bytes:
        return _GOT.pack(_GOT.size, 0, unique, 1, 0, 0, *self._attr(inode))

    def _make(self, parent: int, name: bytes, mode: int) -> int:
        inode = len(self._modes) + 1
        self._modes[inode] = mode
        self._names[parent][name] = inode
        return inode

    def _create(self, unique: int, inode: int, request: bytes) -> bytes:
        made = self._make(inode, request[BODY + _CREATE.size : -1], FILE)
        head = _CREATED.size, 0, unique, made, 0, 1, 1, 0, 0
        return _CREATED.pack(*head, *self._attr(made), made, OpenFlag.KEEP_CACHE, 0)

    def _mkdir(self, unique: int, inode: int, request: bytes) -> bytes:
        made = self._make(inode, request[BODY + _MKDIR.size : -1], DIRECTORY)
        self._names[made] = {}
        return self._entry(unique, made)

    def _remove(self, unique: int, inode: int, request: bytes) -> bytes:
        del self._names[inode][request[BODY:-1]]
        return self._done(unique)

    def _rename(self, unique: int, inode: int, request: bytes) -> bytes:
        parent = _RENAME.unpack_from(request, BODY)[0]
        old, new, _ = request[BODY + _RENAME.size :].split(b"\0")
        self._names[parent][new] = self._names[inode].pop(old)
        return self._done(unique)

    def _open(self, unique: int, inode: int, request: bytes) -> bytes:
        return _OPENED.pack(_OPENED.size, 0, unique, inode, OpenFlag.KEEP_CACHE, 0)

    def _list(self, unique: int, inode: int, request: bytes) -> bytes:
        _, position, room = _READ.unpack_from(request, BODY)
        parts = []
        names = itertools.islice(self._names[inode].items(), position, None)
        for number, (name, child) in enumerate(names, position + 1):
            attr = self._attr(child)
            kind = self._modes[child] >> 12
            head = _DIRENT.pack(child, 0, 1, 1, 0, 0, *attr, child, number, len(name), kind)
            size = -(-(len(head) + len(name)) // wire.DIRENT_ALIGN) * wire.DIRENT_ALIGN
            room -= size
            if room < 0:
                break
            parts.append((head + name).ljust(size, b"\0"))
        body = b"".join(parts)
        return _HEAD.pack(_HEAD.size + len(body), 0, unique) + body

    def _init(self, unique: int, inode: int, request: bytes) -> bytes:
        init = wire.parse(memoryview(request)).arguments
        body = wire.init_out(init, int(WANTED) & init.features, init.max_readahead)
        return _HEAD.pack(_HEAD.size + len(body), 0, unique) + body

    def _done(self, unique: int, *_: object) -> bytes:
        return _HEAD.pack(_HEAD.size, 0, unique)


def _failed(unique: int, error: int) -> bytes:
    return _HEAD.pack(_HEAD.size, -error, unique)


def main() -> None:
    Loop(Device.mount(sys.argv[1], allow_other=False)).run()


if __name__ == "__main__":
    main()
