"""Fixtures: a running kvfs that tests share, and a directory that a test may do anything to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from t5_cluster.processes import Cluster


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Tests leave it serving; blocks that they put stay."""
    cluster = Cluster(tmp_path_factory.mktemp("shared"))
    try:
        cluster.up()
        yield cluster
        cluster.down()
        cluster.assert_gone()
    finally:
        cluster.clean_up()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Cluster]:
    """Not running yet."""
    cluster = Cluster(tmp_path)
    try:
        yield cluster
    finally:
        cluster.clean_up()
