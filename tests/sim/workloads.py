"""What clients do while the world goes wrong: blocks and files whose bytes say whose they are.

Each worker is a thread of a client. It works through production clients, as the agent and the mount
do, and notes every operation in the history before it begins: whoever is killed in one leaves it
without an answer.
"""

from __future__ import annotations

import mmap
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvfs_base.errors import (
    ChunkNotFound,
    IntegrityError,
    KvfsError,
    PrepareExpired,
    StaleChain,
)
from kvfs_base.limits import COMMIT_ATTEMPTS_MAX, PAGE_BYTES
from kvfs_base.types import ROOT_INODE, Attr, BlockInfo, ChunkId, KVLayout
from kvfs_datapath.buffers import round_up
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.client.chunk_client import ChunkRead, ChunkWrite
from kvfs_datapath.client.files import StripedFile
from kvfs_datapath.limits import FILE_RETRY_SECONDS
from kvfs_metadata import messages as m
from sim.history import LEASED, Entry, WrongBytes, page, read_page

if TYPE_CHECKING:
    from sim.cluster import ClientHost
    from sim.world import World

LAYOUT = KVLayout(block_tokens=16)
KEYS = 10
FILE_PAGES = 6
FILES = 2
CUT_PAGES = 8
DAWDLE_CHANCE = 0.1
DAWDLE_SECONDS = 8.0
"""Some writers take their time between storing and committing: collectors come, members go."""
FILE_BYTES = FILE_PAGES * PAGE_BYTES
MOVED_SECONDS = 1.0
"""Who waits for longer than a session lasts may find that its file has moved."""


def key_of(number: int) -> bytes:
    return b"key" + number.to_bytes(29, "big")


def block_size(number: int) -> int:
    """Of the block under a key: from less than a page to three and a bit."""
    return (500, PAGE_BYTES, PAGE_BYTES + 40, 3 * PAGE_BYTES + 33)[number % 4]


def block_bytes(inode: int, number: int, value: int) -> bytes:
    size = block_size(number)
    pages = -(-size // PAGE_BYTES)
    return b"".join(page(inode, index, value) for index in range(pages))[:size]


def check_block(view: memoryview, inode: int, number: int, value: int | None) -> None:
    """Raises WrongBytes unless it is what its writer made for this inode."""
    size = block_size(number)
    for index in range(-(-size // PAGE_BYTES)):
        piece = view[index * PAGE_BYTES : min((index + 1) * PAGE_BYTES, size)]
        if read_page(piece, inode, index) != value:
            raise WrongBytes(f"page {index} of block {inode} holds other bytes")


def aligned(size: int) -> memoryview:
    return memoryview(mmap.mmap(-1, max(PAGE_BYTES, round_up(size))))


class Worker:
    """``run`` goes on until the world says that it is enough."""

    kind = "worker"

    def __init__(self, world: World, client: ClientHost, number: int) -> None:
        self.world = world
        self.client = client
        self.name = f"{client.name}.{self.kind}{number}"
        self.rng = client.env.rng
        self.metadata = client.metadata_client()

    def run(self) -> None:
        while not self.world.enough:
            self.world.hub.sleep(self.rng.expovariate(1 / self.world.plan.pause_seconds))
            try:
                self.step()
            except KvfsError as exc:
                self.failed("step", exc)

    def step(self) -> None:
        raise NotImplementedError

    def failed(self, what: str, exc: KvfsError) -> None:
        self.world.hub.counts[f"{what}: {type(exc).__name__}"] += 1
        self.world.hub.trace(self.name, what, type(exc).__name__)


class BlockWorker(Worker):
    """Stores, reads and removes blocks under a few keys."""

    kind = "blocks"

    def step(self) -> None:
        # A batch is answered by lease if all of it is leased.
        most = 1 if self.world.plan.leases_blocks else 4
        numbers = self.rng.sample(range(KEYS), self.rng.randint(1, most))
        choice = self.rng.random()
        if choice < 0.35:
            self.put(numbers)
        elif choice < 0.85:
            self.get(numbers)
        else:
            self.remove(numbers[0])

    def _begin(self, number: int, *request: Any) -> Entry:
        return self.world.history.begin(("key", number), self.name, request)

    # --- storing, as BlockWriter of the agent does it

    def put(self, numbers: Sequence[int]) -> None:
        keys = b"".join(map(key_of, numbers))
        sizes = tuple(map(block_size, numbers))
        try:
            batch = self.metadata.call(m.PrepareBlocks(self.world.namespace, keys, sizes))
        except KvfsError as exc:
            self.failed("prepare", exc)
            return
        if batch.batch_id:
            found = zip(numbers, batch.blocks, strict=True)
            self._write(batch.batch_id, [(n, b) for n, b in found if b is not None])

    def _write(self, batch_id: int, blocks: Sequence[tuple[int, m.PreparedBlock]]) -> None:
        writes = []
        for number, block in blocks:
            view = aligned(block_size(number))
            value = self.world.next_value()
            if self.world.blocks.setdefault(block.inode, value) != value:
                raise WrongBytes(f"inode number {block.inode} was given out twice")
            data = block_bytes(block.inode, number, value)
            view[: len(data)] = data
            chunk = ChunkId(block.inode, 0)
            writes.append(
                ChunkWrite(chunk, block.chain, len(data), crc32c(data), key_of(number), view)
            )
        try:
            if self._write_chunks(writes):
                if self.rng.random() < DAWDLE_CHANCE:
                    self.world.hub.sleep(self.rng.expovariate(1 / DAWDLE_SECONDS))
                self._commit(batch_id, blocks, writes)
            else:
                self.metadata.call(m.AbortBlocks(batch_id))
        except KvfsError as exc:
            self.failed("abort", exc)

    def _write_chunks(self, writes: Sequence[ChunkWrite]) -> bool:
        errors = [error for error in self.client.chunks.write_chunks(writes) if error is not None]
        if errors:
            self.failed("write block", errors[0])
        return not errors

    def _commit(
        self,
        batch_id: int,
        blocks: Sequence[tuple[int, m.PreparedBlock]],
        writes: Sequence[ChunkWrite],
    ) -> None:
        entries = [(n, self._begin(n, "commit", block.inode)) for n, block in blocks]
        try:
            self._commit_versions(batch_id, writes)
        except (PrepareExpired, StaleChain) as exc:
            self.failed("commit", exc)
            for number, entry in entries:
                self.world.history.forget(("key", number), entry)
        except KvfsError as exc:
            self.failed("commit", exc)
        else:
            for _, entry in entries:
                self.world.history.end(entry, None)
            self.world.hub.trace(self.name, "stored", [block.inode for _, block in blocks])

    def _commit_versions(self, batch_id: int, writes: Sequence[ChunkWrite]) -> None:
        """Writes again, to the present members, what was written to those of a chain that has
        changed. Raises StaleChain if it changes again and again; then nothing is committed."""
        for _ in range(COMMIT_ATTEMPTS_MAX):
            written: dict[int, int] = {}
            for write in writes:
                if write.version:
                    oldest = written.get(write.chain, write.version)
                    written[write.chain] = min(write.version, oldest)
            crc32cs = tuple(write.crc32c for write in writes)
            try:
                self.metadata.call(m.CommitBlocks(batch_id, crc32cs, tuple(written.items())))
                return
            except StaleChain as exc:
                self.failed("commit", exc)
                error = exc
                self.client.chunks.versions(written)
                if not self._write_chunks(writes):
                    break
        self.metadata.call(m.AbortBlocks(batch_id))
        raise error

    # --- reading, as BlockReader does it

    def get(self, numbers: Sequence[int]) -> bool:
        """Whether everything that is stored could be read."""
        if self._get_leased(numbers):
            return True
        infos = self.lookup(numbers)
        found = [(n, info) for n, info in zip(numbers, infos, strict=True) if info is not None]
        reads = [
            ChunkRead(
                chunk=ChunkId(info.inode, 0),
                chain=info.chain,
                size=info.size,
                crc32c=info.crc32c,
                key=key_of(number),
                view=aligned(info.size),
            )
            for number, info in found
        ]
        errors = self.client.chunks.read_chunks(reads) if reads else []
        good = True
        for (number, info), read, error in zip(found, reads, errors, strict=True):
            if error is None:
                check_block(read.view, info.inode, number, self.world.blocks.get(info.inode))
                self.world.hub.trace(self.name, "read", info.inode)
            else:
                good = False
                self.failed("read block", error)
                if self.client.cache is not None:
                    self.client.cache.remove(self.world.namespace, [key_of(number)])
                if isinstance(error, IntegrityError | ChunkNotFound):
                    self._lost(number, info, error)
        return good

    def lookup(self, numbers: Sequence[int]) -> Sequence[BlockInfo | None]:
        entries = [self._begin(number, "lookup") for number in numbers]
        try:
            infos = self._look_up(numbers)
        except KvfsError as exc:
            self.failed("lookup", exc)
            for number, entry in zip(numbers, entries, strict=True):
                self.world.history.forget(("key", number), entry)
            return [None] * len(numbers)
        for entry, info in zip(entries, infos, strict=True):
            self.world.history.end(entry, None if info is None else info.inode)
        return infos

    def _get_leased(self, numbers: Sequence[int]) -> bool:
        """As an agent that has the bytes in its arena, without asking anybody; False if it has to
        ask."""
        cache, namespace = self.client.cache, self.world.namespace
        if cache is None:
            return False
        keys = list(map(key_of, numbers))
        entries = [self._begin(number, *LEASED) for number in numbers]
        held = cache.acquire_leased(namespace, keys, self.client.clock.monotonic())
        if held is None:
            for number, entry in zip(numbers, entries, strict=True):
                self.world.history.forget(("key", number), entry)
            return False
        for entry, block in zip(entries, held, strict=True):
            self.world.history.end(entry, block.generation)
        cache.release(held)
        self.client.uses.looked_up(namespace, b"".join(keys))
        self.world.hub.counts["answered by lease"] += 1
        return True

    def _look_up(self, numbers: Sequence[int]) -> Sequence[BlockInfo | None]:
        """The metadata service's answer, which the client keeps as far as it may."""
        cache, namespace = self.client.cache, self.world.namespace
        keys = list(map(key_of, numbers))
        request = m.LookupBlocks(namespace, b"".join(keys))
        if cache is None:
            found: Sequence[BlockInfo | None] = self.metadata.call(request)
            return found
        revocations = cache.revocations
        if revocations is not None:
            request.watcher = self.client.watcher
        infos: Sequence[BlockInfo | None] = self.metadata.call(request)
        grant = cache.acquire(namespace, keys, infos, revocations)
        cache.finish(grant)
        cache.release(entry for entry in grant.entries if entry is not None)
        return infos

    def _lost(self, number: int, info: BlockInfo, error: KvfsError) -> None:
        """A block that was there and cannot be read any more is removed, as readers do. Where
        nothing may be lost, it must have been removed by somebody meanwhile."""
        if not self.world.plan.lossy and "rot" not in self.world.plan.faults:
            (now,) = self.lookup([number])
            if now is not None and now.inode == info.inode:
                if now.chain != info.chain:
                    return  # it has moved meanwhile
                raise WrongBytes(f"block {info.inode} is committed and cannot be read: {error}")
        self._remove(number, info)

    def remove(self, number: int) -> None:
        self._remove(number, None)

    def _remove(self, number: int, info: BlockInfo | None) -> None:
        entry = self._begin(number, "remove", None if info is None else info.inode)
        seen = ((), ()) if info is None else ((info.inode,), (info.chain,))
        request = m.RemoveBlocks(self.world.namespace, key_of(number), *seen)
        try:
            count = self.metadata.call(request)
        except KvfsError as exc:
            self.failed("remove", exc)
        else:
            self.world.history.end(entry, count)


class FileWorker(Worker):
    """Writes and reads pages of files that all clients share."""

    kind = "files"

    def __init__(self, world: World, client: ClientHost, number: int) -> None:
        super().__init__(world, client, number)
        self.files = [self._open(attr) for attr in world.files]

    def find_again(self) -> None:
        """They may have moved."""
        self.files = [self._open(self.metadata.call(m.GetAttr(inode))) for inode, _ in self.files]

    def _open(self, attr: Attr) -> tuple[int, StripedFile]:
        assert attr.layout is not None
        patience = MOVED_SECONDS if self.world.plan.drains else FILE_RETRY_SECONDS
        file = StripedFile(self.client.chunks, attr.inode, attr.layout, retry_seconds=patience)
        return attr.inode, file

    def step(self) -> None:
        inode, file = self.rng.choice(self.files)
        if not self.world.plan.drains:
            self.use(inode, file)
            return
        # It may have moved: only who has it open knows where it is.
        attr: Attr = self.metadata.call(m.OpenInode(inode))
        try:
            _, file = self._open(attr)
            for _ in range(self.rng.randint(1, 3)):
                self.use(inode, file)
                self.world.hub.sleep(self.rng.random())
            file.close()
        finally:
            self.metadata.call(m.CloseInode(inode))

    def use(self, inode: int, file: StripedFile) -> None:
        first = self.rng.randrange(FILE_PAGES)
        count = min(1 if self.rng.random() < 0.8 else 3, FILE_PAGES - first)
        choice = self.rng.random()
        if choice < 0.4:
            self.write(inode, file, first, count)
        elif choice < 0.9:
            self.read(inode, file, first, count)
        else:
            try:
                file.flush() if choice < 0.95 else file.sync()
            except KvfsError as exc:
                self.failed("flush", exc)

    def write(self, inode: int, file: StripedFile, first: int, count: int) -> None:
        pages = range(first, first + count)
        values = [self.world.next_value() for _ in pages]
        data = b"".join(page(inode, i, value) for i, value in zip(pages, values, strict=True))
        entries = [
            self.world.history.begin(("file", inode, i), self.name, ("write", value))
            for i, value in zip(pages, values, strict=True)
        ]
        try:
            file.write(first * PAGE_BYTES, data)
        except KvfsError as exc:
            self.failed("write file", exc)
            return
        for entry in entries:
            self.world.history.end(entry, None)
        self.world.hub.trace(self.name, "wrote", inode, first, values)

    def read(self, inode: int, file: StripedFile, first: int, count: int) -> bool:
        pages = range(first, first + count)
        things = [("file", inode, i) for i in pages]
        entries = [self.world.history.begin(thing, self.name, ("read",)) for thing in things]
        try:
            data = file.read(first * PAGE_BYTES, count * PAGE_BYTES, FILE_BYTES, True)
        except KvfsError as exc:
            self.failed("read file", exc)
            if isinstance(exc, IntegrityError) and not self.world.plan.may_be_damaged:
                raise WrongBytes(f"file {inode} page {first}: {exc}") from exc
            for thing, entry in zip(things, entries, strict=True):
                self.world.history.forget(thing, entry)
            return False
        for place, (index, entry) in enumerate(zip(pages, entries, strict=True)):
            piece = data[place * PAGE_BYTES : (place + 1) * PAGE_BYTES]
            self.world.history.end(entry, read_page(piece, inode, index))
        self.world.hub.trace(self.name, "saw", inode, first, [entry.answer for entry in entries])
        return True


class CutWorker(Worker):
    """A file of its own that becomes shorter and longer: what was cut off does not come back. It
    may move whenever it is closed."""

    kind = "cuts"

    def __init__(self, world: World, client: ClientHost, number: int) -> None:
        super().__init__(world, client, number)
        self.inode = 0
        self.pages: list[int] = []
        """What each holds, 0 for a hole."""

    def step(self) -> None:
        inode, self.inode = self.inode, 0  # after an error nobody knows what it holds
        if not inode:
            name = f"{self.name}.{self.world.next_value()}".encode()
            made = self.metadata.call(m.Make(self.world.directory, name, stat.S_IFREG | 0o600))
            inode, self.pages = made.inode, []
        attr: Attr = self.metadata.call(m.OpenInode(inode))
        assert attr.layout is not None
        file = StripedFile(self.client.chunks, inode, attr.layout, retry_seconds=MOVED_SECONDS)
        try:
            self._check(file, inode)
            for _ in range(self.rng.randint(0, 3)):
                self._change(file, inode)
                self._check(file, inode)
            file.close()
        finally:
            self.metadata.call(m.CloseInode(inode))
        self.inode = inode

    def _change(self, file: StripedFile, inode: int) -> None:
        pages, old = self.pages, len(self.pages)
        if pages and self.rng.random() < 0.5:
            del pages[self.rng.randrange(old) :]
            file.truncate(old * PAGE_BYTES, len(pages) * PAGE_BYTES)
            self.metadata.call(m.SetAttr(inode, size=len(pages) * PAGE_BYTES))
            self.world.hub.counts["cut"] += 1
        else:
            index, value = self.rng.randrange(CUT_PAGES), self.world.next_value()
            if index > old:
                pages += [0] * (index - old)
                hole = m.SetAttr(inode, grow_to=index * PAGE_BYTES, sparse=True)
                self.metadata.call(hole)
            pages[index : index + 1] = [value]
            file.write(index * PAGE_BYTES, page(inode, index, value))
            self.metadata.call(m.SetAttr(inode, grow_to=len(pages) * PAGE_BYTES))
        self.world.hub.trace(self.name, "left", inode, pages)

    def _check(self, file: StripedFile, inode: int) -> None:
        size = len(self.pages) * PAGE_BYTES
        try:
            data = file.read(0, size, size, True) if size else b""
        except IntegrityError as exc:
            raise WrongBytes(f"own file {inode}: {exc}") from exc
        for index, value in enumerate(self.pages):
            piece = data[index * PAGE_BYTES : (index + 1) * PAGE_BYTES]
            if (found := read_page(piece, inode, index)) != value:
                raise WrongBytes(f"own file {inode}: page {index} is {found}, not {value}")


class ReadWorker(FileWorker):
    """Only reads: its client hears of changes of the cluster only from who refuses to answer."""

    kind = "reads"

    def step(self) -> None:
        inode, file = self.rng.choice(self.files)
        self.read(inode, file, self.rng.randrange(FILE_PAGES), 1)


class ChurnWorker(Worker):
    """Makes a file, writes and reads it, and unlinks it: what it leaves must go."""

    kind = "churn"

    def step(self) -> None:
        name = f"{self.name}.{self.world.next_value()}".encode()
        drains = self.world.plan.drains
        try:
            attr: Attr = self.metadata.call(
                m.Make(self.world.directory, name, stat.S_IFREG | 0o600, open=drains)
            )
            self._use(attr)
            if drains:
                self.metadata.call(m.CloseInode(attr.inode))
            self.metadata.call(m.Unlink(self.world.directory, name))
        except KvfsError as exc:
            self.failed("churn", exc)

    def _use(self, attr: Attr) -> None:
        assert attr.layout is not None
        file = StripedFile(self.client.chunks, attr.inode, attr.layout)
        size = 0
        for index in range(self.rng.randint(1, 4)):
            file.write(size, page(attr.inode, index, index + 1))
            size += PAGE_BYTES
        self.metadata.call(m.SetAttr(attr.inode, grow_to=size))
        if self.rng.random() < 0.5:
            file.flush()
        try:
            data = file.read(0, size, size, False)
        except (IntegrityError, ChunkNotFound) as exc:
            if self.world.plan.may_be_damaged:
                raise
            raise WrongBytes(f"own file {attr.inode}: {exc}") from exc
        if not self.world.plan.files_lossy:
            for index in range(size // PAGE_BYTES):
                piece = data[index * PAGE_BYTES : (index + 1) * PAGE_BYTES]
                if read_page(piece, attr.inode, index) != index + 1:
                    raise WrongBytes(f"own file {attr.inode}: page {index} is gone")
        file.close()
        self.world.hub.trace(self.name, "had", attr.inode, size)


def make_directory(call: Any, name: bytes, copies: int) -> int:
    attr: Attr = call(m.Make(ROOT_INODE, name, stat.S_IFDIR | 0o700, exclusive=True))
    if copies > 1:
        call(m.SetXattr(attr.inode, b"user.kvfs.copies", b"%d" % copies))
    return attr.inode


def make_file(call: Any, directory: int, name: bytes) -> Attr:
    """All of it a hole."""
    attr: Attr = call(m.Make(directory, name, stat.S_IFREG | 0o600))
    made: Attr = call(m.SetAttr(attr.inode, grow_to=FILE_BYTES, sparse=True))
    return made
