"""The handshake without sockets: who is let in, and what everybody else is told."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs_base import frames
from kvfs_base.errors import (
    AuthenticationFailed,
    KvfsError,
    ProtocolError,
    SecretUnusable,
    VersionMismatch,
)
from kvfs_base.frames import Kind
from kvfs_base.handshake import (
    CLIENT,
    CLIENT_HELLO_BYTES,
    HEAD,
    MAGIC,
    SERVER,
    SERVER_HELLO_BYTES,
    VERSION,
    Secret,
    Steps,
    client_steps,
    server_steps,
)

RIGHT = Secret(b"0123456789abcdef0123456789abcdef")
WRONG = Secret(b"0123456789abcdef0123456789abcdeF")


class Side:
    """Runs one side as far as the bytes that came allow."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._received = b""
        self._wanted = 0
        self.sent = b""
        self.outcome: KvfsError | bool = False
        self._step(None)

    def _step(self, data: bytes | None) -> None:
        try:
            outgoing, self._wanted = next(self._steps) if data is None else self._steps.send(data)
        except StopIteration:
            self.outcome = True
        except KvfsError as exc:
            self.outcome = exc
        else:
            self.sent += outgoing

    def feed(self, data: bytes) -> None:
        self._received += data
        while self.outcome is False and len(self._received) >= self._wanted:
            piece = self._received[: self._wanted]
            self._received = self._received[self._wanted :]
            self._step(piece)

    def take(self) -> bytes:
        sent, self.sent = self.sent, b""
        return sent

    @property
    def left(self) -> bytes:
        """What came after the handshake."""
        return self._received


def talk(client: Steps, server: Steps) -> tuple[Side, Side, bytes]:
    """Both sides and everything that the client sent."""
    near, far = Side(client), Side(server)
    said = b""
    while near.sent or far.sent:
        far.feed(piece := near.take())
        said += piece
        near.feed(far.take())
    return near, far, said


def test_both_know_the_secret() -> None:
    near, far, said = talk(client_steps(RIGHT, b"c" * 32), server_steps(RIGHT, b"s" * 32))
    assert (near.outcome, far.outcome) == (True, True)
    assert len(said) == CLIENT_HELLO_BYTES + 32


def test_the_bytes_on_the_wire_are_those_of_the_document() -> None:
    import hashlib
    import hmac

    key = b"0123456789abcdef0123456789abcdef"
    client, server = b"c" * 32, b"s" * 32
    far = Side(server_steps(Secret(key), server))
    far.feed(b"kvfsauth" + bytes([1, 0, 1, 0, 0, 0, 0, 0]) + client)
    proof = hmac.new(key, b"kvfs handshake 1\x02" + client + server, hashlib.sha256).digest()
    assert far.take() == b"kvfsauth" + bytes([1, 0, 2, 0, 0, 0, 0, 0]) + server + proof
    far.feed(hmac.new(key, b"kvfs handshake 1\x01" + client + server, hashlib.sha256).digest())
    assert far.outcome is True


def test_what_follows_the_proof_is_left_to_the_frames() -> None:
    far = Side(server_steps(RIGHT, b"s" * 32))
    near = Side(client_steps(RIGHT, b"c" * 32))
    far.feed(near.take())
    near.feed(far.take())
    far.feed(near.take() + b"a frame")
    assert (far.outcome, far.left) == (True, b"a frame")


@pytest.mark.parametrize(("ours", "theirs"), [(RIGHT, WRONG), (WRONG, RIGHT)])
def test_another_secret_is_found_by_the_client(ours: Secret, theirs: Secret) -> None:
    near, far, said = talk(client_steps(ours, b"c" * 32), server_steps(theirs, b"s" * 32))
    assert isinstance(near.outcome, AuthenticationFailed)
    assert far.outcome is False
    assert len(said) == CLIENT_HELLO_BYTES  # and it proves nothing to such a server


def test_a_wrong_proof_is_refused_by_the_server() -> None:
    far = Side(server_steps(RIGHT, b"s" * 32))
    far.feed(HEAD.pack(MAGIC, VERSION, CLIENT, 0) + b"c" * 32)
    far.feed(WRONG.proof(CLIENT, b"c" * 32, b"s" * 32))
    assert isinstance(far.outcome, AuthenticationFailed)


def test_a_recorded_handshake_opens_no_second_connection() -> None:
    _, _, recorded = talk(client_steps(RIGHT, b"c" * 32), server_steps(RIGHT, b"s" * 32))
    again = Side(server_steps(RIGHT, b"S" * 32))
    again.feed(recorded)
    assert isinstance(again.outcome, AuthenticationFailed)


def test_a_recorded_server_does_not_convince_a_client() -> None:
    far = Side(server_steps(RIGHT, b"s" * 32))
    far.feed(Side(client_steps(RIGHT, b"c" * 32)).take())
    recorded = far.take()
    near = Side(client_steps(RIGHT, b"C" * 32))
    near.feed(recorded)
    assert isinstance(near.outcome, AuthenticationFailed)


def test_what_a_side_sent_is_no_answer_to_itself() -> None:
    near = Side(client_steps(RIGHT, b"c" * 32))
    near.feed(near.take())
    assert isinstance(near.outcome, AuthenticationFailed)
    far = Side(server_steps(RIGHT, b"s" * 32))
    far.feed(HEAD.pack(MAGIC, VERSION, CLIENT, 0) + b"s" * 32)
    far.feed(far.take()[-32:])  # the server's own proof, over the same nonces
    assert isinstance(far.outcome, AuthenticationFailed)


def test_another_version_is_named_on_both_sides() -> None:
    far = Side(server_steps(RIGHT, b"s" * 32))
    far.feed(HEAD.pack(MAGIC, 7, CLIENT, 0))
    assert isinstance(far.outcome, VersionMismatch)
    assert far.outcome.found == "7"
    assert far.sent == HEAD.pack(MAGIC, VERSION, SERVER, 0)
    near = Side(client_steps(RIGHT, b"c" * 32))
    near.feed(HEAD.pack(MAGIC, 7, SERVER, 0))
    assert isinstance(near.outcome, VersionMismatch)


def test_a_client_without_a_secret_is_told() -> None:
    far = Side(server_steps(RIGHT, b"s" * 32))
    far.feed(frames.encode(Kind.REQUEST, 77, ["stat_fs"]))
    assert isinstance(far.outcome, ProtocolError)
    (answer,) = frames.FrameDecoder().feed(far.sent)
    assert (answer.kind, answer.request_id) == (Kind.ERROR, 77)
    assert isinstance(frames.decode_error(answer.body), AuthenticationFailed)


def test_other_protocols_get_no_answer() -> None:
    for opening in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01" + bytes(40), b"KV" * 40):
        far = Side(server_steps(RIGHT, b"s" * 32))
        far.feed(opening)
        assert isinstance(far.outcome, ProtocolError)
        assert far.sent == b""


@given(st.binary(max_size=300), st.booleans())
def test_no_bytes_get_in(noise: bytes, from_hello: bool) -> None:
    """Whatever a stranger sends, alone or behind a hello, the server waits or refuses, and says no
    more than one hello."""
    far = Side(server_steps(RIGHT, b"s" * 32))
    near = Side(client_steps(RIGHT, b"c" * 32))
    if from_hello:
        far.feed(HEAD.pack(MAGIC, VERSION, CLIENT, 0) + b"c" * 32)
    far.feed(noise)
    near.feed(noise)
    assert far.outcome is not True
    assert near.outcome is not True
    assert len(far.sent) <= SERVER_HELLO_BYTES


@given(st.data())
def test_no_bit_of_a_handshake_may_change(data: st.DataObject) -> None:
    _, _, recorded = talk(client_steps(RIGHT, b"c" * 32), server_steps(RIGHT, b"s" * 32))
    place = data.draw(st.integers(0, 8 * len(recorded) - 1))
    changed = bytearray(recorded)
    changed[place // 8] ^= 1 << place % 8
    far = Side(server_steps(RIGHT, b"s" * 32))
    far.feed(bytes(changed))
    assert isinstance(far.outcome, KvfsError)


def test_a_secret_is_kept() -> None:
    assert "0123" not in repr(RIGHT)
    with pytest.raises(TypeError):
        pickle.dumps(RIGHT)
    with pytest.raises(ValueError, match="31 bytes"):
        Secret(bytes(31))
    assert issubclass(SecretUnusable, ValueError)
