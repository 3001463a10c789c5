"""Requests and answers of the data path as no honest peer sends them: made by a Random, so that a
seed repeats them and Hypothesis can shrink them."""

from __future__ import annotations

import dataclasses
import random
import typing
from collections.abc import Sequence
from typing import Any

import msgspec

from kvfs_base import frames
from kvfs_base.cluster import Chain
from kvfs_base.frames import Kind
from kvfs_datapath import messages as m
from kvfs_datapath.checksum import crc32c

REQUESTS: tuple[type[m.ChunkRequest], ...] = typing.get_args(m.DataRequest)
BODY_DEPTH = 100_000
"""Arrays within arrays: more than any stack holds."""

PASSED = 100
ZEROS_MAX = 1 << 20


@dataclasses.dataclass(frozen=True)
class Attack:
    """What one connection sends. Each of ``asked`` is a whole frame, which must be answered before
    the next one is sent; what the server makes of ``rest`` cannot be told."""

    asked: tuple[bytes, ...]
    rest: bytes = b""


class Noise:
    """Against one target. ``chains`` of several copies are those that it knows."""

    def __init__(self, rng: random.Random, target_id: int, chains: Sequence[Chain]) -> None:
        self._rng = rng
        self._target_id = target_id
        self._chains = chains
        self._chain: Chain | None = None

    def attack(self) -> Attack:
        """Some frames that are right in themselves, the last one perhaps not."""
        rng = self._rng
        whole = [self.frame(self.request()) for _ in range(rng.randint(0, 3))]
        last = rng.choice(
            (
                self._cut_frame,
                self._other_payload,
                self._other_header,
                self._other_body,
                self._unknown_tag,
                self._huge_count,
                self._deep_body,
                self._just_bytes,
            )
        )
        data, is_whole = last()
        return Attack((*whole, data)) if is_whole else Attack(tuple(whole), data)

    # --- requests that decode

    def request(self, kind: type[m.ChunkRequest] | None = None) -> m.ChunkRequest:
        """Every field within its bounds, and most of them of one chain that the target knows."""
        cls = self._rng.choice(REQUESTS) if kind is None else kind
        self._chain = self._rng.choice((None, *self._chains))
        made = self._value(msgspec.inspect.type_info(cls))
        assert isinstance(made, cls)
        if isinstance(made, m.PassUpdate) and self._rng.random() < 0.9:
            # Whoever passes on is believed: other chunks than those that are updated.
            update = msgspec.structs.replace(made.update, inode=PASSED + made.update.inode % 4)
            made = msgspec.structs.replace(made, update=update)
        return made

    def _value(self, info: Any, name: str = "", made: dict[str, Any] | None = None) -> Any:
        """One of a type, or of a field of that name, beside fields that were ``made`` before."""
        rng = self._rng
        match info:
            case msgspec.inspect.StructType():
                fields: dict[str, Any] = {}
                for field in info.fields:
                    fields[field.name] = self._value(field.type, field.name, fields)
                return info.cls(**fields)
            case msgspec.inspect.UnionType():
                absent = name == "passing" and self._chain is None and rng.random() < 0.9
                types = [t for t in info.types if isinstance(t, msgspec.inspect.NoneType) == absent]
                return self._value(rng.choice(types if name == "passing" else info.types), name)
            case msgspec.inspect.NoneType():
                return None
            case msgspec.inspect.BoolType():
                return rng.random() < 0.3
            case msgspec.inspect.BytesType():
                return rng.choice((b"", bytes(32), bytes(range(32)), b"short"))
            case msgspec.inspect.VarTupleType():
                if name == "hops" and rng.random() < 0.9:
                    return self._hops()
                most = 8 if info.max_length is None else min(8, info.max_length)
                count = rng.randint(info.min_length or 0, most)
                return tuple(self._value(info.item_type, name) for _ in range(count))
            case msgspec.inspect.IntType():
                return self._number(info, name, made or {})
        raise AssertionError(f"no values for {info}")

    def _hops(self) -> tuple[int, ...]:
        members = () if self._chain is None else self._chain.members
        if self._target_id not in members or self._rng.random() < 0.3:
            return members
        return members[members.index(self._target_id) + 1 :]

    def _number(self, info: Any, name: str, made: dict[str, Any]) -> int:
        rng, chain = self._rng, self._chain
        usual: Sequence[int] = (0, 1, 2, 3)
        match name:
            case "target_id":
                usual = (self._target_id,)
            case "chain":
                usual = (0 if chain is None else chain.chain_id,)
            case "version" if chain is not None:
                usual = (chain.version, chain.version, chain.version - 1, 1, 2)
            case "crc32c":
                length = made.get("length", made.get("size", 0))
                usual = (crc32c(bytes(length)) if length <= ZEROS_MAX else 0,)
            case "size" | "length" | "offset":
                usual = (0, 1, 4095, 4096, 5000, 70_000)
        most = info.le or (1 << 63) - 1
        number = rng.choice(usual if rng.random() < 0.98 else (most, most - 1, 77))
        if name == "offset":
            most = ZEROS_MAX  # what lies before it is memory of this process
        return max(info.ge or 0, min(number, most))

    # --- frames

    def frame(self, request: m.ChunkRequest) -> bytes:
        payload = payload_of(request)
        return frames.encode(Kind.REQUEST, 7, request, len(payload)) + payload

    def _body(self) -> bytes:
        return msgspec.msgpack.encode(self.request())

    def _cut_frame(self) -> tuple[bytes, bool]:
        """The connection ends in the middle."""
        whole = self.frame(self.request())
        return whole[: self._rng.randint(0, len(whole) - 1)], False

    def _other_payload(self) -> tuple[bytes, bool]:
        """More or less of it than the items say, all of which comes."""
        request = self.request()
        size = len(payload_of(request))
        size = max(0, self._rng.choice((size - 1, size + 1, size // 2, size + 70_000, 0, 3)))
        return frames.encode(Kind.REQUEST, 7, request, size) + bytes(size), True

    def _other_header(self) -> tuple[bytes, bool]:
        frame = bytearray(self.frame(self.request()))
        place = self._rng.randrange(frames.HEADER_BYTES)
        frame[place] ^= 1 << self._rng.randrange(8)
        return bytes(frame), False

    def _other_body(self) -> tuple[bytes, bool]:
        """Bytes changed, dropped, put in; the header fits."""
        body = bytearray(self._body())
        for _ in range(self._rng.randint(1, 4)):
            place = self._rng.randrange(len(body))
            match self._rng.randrange(3):
                case 0:
                    body[place] = self._rng.randrange(256)
                case 1:
                    del body[place:]
                case 2:
                    body[place:place] = bytes([self._rng.randrange(256)])
            body = body or bytearray(1)
        return frame_of(bytes(body)), True

    def _unknown_tag(self) -> tuple[bytes, bool]:
        tag = self._rng.choice(("", "reed", "x" * 300, 5, None, [], {}))
        return frame_of(msgspec.msgpack.encode([tag, 1, [[1, 2, 3]]])), True

    def _huge_count(self) -> tuple[bytes, bool]:
        """Arrays, maps, strings, bytes and numbers that claim to be as long as can be said."""
        body = self._body()
        place = self._rng.randrange(len(body))
        mark = self._rng.choice((b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"))
        return frame_of(body[:place] + mark + b"\xff" * 4 + body[place:]), True

    def _deep_body(self) -> tuple[bytes, bool]:
        body = self._body()
        place = self._rng.randrange(len(body) + 1)
        deep = self._rng.choice((b"\x91", b"\x81\x00")) * BODY_DEPTH
        if place == len(body):  # one field more than the request has, which is skipped
            body = bytes([body[0] + 1]) + body[1:]
        return frame_of(body[:place] + deep + b"\xc0" + body[place:]), True

    def _just_bytes(self) -> tuple[bytes, bool]:
        return self._rng.randbytes(self._rng.randint(1, 200)), False


def frame_of(body: bytes) -> bytes:
    head = frames.HEADER.pack(frames.MAGIC, frames.VERSION, Kind.REQUEST, len(body), 7, 0)
    return head + body


def payload_of(request: m.ChunkRequest) -> bytes:
    """As long as the items say; all of it zeros."""
    match request:
        case m.WriteChunks():
            sizes = [chunk.size for chunk in request.chunks]
        case m.WritePieces():
            sizes = [piece.length for piece in request.pieces]
        case m.UpdateChunks():
            sizes = [0 if update.cut else update.length for update in request.updates]
        case m.PassUpdate():
            sizes = [0 if request.update.cut else request.update.length]
        case _:
            sizes = []
    # Nobody sends a quarter of a GiB here: then it is shorter than the items say.
    return bytes(min(sum(sizes), ZEROS_MAX))
