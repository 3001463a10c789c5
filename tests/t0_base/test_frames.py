"""Frames: what is encoded is decoded however it is cut; no input does worse than ProtocolError."""

from __future__ import annotations

import msgspec
import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from kvfs_base import frames
from kvfs_base.errors import (
    ConnectionLost,
    EntryNotFound,
    InternalError,
    KvfsError,
    ProtocolError,
    VersionMismatch,
)
from kvfs_base.frames import FrameDecoder, Kind
from kvfs_base.limits import FRAME_BODY_BYTES_MAX, FRAME_PAYLOAD_BYTES_MAX


@given(
    bodies=st.lists(st.binary(max_size=300), min_size=1, max_size=8),
    cuts=st.lists(st.integers(min_value=1, max_value=64), min_size=1, max_size=50),
)
def test_frames_survive_any_fragmentation(bodies: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(frames.encode(Kind.REQUEST, i, b) for i, b in enumerate(bodies))
    decoder = FrameDecoder()
    out = []
    position = 0
    turn = 0
    while position < len(stream):
        step = cuts[turn % len(cuts)]
        out += decoder.feed(stream[position : position + step])
        position += step
        turn += 1
    assert [msgspec.msgpack.decode(f.body) for f in out] == bodies
    assert [f.request_id for f in out] == list(range(len(bodies)))


@given(st.binary(max_size=200))
def test_noise_is_refused_or_waited_for_and_never_crashes(noise: bytes) -> None:
    decoder = FrameDecoder()
    try:
        list(decoder.feed(noise))
    except KvfsError as exc:
        assert isinstance(exc, ProtocolError | VersionMismatch | ConnectionLost)


@given(data=st.data())
def test_a_damaged_header_never_yields_a_longer_frame_than_the_bound(data: st.DataObject) -> None:
    frame = bytearray(frames.encode(Kind.REPLY, 5, b"body"))
    position = data.draw(st.integers(0, frames.HEADER_BYTES - 1))
    frame[position] ^= data.draw(st.integers(1, 255))
    try:
        header = frames.decode_header(frame)
    except KvfsError:
        return
    assert header.body_bytes <= FRAME_BODY_BYTES_MAX
    assert header.payload_bytes <= FRAME_PAYLOAD_BYTES_MAX


@given(data=st.data(), body=st.binary(max_size=40))
def test_a_frame_that_changed_on_its_way_is_never_taken(data: st.DataObject, body: bytes) -> None:
    """Up to three wrong bits, which a CRC32C always finds in frames of this length. Nobody waits
    for what such a header says that will come."""
    good = frames.encode(Kind.REQUEST, 1, body)
    bits = data.draw(st.sets(st.integers(0, 8 * len(good) - 1), min_size=1, max_size=3))
    frame = bytearray(good)
    for bit in bits:
        frame[bit // 8] ^= 1 << bit % 8
    found: list[frames.Frame] = []
    with pytest.raises((ConnectionLost, ProtocolError, VersionMismatch)):
        for one in FrameDecoder().feed(good + frame):
            found.append(one)
    assert [msgspec.msgpack.decode(one.body) for one in found] == [body]


@pytest.mark.parametrize("bit", range(8 * frames.HEADER_BYTES))
def test_one_wrong_bit_in_a_header_is_found_without_the_body(bit: int) -> None:
    header = bytearray(frames.encode(Kind.REQUEST, 1, b"body", 100)[: frames.HEADER_BYTES])
    header[bit // 8] ^= 1 << bit % 8
    if bit < 16:
        error: type[KvfsError] = ProtocolError
    elif bit < 24:
        error = VersionMismatch
    else:
        error = ConnectionLost
    if bit < 8 * (frames.HEADER_BYTES - 4):
        with pytest.raises(error):
            frames.decode_header(header)
    else:  # in the other sum
        with pytest.raises(error):
            frames.decode_header(header).check(b"\xc4\x04body")


@pytest.mark.parametrize("place", [0, 2, 4, 9, 17, 25, 29, 33])
def test_what_comes_before_a_bad_frame_is_taken(place: int) -> None:
    good = frames.encode(Kind.REPLY, 5, b"body")
    bad = bytearray(good)
    bad[place] ^= 1
    found = FrameDecoder().feed(good + bad)
    assert next(found).request_id == 5
    with pytest.raises((ConnectionLost, ProtocolError, VersionMismatch)):
        next(found)


def test_header_layout_is_the_documented_one() -> None:
    frame = frames.encode(Kind.REPLY, 0x0102, b"", payload_bytes=3)
    assert frame[:24].hex() == "4b5603020200000002010000000000000300000000000000"
    assert frame[24:28] == crc32c(frame[:24]).to_bytes(4, "little")
    assert frame[28:32] == crc32c(frame[:24] + frame[32:]).to_bytes(4, "little")
    assert frames.HEADER_BYTES == 32 and frame[32:] == msgspec.msgpack.encode(b"")


def test_other_versions_are_named() -> None:
    frame = bytearray(frames.encode(Kind.REQUEST, 1, None))
    frame[2] = 9
    with pytest.raises(VersionMismatch) as info:
        frames.decode_header(frame)
    assert (info.value.found, info.value.expected) == ("9", "3")


def test_bodies_over_the_bound_are_not_sent() -> None:
    with pytest.raises(ProtocolError):
        frames.encode(Kind.REQUEST, 1, bytes(FRAME_BODY_BYTES_MAX))


def test_payload_on_a_control_stream_is_refused() -> None:
    with pytest.raises(ProtocolError):
        list(FrameDecoder().feed(frames.encode(Kind.REQUEST, 1, None, payload_bytes=1)))


def test_errors_travel_with_their_fields_and_strangers_without_their_text() -> None:
    frame = frames.encode_error(3, EntryNotFound(name=b"x"))
    error = frames.decode_error(frame[frames.HEADER_BYTES :])
    assert isinstance(error, EntryNotFound)
    assert error.name == b"x"
    frame = frames.encode_error(3, RuntimeError("a secret path"))
    error = frames.decode_error(frame[frames.HEADER_BYTES :])
    assert isinstance(error, InternalError)
    assert "secret" not in str(error)


@given(st.binary(max_size=100))
def test_error_bodies_never_crash_the_reader(noise: bytes) -> None:
    assert isinstance(frames.decode_error(noise), KvfsError)
