"""What ``import kvfs`` promises."""

from __future__ import annotations

import subprocess
import sys

import pytest

import kvfs

HEAVY = ("cupy", "lmdb", "numpy", "pyfuse3", "torch", "trio", "transformers")


def test_public_names_are_sorted_and_there() -> None:
    assert kvfs.__all__ == sorted(kvfs.__all__)
    for name in kvfs.__all__:
        assert getattr(kvfs, name) is not None
        assert name in dir(kvfs)
    with pytest.raises(AttributeError):
        kvfs.no_such_name  # noqa: B018


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        timeout=60,
        check=True,
        text=True,
    )
    return done.stdout.strip()


def test_the_import_is_light() -> None:
    code = "import sys, kvfs; kvfs.block_keys([1], 1); print(*sys.modules)"
    assert set(HEAVY) & set(run(code).split()) == set()


def test_a_client_needs_no_heavy_neighbour() -> None:
    missing = ("cupy", "numpy", "pyfuse3", "torch", "transformers")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing})); "
        "import kvfs, kvfs.client, kvfs.aio, kvfs.agent.server; "
        "print(kvfs.connect.__name__)"
    )
    assert run(code) == "connect"
