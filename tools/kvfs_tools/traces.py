"""Request traces in the format that Mooncake published, and what they say about reuse.

A trace is JSON lines, one request each::

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [0, 46, 47]}

``timestamp`` is milliseconds since the trace began, lengths are tokens, and ``hash_ids`` names the
prefix of the input in pieces of 512 tokens (the last piece may be shorter): equal ids are the same
tokens after the same prefix. Source: "Mooncake: Trading More Storage for Less Computation",
FAST'25, repository kvcache-ai/Mooncake.

A request *hits* a block if all blocks before it hit too: KV behind a gap is of no use to an engine.
All figures below count that way.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated

import msgspec

from kvfs_base.errors import InvalidRequest
from kvfs_base.limits import MIB

TRACE_BLOCK_TOKENS = 512
"""Tokens behind one id, fixed by the format."""

LINE_BYTES_MAX = 4 * MIB
"""A line of 128 K-token inputs has 250 ids, about 2 KB; 4 MiB is a file that is not a trace."""

LRU_SHARES = (0.01, 0.05, 0.10, 0.20)
"""Capacities that the summary simulates, as shares of the distinct blocks."""


@dataclasses.dataclass(eq=False)
class TraceError(InvalidRequest):
    """A trace cannot be read. ``line`` counts from 1; 0 is the file itself. ``detail`` says where,
    too. Never on a wire."""

    path: str = ""
    line: int = 0


class TraceRequest(msgspec.Struct, frozen=True):
    """One request; fields as in the format."""

    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
    output_length: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
    hash_ids: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=0)], ...], msgspec.Meta(max_length=1 << 16)
    ]

    def tokens(self, blocks: int) -> int:
        """Input tokens that the first ``blocks`` blocks hold; the last one may be partial."""
        return min(blocks * TRACE_BLOCK_TOKENS, self.input_length)


def read_trace(path: str | os.PathLike[str], limit: int | None = None) -> Iterator[TraceRequest]:
    """The requests of a trace file in order, at most ``limit``. Empty lines are skipped. Raises
    TraceError, which names the line."""
    name = os.fspath(path)
    decoder = msgspec.json.Decoder(TraceRequest)
    found = 0
    try:
        with open(name, "rb") as file:
            for number in itertools.count(1):
                line = file.readline(LINE_BYTES_MAX + 1)
                if not line or found == limit:
                    return
                if line.strip():
                    yield _decode(decoder, line, name, number)
                    found += 1
    except OSError as exc:
        raise TraceError(f"{name}: {exc.strerror or exc}", name) from exc


def _decode(
    decoder: msgspec.json.Decoder[TraceRequest], line: bytes, path: str, number: int
) -> TraceRequest:
    def error(what: str) -> TraceError:
        return TraceError(f"{path}:{number}: {what}", path, number)

    if len(line) > LINE_BYTES_MAX:
        raise error(f"line longer than {LINE_BYTES_MAX} bytes")
    try:
        request = decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise error(str(exc)) from exc
    if len(set(request.hash_ids)) != len(request.hash_ids):
        raise error("hash_ids repeats an id: a block cannot follow itself")
    return request


def write_trace(path: str | os.PathLike[str], requests: Iterable[TraceRequest]) -> int:
    """Writes a trace file; answers with the number of requests."""
    encoder = msgspec.json.Encoder()
    count = 0
    with open(path, "wb") as file:
        for request in requests:
            file.write(encoder.encode(request) + b"\n")
            count += 1
    return count


@dataclasses.dataclass(frozen=True)
class TraceStatistics:
    """What a trace says about reuse. Rates are shares of all block references."""

    requests: int
    references: int
    distinct: int
    hit_rate: float
    """Of an unbounded cache that starts empty."""
    blocks_per_request: dict[int, int]
    """Percentile -> blocks."""
    mean_blocks: float
    first_block_only: float
    """Share of the requests that find at most one block: openings of conversations."""
    reuse_distance: dict[int, float]
    """Percentile -> distinct blocks used between two uses of one block, as a share of all distinct
    blocks. An LRU cache of that share keeps the block."""
    lru_hit_rates: dict[float, float]
    """Capacity as a share of the distinct blocks -> hit rate."""


PERCENTILES = (10, 25, 50, 75, 90, 99)


def trace_statistics(
    requests: Sequence[TraceRequest], shares: Sequence[float] = LRU_SHARES
) -> TraceStatistics:
    """Everything above; about 2 s for 300,000 references. Raises InvalidRequest without any."""
    chains = [r.hash_ids for r in requests if r.hash_ids]
    if not chains:
        raise InvalidRequest(detail="the trace has no block references")
    distinct = len({i for ids in chains for i in ids})
    references = sum(map(len, chains))
    hits = prefix_hits(chains)
    distances = reuse_distances(chains)
    return TraceStatistics(
        requests=len(requests),
        references=references,
        distinct=distinct,
        hit_rate=sum(hits) / references,
        blocks_per_request={p: percentile(sorted(map(len, chains)), p) for p in PERCENTILES},
        mean_blocks=references / len(requests),
        first_block_only=sum(h <= 1 for h in hits) / len(hits),
        reuse_distance={p: percentile(distances, p) / distinct for p in PERCENTILES},
        lru_hit_rates={s: lru_hit_rate(chains, max(1, int(distinct * s))) for s in shares},
    )


def percentile(ordered: Sequence[int], percent: int) -> int:
    """The nearest-rank percentile of an ascending sequence; 0 of an empty one."""
    if not ordered:
        return 0
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def prefix_hits(chains: Iterable[Sequence[int]]) -> list[int]:
    """For each request, the blocks that an unbounded cache has, counted without a gap."""
    seen: set[int] = set()
    hits = []
    for ids in chains:
        count = 0
        while count < len(ids) and ids[count] in seen:
            count += 1
        hits.append(count)
        seen.update(ids)
    return hits


def lru_hit_rate(chains: Iterable[Sequence[int]], capacity_blocks: int) -> float:
    """Hit rate of an LRU cache of ``capacity_blocks`` that uses a request's blocks in order."""
    cache: collections.OrderedDict[int, None] = collections.OrderedDict()
    hits = references = 0
    for ids in chains:
        references += len(ids)
        for block in ids:
            if block not in cache:
                break
            hits += 1
        for block in ids:
            if block in cache:
                cache.move_to_end(block)
                continue
            cache[block] = None
            if len(cache) > capacity_blocks:
                cache.popitem(last=False)
    return hits / references if references else 0.0


def reuse_distances(chains: Iterable[Sequence[int]]) -> list[int]:
    """Ascending stack distances (Mattson et al., 1970) of every repeated reference: how many
    distinct blocks were used since the block's last use."""
    references = list(itertools.chain.from_iterable(chains))
    # A Fenwick tree over time holds a 1 at the latest use of each block.
    tree = [0] * (len(references) + 1)

    def add(position: int, value: int) -> None:
        while position < len(tree):
            tree[position] += value
            position += position & -position

    def total(position: int) -> int:
        result = 0
        while position:
            result += tree[position]
            position &= position - 1
        return result

    last: dict[int, int] = {}
    distances = []
    for now, block in enumerate(references, start=1):
        before = last.get(block)
        if before is not None:
            distances.append(len(last) - total(before))
            add(before, -1)
        add(now, 1)
        last[block] = now
    distances.sort()
    return distances
