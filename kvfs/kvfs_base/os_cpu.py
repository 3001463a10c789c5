"""What the processor can do, and what it does when it has nothing to do."""

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


IDLE_DRIVER = Path("/sys/devices/system/cpu/cpuidle/current_driver")
IDLE_POLL_NS = Path("/sys/module/haltpoll/parameters/guest_halt_poll_ns")


def sleeps_at_once() -> bool:
    """Whether an idle core of this virtual machine goes to the host at once, because somebody has
    taken away the time (Linux: 200 us) for which it looks out for work. To get it back takes longer
    than most requests. False where that is not known."""
    try:
        driver, poll_ns = IDLE_DRIVER.read_text().strip(), int(IDLE_POLL_NS.read_text())
    except (OSError, ValueError):
        return False
    return driver == "haltpoll" and not poll_ns


__all__ = ["cpu_flags", "sleeps_at_once"]
