"""Names and attributes of chunk files."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfs_base.errors import ChunkMismatch, InvalidRequest, VersionMismatch
from kvfs_base.types import ChunkId
from kvfs_datapath.buffers import round_up
from kvfs_datapath.checksum import crc32c
from kvfs_datapath.format import (
    ATTRIBUTE_BYTES,
    DIRECTORIES,
    Append,
    ChunkInfo,
    ChunkState,
    chain_of,
    chunk_of,
    directory_of,
    pack,
    path_of,
    pending_path_of,
    unpack,
    unpack_versioned,
)

SEALED = ChunkInfo(7, 3, 0, ChunkState.SEALED, length=1000, crc32c=0xDEADBEEF, key=b"k" * 32)


def test_the_checksum_is_crc32c() -> None:
    """The check value of the CRC catalogue, and of RFC 3720 B.4."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"56789", crc32c(b"1234")) == 0xE3069283


@given(
    inode=st.integers(0, (1 << 63) - 1),
    number=st.integers(0, (1 << 32) - 1),
    length=st.integers(0, 1 << 28),
    checksum=st.integers(0, (1 << 32) - 1),
    key=st.sampled_from([b"", b"\1" * 32, bytes(31) + b"\1"]),
    durable=st.booleans(),
)
def test_attributes_come_back(
    inode: int, number: int, length: int, checksum: int, key: bytes, durable: bool
) -> None:
    info = ChunkInfo(inode, number, 0, ChunkState.SEALED, length, checksum, key, durable)
    assert unpack(pack(info), info.chunk) == info


def test_an_open_chunk_promises_nothing() -> None:
    info = ChunkInfo(7, 3, 0, ChunkState.OPEN, length=1000, crc32c=5)
    assert unpack(pack(info), info.chunk) == ChunkInfo(7, 3, 0, ChunkState.OPEN)


def test_the_layout_on_disk_is_the_documented_one() -> None:
    data = pack(SEALED)
    assert len(data) == ATTRIBUTE_BYTES == 68
    assert data[:4] == b"KVFC"
    assert struct.unpack_from("<HBBQIIQ", data, 4) == (1, 2, 0, 7, 3, 0xDEADBEEF, 1000)
    assert data[32:64] == b"k" * 32
    assert struct.unpack_from("<I", data, 64) == (crc32c(data[:64]),)


@pytest.mark.parametrize("bit", range(0, 68 * 8, 5))
def test_a_flipped_bit_in_the_attribute_is_noticed(bit: int) -> None:
    data = bytearray(pack(SEALED))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises((ChunkMismatch, VersionMismatch)):
        unpack(bytes(data), SEALED.chunk)


def test_an_attribute_belongs_to_one_chunk() -> None:
    for other in (ChunkId(8, 3), ChunkId(7, 4)):
        with pytest.raises(ChunkMismatch):
            unpack(pack(SEALED), other)
    for damaged in (None, b"", b"KVFC", pack(SEALED)[:-1], pack(SEALED) + b"x"):
        with pytest.raises(ChunkMismatch):
            unpack(damaged, SEALED.chunk)


def test_a_newer_format_is_not_damage() -> None:
    data = bytearray(pack(SEALED))
    data[4] = 3
    with pytest.raises(VersionMismatch) as caught:
        unpack(bytes(data), SEALED.chunk)
    assert (caught.value.found, caught.value.expected) == ("3", "2")


U32 = st.integers(0, (1 << 32) - 1)


@given(
    info=st.builds(
        ChunkInfo,
        inode=st.integers(0, (1 << 63) - 1),
        number=U32,
        chain=st.integers(1, (1 << 32) - 1),
        state=st.sampled_from([ChunkState.SEALED, ChunkState.PENDING]),
        length=st.integers(0, 1 << 28),
        crc32c=U32,
        durable=st.booleans(),
        version=st.integers(1, (1 << 32) - 1),
        writer=U32,
        sequence=U32,
    ),
    append=st.none() | st.builds(Append, st.integers(1, 1 << 28), U32, U32, U32),
)
def test_versions_come_back(info: ChunkInfo, append: Append | None) -> None:
    data = pack(info, append)
    assert len(data) == ATTRIBUTE_BYTES
    assert unpack_versioned(data, info.chunk) == (info, append)


def test_the_layout_of_a_version_is_the_documented_one() -> None:
    info = ChunkInfo(7, 3, 9, ChunkState.SEALED, 1000, 5, b"", True, 12, 13, 14)
    data = pack(info, Append(1100, 6, 15, 16))
    assert struct.unpack_from("<HBBQIIQ", data, 4) == (2, 2, 1, 7, 3, 5, 1000)
    assert struct.unpack_from("<8I", data, 32) == (12, 13, 14, 1100, 6, 15, 16, 0)
    assert struct.unpack_from("<I", data, 64) == (crc32c(data[:64]),)
    assert struct.unpack_from("<8I", pack(info), 32) == (12, 13, 14, 0, 0, 0, 0, 0)


def test_versions_are_for_chains_of_several_copies() -> None:
    info = ChunkInfo(7, 3, 9, ChunkState.SEALED, 1000, 5, b"", False, 1)
    for chain, state in ((0, ChunkState.SEALED), (9, ChunkState.OPEN)):
        wrong = msgspec.structs.replace(info, chain=chain, state=state)
        with pytest.raises(ChunkMismatch):
            unpack(pack(wrong), wrong.chunk)
    with pytest.raises(ChunkMismatch):  # a block that is not whole
        pending = ChunkInfo(7, 3, 9, ChunkState.PENDING, 1000, 5, b"k" * 32)
        unpack(pack(pending), pending.chunk)


def test_keys_have_one_length() -> None:
    with pytest.raises(InvalidRequest):
        pack(ChunkInfo(1, 0, 0, ChunkState.SEALED, key=b"short"))


def test_names() -> None:
    chunk = ChunkId(0x1234, 0x56)
    assert path_of(chunk) == f"{directory_of(0x1234)}/0000000000001234.00000056"
    assert chunk_of("0000000000001234.00000056") == chunk
    for foreign in ("", "lost+found", "0000000000001234", "000000000000123x.00000056", "a.b"):
        assert chunk_of(foreign) is None


def test_names_on_chains() -> None:
    chunk = ChunkId(0x1234, 0x56, 0xAB)
    assert path_of(chunk) == f"{directory_of(0x1234, 0xAB)}/0000000000001234.00000056"
    assert directory_of(0x1234, 0xAB).startswith("chains/000000ab/")
    assert pending_path_of(chunk) == "chains/000000ab/pending/0000000000001234.00000056"
    assert chunk_of("0000000000001234.00000056", 0xAB) == chunk
    assert chain_of("000000ab") == 0xAB
    for foreign in ("", "ab", "000000AB", "00000000", "pending", "0x0000ab", "000000zz"):
        assert chain_of(foreign) is None


def test_inodes_spread_over_the_directories() -> None:
    used = [directory_of(inode) for inode in range(1, 20 * DIRECTORIES)]
    assert len(set(used)) == DIRECTORIES
    assert max(used.count(d) for d in set(used)) < 60
    assert directory_of(5).split("/")[1] == f"{crc32c(struct.pack('<Q', 5)) & 255:02x}"


def test_the_attribute_fits_into_an_ext4_inode(tmp_path: Path) -> None:
    """One byte group more and every chunk would take another disk block, and another access."""
    file = tmp_path / "chunk"
    file.touch()
    if os.statvfs(file).f_bsize != 4096:
        pytest.skip("not the usual ext4")
    os.setxattr(file, "user.kvfs", pack(SEALED))
    assert file.stat().st_blocks == 0


def test_rounding_to_pages() -> None:
    assert [round_up(n) for n in (0, 1, 4096, 4097)] == [0, 4096, 4096, 8192]
