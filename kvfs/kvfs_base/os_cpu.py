"""What the processor can do."""

from __future__ import annotations

from pathlib import Path


def cpu_flags() -> frozenset[str]:
    """As Linux names them; none where it does not say (it has another word for them on ARM)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


__all__ = ["cpu_flags"]
