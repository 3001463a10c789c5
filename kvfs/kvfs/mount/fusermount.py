"""Mounting without being root: fusermount3 mounts, and passes the device's descriptor back."""

from __future__ import annotations

import array
import os
import socket
import subprocess

from kvfs_base.errors import MountFailed

PROGRAM = "fusermount3"
DESCRIPTOR_VARIABLE = "_FUSE_COMMFD"
"""Names the socket that the program sends the descriptor over."""
MOUNT_SECONDS = 10.0


def mount(mountpoint: str, options: str) -> int:
    """The descriptor of /dev/fuse, mounted at ``mountpoint``. Raises MountFailed."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(MOUNT_SECONDS)
        environment = {**os.environ, DESCRIPTOR_VARIABLE: str(theirs.fileno())}
        try:
            done = subprocess.run(
                [PROGRAM, "-o", options, "--", mountpoint],
                env=environment,
                pass_fds=[theirs.fileno()],
                capture_output=True,
                text=True,
                timeout=MOUNT_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise MountFailed(detail=f"{PROGRAM}: {exc}", mountpoint=mountpoint) from exc
        if done.returncode:
            detail = done.stderr.strip() or f"{PROGRAM} ended with {done.returncode}"
            raise MountFailed(detail=detail, mountpoint=mountpoint)
        theirs.close()  # or nothing would end the wait for a message that does not come
        descriptor = _receive(ours)
    if descriptor is None:
        raise MountFailed(detail=f"{PROGRAM} passed no descriptor", mountpoint=mountpoint)
    return descriptor


def _receive(end: socket.socket) -> int | None:
    item = array.array("i").itemsize
    try:
        _, messages, _, _ = end.recvmsg(1, socket.CMSG_SPACE(item), socket.MSG_CMSG_CLOEXEC)
    except OSError:
        return None
    for level, kind, data in messages:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS and len(data) >= item:
            return array.array("i", data[:item])[0]
    return None
