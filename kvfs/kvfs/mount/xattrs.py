"""Extended attributes, which the metadata service keeps."""

from __future__ import annotations

from kvfs.mount.backend import Backend
from kvfs_base.errors import AttributeMissing, LimitExceeded, NotSupported
from kvfs_base.limits import XATTR_NAME_BYTES_MAX, XATTR_VALUE_BYTES_MAX
from kvfs_metadata.messages import GetXattr, ListXattr, RemoveXattr, SetXattr

FOREIGN = (b"security.", b"system.")
"""Labels, capabilities and ACLs: not kept. The kernel asks for ``security.capability`` before every
write, so these are answered here."""


class Xattrs:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def check(self, name: bytes) -> None:
        """Raises AttributeMissing for what no file here has."""
        if name.startswith(FOREIGN):
            raise AttributeMissing(name=name)
        _check_name(name)

    async def get(self, inode: int, name: bytes) -> bytes:
        self.check(name)
        value: bytes = await self._backend.call(GetXattr(inode, name))
        return value

    async def set(self, inode: int, name: bytes, value: bytes, flags: int = 0) -> None:
        """``flags`` as in setxattr(2)."""
        if name.startswith(FOREIGN):
            raise NotSupported(detail=f"extended attribute {name!r}")
        _check_name(name)
        if len(value) > XATTR_VALUE_BYTES_MAX:
            raise LimitExceeded(limit=XATTR_VALUE_BYTES_MAX)
        await self._backend.call(SetXattr(inode, name, value, flags))

    async def list(self, inode: int) -> tuple[bytes, ...]:
        names: tuple[bytes, ...] = await self._backend.call(ListXattr(inode))
        return names

    async def remove(self, inode: int, name: bytes) -> None:
        self.check(name)
        await self._backend.call(RemoveXattr(inode, name))


def _check_name(name: bytes) -> None:
    if len(name) > XATTR_NAME_BYTES_MAX:
        raise LimitExceeded(detail="attribute name", limit=XATTR_NAME_BYTES_MAX)
