"""Fixtures: a kvfs with a mount that all tests share, and one that a test may break.

What a role logs at WARNING or above, or prints as a traceback, fails the test during which it did,
unless that test is marked ``logs_warnings``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from t4_mount.harness import Cluster, detach


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("kvfs"))
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def mounted(cluster: Cluster) -> Iterator[Path]:
    """One mount for all tests that leave it as it is."""
    mountpoint = cluster.directory / "mnt"
    try:
        with cluster.mounted(mountpoint, "--allow-other"):
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
def own_cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A kvfs that the test may break."""
    cluster = Cluster(tmp_path)
    try:
        yield cluster
    finally:
        detach(tmp_path / "mnt")
        cluster.stop()


@pytest.fixture(autouse=True)
def no_complaints(request: pytest.FixtureRequest) -> Iterator[None]:
    """What the shared processes log at WARNING or above is a failure of the test that ran."""
    names = {"cluster", "own_cluster"} & set(request.fixturenames)
    clusters = [request.getfixturevalue(name) for name in names]
    before = [len(c.complaints()) for c in clusters]
    yield
    if request.node.get_closest_marker("logs_warnings") is None:
        new = [c.complaints()[n:] for c, n in zip(clusters, before, strict=True)]
        assert not any(new), new
