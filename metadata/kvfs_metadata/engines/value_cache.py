"""Values of a store that is far away, so that asking twice costs one round trip."""

from __future__ import annotations

from collections import OrderedDict

from kvfs_metadata.engines.engine import Writes

OVERHEAD_BYTES = 200
"""Of two bytes objects and their place in the dictionary."""

UNKNOWN = object()


class ValueCache:
    """Keys to values, or to None where it is known that there is none; the least recently used go
    first. Whoever owns it tells it of every commit."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._values: OrderedDict[bytes, bytes | None] = OrderedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: bytes) -> bytes | object | None:
        """The value, None, or UNKNOWN."""
        value = self._values.get(key, UNKNOWN)
        if value is not UNKNOWN:
            self._values.move_to_end(key)
        return value

    def put(self, key: bytes, value: bytes | None) -> None:
        self.forget(key)
        cost = _cost(key, value)
        if cost > self._capacity_bytes // 16:
            return  # one value is not worth all others
        self._values[key] = value
        self.size_bytes += cost
        while self.size_bytes > self._capacity_bytes:
            self.size_bytes -= _cost(*self._values.popitem(last=False))

    def forget(self, key: bytes) -> None:
        value = self._values.pop(key, UNKNOWN)
        if value is None or isinstance(value, bytes):
            self.size_bytes -= _cost(key, value)

    def apply(self, writes: Writes, *, own: bool) -> None:
        """A commit happened. What others wrote is kept only where this process knew the key."""
        for key, value in writes.items():
            if own or key in self._values:
                self.put(key, value)

    def clear(self) -> None:
        self._values.clear()
        self.size_bytes = 0


def _cost(key: bytes, value: bytes | None) -> int:
    return OVERHEAD_BYTES + len(key) + (0 if value is None else len(value))
