"""docs/metrics.md has every metric that the services answer, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import kvfs
from api_cluster import ApiCluster
from kvfs_base.os_env import os_env
from kvfs_base.rpc import BlockingRpcClient
from kvfs_datapath.messages import Statistics as ChunkStatistics
from kvfs_metadata.client import BlockingMetadataClient
from kvfs_metadata.messages import Statistics

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def documented(section: str) -> set[str]:
    text = PAGE.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_metadata(cluster: ApiCluster) -> None:
    client = BlockingMetadataClient(os_env(), cluster.metadata_address)
    try:
        assert documented("Metadata service") == set(client.call(Statistics()))
    finally:
        client.close()


def test_chunk_server(cluster: ApiCluster) -> None:
    for server in cluster.servers:
        assert documented("Chunk server") == set(server.statistics())
        client = BlockingRpcClient(os_env().blocking_network, server.addresses[0])
        try:
            assert documented("Chunk server") == set(client.call(ChunkStatistics()))
        finally:
            client.close()


def test_agent(client: kvfs.Client) -> None:
    assert documented("Node agent") == set(client.statistics())
