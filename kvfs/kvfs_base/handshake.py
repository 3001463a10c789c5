"""Who may talk: the mutual proof at the start of a TCP connection. Sans-I/O.

Both sides hold the cluster's secret and show it without telling it (ISO/IEC 9798-4, mutual
authentication in three passes). Integers are little-endian:

    client -> server   hello    offset  size  field
                                0       8     magic     b"kvfsauth"
                                8       2     version   1
                                10      2     role      1
                                12      4     zero
                                16      32    nonce     of the client
    server -> client   hello    0       48    the same with role 2 and the nonce of the server
                                48      32    proof     HMAC-SHA256(secret, label | 2 | both nonces)
    client -> server   proof    0       32    HMAC-SHA256(secret, label | 1 | both nonces)

``label`` is b"kvfs handshake 1", the role is one byte, and the client's nonce comes first. Label
and role keep a proof from being used for anything else, the nonces from being used again. The first
frame follows the client's proof at once, so a connection costs one round trip more.

A server that speaks another version answers with the first 16 bytes of its own hello and closes. A
client that has no secret begins with a frame: it gets the error AuthenticationFailed as the answer
to that frame. It is a proof, not a tunnel: nothing that follows is encrypted or signed.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Generator
from typing import Any

from kvfs_base import frames
from kvfs_base.errors import AuthenticationFailed, KvfsError, ProtocolError, VersionMismatch
from kvfs_base.limits import SECRET_BYTES_MIN

MAGIC = b"kvfsauth"
VERSION = 1
CLIENT = 1
SERVER = 2
HEAD = struct.Struct("<8sHHI")
NONCE_BYTES = 32
PROOF_BYTES = 32
CLIENT_HELLO_BYTES = HEAD.size + NONCE_BYTES
SERVER_HELLO_BYTES = CLIENT_HELLO_BYTES + PROOF_BYTES
LABEL = b"kvfs handshake 1"

Steps = Generator[tuple[bytes, int], bytes, None]
"""Yields (bytes to send, how many to receive next) and gets exactly that many back. Whoever drives
it sends before it receives, and ends the connection if it raises."""


class Secret:
    """The secret of one cluster. Shows itself to nobody who prints it."""

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        if len(key) < SECRET_BYTES_MIN:
            raise ValueError(f"a secret of {len(key)} bytes")
        self._key = key

    def proof(self, role: int, client_nonce: bytes, server_nonce: bytes) -> bytes:
        message = b"".join((LABEL, bytes([role]), client_nonce, server_nonce))
        return hmac.digest(self._key, message, hashlib.sha256)

    def __repr__(self) -> str:
        return "Secret(...)"

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a secret is not copied to other processes")


def client_steps(secret: Secret, nonce: bytes) -> Steps:
    """The side that connected. Raises AuthenticationFailed, VersionMismatch, ProtocolError."""
    head = yield HEAD.pack(MAGIC, VERSION, CLIENT, 0) + nonce, HEAD.size
    _check_head(head, SERVER)
    rest = yield b"", SERVER_HELLO_BYTES - HEAD.size
    theirs, proof = rest[:NONCE_BYTES], rest[NONCE_BYTES:]
    if not hmac.compare_digest(proof, secret.proof(SERVER, nonce, theirs)):
        raise AuthenticationFailed(detail="the server has another secret")
    yield secret.proof(CLIENT, nonce, theirs), 0


def server_steps(secret: Secret, nonce: bytes) -> Steps:
    """The side that listens. Raises the same; what it yields before is the peer's answer."""
    head = yield b"", HEAD.size
    try:
        _check_head(head, CLIENT)
    except VersionMismatch:
        yield HEAD.pack(MAGIC, VERSION, SERVER, 0), 0
        raise
    except ProtocolError:
        answer = yield from _answer_to_frame(head)
        yield answer, 0
        raise
    theirs = yield b"", NONCE_BYTES
    hello = HEAD.pack(MAGIC, VERSION, SERVER, 0) + nonce + secret.proof(SERVER, theirs, nonce)
    proof = yield hello, PROOF_BYTES
    if not hmac.compare_digest(proof, secret.proof(CLIENT, theirs, nonce)):
        raise AuthenticationFailed(detail="the client has another secret")


def _check_head(head: bytes, role: int) -> None:
    magic, version, found, zero = HEAD.unpack(head)
    if magic != MAGIC:
        raise ProtocolError(detail="the peer does not authenticate")
    if version != VERSION:
        raise VersionMismatch(detail="handshake", found=str(version), expected=str(VERSION))
    if found != role or zero:
        # Also a proof of ours that comes back: both ends of this connection are the same end.
        raise AuthenticationFailed(detail=f"the peer speaks as {found}")


def _answer_to_frame(head: bytes) -> Generator[tuple[bytes, int], bytes, bytes]:
    """The error for a peer that sent a frame instead of a hello; nothing for anything else."""
    if int.from_bytes(head[:2], "little") != frames.MAGIC:
        return b""
    rest = yield b"", frames.HEADER_BYTES - len(head)
    try:
        header = frames.decode_header(head + rest)
    except KvfsError:
        return b""
    error = AuthenticationFailed(detail="the server asks for a secret")
    return frames.encode_error(header.request_id, error)
