"""What the metadata service should answer, as sequential objects, and clients that play at random.

``Names`` is one directory with a few names, moved between by renames and links; ``Blocks`` the
blocks of a few keys. ``NamePlayer`` and ``BlockPlayer`` ask a real service, and write down what
they asked and were answered in the models' words.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import threading
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from kvfs_base import errors as e
from kvfs_base.rpc import Request
from kvfs_base.types import Attr
from kvfs_metadata import messages as m
from kvfs_metadata.client import BlockingMetadataClient
from linearizability import UNANSWERED, Operation, Recorder

FILE = 0o100644
XATTR = b"user.mark"
NOREPLACE, EXCHANGE = 1, 2

UNKNOWN_OUTCOMES = (e.ConnectionLost, e.DeadlineExceeded, e.StoreUnavailable)
ANSWERS = {
    e.EntryNotFound: "missing",
    e.EntryExists: "exists",
    e.InodeStale: "stale",
    e.AttributeMissing: "no attribute",
}


class File(NamedTuple):
    inode: int
    mark: int
    """Its uid: made with one that nobody else makes a file with, and changed later."""
    xattr: bytes | None


Entries = tuple[File | None, ...]
"""What each name stands for; names of one file have equal values."""


class Names:
    """``known`` are the inodes that answered calls have made: a file whose maker got no answer has
    another one, which is learnt when it is seen. Until then its inode is minus its mark."""

    def __init__(self, count: int, known: Iterable[int]) -> None:
        self._count = count
        self._known = frozenset(known)

    def initial(self) -> Entries:
        return (None,) * self._count

    def step(self, state: Entries, request: Any, answer: Any) -> Iterable[Entries]:
        kind, *arguments = request
        for seen in self._with_learnt(state, answer):
            for expected, following in getattr(self, f"_{kind}")(seen, *arguments):
                if answer in (expected, UNANSWERED):
                    yield following

    def _with_learnt(self, state: Entries, answer: Any) -> Iterable[Entries]:
        """``state``, and what it is if an inode of ``answer`` is that of a file made unseen."""
        yield state
        unseen = {file for file in state if file is not None and file.inode < 0}
        if not unseen or answer is UNANSWERED:
            return
        present = {file.inode for file in state if file is not None}
        new = _inodes_of(answer) - self._known - present
        for file, inode in itertools.product(unseen, new):
            yield _replace(state, file, file._replace(inode=inode))

    # Each answers with what the object may say and is then.

    def _create(self, state: Entries, at: int, mark: int, made: int | None) -> Any:
        """``made``: the inode, if the answer tells."""
        if state[at] is not None:
            return [("exists", state)]
        inode = -mark if made is None else made
        return [(("made", inode), _put(state, at, File(inode, mark, None)))]

    def _unlink(self, state: Entries, at: int) -> Any:
        file = state[at]
        if file is None:
            return [("missing", state)]
        following = _put(state, at, None)
        return [(("unlinked", file.inode, following.count(file)), following)]

    def _rename(self, state: Entries, old: int, new: int, flags: int) -> Any:
        file, replaced = state[old], state[new]
        if file is None or (flags == EXCHANGE and replaced is None):
            return [("missing", state)]
        if replaced is not None and flags == NOREPLACE:
            return [("exists", state)]
        if file == replaced:
            return [("done", state)]
        left = replaced if flags == EXCHANGE else None
        return [("done", _put(_put(state, old, left), new, file))]

    def _link(self, state: Entries, inode: int, at: int) -> Any:
        file = _by_inode(state, inode)
        if file is None:  # collected, or unlinked and not collected yet
            taken = "exists" if state[at] is not None else "missing"
            return [("stale", state), (taken, state)]
        if state[at] is not None:
            return [("exists", state)]
        following = _put(state, at, file)
        return [(("linked", inode, following.count(file)), following)]

    def _set_mark(self, state: Entries, inode: int, mark: int) -> Any:
        file = _by_inode(state, inode)
        if file is None:
            return [("stale", state), ("done", state)]
        return [("done", _replace(state, file, file._replace(mark=mark)))]

    def _set_xattr(self, state: Entries, inode: int, value: bytes) -> Any:
        """With XATTR_CREATE."""
        file = _by_inode(state, inode)
        if file is None:
            return [(answer, state) for answer in ("stale", "done", "exists")]
        if file.xattr is not None:
            return [("exists", state)]
        return [("done", _replace(state, file, file._replace(xattr=value)))]

    def _remove_xattr(self, state: Entries, inode: int) -> Any:
        file = _by_inode(state, inode)
        if file is None:
            return [(answer, state) for answer in ("stale", "done", "no attribute")]
        if file.xattr is None:
            return [("no attribute", state)]
        return [("done", _replace(state, file, file._replace(xattr=None)))]

    def _get_xattr(self, state: Entries, inode: int, value: Any) -> Any:
        """``value``: the answer, which is free for a file without a name."""
        file = _by_inode(state, inode)
        if file is None:
            return [(value, state)]
        return [("no attribute" if file.xattr is None else file.xattr, state)]

    def _stat(self, state: Entries, at: int) -> Any:
        file = state[at]
        if file is None:
            return [("missing", state)]
        return [(("is", file.inode, file.mark, state.count(file)), state)]

    def _list(self, state: Entries) -> Any:
        shown = [
            (at, file.inode, file.mark, state.count(file))
            for at, file in enumerate(state)
            if file is not None
        ]
        return [(("lists", *shown), state)]


def _put(state: Entries, at: int, file: File | None) -> Entries:
    return (*state[:at], file, *state[at + 1 :])


def _replace(state: Entries, old: File, new: File) -> Entries:
    return tuple(new if file == old else file for file in state)


def _by_inode(state: Entries, inode: int) -> File | None:
    return next((f for f in state if f is not None and f.inode == inode), None)


def _inodes_of(answer: Any) -> set[int]:
    if not isinstance(answer, tuple):
        return set()
    if answer[0] == "lists":
        return {entry[1] for entry in answer[1:]}
    return {answer[1]}


class Blocks:
    """The state is the inode, or None, of each key."""

    def __init__(self, count: int) -> None:
        self._count = count

    def initial(self) -> tuple[int | None, ...]:
        return (None,) * self._count

    def step(self, state: Any, request: Any, answer: Any) -> Iterable[Hashable]:
        kind, *arguments = request
        expected, following = getattr(self, f"_{kind}")(state, answer, *arguments)
        return [following] if answer in (expected, UNANSWERED) else []

    def _prepare(self, state: Any, answer: Any, keys: Sequence[int]) -> Any:
        """New inodes for what is absent, which are the service's choice."""
        if not isinstance(answer, tuple):
            return UNANSWERED, state
        pairs = zip(keys, answer, strict=True)
        fitting = all((state[key] is None) == (inode is not None) for key, inode in pairs)
        return answer if fitting else "other blocks", state

    def _commit(self, state: Any, answer: Any, inodes: dict[int, int]) -> Any:
        """What is stored keeps its first value."""
        return "done", tuple(
            inodes.get(key) if stored is None else stored for key, stored in enumerate(state)
        )

    def _remove(self, state: Any, answer: Any, keys: Sequence[int], inodes: Sequence[int]) -> Any:
        gone = {
            key
            for place, key in enumerate(keys)
            if state[key] is not None and (not inodes or state[key] == inodes[place])
        }
        left = tuple(None if key in gone else inode for key, inode in enumerate(state))
        return len(gone), left

    def _match(self, state: Any, answer: Any, keys: Sequence[int]) -> Any:
        return len(list(itertools.takewhile(lambda k: state[k] is not None, keys))), state

    def _lookup(self, state: Any, answer: Any, keys: Sequence[int]) -> Any:
        return tuple(state[key] for key in keys), state


# --- players


def key(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


class Player:
    """Asks, and writes down."""

    def __init__(self, client: BlockingMetadataClient, name: Hashable, seed: int) -> None:
        self.recorder = Recorder(name)
        self.rng = random.Random(seed)
        self._client = client
        self._pause = threading.Event()

    @property
    def history(self) -> list[Operation]:
        return self.recorder.history

    def _ask(self, request: Request) -> Any:
        """The reply, UNANSWERED, or the models' word for an error."""
        while True:
            try:
                return self._client.call(request)
            except UNKNOWN_OUTCOMES:
                return UNANSWERED
            except tuple(ANSWERS) as exc:
                return ANSWERS[type(exc)]
            except e.NoTarget:  # a heartbeat came late, on a machine with other work
                self._pause.wait(0.05)


class NamePlayer(Player):
    """Plays in one directory with ``count`` names. ``marks`` gives numbers that no other player
    has, from 1."""

    MOVES = (
        "create",
        "create",
        "unlink",
        "rename",
        "rename",
        "exchange",
        "rename_new",
        "link",
        "set_mark",
        "set_xattr",
        "remove_xattr",
        "get_xattr",
        "stat",
        "list",
    )

    def __init__(
        self,
        client: BlockingMetadataClient,
        name: Hashable,
        seed: int,
        *,
        directory: int,
        count: int,
        marks: Iterable[int],
    ) -> None:
        super().__init__(client, name, seed)
        self._directory = directory
        self._count = count
        self._marks = iter(marks)
        self._inodes = [0]
        """Seen lately."""

    def move(self) -> None:
        getattr(self, self.rng.choice(self.MOVES))()

    def final(self) -> None:
        """All that can be seen, once everybody is quiet."""
        self.list()
        for at in range(self._count):
            self.stat(at)
            if isinstance(self.history[-1].answer, tuple):
                self.get_xattr(self._inodes[-1])

    def _any(self) -> int:
        return self.rng.randrange(self._count)

    def _two(self) -> list[int]:
        return self.rng.sample(range(self._count), 2)

    def _inode(self) -> int:
        return self.rng.choice(self._inodes)

    def _seen(self, inode: int) -> int:
        self._inodes = [*self._inodes[-2:], inode]
        return inode

    def create(self) -> None:
        at, mark = self._any(), next(self._marks)
        made: list[int] = []

        def ask() -> Any:
            reply = self._ask(m.Make(self._directory, _name(at), FILE, uid=mark))
            if isinstance(reply, Attr):
                made.append(self._seen(reply.inode))
                return ("made", reply.inode)
            return reply

        # What is made is known only afterwards, and belongs to what was asked.
        request = ["create", at, mark, None]
        self.recorder.call(request, ask)
        if made:
            request[3] = made[0]

    def unlink(self) -> None:
        at = self._any()

        def ask() -> Any:
            reply = self._ask(m.Unlink(self._directory, _name(at)))
            if isinstance(reply, Attr):
                return ("unlinked", self._seen(reply.inode), reply.nlink)
            return reply

        self.recorder.call(("unlink", at), ask)

    def rename(self, flags: int = 0) -> None:
        old, new = self._two()
        request = m.Rename(self._directory, _name(old), self._directory, _name(new), flags)
        self.recorder.call(("rename", old, new, flags), lambda: self._done(request))

    def exchange(self) -> None:
        self.rename(EXCHANGE)

    def rename_new(self) -> None:
        self.rename(NOREPLACE)

    def link(self) -> None:
        inode, at = self._inode(), self._any()

        def ask() -> Any:
            reply = self._ask(m.Link(inode, self._directory, _name(at)))
            return ("linked", inode, reply.nlink) if isinstance(reply, Attr) else reply

        self.recorder.call(("link", inode, at), ask)

    def set_mark(self) -> None:
        inode, mark = self._inode(), next(self._marks)
        request = m.SetAttr(inode, uid=mark)
        self.recorder.call(("set_mark", inode, mark), lambda: self._done(request))

    def set_xattr(self) -> None:
        inode, value = self._inode(), b"%d" % next(self._marks)
        request = m.SetXattr(inode, XATTR, value, 1)
        self.recorder.call(("set_xattr", inode, value), lambda: self._done(request))

    def remove_xattr(self) -> None:
        inode = self._inode()
        request = m.RemoveXattr(inode, XATTR)
        self.recorder.call(("remove_xattr", inode), lambda: self._done(request))

    def get_xattr(self, inode: int | None = None) -> None:
        inode = self._inode() if inode is None else inode
        request: list[Any] = ["get_xattr", inode, None]
        request[2] = self.recorder.call(request, lambda: self._ask(m.GetXattr(inode, XATTR)))

    def stat(self, at: int | None = None) -> None:
        at = self._any() if at is None else at

        def ask() -> Any:
            reply = self._ask(m.Lookup(self._directory, _name(at)))
            if isinstance(reply, Attr):
                return ("is", self._seen(reply.inode), reply.uid, reply.nlink)
            return reply

        self.recorder.call(("stat", at), ask)

    def list(self) -> None:
        def ask() -> Any:
            reply = self._ask(m.ReadDir(self._directory))
            if not isinstance(reply, m.DirectoryPage):
                return reply
            return ("lists", *((int(n), a.inode, a.uid, a.nlink) for n, a in reply.entries))

        self.recorder.call(("list",), ask)

    def _done(self, request: Request) -> Any:
        reply = self._ask(request)
        return "done" if isinstance(reply, (m.Done, m.Touched, Attr)) else reply


def _name(at: int) -> bytes:
    return b"%d" % at


def made_by(history: Iterable[Operation]) -> list[int]:
    """The inodes that answered calls made, which must be different ones."""
    return [
        op.answer[1] for op in history if isinstance(op.answer, tuple) and op.answer[0] == "made"
    ]


class BlockPlayer(Player):
    """Plays with ``count`` keys of one namespace. ``reads`` may be switched off where blocks are
    shown before they are durable."""

    MOVES = ("put", "put", "prepare", "commit", "remove", "remove", "match", "lookup")

    def __init__(
        self,
        client: BlockingMetadataClient,
        name: Hashable,
        seed: int,
        *,
        namespace: int,
        first: int,
        count: int,
        reads: bool = True,
    ) -> None:
        super().__init__(client, name, seed)
        self._namespace = namespace
        self._first = first
        self._count = count
        self._moves = self.MOVES if reads else self.MOVES[:-2]
        self._prepared: list[tuple[int, dict[int, int]]] = []
        self._inodes: dict[int, int] = {}

    def move(self) -> None:
        getattr(self, self.rng.choice(self._moves))()

    def final(self) -> None:
        for _ in range(len(self._prepared)):
            self.commit()
        self.lookup(range(self._count))
        self.match(range(self._count))

    def _some(self) -> list[int]:
        return self.rng.sample(range(self._count), self.rng.randint(1, self._count))

    def _keys(self, numbers: Iterable[int]) -> bytes:
        return b"".join(key(self._first + number) for number in numbers)

    def put(self) -> None:
        self.prepare()
        self.commit()

    def prepare(self) -> None:
        numbers = tuple(self._some())

        def ask() -> Any:
            sizes = (100,) * len(numbers)
            reply = self._ask(m.PrepareBlocks(self._namespace, self._keys(numbers), sizes))
            if not isinstance(reply, m.PreparedBatch):
                return reply
            inodes = tuple(None if b is None else b.inode for b in reply.blocks)
            if reply.batch_id:
                absent = {k: i for k, i in zip(numbers, inodes, strict=True) if i is not None}
                self._prepared.append((reply.batch_id, absent))
                self._inodes |= absent
            return inodes

        self.recorder.call(("prepare", numbers), ask)

    def commit(self) -> None:
        if not self._prepared:
            return
        batch_id, inodes = self._prepared.pop(0)

        def ask() -> Any:
            reply = self._ask(m.CommitBlocks(batch_id, tuple(inodes.values())))
            return "done" if isinstance(reply, m.Done) else reply

        self.recorder.call(("commit", inodes), ask)

    def remove(self) -> None:
        numbers = tuple(self._some())
        inodes: tuple[int, ...] = ()
        if self.rng.random() < 0.3:  # as for blocks that were found damaged
            inodes = tuple(self._inodes.get(number, 1) for number in numbers)
        request = m.RemoveBlocks(self._namespace, self._keys(numbers), inodes)
        self.recorder.call(("remove", numbers, inodes), lambda: self._ask(request))

    def match(self, numbers: Sequence[int] = ()) -> None:
        numbers = tuple(numbers or self._some())
        request = m.MatchBlocks(self._namespace, self._keys(numbers))
        self.recorder.call(("match", numbers), lambda: self._ask(request))

    def lookup(self, numbers: Sequence[int] = ()) -> None:
        numbers = tuple(numbers or self._some())

        def ask() -> Any:
            reply = self._ask(m.LookupBlocks(self._namespace, self._keys(numbers)))
            if isinstance(reply, tuple):
                return tuple(None if block is None else block.inode for block in reply)
            return reply

        self.recorder.call(("lookup", numbers), ask)
