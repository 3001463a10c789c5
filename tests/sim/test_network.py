"""Streams of the simulated network, for threads and for trio, whole and broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import trio

from kvfs_base import threads
from kvfs_base.errors import ConnectionLost, DeadlineExceeded
from kvfs_base.seams import Connection
from kvfs_base.types import Address
from sim.hub import Hub
from sim.network import NetworkKnobs, SimBlockingNetwork, SimNetwork
from sim.sim_threads import SimThreads
from sim.trio_host import SimTrioNetwork, TrioHost


class Stage:
    """Two hosts, a process on each, and a listener on the second."""

    def __init__(self, seed: int = 1) -> None:
        self.hub = Hub(seed)
        self.network = SimNetwork(self.hub, NetworkKnobs())
        self.a, self.b = self.network.host("a"), self.network.host("b")
        self.client, self.server = self.hub.process("client"), self.hub.process("server")
        self.address = Address.tcp(self.b.ip, 7000)
        self.near = SimBlockingNetwork(self.network, self.a, self.client)
        self.far = SimBlockingNetwork(self.network, self.b, self.server)

    def run(self, body: Callable[[], None]) -> None:
        with threads.installed(SimThreads(self.hub)):
            try:
                self.hub.run(self.client.start(body, name="body"), 1000.0)
            finally:
                self.hub.close()

    def pair(self) -> tuple[Connection, Connection]:
        listener = self.server.run(self.far.listen, self.address)
        near = self.near.connect(self.address, 5.0)
        far = self.server.run(listener.accept)
        near.set_timeout(20.0)
        far.set_timeout(20.0)
        return near, far

    def cut(self, *paths: str) -> None:
        for path in paths:
            self.network.cut_path(path[0], path[1])


@pytest.fixture
def stage() -> Iterator[Stage]:
    yield Stage()


def receive(connection: Connection, count: int) -> bytes:
    buffer = bytearray(count)
    connection.receive_into([memoryview(buffer)])
    return bytes(buffer)


def test_bytes_arrive_whole_and_in_order(stage: Stage) -> None:
    def body() -> None:
        near, far = stage.pair()
        data = bytes(range(256)) * 4000  # many times the window
        sender = threads.thread(lambda: near.send([data[:1000], data[1000:]]), name="sender")
        sender.start()
        assert receive(far, len(data)) == data
        far.send([b"back"])
        assert receive(near, 4) == b"back"

    stage.run(body)


def test_timeouts_cover_the_whole_call(stage: Stage) -> None:
    def body() -> None:
        near, far = stage.pair()
        near.set_timeout(2.0)

        def trickle() -> None:
            for _ in range(10):
                stage.hub.sleep(0.5)
                far.send([b"x"])

        threads.thread(trickle, name="trickle").start()
        begun = stage.hub.now
        with pytest.raises(DeadlineExceeded):
            receive(near, 100)
        assert stage.hub.now == begun + 2.0
        with pytest.raises(DeadlineExceeded):
            near.send([bytes(1 << 20)])

    stage.run(body)


def test_a_closed_peer_is_lost_after_what_it_sent(stage: Stage) -> None:
    def body() -> None:
        near, far = stage.pair()
        far.send([b"last"])
        far.close()
        assert receive(near, 4) == b"last"
        with pytest.raises(ConnectionLost):
            receive(near, 1)
        with pytest.raises(ConnectionLost):
            for _ in range(100):
                near.send([b"x"])
                stage.hub.sleep(0.1)

    stage.run(body)


def test_nobody_listens_and_nobody_answers(stage: Stage) -> None:
    def body() -> None:
        with pytest.raises(ConnectionLost):
            stage.near.connect(stage.address, 5.0)
        stage.pair()
        stage.cut("ba")
        begun = stage.hub.now
        with pytest.raises(DeadlineExceeded):
            stage.near.connect(stage.address, 5.0)
        assert stage.hub.now >= begun + 4.9

    stage.run(body)


def test_a_one_way_cut_holds_one_way_up(stage: Stage) -> None:
    def body() -> None:
        near, far = stage.pair()
        stage.cut("ab")
        near.send([b"question"])
        far.send([b"other way"])
        assert receive(near, 9) == b"other way"
        far.set_timeout(10.0)
        with pytest.raises(DeadlineExceeded):
            receive(far, 8)
        stage.network.heal_path("a", "b")
        assert receive(far, 8) == b"question"

    stage.run(body)


def test_what_was_sent_before_giving_up_arrives_after_the_cut(stage: Stage) -> None:
    def body() -> None:
        near, far = stage.pair()
        stage.cut("ab", "ba")
        near.send([b"late"])
        near.close()
        stage.hub.sleep(30.0)
        stage.network.heal()
        assert receive(far, 4) == b"late"
        with pytest.raises(ConnectionLost):
            receive(far, 1)

    stage.run(body)


def test_a_broken_connection_delivers_a_first_part_or_nothing() -> None:
    found = set()
    for seed in range(30):
        stage = Stage(seed)

        def body(stage: Stage = stage) -> None:
            near, far = stage.pair()
            stage.network.knobs.split_chance = 0.0
            for piece in (b"1", b"2", b"3"):
                near.send([piece])
            (end,) = stage.network.of_host(stage.a)
            end.break_off(late=10.0)
            with pytest.raises(ConnectionLost):
                receive(near, 1)
            far.set_timeout(15.0)
            got = b""
            with pytest.raises((DeadlineExceeded, ConnectionLost)):
                while True:
                    got += receive(far, 1)
            found.add(got)
            far.send([b"answer"])  # to nobody, which it learns now
            stage.hub.sleep(1.0)
            with pytest.raises(ConnectionLost):
                receive(far, 1)

        stage.run(body)
    assert b"" in found and b"123" in found
    assert found <= {b"", b"1", b"12", b"123"}


def test_a_killed_process_closes_and_a_dead_host_says_nothing(stage: Stage) -> None:
    def body() -> None:
        near, far = stage.pair()
        far.send([b"goodbye"])
        stage.hub.kill(stage.server)
        assert receive(near, 7) == b"goodbye"
        with pytest.raises(ConnectionLost):
            receive(near, 1)
        with pytest.raises(ConnectionLost):
            stage.near.connect(stage.address, 5.0)
        stage.server = stage.hub.process("server again")
        stage.far = SimBlockingNetwork(stage.network, stage.b, stage.server)
        near, far = stage.pair()
        for end in stage.network.of_host(stage.b):
            end.vanish()
        stage.network.power_off(stage.b)
        stage.hub.kill(stage.server)
        near.set_timeout(5.0)
        with pytest.raises(DeadlineExceeded):
            receive(near, 1)
        stage.network.power_on(stage.b)
        near.send([b"anybody?"])
        with pytest.raises(ConnectionLost):
            receive(near, 1)

    stage.run(body)


def test_shutdown_and_close_wake_who_waits(stage: Stage) -> None:
    def body() -> None:
        near, _ = stage.pair()
        stage.hub.call_later(1.0, lambda: None)
        threads.thread(lambda: (stage.hub.sleep(1.0), near.shutdown()), name="other").start()
        with pytest.raises(ConnectionLost):
            receive(near, 1)
        listener = stage.near.listen(Address.tcp(stage.a.ip, 0))
        threads.thread(lambda: (stage.hub.sleep(1.0), listener.close()), name="closer").start()
        with pytest.raises(ConnectionLost):
            listener.accept()
        again = stage.near.listen(listener.address)
        with pytest.raises(ConnectionLost):
            stage.near.listen(listener.address)
        again.close()

    stage.run(body)


def test_trio_and_threads_talk(stage: Stage) -> None:
    trio_host = TrioHost(stage.hub)
    served: list[str] = []

    async def serve() -> None:
        network = SimTrioNetwork(trio_host, stage.network, stage.b, stage.server)

        async def echo(stream: trio.abc.Stream) -> None:
            async with stream:
                while data := await stream.receive_some(1000):
                    await stream.send_all(data)
            served.append("one")

        await network.serve(stage.address, echo)

    async def ask() -> None:
        network = SimTrioNetwork(trio_host, stage.network, stage.a, stage.client)
        async with await network.connect(stage.address) as stream:
            await stream.send_all(b"from trio")
            assert await stream.receive_some(100) == b"from trio"
        with pytest.raises(ConnectionLost):
            await network.connect(Address.tcp(stage.b.ip, 1))
        answer = await trio.to_thread.run_sync(lambda: stage.hub.sleep(3.0) or "slept")
        served.append(answer)

    def body() -> None:
        with trio_host.installed():
            trio_host.start(seed=1)
            trio_host.start_soon(serve)
            stage.hub.sleep(0.1)
            near = stage.near.connect(stage.address, 5.0)
            data = bytes(range(256)) * 2000
            threads.thread(lambda: near.send([data]), name="sender").start()
            assert receive(near, len(data)) == data
            near.close()
            trio_host.start_soon(ask)
            stage.hub.sleep(10.0)
            trio_host.stop()

    stage.run(body)
    assert sorted(served) == ["one", "one", "slept"]
