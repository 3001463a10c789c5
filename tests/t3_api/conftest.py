from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvfs
from api_cluster import ApiCluster


@pytest.fixture
def start_cluster(tmp_path: Path) -> Iterator[Callable[..., ApiCluster]]:
    """Starts a cluster with the agent settings given; stopped at the end of the test."""
    started: list[ApiCluster] = []

    def start(**agent_settings: Any) -> ApiCluster:
        started.append(ApiCluster(str(tmp_path / str(len(started))), **agent_settings))
        return started[-1]

    yield start
    for cluster in started:
        cluster.stop()


@pytest.fixture
def cluster(start_cluster: Callable[..., ApiCluster]) -> ApiCluster:
    return start_cluster()


@pytest.fixture
def client(cluster: ApiCluster) -> Iterator[kvfs.Client]:
    with cluster.connect() as client:
        yield client


@pytest.fixture
def namespace(client: kvfs.Client) -> kvfs.Namespace:
    return client.namespace("tenant/model", kvfs.KVLayout(block_tokens=16), create=True)


@pytest.fixture
def kept_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks drop what the kernel has cached, of all: tests beside them would read it again."""
    instead = tmp_path_factory.mktemp("proc") / "drop_caches"
    instead.touch()
    for module in ("bench", "mount_fio"):
        monkeypatch.setattr(f"kvfs_tools.{module}.CACHES", instead)
    monkeypatch.setattr(os, "sync", lambda: None)
