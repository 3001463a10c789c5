"""Questions to chunk servers that the mount waits for without a task, or not at all for a while.

A new file's chunk gets its name while the kernel writes the file (``leave``): when it is closed the
answer is there, mostly, and has woken nobody. Until it is taken in nobody else talks to the server
on that connection, so what was left is collected by whoever needs the connection next, and by the
front end some milliseconds later.
"""

from __future__ import annotations

import select
from collections.abc import Callable

Answered = Callable[[bool], None]
"""Told True once the answer can be read, False if it will not be waited for any more. Once."""


class Adoptions:
    """Of one mount, by the descriptor that becomes readable."""

    def __init__(self) -> None:
        self.awaited: dict[int, Answered] = {}
        """Somebody waits for these: the front end sees to them, and takes them out of here."""
        self.left: dict[int, Answered] = {}
        """Nobody does yet."""

    def wait(self, descriptor: int, answered: Answered) -> None:
        self.awaited[descriptor] = answered

    def leave(self, descriptor: int, answered: Answered) -> None:
        self.left[descriptor] = answered

    def collect(self) -> None:
        """Tells of those that were left and are answered."""
        if not self.left:
            return
        poll = select.poll()
        for descriptor in self.left:
            poll.register(descriptor, select.POLLIN)
        for descriptor, _ in poll.poll(0):
            self.left.pop(descriptor)(True)

    def need(self, descriptor: int) -> None:
        """Somebody waits for it from now on, if nobody did."""
        answered = self.left.pop(descriptor, None)
        if answered is not None:
            self.awaited[descriptor] = answered

    def need_all(self) -> None:
        self.awaited.update(self.left)
        self.left.clear()
