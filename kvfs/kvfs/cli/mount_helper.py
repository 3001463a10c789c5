"""mount.kvfs: what ``mount -t kvfs`` and a line in /etc/fstab run.

    mount.kvfs TARGET DIRECTORY [-sfnv] [-o OPTIONS]

``kvfs mount`` stays as a process in the background; this returns once the mount is there. Options
are the settings of a mount (docs/configuration.md), ``config=FILE`` and ``log=FILE``. What mount(8)
and systemd keep for themselves is passed over. ``ro`` and such, which would promise what is not
done, are errors.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import NamedTuple

from kvfs.mount.config import MountConfig
from kvfs.settings import settings_of

USAGE, FAILED = 1, 32
"""Exit codes of mount(8): a wrong call; the mount failed."""
LOG = "/var/log/kvfs-mount.log"

PASSED_OVER = re.compile(
    r"x-.*|comment=.*|_netdev|nofail|(no)?auto|(no)?users?|owner|group|defaults|rw|async"
    r"|(no)?relatime|noatime|nodiratime|exec|nosuid|nodev|silent|loud"
)
"""What others act on, and what is so in any case: access times stay, and set-ID programs and
devices do not work on a kvfs mount."""


class Call(NamedTuple):
    target: str
    directory: str
    arguments: tuple[str, ...]
    """Of ``kvfs mount``."""
    log: str
    is_real: bool
    """False for -f, which does all but mount."""


class UsageError(Exception):
    pass


def parse(argv: list[str]) -> Call:
    """Raises UsageError."""
    words: list[str] = []
    options: list[str] = []
    is_real = True
    rest = iter(argv)
    for word in rest:
        if word in ("-o", "-t"):
            value = next(rest, None)
            if value is None:
                raise UsageError(f"{word} needs a value")
            options += value.split(",") if word == "-o" else []
        elif word.startswith("-o"):
            options += word[2:].split(",")
        elif re.fullmatch(r"-[sfnv]+", word):
            is_real = is_real and "f" not in word
        elif word.startswith("-"):
            raise UsageError(f"no such option: {word}")
        else:
            words.append(word)
    if len(words) != 2:
        raise UsageError("usage: mount.kvfs TARGET DIRECTORY [-sfnv] [-o OPTIONS]")
    arguments, log = _arguments([option for option in options if option])
    target = words[0].removeprefix("kvfs#")
    return Call(target, os.path.abspath(words[1]), arguments, log, is_real)


def _arguments(options: list[str]) -> tuple[tuple[str, ...], str]:
    known = {s.name: s for s in settings_of(MountConfig, "mount")}
    log = LOG
    arguments: list[str] = []
    for option in options:
        name, is_set, value = option.partition("=")
        setting = known.get(name.replace("-", "_"))
        if name == "log" and value:
            log = value
        elif name == "config" and value:
            arguments += ["--config", value]
        elif setting is not None and name not in ("mountpoint", "metadata"):
            # A switch without a value is on.
            arguments += [setting.flag, value if is_set else "true"]
        elif not PASSED_OVER.fullmatch(option):
            raise UsageError(f"option {option!r} is not known, or nothing that kvfs does")
    return tuple(arguments), log


def run(call: Call) -> int:
    """The exit code."""
    if not call.is_real:
        return 0
    try:
        log = open(call.log, "ab")  # noqa: SIM115 (the service's from then on)
    except OSError as exc:
        print(f"mount.kvfs: {call.log}: {exc.strerror}", file=sys.stderr)
        return FAILED
    with log:
        before = log.tell()
        command = [sys.executable, "-m", "kvfs", "mount", *call.arguments, "--"]
        service = subprocess.Popen(
            [*command, call.target, call.directory],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd="/",
            start_new_session=True,
        )
    assert service.stdout is not None
    with service.stdout:
        line = service.stdout.readline()
    if _is_ready(line):
        return 0
    service.wait()
    with open(call.log, "rb") as written:
        written.seek(before)
        sys.stderr.write(written.read().decode(errors="replace"))
    return FAILED


def _is_ready(line: bytes) -> bool:
    try:
        return bool(json.loads(line)["event"] == "ready")
    except (ValueError, KeyError, TypeError):
        return False


def main() -> None:
    try:
        call = parse(sys.argv[1:])
    except UsageError as exc:
        print(f"mount.kvfs: {exc}", file=sys.stderr)
        sys.exit(USAGE)
    sys.exit(run(call))


if __name__ == "__main__":
    main()
