"""block_keys: its value byte for byte, its chain, and what it refuses."""

from __future__ import annotations

import array
import hashlib
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvfs
from kvfs import block_keys

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=60)


def reference(tokens: list[int], block_tokens: int, salt: bytes) -> list[bytes]:
    """As the docstring says it."""
    head = struct.pack("<IQ", block_tokens, len(salt))
    key = hashlib.sha256(b"kvfs.block_keys.1" + head + salt).digest()
    keys = []
    for first in range(0, len(tokens) - block_tokens + 1, block_tokens):
        block = tokens[first : first + block_tokens]
        key = hashlib.sha256(key + b"".join(struct.pack("<I", t) for t in block)).digest()
        keys.append(key)
    return keys


@given(TOKENS, st.integers(1, 7), st.binary(max_size=9))
def test_keys_are_as_specified(tokens: list[int], block_tokens: int, salt: bytes) -> None:
    assert block_keys(tokens, block_tokens, salt) == reference(tokens, block_tokens, salt)


def test_known_values() -> None:
    """Stored caches are named by these: they never change."""
    found = [key.hex() for key in block_keys([1, 2, 3, 4, 5], 2, b"salt")]
    assert found == KNOWN


KNOWN = [
    "d5b53fd898e81cd99ada07ab2d55e44b3701e371e3f7205b7d703ecbddec027b",
    "965aa1b35b2515aa2fb9453802500dba8c20578163ae6658a68991916a41758e",
]


@given(TOKENS, st.integers(1, 7), st.data())
def test_a_chain_continues_from_a_parent(
    tokens: list[int], block_tokens: int, data: st.DataObject
) -> None:
    keys = block_keys(tokens, block_tokens)
    if keys:
        done = data.draw(st.integers(1, len(keys)))
        rest = block_keys(tokens[done * block_tokens :], block_tokens, parent=keys[done - 1])
        assert keys[:done] + rest == keys


@given(TOKENS, TOKENS)
def test_equal_keys_mean_equal_prefixes(one: list[int], two: list[int]) -> None:
    common = 0
    while common < min(len(one), len(two)) and one[common] == two[common]:
        common += 1
    keys = zip(block_keys(one, 1), block_keys(two, 1), strict=False)
    assert sum(a == b for a, b in keys) == common


def test_size_and_salt_are_part_of_every_key() -> None:
    tokens = list(range(12))
    lists = [
        block_keys(tokens, 2),
        block_keys(tokens, 3),
        block_keys(tokens, 2, b"a"),
        block_keys(tokens, 2, b"b"),
    ]
    assert len({key for keys in lists for key in keys}) == sum(map(len, lists))


def test_every_kind_of_token_list_gives_the_same_keys() -> None:
    tokens = [0, 1, 127, 128, 50_000, 2**31 - 1]
    expected = block_keys(tokens, 2)
    same: list[Any] = [tuple(tokens), array.array("q", tokens), iter(tokens)]
    same += [np.array(tokens, dtype) for dtype in ("i4", "i8", "u4", "u8", ">i8")]
    same.append(np.array(tokens).repeat(2)[::2])
    for other in same:
        assert block_keys(other, 2) == expected
    torch = pytest.importorskip("torch")
    assert block_keys(torch.tensor(tokens), 2) == expected
    assert block_keys(torch.tensor(tokens, dtype=torch.int32), 2) == expected


@pytest.mark.parametrize(
    "tokens",
    [
        [-1],
        [2**32],
        [1.5],
        ["a"],
        "text",
        b"bytes",
        None,
        [[1, 2]],
        np.array([-1]),
        np.array([2**32]),
        np.array([1.5]),
        np.array([[1, 2]]),
        np.array([True]),
    ],
    ids=repr,
)
def test_what_is_no_token_is_refused(tokens: Any) -> None:
    with pytest.raises(kvfs.InvalidRequest):
        block_keys(tokens, 1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"block_tokens": 0},
        {"block_tokens": -1},
        {"block_tokens": 2**32},
        {"block_tokens": 1.0},
        {"block_tokens": 1, "salt": "text"},
        {"block_tokens": 1, "parent": b"short"},
        {"block_tokens": 1, "parent": bytes(32), "salt": b"twice"},
    ],
    ids=repr,
)
def test_other_arguments_are_checked(arguments: dict[str, Any]) -> None:
    with pytest.raises(kvfs.InvalidRequest):
        block_keys([1, 2], **arguments)
