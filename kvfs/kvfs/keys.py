"""Names of blocks: a hash chained over the tokens of a prefix.

The value of a key, byte for byte (``||`` joins, integers are unsigned and little-endian):

    root  = SHA256("kvfs.block_keys.1" || u32(block_tokens) || u64(len(salt)) || salt)
    key_i = SHA256(key_{i-1} || u32(t_0) || ... || u32(t_{block_tokens - 1}))      key_{-1} = root

where ``t`` are the tokens of block ``i``. Equal keys therefore mean equal prefixes, block sizes and
salts. What else decides the KV (model, revision, dtype, layout, rank, adapter) is the namespace's
layout; a tenant, an image's hash or a cache policy belongs into the salt.
"""

from __future__ import annotations

import array
import hashlib
import struct
import sys
from collections.abc import Sequence
from typing import Any

from kvfs_base.errors import InvalidRequest
from kvfs_base.limits import BLOCK_KEY_BYTES

_DOMAIN = b"kvfs.block_keys.1"
_TOKEN_BYTES = 4
_TOKEN_END = 1 << 32


def block_keys(
    token_ids: Sequence[int] | Any,
    block_tokens: int,
    salt: bytes = b"",
    parent: bytes | None = None,
) -> list[bytes]:
    """The key, 32 bytes, of each full block of ``token_ids``; tokens after the last full block have
    none.

    ``token_ids``: integers in [0, 2**32), as a sequence or as a one-dimensional integer array or
    tensor of numpy or torch (any device). ``parent``: the key of the block before the first token,
    to continue a chain without its tokens; it carries the salt already, so ``salt`` must be empty.
    Raises InvalidRequest. 100,000 tokens in blocks of 16 take about 8 ms.
    """
    if not isinstance(block_tokens, int) or not 0 < block_tokens < _TOKEN_END:
        raise InvalidRequest(detail=f"block_tokens={block_tokens!r}")
    key = _root(block_tokens, salt) if parent is None else _checked_parent(parent, salt)
    tokens = _token_bytes(token_ids)
    step = block_tokens * _TOKEN_BYTES
    sha256 = hashlib.sha256
    keys = []
    for end in range(step, len(tokens) + 1, step):
        key = sha256(key + tokens[end - step : end]).digest()
        keys.append(key)
    return keys


def _root(block_tokens: int, salt: bytes) -> bytes:
    if not isinstance(salt, bytes):
        raise InvalidRequest(detail=f"salt is {type(salt).__name__}, not bytes")
    head = struct.pack("<IQ", block_tokens, len(salt))
    return hashlib.sha256(_DOMAIN + head + salt).digest()


def _checked_parent(parent: bytes, salt: bytes) -> bytes:
    if not isinstance(parent, bytes) or len(parent) != BLOCK_KEY_BYTES:
        raise InvalidRequest(detail=f"parent is not a key of {BLOCK_KEY_BYTES} bytes")
    if salt:
        raise InvalidRequest(detail="salt and parent: the parent carries the salt already")
    return parent


def _token_bytes(token_ids: Any) -> bytes:
    """The tokens as u32, little-endian."""
    if hasattr(token_ids, "dtype"):
        return _array_bytes(token_ids)
    if isinstance(token_ids, bytes | bytearray):  # array would take their bytes for its own
        raise InvalidRequest(detail="token ids are bytes, not integers")
    try:
        tokens = array.array("I", token_ids)
    except (OverflowError, TypeError, ValueError) as exc:
        raise InvalidRequest(detail=f"token ids: {exc}") from exc
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens.tobytes()


def _array_bytes(tokens: Any) -> bytes:
    if not hasattr(tokens, "astype"):  # a torch tensor; cpu() and numpy() are free on the CPU
        try:
            tokens = tokens.detach().cpu().numpy()
        except (AttributeError, RuntimeError, TypeError) as exc:
            raise InvalidRequest(detail=f"token ids: {type(tokens).__name__}") from exc
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise InvalidRequest(detail=f"token ids: {tokens.dtype} in {tokens.ndim} dimensions")
    if len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) >= _TOKEN_END):
        raise InvalidRequest(detail="token ids outside of [0, 2**32)")
    return bytes(tokens.astype("<u4").tobytes())


__all__ = ["block_keys"]
