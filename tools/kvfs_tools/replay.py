"""Replays a request trace against kvfs as an inference engine would: match the prefix, load what
hits, store what was missing. Every byte that comes back is checked.

Contents are *self-describing*: each 4 KiB page starts with the key of its block and its own index,
and the rest looks like bfloat16 KV whose low mantissa bits carry a hash of both, in every 8 bytes.
A page that is torn, stale, from another block or at another place differs from what is expected.
"""

from __future__ import annotations

import dataclasses
import hashlib
import mmap
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvfs_base.errors import CapacityError, InvalidRequest
from kvfs_base.limits import (
    BLOCK_BYTES_MAX,
    KIB,
    MIB,
    PAGE_BYTES,
)
from kvfs_base.seams import Buffer
from kvfs_tools.traces import TraceRequest

KEY_DOMAIN = b"kvfs trace block v1\0"
BATCH_BYTES = 32 * MIB
"""Blocks handed over or leased at a time: half of what a small arena has, and few calls."""

BANK_PAGES = 256
"""Noise that all blocks share; 1 MiB stays in a core's cache."""

LANE_MASK = np.uint64(0x003F_003F_003F_003F)
"""The low 6 of bfloat16's 7 mantissa bits: values keep sign and magnitude, and 24 bits of each 8
bytes tell whose they are."""

WORDS = PAGE_BYTES // 8
HEADER_WORDS = 6  # key (4), page index, block bytes


class BlockStore(Protocol):
    """What the replay needs of a namespace (``kvfs.Namespace`` is one)."""

    def match(self, keys: Sequence[bytes]) -> int: ...

    def put(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> int: ...

    def get(self, keys: Sequence[bytes]) -> AbstractContextManager[Sequence[memoryview | None]]: ...


def trace_keys(hash_ids: Iterable[int], salt: bytes = b"") -> list[bytes]:
    """32-byte keys for ids of a trace: SHA-256 of a domain tag, the length and bytes of ``salt``
    (what keeps two replays apart), and the id as 8 bytes, little-endian. Ids name a prefix already,
    so nothing is chained."""
    head = KEY_DOMAIN + len(salt).to_bytes(8, "little") + salt
    return [hashlib.sha256(head + i.to_bytes(8, "little")).digest() for i in hash_ids]


class BlockPattern:
    """Makes and checks contents of blocks of ``block_bytes``, a positive multiple of 4 KiB."""

    def __init__(self, block_bytes: int) -> None:
        if block_bytes % PAGE_BYTES or not 0 < block_bytes <= BLOCK_BYTES_MAX:
            detail = f"block size {block_bytes} is no multiple of {PAGE_BYTES}"
            raise InvalidRequest(detail=f"{detail} up to {BLOCK_BYTES_MAX}")
        self.block_bytes = block_bytes
        self.pages = block_bytes // PAGE_BYTES
        noise = np.random.default_rng(20250101).standard_normal(
            (min(self.pages, BANK_PAGES), PAGE_BYTES // 2), dtype=np.float32
        )
        halves = (noise.view(np.uint32) >> 16).astype(np.uint16)
        bank = halves.view(np.uint64).reshape(-1, WORDS)
        repeats = -(-self.pages // len(bank))
        self._bank = bank if repeats == 1 else np.tile(bank, (repeats, 1))[: self.pages]
        self._index = np.arange(self.pages, dtype=np.uint64)
        self._scratch = np.empty((self.pages, WORDS), np.uint64)

    def fill(self, key: bytes, out: memoryview) -> None:
        """Writes the block of ``key`` into ``out`` (block_bytes long)."""
        self._expected(key, np.frombuffer(out, np.uint64).reshape(self.pages, WORDS))

    def wrong_pages(self, key: bytes, block: Buffer) -> list[int]:
        """Indices of pages that are not as ``fill`` made them; every page if the size differs."""
        if len(block) != self.block_bytes:
            return list(range(self.pages))
        self._expected(key, self._scratch)
        found = np.frombuffer(block, np.uint64).reshape(self.pages, WORDS)
        if np.array_equal(found, self._scratch):
            return []
        return [int(i) for i in np.flatnonzero((found != self._scratch).any(axis=1))]

    def _expected(self, key: bytes, out: NDArray[np.uint64]) -> None:
        words = np.frombuffer(key, np.uint64)
        with np.errstate(over="ignore"):
            mixed = _mix(words[0] ^ _mix(words[1] + self._index))
        np.bitwise_xor(self._bank, (mixed & LANE_MASK)[:, None], out=out)
        out[:, :4] = words
        out[:, 4] = self._index
        out[:, 5] = self.block_bytes


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return value ^ (value >> np.uint64(31))


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    block_bytes: int = 256 * KIB
    salt: bytes = b""
    seconds: float | None = None
    """Stop before the first request that would start later than this."""

    def __post_init__(self) -> None:
        if self.seconds is not None and self.seconds <= 0:
            raise InvalidRequest(detail="seconds must be positive")


@dataclasses.dataclass
class ReplayReport:
    """Counts of one replay. ``*_seconds`` is time inside API calls; ``data_seconds`` went into
    making and checking contents, which an engine does not do."""

    requests: int = 0
    references: int = 0
    tokens: int = 0
    hit_blocks: int = 0
    hit_tokens: int = 0
    stored_blocks: int = 0
    known_blocks: int = 0
    """Put again although stored: they lay behind a gap, and were not written twice."""
    refused_blocks: int = 0
    """Puts that found no room (CapacityError)."""
    vanished_blocks: int = 0
    """Matched, but evicted before they were loaded: misses."""
    wrong_blocks: int = 0
    """Loaded with other contents than were stored. Anything but 0 is a bug."""
    bytes_out: int = 0
    bytes_in: int = 0
    match_seconds: float = 0.0
    get_seconds: float = 0.0
    put_seconds: float = 0.0
    data_seconds: float = 0.0
    wall_seconds: float = 0.0
    stopped_early: bool = False
    wrong_keys: list[bytes] = dataclasses.field(default_factory=list)
    recent_keys: list[bytes] = dataclasses.field(default_factory=list)
    """Keys of the last requests, newest last: what is most likely to be stored still."""

    @property
    def hit_rate(self) -> float:
        return self.hit_blocks / self.references if self.references else 0.0

    @property
    def gigabytes_out_per_second(self) -> float:
        """Loaded and verified by kvfs, a second of get calls."""
        return self.bytes_out / self.get_seconds / 1e9 if self.get_seconds else 0.0

    @property
    def gigabytes_in_per_second(self) -> float:
        """Newly stored, a second of put calls."""
        return self.bytes_in / self.put_seconds / 1e9 if self.put_seconds else 0.0


RECENT_KEYS_MAX = 64


class Replay:
    """One replay against one store; ``run`` once."""

    def __init__(self, store: BlockStore, config: ReplayConfig | None = None) -> None:
        self.store = store
        self.config = config or ReplayConfig()
        self.pattern = BlockPattern(self.config.block_bytes)
        self.report = ReplayReport()
        self.batch = max(1, BATCH_BYTES // self.config.block_bytes)
        # One set of page-aligned buffers for all puts: put has copied them when it returns.
        self._map = mmap.mmap(-1, self.batch * self.config.block_bytes)
        size = self.config.block_bytes
        self._buffers = [memoryview(self._map)[i * size :][:size] for i in range(self.batch)]

    def run(
        self,
        requests: Iterable[TraceRequest],
        progress: Callable[[ReplayReport], None] | None = None,
    ) -> ReplayReport:
        """Replays in order, as fast as the store answers; timestamps are not waited for.
        ``progress`` sees the report after each request."""
        report = self.report
        begin = time.perf_counter()
        for request in requests:
            report.wall_seconds = time.perf_counter() - begin
            if self.config.seconds is not None and report.wall_seconds > self.config.seconds:
                report.stopped_early = True
                break
            self._request(request)
            if progress is not None:
                progress(report)
        report.wall_seconds = time.perf_counter() - begin
        return report

    def _request(self, request: TraceRequest) -> None:
        report = self.report
        keys = trace_keys(request.hash_ids, self.config.salt)
        begin = time.perf_counter()
        matched = self.store.match(keys)
        report.match_seconds += time.perf_counter() - begin
        hits = self._load(keys[:matched])
        report.requests += 1
        report.references += len(keys)
        report.tokens += request.input_length
        report.hit_blocks += hits
        report.hit_tokens += request.tokens(hits)
        self._store(keys[hits:])
        report.recent_keys = (report.recent_keys + keys)[-RECENT_KEYS_MAX:]

    def _load(self, keys: list[bytes]) -> int:
        """Loads and checks matched blocks; answers with how many came without a gap."""
        report = self.report
        loaded = 0
        for start in range(0, len(keys), self.batch):
            part = keys[start : start + self.batch]
            begin = time.perf_counter()
            lease = self.store.get(part)
            with lease as blocks:
                got = time.perf_counter()
                report.get_seconds += got - begin
                good = self._check(part, blocks)
                end = time.perf_counter()
                report.data_seconds += end - got
            report.get_seconds += time.perf_counter() - end
            loaded += good
            if good < len(part):
                report.vanished_blocks += len(keys) - loaded
                break
        return loaded

    def _check(self, keys: list[bytes], blocks: Sequence[memoryview | None]) -> int:
        """How many blocks came from the first without a gap. Wrong ones count as come: the report
        names them."""
        count = 0
        for key, block in zip(keys, blocks, strict=True):
            if block is None:
                break
            if self.pattern.wrong_pages(key, block):
                self.report.wrong_blocks += 1
                self.report.wrong_keys.append(key)
            self.report.bytes_out += len(block)
            count += 1
        return count

    def _store(self, keys: list[bytes]) -> None:
        report = self.report
        for start in range(0, len(keys), self.batch):
            part = keys[start : start + self.batch]
            buffers = self._buffers[: len(part)]
            begin = time.perf_counter()
            for key, buffer in zip(part, buffers, strict=True):
                self.pattern.fill(key, buffer)
            filled = time.perf_counter()
            report.data_seconds += filled - begin
            try:
                stored = self.store.put(part, buffers)
            except CapacityError:
                # An engine goes on without storing; what was refused shows in the report.
                report.refused_blocks += len(part)
                continue
            finally:
                report.put_seconds += time.perf_counter() - filled
            report.stored_blocks += stored
            report.known_blocks += len(part) - stored
            report.bytes_in += stored * self.config.block_bytes
