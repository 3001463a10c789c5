"""Frames: how every kvfs connection is cut into messages. Sans-I/O.

A frame is a 24-byte little-endian header, a msgpack body and, on the data path, a payload that no
Python code looks into:

    offset  size  field
    0       2     magic          0x564B ("KV")
    2       1     version        1
    3       1     kind           1 request, 2 reply, 3 error, 4 notification
    4       4     body_bytes     <= limits.FRAME_BODY_BYTES_MAX
    8       8     request_id     chosen by the caller, echoed in the reply
    16      8     payload_bytes  <= limits.FRAME_PAYLOAD_BYTES_MAX

The body is one msgspec struct: a member of the service's request union, the reply type that belongs
to it, or ErrorBody. TCP's checksum guards the control part only weakly; payload bytes are covered
by the CRC32C of their chunk.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from kvfs_base.errors import InternalError, KvfsError, ProtocolError, VersionMismatch, from_wire
from kvfs_base.limits import FRAME_BODY_BYTES_MAX, FRAME_PAYLOAD_BYTES_MAX

MAGIC = 0x564B
VERSION = 1
HEADER = struct.Struct("<HBBIQQ")
HEADER_BYTES = HEADER.size


class Kind(enum.IntEnum):
    REQUEST = 1
    REPLY = 2
    ERROR = 3
    NOTIFICATION = 4


_KINDS = {kind.value: kind for kind in Kind}


class ErrorBody(msgspec.Struct, array_like=True, frozen=True):
    code: str
    data: dict[str, Any]


# Tuples: one of each is made for every message, and frozen dataclasses take three times as long.


class FrameHeader(NamedTuple):
    kind: Kind
    body_bytes: int
    request_id: int
    payload_bytes: int


class Frame(NamedTuple):
    kind: Kind
    request_id: int
    body: bytes


UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding a stranger's bytes may raise: msgspec lets the error of invalid UTF-8 through, and
the one of arrays in arrays in arrays."""

_encoder = msgspec.msgpack.Encoder()
_error_decoder = msgspec.msgpack.Decoder(ErrorBody)


def encode(kind: Kind, request_id: int, message: Any, payload_bytes: int = 0) -> bytes:
    """Header and body; the payload, if any, follows on the wire. Raises ProtocolError if the body
    is over its bound, so that a peer never sees a frame it must refuse."""
    body = _encoder.encode(message)
    if len(body) > FRAME_BODY_BYTES_MAX:
        raise ProtocolError(detail=f"frame body of {len(body)} bytes")
    return HEADER.pack(MAGIC, VERSION, kind, len(body), request_id, payload_bytes) + body


def encode_error(request_id: int, error: BaseException) -> bytes:
    """Errors outside the tree travel as InternalError: their text is for the server's log."""
    if not isinstance(error, KvfsError):
        error = InternalError(detail=type(error).__name__)
    return encode(Kind.ERROR, request_id, ErrorBody(error.wire_code, error.wire_data()))


def decode_error(body: bytes) -> KvfsError:
    try:
        error = _error_decoder.decode(body)
    except UNDECODABLE as exc:
        return ProtocolError(detail=f"error body: {exc}")
    return from_wire(error.code, error.data)


def decode_header(data: bytes | bytearray | memoryview, offset: int = 0) -> FrameHeader:
    """Raises ProtocolError or VersionMismatch; nothing after such a header can be trusted."""
    magic, version, number, body_bytes, request_id, payload_bytes = HEADER.unpack_from(data, offset)
    if magic != MAGIC:
        raise ProtocolError(detail=f"bad magic 0x{magic:04x}")
    if version != VERSION:
        raise VersionMismatch(detail="frame version", found=str(version), expected=str(VERSION))
    if body_bytes > FRAME_BODY_BYTES_MAX or payload_bytes > FRAME_PAYLOAD_BYTES_MAX:
        raise ProtocolError(detail=f"frame of {body_bytes} + {payload_bytes} bytes")
    kind = _KINDS.get(number)
    if kind is None:
        raise ProtocolError(detail=f"bad frame kind {number}")
    return FrameHeader(kind, body_bytes, request_id, payload_bytes)


class FrameDecoder:
    """Cuts a control stream (no payloads) into frames. Memory is bounded by one frame and one
    read."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray) -> Iterator[Frame]:
        """Yields the frames that ``data`` completes. Raises ProtocolError."""
        if self._buffer:
            self._buffer += data
            data = self._buffer
        start = 0
        try:
            while len(data) - start >= HEADER_BYTES:
                header = decode_header(data, start)
                if header.payload_bytes:
                    raise ProtocolError(detail="payload on a control connection")
                end = start + HEADER_BYTES + header.body_bytes
                if len(data) < end:
                    break
                with memoryview(data) as view:
                    body = bytes(view[start + HEADER_BYTES : end])
                start = end
                yield Frame(header.kind, header.request_id, body)
        finally:
            if data is self._buffer:
                del self._buffer[:start]
            else:
                self._buffer += data[start:]
