"""One network for both network seams: byte streams that are slow, stall and break.

A stream loses no byte in its middle and keeps their order, as TCP does. What goes wrong is what
goes wrong with TCP. A path may be cut in one direction or both: bytes wait at the sender and arrive
when it heals, also if the sender has given up and closed the connection meanwhile. A connection may
break: of what was on its way a first part arrives, perhaps many seconds late, and the other end may
learn of the break only when it sends something. A host without power says nothing at all.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence

from kvfs_base.errors import ConnectionLost, DeadlineExceeded
from kvfs_base.limits import PAGE_BYTES
from kvfs_base.seams import Buffer, Connection, DiskFile, Listener
from kvfs_base.types import Address
from sim.hub import Hub, Process

RETRANSMIT_SECONDS = 3.0
"""After a path has healed the first bytes come within this time."""

DATA, END, RESET = "data", "end", "reset"
STOP_SECONDS = 4.0
Wake = Callable[[], None]


class Host:
    """Where processes run: an address, and whether there is power."""

    def __init__(self, name: str, ip: str) -> None:
        self.name = name
        self.ip = ip
        self.up = True


FRAME_FLIPS = 20


@dataclasses.dataclass
class NetworkKnobs:
    latency: float = 0.0005
    slow_chance: float = 0.001
    """A segment that takes up to a second longer."""
    split_chance: float = 0.05
    """A segment that arrives in two parts."""
    stop_chance: float = 0.0
    """A message with data that stops halfway, for up to STOP_SECONDS."""
    window_bytes: int = 128 << 10
    flip_chance: float = 0.0
    """A large segment of which one bit is wrong, and TCP's checksum did not see it. Of small ones,
    that are frames without payload, one in FRAME_FLIPS as many."""


class Pipe:
    """One direction of a connection."""

    def __init__(self, network: SimNetwork, source: Host, target: Host) -> None:
        self._network = network
        self._hub = network.hub
        self.source = source
        self.target = target
        self.reverse: Pipe
        self.buffer = bytearray()
        self.ended: str | None = None
        """END or RESET, which the receiver sees after the buffer."""
        self.unread = 0
        """Bytes that were sent and not taken."""
        self.receiver_gone = False
        self.readers: list[Wake] = []
        self.writers: list[Wake] = []
        self._flight: collections.deque[tuple[float, str, bytes]] = collections.deque()
        self._arrival = 0.0
        self._planned = False

    @property
    def idle(self) -> bool:
        return not self._flight

    def push(self, kind: str, data: bytes = b"", delay: float = 0.0) -> None:
        network = self._network
        if len(data) > 1 and network.chance(network.knobs.split_chance):
            cut = self._hub.rng.randrange(1, len(data))
            self._append(kind, data[:cut], delay)
            data = data[cut:]
        self._append(kind, data, delay)
        self._plan()

    def _append(self, kind: str, data: bytes, delay: float) -> None:
        moment = self._hub.now + delay + self._network.delay(self.source, self.target)
        self._arrival = max(self._arrival, moment)
        self.unread += len(data)
        self._flight.append((self._arrival, kind, data))

    def _plan(self) -> None:
        if self._flight and not self._planned:
            self._planned = True
            self._hub.call_at(self._flight[0][0], self._arrive)

    def _arrive(self) -> None:
        self._planned = False
        if not self._network.is_open(self.source, self.target):
            self._network.stalled[self] = None
            return
        while self._flight and self._flight[0][0] <= self._hub.now:
            _, kind, data = self._flight.popleft()
            self._deliver(kind, data)
        self._plan()

    def _deliver(self, kind: str, data: bytes) -> None:
        if self.receiver_gone:
            self.unread = 0
            if kind == DATA and self.reverse.ended != RESET:
                self.reverse.push(RESET)  # as a kernel answers for a socket that is no more
            return
        if self.ended == RESET:
            return
        if kind == DATA:
            self.buffer += data
        else:
            self.ended = kind
            if kind == RESET:
                self.unread = 0
                _wake(self.reverse.writers)
        _wake(self.readers)

    def unstall(self) -> None:
        """The path is open again, or the receiver's host has power again."""
        delay = self._hub.rng.random() * RETRANSMIT_SECONDS
        soonest = self._hub.now + delay
        self._flight = collections.deque(
            (max(soonest, moment), kind, data) for moment, kind, data in self._flight
        )
        self._arrival = max(self._arrival, soonest)
        self._plan()

    def take(self, count: int) -> bytes:
        data = bytes(self.buffer[:count])
        del self.buffer[:count]
        self.unread -= len(data)
        _wake(self.writers)
        return data

    def lose_flight(self, late: float) -> None:
        """Of what is on its way a first part arrives, up to ``late`` seconds later; nothing
        follows."""
        keep = self._hub.rng.randrange(len(self._flight) + 1)
        delay = self._hub.rng.random() * late
        kept = list(self._flight)[:keep]
        if delay:
            self._hub.counts["late"] += len(kept)
        self._flight = collections.deque((at + delay, kind, data) for at, kind, data in kept)
        self._arrival = self._flight[-1][0] if kept else self._hub.now

    def drop_flight(self) -> None:
        self._flight.clear()


def _wake(waiting: list[Wake]) -> None:
    for wake in waiting:
        wake()
    waiting.clear()


class Endpoint:
    """One end of a connection, as the kernel of its host has it."""

    def __init__(self, network: SimNetwork, process: Process, out: Pipe, into: Pipe) -> None:
        self.network = network
        self.process = process
        self.out = out
        self.into = into
        self.closed = False
        network.endpoints[self] = None
        process.at_death.append(self.close)

    def close(self) -> None:
        """What was sent before still goes out. Who has not read everything resets."""
        if self.closed or self._gone():
            return
        unread = bool(self.into.buffer) or not self.into.idle
        if self.out.ended is None:
            self.out.push(RESET if unread else END)

    def vanish(self) -> None:
        """The host has lost its power: what is on its way may arrive, nothing else."""
        if not self.closed:
            self.out.lose_flight(0.0)
            self._gone()

    def _gone(self) -> bool:
        self.closed = True
        self.network.endpoints.pop(self, None)
        was_gone, self.into.receiver_gone = self.into.receiver_gone, True
        _wake(self.into.readers)
        _wake(self.out.writers)
        return was_gone

    def break_off(self, late: float) -> None:
        """The connection is reset here. The other end learns of it when it sends."""
        self.out.lose_flight(late)
        self.into.drop_flight()
        self.into.buffer.clear()
        self.into.ended = RESET
        self.into.receiver_gone = True
        self.into.unread = 0
        _wake(self.into.readers)
        _wake(self.out.writers)

    @property
    def lost(self) -> str:
        """Why nothing can be sent any more, or an empty string."""
        if self.closed:
            return "closed here"
        if self.into.ended == RESET:
            return "connection reset"
        return ""

    @property
    def room(self) -> int:
        return self.network.knobs.window_bytes - self.out.unread


class SimNetwork:
    def __init__(self, hub: Hub, knobs: NetworkKnobs) -> None:
        self.hub = hub
        self.knobs = knobs
        self.may_damage = True
        self.hosts: dict[str, Host] = {}
        self.cut: set[tuple[str, str]] = set()
        self.clogged: dict[tuple[str, str], float] = {}
        self.stalled: dict[Pipe, None] = {}
        self.endpoints: dict[Endpoint, None] = {}
        self.listeners: dict[tuple[str, Address], BaseListener] = {}
        self._next_port = 40_000

    def host(self, name: str) -> Host:
        found = self.hosts.get(name)
        if found is None:
            found = self.hosts[name] = Host(name, f"10.0.0.{len(self.hosts) + 1}")
        return found

    def chance(self, share: float) -> bool:
        return share > 0 and self.hub.rng.random() < share

    def is_open(self, source: Host, target: Host) -> bool:
        return source.up and target.up and (source.name, target.name) not in self.cut

    def delay(self, source: Host, target: Host) -> float:
        if source is target:
            return 1e-5 * self.hub.rng.random()
        seconds = self.knobs.latency * (0.5 + self.hub.rng.random())
        if self.chance(self.knobs.slow_chance):
            seconds += self.hub.rng.random()
        until = self.clogged.get((source.name, target.name), 0.0)
        return seconds + max(0.0, until - self.hub.now)

    # --- faults

    def cut_path(self, source: str, target: str) -> None:
        self.cut.add((source, target))

    def heal_path(self, source: str, target: str) -> None:
        self.cut.discard((source, target))
        self._unstall()

    def heal(self) -> None:
        """Every path, at once."""
        self.cut.clear()
        self.clogged.clear()
        self._unstall()

    def power_off(self, host: Host) -> None:
        """Its processes must be dead."""
        host.up = False

    def power_on(self, host: Host) -> None:
        host.up = True
        self._unstall()

    def _unstall(self) -> None:
        for pipe in list(self.stalled):
            if self.is_open(pipe.source, pipe.target):
                del self.stalled[pipe]
                pipe.unstall()

    def of_host(self, host: Host) -> list[Endpoint]:
        return [e for e in self.endpoints if e.out.source is host]

    # --- connections

    def target_of(self, source: Host, address: Address) -> Host | None:
        if address.kind == "unix":
            return source
        return next((h for h in self.hosts.values() if h.ip == address.host), None)

    def bind(self, host: Host, address: Address, listener: BaseListener) -> Address:
        """Raises ConnectionLost if the address is taken."""
        if address.kind == "tcp" and address.port == 0:
            self._next_port += 1
            address = Address.tcp(address.host, self._next_port)
        if (host.name, address) in self.listeners:
            raise ConnectionLost(address=str(address), detail="address in use")
        self.listeners[host.name, address] = listener
        return address

    def open_pair(self, source: Host, process: Process, listener: BaseListener) -> Endpoint:
        """A new connection, of which the listener gets its end."""
        there, back = (
            Pipe(self, source, listener.host),
            Pipe(self, listener.host, source),
        )
        there.reverse, back.reverse = back, there
        near = Endpoint(self, process, out=there, into=back)
        listener.arrived(Endpoint(self, listener.process, out=back, into=there))
        return near

    def damaged(self, data: bytes) -> bytes:
        """Perhaps with one wrong bit: in a payload, or, more seldom, in a frame without one."""
        is_payload = len(data) >= 4096
        chance = self.knobs.flip_chance / (1 if is_payload else FRAME_FLIPS)
        if self.chance(chance) and self.may_damage:
            self.hub.counts["wire flip" if is_payload else "frame flip"] += 1
            place = self.hub.rng.randrange(len(data))
            changed = bytearray(data)
            changed[place] ^= 1 << self.hub.rng.randrange(8)
            return bytes(changed)
        return data


class BaseListener:
    """``arrived`` gets the listener's end of each new connection."""

    def __init__(self, network: SimNetwork, host: Host, process: Process, address: Address) -> None:
        self.network = network
        self.host = host
        self.process = process
        self.address = network.bind(host, address, self)
        self.open = True
        process.at_death.append(self.unbind)

    def arrived(self, endpoint: Endpoint) -> None:
        raise NotImplementedError

    def unbind(self) -> None:
        if self.open:
            self.open = False
            self.network.listeners.pop((self.host.name, self.address), None)


# --- the seam for threads


class SimConnection:
    """A blocking stream."""

    can_pass_descriptors = False

    def __init__(self, endpoint: Endpoint, peer: Address) -> None:
        self._end = endpoint
        self._hub = endpoint.network.hub
        self._peer = str(peer)
        self._timeout: float | None = None

    def send(
        self, parts: Sequence[Buffer], descriptors: Sequence[int] = (), *, more: bool = False
    ) -> None:
        assert not descriptors, "no descriptor passes to another host"
        self._hub.checkpoint()
        network = self._end.network
        left = network.damaged(b"".join(parts))
        if len(left) > PAGE_BYTES and network.chance(network.knobs.stop_chance):
            before = self._hub.rng.randrange(1, len(left))
            self._push(left[:before])
            left = left[before:]
            self._hub.counts["stopped halfway"] += 1
            self._hub.sleep(STOP_SECONDS * self._hub.rng.random())
        self._push(left)

    def _push(self, left: bytes) -> None:
        while left:
            self._require_open()
            room = self._end.room
            if room > 0:
                self._end.out.push(DATA, left[:room])
                left = left[room:]
            else:
                self._wait(self._end.out.writers, self._deadline())

    def fileno(self) -> int:
        raise AssertionError("no descriptor passes to another host")

    def send_files(self, pieces: Sequence[tuple[DiskFile, int, int]]) -> None:
        for file, offset, count in pieces:
            data = memoryview(bytearray(count))
            if file.preadv([data], offset) < count:
                raise ConnectionLost(address=self._peer, detail="file shorter than said")
            self.send([data])

    def receive_into(self, views: Sequence[memoryview]) -> None:
        self._hub.checkpoint()
        deadline = self._deadline()
        for view in views:
            done = 0
            while done < len(view):
                if self._end.into.buffer and not self._end.closed:
                    data = self._end.into.take(len(view) - done)
                    view[done : done + len(data)] = data
                    done += len(data)
                    continue
                self._require_open()
                if self._end.into.ended is not None:
                    raise ConnectionLost(address=self._peer, detail="closed by peer")
                self._wait(self._end.into.readers, deadline)

    def receive_groups(
        self, groups: Sequence[Sequence[memoryview]], after: Callable[[int], None]
    ) -> None:
        for number, views in enumerate(groups):
            self.receive_into(views)
            after(number)

    def receive_with_descriptors(self, view: memoryview) -> list[int]:
        self.receive_into([view])
        return []

    def _deadline(self) -> float | None:
        return None if self._timeout is None else self._hub.now + self._timeout

    def _require_open(self) -> None:
        if self._end.lost:
            raise ConnectionLost(address=self._peer, detail=self._end.lost)

    def _wait(self, waiters: list[Wake], deadline: float | None) -> None:
        me = self._hub.require_alive()
        left = None if deadline is None else deadline - self._hub.now
        if left is not None and left <= 0:
            raise DeadlineExceeded(operation=self._peer, seconds=self._timeout or 0.0)

        def wake() -> None:
            self._hub.wake(me)

        waiters.append(wake)
        self._hub.park(left)
        if wake in waiters:
            waiters.remove(wake)
            raise DeadlineExceeded(operation=self._peer, seconds=self._timeout or 0.0)

    def set_timeout(self, seconds: float | None) -> None:
        self._timeout = seconds

    def shutdown(self) -> None:
        if not self._hub.is_dead:
            self._end.close()

    def close(self) -> None:
        if not self._hub.is_dead:
            self._end.close()


class SimListener(BaseListener):
    def __init__(self, network: SimNetwork, host: Host, process: Process, address: Address) -> None:
        super().__init__(network, host, process, address)
        self._backlog: collections.deque[Endpoint] = collections.deque()
        self._waiting: list[Wake] = []

    def arrived(self, endpoint: Endpoint) -> None:
        self._backlog.append(endpoint)
        _wake(self._waiting)

    def accept(self) -> Connection:
        hub = self.network.hub
        me = hub.require_alive()
        while not self._backlog:
            if not self.open:
                raise ConnectionLost(address=str(self.address), detail="listener closed")
            self._waiting.append(lambda: hub.wake(me))
            hub.park()
        return SimConnection(self._backlog.popleft(), self.address)

    def close(self) -> None:
        if self.network.hub.is_dead:
            return
        self.unbind()
        while self._backlog:
            self._backlog.popleft().close()
        _wake(self._waiting)


SYN_AGAIN_SECONDS = 1.0


class SimBlockingNetwork:
    """The network as threads of one process see it."""

    def __init__(self, network: SimNetwork, host: Host, process: Process) -> None:
        self._network = network
        self._host = host
        self._process = process

    def connect(self, address: Address, timeout: float) -> Connection:
        network, hub = self._network, self._network.hub
        deadline = hub.now + timeout
        target = network.target_of(self._host, address)
        while target is not None:
            hub.sleep(network.delay(self._host, target))
            if network.is_open(self._host, target) and network.is_open(target, self._host):
                break
            if hub.now + SYN_AGAIN_SECONDS > deadline:
                hub.sleep(max(0.0, deadline - hub.now))
                raise DeadlineExceeded(operation=f"connect {address}", seconds=timeout)
            hub.sleep(SYN_AGAIN_SECONDS)
        listener = None if target is None else network.listeners.get((target.name, address))
        if listener is None or target is None:
            hub.sleep(network.knobs.latency)
            raise ConnectionLost(address=str(address), detail="connection refused")
        near = network.open_pair(self._host, self._process, listener)
        hub.sleep(network.delay(target, self._host))
        return SimConnection(near, address)

    def listen(self, address: Address) -> Listener:
        self._network.hub.checkpoint()
        return SimListener(self._network, self._host, self._process, address)
