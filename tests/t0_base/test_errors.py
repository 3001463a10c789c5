"""The error tree: every leaf has an errno, a wire code, a temporary flag, and survives the wire."""

from __future__ import annotations

import dataclasses
import errno
import pickle
import re

import pytest

from kvfs_base import errors
from kvfs_base.errors import WIRE_CODES, KvfsError, ProtocolError, from_wire


def leaves() -> list[type[KvfsError]]:
    return sorted(WIRE_CODES.values(), key=lambda cls: cls.wire_code)


def test_every_class_that_is_raised_has_its_own_wire_code() -> None:
    classes = [
        cls
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, KvfsError) and dataclasses.fields(cls)
    ]
    assert len(classes) >= 25
    assert {cls.wire_code for cls in classes} == set(WIRE_CODES)


@pytest.mark.parametrize("cls", leaves(), ids=lambda cls: cls.wire_code)
def test_leaf(cls: type[KvfsError]) -> None:
    assert cls.posix_errno in errno.errorcode
    assert isinstance(cls.temporary, bool)
    error = cls()
    back = from_wire(error.wire_code, error.wire_data())
    assert type(back) is cls
    assert back.wire_data() == error.wire_data()
    assert str(error).startswith(cls.__name__)


def test_the_tree_at_the_top_of_the_file_is_the_tree() -> None:
    drawn = dict(re.findall(r"[├└]── (\w+) +(E[A-Z0-9]+)", errors.__doc__ or ""))
    actual = {cls.__name__: errno.errorcode[cls.posix_errno] for cls in leaves()}
    top = {"InvalidRequest"}  # drawn as an inner node with its errno
    assert drawn.keys() - top == actual.keys() - top
    assert {k: v for k, v in drawn.items() if k in actual} == {k: actual[k] for k in drawn}
    temporary = set(re.findall(r"(\w+) +E[A-Z0-9]+ +temporary", errors.__doc__ or ""))
    assert temporary == {cls.__name__ for cls in leaves() if cls.temporary}


def test_errors_carry_data_across_the_wire_and_ignore_what_they_do_not_know() -> None:
    error = errors.ChunkCorrupt(inode=7, number=1, expected_crc32c=2, found_crc32c=3)
    back = from_wire("chunk_corrupt", {**error.wire_data(), "new_field": 1})
    assert isinstance(back, errors.ChunkCorrupt)
    assert (back.inode, back.found_crc32c) == (7, 3)


def test_fields_of_other_types_are_a_protocol_error() -> None:
    for value in ("3", None, [3], b"3"):
        assert isinstance(from_wire("stale_chain", {"version": value}), ProtocolError)
    assert all(f.type in errors.FIELD_TYPES for c in leaves() for f in dataclasses.fields(c))


def test_an_unknown_code_is_a_protocol_error() -> None:
    assert isinstance(from_wire("from_the_future", {}), ProtocolError)


def test_builtin_parents() -> None:
    assert issubclass(errors.EntryNotFound, LookupError)
    assert issubclass(errors.InvalidRequest, ValueError)
    assert issubclass(errors.ArenaFull, MemoryError)


def test_errors_survive_copying_between_processes() -> None:
    error = errors.ConnectionLost(address="unix:/x", detail="gone")
    assert pickle.loads(pickle.dumps(error)).wire_data() == error.wire_data()
