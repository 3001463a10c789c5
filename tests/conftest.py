"""Rules that hold for every test: an unasked-for WARNING in a log is a failure, a hang dumps
stacks, and a module that leaves hundreds of descriptors open has failed."""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
from collections.abc import Iterator
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
