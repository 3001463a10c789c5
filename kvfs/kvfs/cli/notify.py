"""Tells systemd how a service is doing (sd_notify(3)): datagrams to the socket that it names."""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger(__name__)

VARIABLE = "NOTIFY_SOCKET"


def notify(state: str) -> bool:
    """``READY=1``, ``STOPPING=1`` and such. False if nobody asked for it, or listens."""
    address = os.environ.get(VARIABLE, "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):  # a name without a file
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.connect(address)
            sender.send(state.encode())
    except OSError as exc:
        log.info("%s was not told %s: %s", VARIABLE, state, exc.strerror)
        return False
    return True
