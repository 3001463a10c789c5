"""Requests and answers of the data path as no honest peer sends them: made by a Random, so that a
seed repeats them and Hypothesis can shrink them."""

from __future__ import annotations

import dataclasses
import random
import threading
import typing
from collections.abc import Sequence
from typing import Any

import msgspec

from kvfs_base import frames
from kvfs_base.cluster import Chain
from kvfs_base.errors import WIRE_CODES, ConnectionLost
from kvfs_base.frames import Kind
from kvfs_base.limits import FRAME_BODY_BYTES_MAX
from kvfs_base.seams import Connection
from kvfs_datapath import messages as m
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.wire import send_message

REQUESTS: tuple[type[m.ChunkRequest], ...] = typing.get_args(m.DataRequest)
BODY_DEPTH = 100_000
"""Arrays within arrays: more than any stack holds."""

PASSED = 100
ZEROS_MAX = 1 << 20


def with_sums(fields: bytes, body: bytes = b"") -> bytes:
    """A header of ``frames.FIELDS`` that says what nobody else would, and is whole."""
    begun = crc32c(fields)
    return fields + begun.to_bytes(4, "little") + crc32c(body, begun).to_bytes(4, "little")


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
                self._other_bit,
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
        made = self.value(msgspec.inspect.type_info(cls))
        assert isinstance(made, cls)
        if isinstance(made, m.PassUpdate) and self._rng.random() < 0.9:
            # Whoever passes on is believed: other chunks than those that are updated.
            update = msgspec.structs.replace(made.update, inode=PASSED + made.update.inode % 4)
            made = msgspec.structs.replace(made, update=update)
        return made

    def value(self, info: Any, name: str = "", made: dict[str, Any] | None = None) -> Any:
        """One of a type, or of a field of that name, beside fields that were ``made`` before."""
        rng = self._rng
        match info:
            case msgspec.inspect.StructType():
                fields: dict[str, Any] = {}
                for field in info.fields:
                    fields[field.name] = self.value(field.type, field.name, fields)
                return info.cls(**fields)
            case msgspec.inspect.UnionType():
                absent = name == "passing" and self._chain is None and rng.random() < 0.9
                types = [t for t in info.types if isinstance(t, msgspec.inspect.NoneType) == absent]
                return self.value(rng.choice(types if name == "passing" else info.types), name)
            case msgspec.inspect.NoneType():
                return None
            case msgspec.inspect.BoolType():
                return rng.random() < 0.3
            case msgspec.inspect.EnumType():
                return rng.choice(list(info.cls))
            case msgspec.inspect.DictType():
                return {}
            case msgspec.inspect.StrType():
                return rng.choice(("", "conflict", "no_such_error"))
            case msgspec.inspect.BytesType():
                return rng.choice((b"", bytes(32), bytes(range(32)), b"short"))
            case msgspec.inspect.VarTupleType():
                if name == "hops" and rng.random() < 0.9:
                    return self._hops()
                most = 8 if info.max_length is None else min(8, info.max_length)
                count = rng.randint(info.min_length or 0, most)
                return tuple(self.value(info.item_type, name) for _ in range(count))
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

    def _other_bit(self) -> tuple[bytes, bool]:
        """In the body; the checksum is that of the right one."""
        request = self.request()
        frame = bytearray(self.frame(request))
        end = len(frame) - len(payload_of(request))
        frame[self._rng.randrange(frames.HEADER_BYTES, end)] ^= 1 << self._rng.randrange(8)
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
    return frames.frame(Kind.REQUEST, 7, body)


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


Honest = tuple[Any, bytes, list[int]]
"""Reply, payload and descriptors."""


class Answers:
    """What a server says instead of what it should. Descriptors are whoever's who passes them."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._noise = Noise(rng, 1, ())

    def send(self, connection: Connection, number: int, honest: Honest) -> None:
        """May go on until the asker gives up. Raises ConnectionLost when it ends the connection."""
        kinds = (
            self._as_it_should_be,
            self._other_fields,
            self._other_counts,
            self._other_payload,
            self._other_bytes,
            self._other_descriptors,
            self._other_header,
            self._other_bit,
            self._error,
            self._deep_error,
            self._just_bytes,
            self._drop_by_drop,
        )
        self._rng.choice(kinds)(connection, number, honest)

    def _as_it_should_be(self, connection: Connection, number: int, honest: Honest) -> None:
        reply, payload, descriptors = honest
        parts = [payload] if payload else []
        send_message(connection, Kind.REPLY, number, reply, parts, descriptors=descriptors)

    def _other_fields(self, connection: Connection, number: int, honest: Honest) -> None:
        info = msgspec.inspect.type_info(type(honest[0]))
        reply = self._noise.value(info)
        self._as_it_should_be(connection, number, (reply, *honest[1:]))

    def _other_counts(self, connection: Connection, number: int, honest: Honest) -> None:
        """As many infos, errors, tokens as nobody asked for."""
        reply, payload, descriptors = honest
        if isinstance(reply, m.Outcomes):
            infos = list(reply.infos)
            match self._rng.randrange(3):
                case 0:
                    infos = infos[:-1]
                case 1:
                    infos += infos or [None]
                case 2:
                    infos = [None] * len(infos)
            reply = m.Outcomes(tuple(infos), self._rng.choice(({}, reply.errors)))
        elif isinstance(reply, m.Staged):
            reply = m.Staged(reply.tokens[:-1])
            descriptors = self._rng.choice((descriptors, descriptors[:-1]))
        self._as_it_should_be(connection, number, (reply, payload, descriptors))

    def _other_payload(self, connection: Connection, number: int, honest: Honest) -> None:
        reply, payload, descriptors = honest
        size = self._rng.choice((0, 1, len(payload) + 1, max(0, len(payload) - 1), 512 << 20))
        sent = payload[:size] + bytes(max(0, min(size, ZEROS_MAX) - len(payload)))
        send_message(
            connection, Kind.REPLY, number, reply, payload_bytes=size, descriptors=descriptors
        )
        connection.send([sent[: self._rng.choice((len(sent), len(sent) // 2))] or b"\0"])
        raise ConnectionLost

    def _other_bytes(self, connection: Connection, number: int, honest: Honest) -> None:
        reply, payload, descriptors = honest
        if payload:
            place = self._rng.randrange(len(payload))
            payload = payload[:place] + bytes([payload[place] ^ 1]) + payload[place + 1 :]
        self._as_it_should_be(connection, number, (reply, payload, descriptors))

    def _other_descriptors(self, connection: Connection, number: int, honest: Honest) -> None:
        reply, payload, descriptors = honest
        if connection.can_pass_descriptors:
            descriptors = self._rng.choice((descriptors[1:], [0, 1, *descriptors], [0] * 250))
        self._as_it_should_be(connection, number, (reply, payload, descriptors))

    def _other_header(self, connection: Connection, number: int, honest: Honest) -> None:
        kind, version, magic, size = Kind.REPLY, frames.VERSION, frames.MAGIC, None
        match self._rng.randrange(5):
            case 0:
                kind = self._rng.choice((Kind.REQUEST, Kind.NOTIFICATION, Kind.ERROR))
            case 1:
                version = self._rng.choice((0, 1, 255))
            case 2:
                magic ^= 1
            case 3:
                number += self._rng.choice((-1, 1, 1 << 40))
            case 4:
                size = self._rng.choice((FRAME_BODY_BYTES_MAX, FRAME_BODY_BYTES_MAX + 1))
        body = msgspec.msgpack.encode(honest[0])
        size = len(body) if size is None else size
        fields = frames.FIELDS.pack(magic, version, kind, size, number, len(honest[1]))
        connection.send([with_sums(fields, body), body, honest[1]])
        raise ConnectionLost

    def _other_bit(self, connection: Connection, number: int, honest: Honest) -> None:
        """In the header or the body: the asker must not act on any of it."""
        frame = bytearray(frames.encode(Kind.REPLY, number, honest[0], len(honest[1])))
        frame[self._rng.randrange(len(frame))] ^= 1 << self._rng.randrange(8)
        connection.send([frame, honest[1]])
        raise ConnectionLost

    def _error(self, connection: Connection, number: int, honest: Honest) -> None:
        """Any error, its fields of any type."""
        values = (None, -1, 1 << 62, "text", b"bytes", [1], {"a": 1}, 0.5, True)
        cls = self._rng.choice(list(WIRE_CODES.values()))
        names = [field.name for field in dataclasses.fields(cls)]
        data = {name: self._rng.choice(values) for name in names if self._rng.random() < 0.8}
        body = frames.ErrorBody(self._rng.choice((cls.wire_code, "no_such_error")), data)
        if isinstance(honest[0], m.Outcomes) and self._rng.random() < 0.5:
            count = len(honest[0].infos)
            reply = m.Outcomes((None,) * count, dict.fromkeys(range(count), body))
            connection.send([frames.encode(Kind.REPLY, number, reply)])
        else:
            connection.send([frames.encode(Kind.ERROR, number, body)])

    def _deep_error(self, connection: Connection, number: int, honest: Honest) -> None:
        body = b"\x92\xa8conflict\x81\xa6detail" + b"\x91" * BODY_DEPTH + b"\xc0"
        connection.send([frames.frame(Kind.ERROR, number, body)])

    def _just_bytes(self, connection: Connection, number: int, honest: Honest) -> None:
        connection.send([self._rng.randbytes(self._rng.randint(1, 200))])
        raise ConnectionLost

    def _drop_by_drop(self, connection: Connection, number: int, honest: Honest) -> None:
        """An answer that never ends, and is never late either."""
        whole = frames.frame(Kind.REPLY, number, bytes(1 << 20))[: frames.HEADER_BYTES]
        whole = self._rng.choice((whole, bytes(0)))
        pause = threading.Event()
        connection.send([whole or b"K"])
        while True:
            pause.wait(0.01)
            connection.send([b"V"])
