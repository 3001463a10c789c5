"""Files of whole chunks that a server keeps open for the next reader.

Opening a chunk of 64 KiB, looking at its attribute and closing it costs more than sending it. What
is kept is never the only thing that holds a chunk: whoever gives a chunk's name to another file,
takes the name away or changes the attribute calls ``drop`` afterwards. So a file that was removed
has its space back as soon as those are done who are reading it, and who opens a chunk sees what was
done before.

Somebody may open a file, be overtaken by a change, and only then come to keep it. Each ``drop``
therefore counts a number up, which was looked at before the file was opened (``ticket``): where it
has changed the file is used once and not kept.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvfs_base import threads
from kvfs_base.seams import DiskFile
from kvfs_base.types import ChunkId
from kvfs_datapath.format import ChunkInfo

TICKETS = 1024
"""Chunks share them: a change of another chunk costs no more than that a file is not kept."""


class KeptFile:
    """An open chunk and what its attribute says, for as long as it is not closed. ``users`` counts
    those who hold it now; guarded by the lock of ``KeptFiles``."""

    __slots__ = ("_owner", "dropped", "file", "info", "is_new", "used", "users")

    def __init__(self, owner: KeptFiles, file: DiskFile, info: ChunkInfo) -> None:
        self._owner = owner
        self.file = file
        self.info = info
        self.users = 1
        self.dropped = False
        self.is_new = True
        """Nobody has borrowed it again."""
        self.used = False
        """Somebody has since it was looked at whether it may be closed."""

    def drop(self) -> None:
        """What it says may be wrong: nobody else gets it."""
        self._owner.drop(self.info.chunk)

    def close(self) -> None:
        """Once."""
        self._owner.give_back([self])


class KeptFiles:
    """Least recently used first out, or nearly (second chance): a borrowed one costs a look into a
    dict. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threads.lock()
        self._kept: tuple[dict[tuple[int, int, int], KeptFile], ...] = ({}, {})
        """By ChunkId: buffered ones and those for O_DIRECT, in the order in which they are looked
        at."""
        self._changes = [0] * TICKETS
        self.hits = 0
        """How often a file was there."""

    def __len__(self) -> int:
        return sum(map(len, self._kept))

    def borrow(
        self, chunks: Sequence[tuple[int, int, int]], *, direct: bool
    ) -> list[KeptFile | None]:
        """Those that are there: to be closed, or given back. ``chunks`` are ChunkIds, or tuples
        that equal them: making hundreds of those takes as long as the rest."""
        kept = self._kept[direct]
        with self._lock:
            found = [kept.get(chunk) for chunk in chunks]
            for one in found:
                if one is not None:
                    self.hits += 1
                    one.users += 1
                    one.used = True
                    one.is_new = False
        return found

    def give_back(self, files: Sequence[KeptFile]) -> None:
        closing = []
        with self._lock:
            for one in files:
                one.users -= 1
                if one.dropped and not one.users:
                    closing.append(one)
        for one in closing:
            one.file.close()

    def ticket(self, chunk: ChunkId) -> int:
        """For ``add``, from before the file is opened."""
        return self._changes[hash(chunk) % TICKETS]

    def add(self, file: DiskFile, info: ChunkInfo, ticket: int | None, *, direct: bool) -> KeptFile:
        """Takes over ``file`` and lends it at once. Without a ``ticket``, or if the chunk was
        changed since, or another thread was faster, it is used this once."""
        added = KeptFile(self, file, info)
        chunk = info.chunk
        kept = self._kept[direct]
        with self._lock:
            if chunk in kept or self._changes[hash(chunk) % TICKETS] != ticket:
                added.dropped = True
                return added
            kept[chunk] = added
            while len(self) > self._limit:
                self._make_room(kept)
        return added

    def _make_room(self, kept: dict[tuple[int, int, int], KeptFile]) -> None:
        """Closes the first one of ``kept`` that was not used since the last look at it."""
        while True:
            chunk, found = next(iter(kept.items()))
            if not found.used:
                self._drop(kept, chunk)
                return
            found.used = False
            kept[chunk] = kept.pop(chunk)

    def drop(self, chunk: ChunkId) -> None:
        """After every change of what lies at the chunk's place."""
        with self._lock:
            self._changes[hash(chunk) % TICKETS] += 1
            for kept in self._kept:
                if chunk in kept:
                    self._drop(kept, chunk)

    def clear(self) -> None:
        """Nothing is kept from now on."""
        with self._lock:
            self._limit = 0
            for kept in self._kept:
                for chunk in list(kept):
                    self._drop(kept, chunk)

    @staticmethod
    def _drop(kept: dict[tuple[int, int, int], KeptFile], chunk: tuple[int, int, int]) -> None:
        found = kept.pop(chunk)
        found.dropped = True
        if not found.users:
            found.file.close()
