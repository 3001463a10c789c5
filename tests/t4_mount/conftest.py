"""Fixtures: a kvfs with a mount that all tests share, and one that a test may break.

What a role logs at WARNING or above, or prints as a traceback, fails the test during which it did,
unless that test is marked ``logs_warnings``.

Tests run through the direct front end; those marked ``both_frontends`` through pyfuse3 as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from t4_mount.harness import Cluster, detach

HASTY_SECONDS = 6.0
"""Mounts say something every second, and the service counts that every two."""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("kvfs"))
    try:
        yield cluster
    finally:
        cluster.stop()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "frontend" in metafunc.fixturenames:
        both = metafunc.definition.get_closest_marker("both_frontends") is not None
        names = ["direct", "pyfuse3"] if both else ["direct"]
        metafunc.parametrize("frontend", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def frontend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def mounted(cluster: Cluster, frontend: str) -> Iterator[Path]:
    """One mount for all tests that leave it as it is."""
    mountpoint = cluster.directory / f"mnt-{frontend}"
    try:
        with cluster.mounted(mountpoint, "--allow-other", f"--frontend={frontend}"):
            yield mountpoint
    finally:
        detach(mountpoint)


@pytest.fixture
def work(mounted: Path, request: pytest.FixtureRequest) -> Path:
    """An empty directory in the mount."""
    directory = mounted / re.sub(r"\W+", "-", request.node.name)[:200]
    directory.mkdir()
    return directory


@pytest.fixture
def own_cluster(tmp_path: Path, frontend: str) -> Iterator[Cluster]:
    """A kvfs that the test may break."""
    cluster = Cluster(tmp_path)
    cluster.mount_options = (f"--frontend={frontend}",)
    try:
        yield cluster
    finally:
        detach(tmp_path / "mnt")
        cluster.stop()


@pytest.fixture
def hasty_cluster(tmp_path: Path, frontend: str) -> Iterator[Cluster]:
    """The same; a mount that was killed is given up after some seconds."""
    cluster = Cluster(tmp_path, session_seconds=HASTY_SECONDS)
    cluster.mount_options = (f"--frontend={frontend}",)
    try:
        yield cluster
    finally:
        detach(tmp_path / "mnt")
        cluster.stop()


@pytest.fixture(autouse=True)
def no_complaints(request: pytest.FixtureRequest) -> Iterator[None]:
    """What the shared processes log at WARNING or above is a failure of the test that ran."""
    names = {"cluster", "own_cluster", "hasty_cluster"} & set(request.fixturenames)
    clusters = [request.getfixturevalue(name) for name in names]
    before = [len(c.complaints()) for c in clusters]
    yield
    if request.node.get_closest_marker("logs_warnings") is None:
        new = [c.complaints()[n:] for c, n in zip(clusters, before, strict=True)]
        assert not any(new), new
