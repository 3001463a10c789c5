"""Rules that hold for every test: an unasked-for WARNING in a log is a failure, a hang dumps
stacks, and a module that leaves hundreds of descriptors open has failed."""

from __future__ import annotations

import faulthandler
import gc
import itertools
import logging
import os
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from postgres_server import PostgresServer

faulthandler.enable()

# How long an example takes, and how long it takes to draw one, is the machine's business.
hypothesis.settings.register_profile(
    "kvfs", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("kvfs")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Nobody looks for garbage in what is imported meanwhile, half a million objects, and later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def no_unexpected_warnings(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test during which a kvfs logger said WARNING or worse, unless the test carries
    ``@pytest.mark.logs_warnings``."""
    records: list[logging.LogRecord] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name.startswith("kvfs"):
                records.append(record)

    collector = Collector(level=logging.WARNING)
    logging.getLogger().addHandler(collector)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(collector)
    if records and request.node.get_closest_marker("logs_warnings") is None:
        pytest.fail("logged: " + "; ".join(r.getMessage() for r in records))


@pytest.fixture(scope="module", autouse=True)
def usual_umask() -> Iterator[None]:
    """Of each module, whatever the one before has set."""
    os.umask(0o022)
    yield
    os.umask(0o022)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One real server for the whole run. Who kills it starts it again."""
    from postgres_server import PostgresServer

    server = PostgresServer()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of an empty database."""
    with postgres_server.fresh_database() as url:
        yield url


DESCRIPTORS_MAX = 300
"""What one module may leave open: far more than any needs, far less than select() takes."""


@pytest.fixture(scope="module", autouse=True)
def descriptors_are_closed() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    if len(os.listdir("/proc/self/fd")) - before > DESCRIPTORS_MAX:
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) - before <= DESCRIPTORS_MAX, "descriptors leak"


LONG = (
    "t5_cluster/",
    "sim/test_simulation.py",
    "t4_mount/test_file_checker.py",
    "t3_api/test_bench",
    "t3_api/test_replay_demo.py",
    "t2_services/test_posix_model.py",
    "t1_stores/test_version_crashes.py",
    "t6_engines/test_bench_ttft.py",
)
"""Half of the time in a twentieth of the tests."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deals what is long out to the workers: each begins with its share and goes on with as much
    of the rest as makes their numbers of tests equal, since that is how xdist cuts the list. Who
    is done takes over short tests of others in the end, so all end at about the same time."""
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers == 1:
        return
    units = [(unit, list(group)) for unit, group in itertools.groupby(items, _unit)]
    long = [group for unit, group in units if unit]
    rest = [item for unit, group in units if not unit for item in group]
    # Every other worker plays its hand from the end: seeds compute while clusters wait.
    hands = [long[place::workers][:: 1 - 2 * (place % 2)] for place in range(workers)]
    counts = [sum(map(len, hand)) for hand in hands]
    items.clear()
    for place, hand in enumerate(hands):
        share = (len(rest) + sum(counts[place:])) // (workers - place) - counts[place]
        items += [*itertools.chain.from_iterable(hand), *rest[: max(0, share)]]
        del rest[: max(0, share)]


def _unit(item: pytest.Item) -> str:
    """What stays together of the long ones: tests of seeds have nothing to share."""
    name = os.path.relpath(item.path, os.path.dirname(__file__))
    if not name.startswith(LONG):
        return ""
    parent = item if name.startswith("sim/") else item.parent
    assert parent is not None
    return parent.nodeid
