"""Frames with payloads and descriptors over a blocking connection."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import msgspec

from kvfs_base import frames
from kvfs_base.errors import ConnectionLost, ProtocolError, VersionMismatch
from kvfs_base.frames import FrameHeader, Kind
from kvfs_base.rpc import Request
from kvfs_base.seams import Buffer, Connection
from kvfs_datapath.messages import reply_problem

_UNREADABLE = (ProtocolError, VersionMismatch)
_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}


def send_message(
    connection: Connection,
    kind: Kind,
    request_id: int,
    message: Any,
    payload: Sequence[Buffer] = (),
    *,
    payload_bytes: int | None = None,
    descriptors: Sequence[int] = (),
    more: bool = False,
) -> None:
    """One frame. ``payload_bytes`` announces a payload that the caller sends after this call, with
    ``more`` at once."""
    announced = sum(len(p) for p in payload) if payload_bytes is None else payload_bytes
    head = frames.encode(kind, request_id, message, announced)
    connection.send([head, *payload], descriptors, more=more)


def receive_header(connection: Connection) -> FrameHeader:
    view = memoryview(bytearray(frames.HEADER_BYTES))
    connection.receive_into([view])
    return frames.decode_header(view)


def receive_reply_header(connection: Connection) -> FrameHeader:
    """Of an answer. One that cannot be read is none, and does not say what became of the request:
    it may have changed on its way. Raises ConnectionLost."""
    try:
        return receive_header(connection)
    except _UNREADABLE as exc:
        raise ConnectionLost(detail=str(exc)) from exc


def receive_header_and_descriptors(connection: Connection) -> tuple[FrameHeader, list[int]]:
    """As ``receive_reply_header``. The caller owns the descriptors; they come with the first byte
    of a frame."""
    view = memoryview(bytearray(frames.HEADER_BYTES))
    descriptors = connection.receive_with_descriptors(view)
    try:
        return frames.decode_header(view), descriptors
    except _UNREADABLE as exc:
        close_all(descriptors)
        raise ConnectionLost(detail=str(exc)) from exc


def close_all(descriptors: Sequence[int]) -> None:
    """Closes descriptors that a peer passed: they are nobody else's."""
    for descriptor in descriptors:
        os.close(descriptor)


def receive_body(connection: Connection, header: FrameHeader) -> bytes:
    """Raises ConnectionLost if header or body changed on their way, too."""
    body = bytearray(header.body_bytes)
    if body:
        connection.receive_into([memoryview(body)])
    header.check(body)
    return bytes(body)


def decode_reply(header: FrameHeader, body: bytes, request: Request) -> Any:
    """The reply, or raises the error that the frame carries."""
    if header.kind is Kind.ERROR:
        raise frames.decode_error(body)
    if header.kind is not Kind.REPLY:
        raise ProtocolError(detail=f"a frame of kind {header.kind.name} for an answer")
    reply_type = type(request).Reply
    decoder = _decoders.get(reply_type)
    if decoder is None:
        decoder = _decoders[reply_type] = msgspec.msgpack.Decoder(reply_type)
    try:
        reply = decoder.decode(body)
    except frames.UNDECODABLE as exc:
        raise ProtocolError(detail=f"reply to {type(request).__name__}: {exc}") from exc
    problem = reply_problem(request, reply)
    if problem:
        raise ProtocolError(detail=f"reply to {type(request).__name__}: {problem}")
    return reply
