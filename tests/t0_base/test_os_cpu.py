"""What the processor says of itself, and what Linux does with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvfs_base import os_cpu
from kvfs_base.os_cpu import cpu_flags, sleeps_at_once

X86 = (
    "processor\t: 0\nmodel name\t: a\nflags\t\t: fpu avx512f\tx\n\nprocessor\t: 1\nflags\t: none\n"
)
ARM = "processor\t: 0\nFeatures\t: fp asimd crc32\n"


@pytest.mark.parametrize(
    ("text", "flags"), [(X86, {"fpu", "avx512f", "x"}), (ARM, set()), ("", set())]
)
def test_flags(monkeypatch: pytest.MonkeyPatch, text: str, flags: set[str]) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    assert cpu_flags() == flags


def test_a_host_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert cpu_flags() == frozenset()


@pytest.mark.parametrize(
    ("driver", "poll_ns", "sleeps"),
    [
        ("haltpoll\n", "0\n", True),
        ("haltpoll\n", "200000\n", False),
        ("intel_idle\n", "0\n", False),
        ("haltpoll\n", "", False),
        (None, None, False),
    ],
)
def test_cores_that_are_idle(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    driver: str | None,
    poll_ns: str | None,
    sleeps: bool,
) -> None:
    for name, text in (("IDLE_DRIVER", driver), ("IDLE_POLL_NS", poll_ns)):
        path = tmp_path / name
        if text is not None:
            path.write_text(text)
        monkeypatch.setattr(os_cpu, name, path)
    assert sleeps_at_once() is sleeps
