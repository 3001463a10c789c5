"""Types that cross rooms."""

from __future__ import annotations

import msgspec
import pytest

from kvfs_base.errors import InvalidRequest, NotLoopback
from kvfs_base.types import Address, Attr, KVLayout, Layout


@pytest.mark.parametrize("text", ["unix:/run/kvfs/agent.sock", "tcp:127.0.0.1:80", "tcp:::1:9"])
def test_addresses_are_read_as_they_are_written(text: str) -> None:
    assert str(Address.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "unix:", "unix:relative", "tcp:host", "tcp:host:x", "tcp::1", "tcp:h:70000", "h:1"]
)
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        Address.parse(text)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "example.org", "::", ""])
def test_only_loopback_is_reachable_without_authentication(host: str) -> None:
    with pytest.raises(NotLoopback):
        Address.tcp(host, 1).require_loopback()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_is_loopback(host: str) -> None:
    Address.tcp(host, 1).require_loopback()


def test_chunks_go_round_the_chains() -> None:
    layout = Layout(16, (5, 7, 9))
    assert [layout.chain_of(i) for i in range(5)] == [5, 7, 9, 5, 7]


def test_a_stripe_is_bounded_on_the_wire() -> None:
    wide = msgspec.msgpack.encode(Layout(16, tuple(range(17))))
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(wide, type=Layout)


def test_layouts_are_equal_only_if_every_field_is() -> None:
    base = KVLayout(block_tokens=16, dtype="bfloat16", model="m", rank="0/2")
    for change in (
        {"block_tokens": 32},
        {"dtype": "float16"},
        {"model": "n"},
        {"revision": "r"},
        {"rank": "1/2"},
        {"adapter": "a"},
        {"order": "K"},
        {"layers": 1},
        {"kv_heads": 1},
        {"head_dim": 1},
        {"block_bytes": 1},
    ):
        assert msgspec.structs.replace(base, **change) != base


def test_attributes_know_what_they_are() -> None:
    assert Attr(2, 0o040755).is_dir
    assert Attr(2, 0o100644).is_file
    assert Attr(2, 0o100444, key=b"k" * 32).is_block
