"""What the processor says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvfs_base.os_cpu import cpu_flags

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
