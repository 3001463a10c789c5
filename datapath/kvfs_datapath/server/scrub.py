"""The scrubber: reads every sealed chunk again, slowly, before somebody needs it.

Disks lose bits in silence. A second copy helps only if the first one's damage is found while the
second is whole. One thread a server reads the targets in turn, past the page cache where that is
possible, at a bounded rate each. What is bad on a chain of several copies is handed to ``repair``;
of a single copy nothing is left but to say so, once.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Generator, Sequence

import msgspec

from kvfs_base import threads
from kvfs_base.counters import Counters
from kvfs_base.errors import (
    ChunkNotFound,
    DiskFull,
    IntegrityError,
    KvfsError,
    ServerBusy,
    TargetFailed,
    VersionMismatch,
)
from kvfs_base.seams import Env
from kvfs_base.types import U32, U64, ChunkId
from kvfs_datapath.chunks.store import ChunkStore
from kvfs_datapath.format import DIRECTORIES, root_of
from kvfs_datapath.limits import (
    SCRUB_BAD_REMEMBERED_MAX,
    SCRUB_CHUNK_BYTES,
    SCRUB_SAVE_SECONDS,
    SCRUB_START_SECONDS,
)

log = logging.getLogger(__name__)

POSITION = "scrub.json"
DAY_SECONDS = 86_400.0
IDLE_SECONDS = 3_600.0

Repair = Callable[[ChunkStore, ChunkId], object]
"""Looks at a chunk of a chain that was found bad, and gets it from another member. May raise any
KvfsError if it is not whole again: the next round finds the chunk once more."""


class Position(msgspec.Struct, frozen=True):
    """Contents of ``scrub.json``: which chunk comes next, in the order of chain, directory, inode
    and number. ``done``: the round that began then is over."""

    began_ns: U64
    chain: U32 = 0
    directory: U32 = 0
    inode: U64 = 0
    number: U32 = 0
    done: bool = False


@dataclasses.dataclass(slots=True)
class _Course:
    """One target's way. ``work`` reads a piece and yields for how many seconds that was enough."""

    store: ChunkStore
    due: float
    saved_at: float
    position: Position | None = None
    work: Generator[float, None, None] = dataclasses.field(init=False)


class Scrubber:
    """Runs from ``start`` to ``stop``."""

    def __init__(
        self,
        env: Env,
        stores: Sequence[ChunkStore],
        counters: Counters,
        *,
        bytes_per_second: int,
        days: float,
        repair: Repair | None = None,
    ) -> None:
        """``bytes_per_second`` of each target, 0 to do nothing; a round begins ``days`` after the
        one before, or when that is over. Counts in ``scrubbed_bytes``, ``scrubbed_chunks``,
        ``scrub_bad_chunks``, ``scrub_repaired_chunks`` and ``scrub_rounds``."""
        self._clock = env.clock
        self._counters = counters
        self._rate = bytes_per_second
        self._round_seconds = days * DAY_SECONDS
        self._repair = repair
        self._told: dict[tuple[str, ChunkId], None] = {}
        self._stopping = threads.event()
        self._thread = threads.thread(self._run, name="kvfs-scrubber")
        now = self._clock.monotonic()
        self._courses: list[_Course] = []
        for store in stores if bytes_per_second else ():
            # Who has just started has other things to do.
            course = _Course(store, due=now + SCRUB_START_SECONDS, saved_at=now)
            course.work = self._walk(course)
            self._courses.append(course)

    def start(self) -> None:
        if self._courses:
            self._thread.start()

    def stop(self) -> None:
        """Returns once the thread has ended and every position is saved."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        for course in self._courses:
            course.work.close()
            self._save(course)
        self._courses.clear()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._stopping.wait(self.step())
        except Exception:
            log.exception("the scrubber thread failed")

    def step(self) -> float:
        """Reads a piece of the target whose turn it is, if it is time; answers how many seconds
        nothing is due."""
        if not self._courses:
            return IDLE_SECONDS
        course = min(self._courses, key=lambda course: course.due)
        now = self._clock.monotonic()
        if course.due <= now:
            try:
                # What was missed while the disk was busy is not made up for.
                course.due = now + next(course.work)
            except TargetFailed:
                self._courses.remove(course)
                return 0.0
            if now - course.saved_at >= SCRUB_SAVE_SECONDS:
                self._save(course)
        return max(0.0, min(course.due for course in self._courses) - now)

    # --- one target

    def _walk(self, course: _Course) -> Generator[float, None, None]:
        course.position = self._load(course.store)
        while True:
            now_ns = self._clock.time_ns()
            position = course.position
            if position is not None and position.done:
                wait = self._round_seconds - (now_ns - position.began_ns) / 1e9
                if 0 < wait <= self._round_seconds:  # else the clock was set back
                    yield wait
                    continue
                position = None
            course.position = position or Position(began_ns=now_ns)
            yield from self._round(course, course.position)
            course.position = msgspec.structs.replace(course.position, done=True)
            self._save(course)
            self._counters.add(scrub_rounds=1)
            log.info("every chunk of target %s was read: %s", course.store.uuid, self._figures())

    def _figures(self) -> str:
        found = self._counters.snapshot()
        return f"{found['scrub_bad_chunks']} bad chunks since the start"

    def _round(self, course: _Course, start: Position) -> Generator[float, None, None]:
        store = course.store
        for chain in (0, *store.chains()):
            for directory in range(DIRECTORIES):
                if (chain, directory) < (start.chain, start.directory):
                    continue
                found = store.list_directory(f"{root_of(chain)}/{directory:02x}", chain)
                for chunk in sorted(found):
                    place = (chain, directory, chunk.inode, chunk.number)
                    if place < (start.chain, start.directory, start.inode, start.number):
                        continue
                    course.position = Position(start.began_ns, *place)
                    yield from self._check(store, chunk)
            yield 0.0  # an empty tree is a look at 256 directories

    def _check(self, store: ChunkStore, chunk: ChunkId) -> Generator[float, None, None]:
        """Yields for how many seconds each piece was enough."""
        read = 0
        pieces = store.recheck_in_pieces(chunk)
        try:
            for count in pieces:
                read += count
                self._counters.add(scrubbed_bytes=count)
                yield count / self._rate
        except (ChunkNotFound, ServerBusy, VersionMismatch):
            pass  # gone, or not now, or a newer server's
        except IntegrityError as exc:
            self._counters.add(scrub_bad_chunks=1)
            self._deal_with(store, chunk, exc)
        finally:
            pieces.close()
        if read:
            self._counters.add(scrubbed_chunks=1)
        if read < SCRUB_CHUNK_BYTES:
            yield (SCRUB_CHUNK_BYTES - read) / self._rate

    def _deal_with(self, store: ChunkStore, chunk: ChunkId, error: KvfsError) -> None:
        if chunk.chain and self._repair is not None:
            try:
                self._repair(store, chunk)
                self._counters.add(scrub_repaired_chunks=1)
            except TargetFailed:
                raise
            except KvfsError as exc:
                log.info("chunk %s stays bad for now: %s", tuple(chunk), exc)
            return
        if (store.uuid, chunk) not in self._told:
            log.error("bad chunk on target %d: %s", store.target_id, error)
            self._told[store.uuid, chunk] = None
            while len(self._told) > SCRUB_BAD_REMEMBERED_MAX:
                del self._told[next(iter(self._told))]

    # --- where it was

    def _load(self, store: ChunkStore) -> Position | None:
        try:
            return msgspec.json.decode(store.read_note(POSITION), type=Position)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None  # there is none, or the power went: from the start

    def _save(self, course: _Course) -> None:
        course.saved_at = self._clock.monotonic()
        if course.position is None:
            return
        try:
            course.store.write_note(POSITION, msgspec.json.encode(course.position))
        except (TargetFailed, DiskFull, ServerBusy) as exc:
            log.info("where the scrubber is on %s is not saved: %s", course.store.uuid, exc)
