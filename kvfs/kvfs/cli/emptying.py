"""What is left on targets that are being drained, and what keeps it there."""

from __future__ import annotations

import threading

import click

from kvfs.cli.paths import every_file
from kvfs_metadata.client import BlockingMetadataClient
from kvfs_metadata.cluster.admin_messages import (
    ClusterDetails,
    DescribeCluster,
    FindOpenFiles,
    TargetDetails,
)
from kvfs_metadata.messages import Statistics

POLL_SECONDS = 1.0
"""Between two looks."""


def state_of(target: TargetDetails) -> str:
    if target.drained:
        drain = "drained"
    elif target.draining:
        drain = "draining"
    else:
        return target.state.value
    return f"offline, {drain}" if target.state == "offline" else drain


def drained_blocks(client: BlockingMetadataClient) -> int:
    """Blocks that were given up since the service started."""
    count: int = client.call(Statistics())["drained_blocks"]
    return count


def wait_until_empty(client: BlockingMetadataClient, numbers: set[int]) -> None:
    """Says whatever changes."""
    told: dict[int, list[str]] = {}
    while numbers:
        details: ClusterDetails = client.call(DescribeCluster())
        targets = [one for one in details.targets if one.target_id in numbers]
        for one in targets:
            lines = [_left_on(one), *_open_files(client, one)]
            if told.get(one.target_id) != lines:
                told[one.target_id] = lines
                click.echo("\n  ".join(lines))
        numbers = {one.target_id for one in targets if not _is_empty(one)}
        threading.Event().wait(POLL_SECONDS if numbers else 0)


def _is_empty(target: TargetDetails) -> bool:
    return target.drained and not target.removals


def _left_on(target: TargetDetails) -> str:
    if _is_empty(target):
        return f"target {target.target_id}: drained"
    left = f"{target.blocks_left:,} blocks, {target.files_left:,} files"
    return f"target {target.target_id} ({state_of(target)}): {left}, {target.removals:,} removals"


def _open_files(client: BlockingMetadataClient, target: TargetDetails) -> list[str]:
    if target.drained:
        return []
    found = {one.inode: one.holders for one in client.call(FindOpenFiles(target.target_id))}
    if not found:
        return []
    paths = {attr.inode: path for path, attr in every_file(client) if attr.inode in found}
    return [
        f"{paths.get(inode, 'a file without a name')} is open: "
        + (", ".join(holders) or "perhaps, the metadata service was just started")
        for inode, holders in found.items()
    ]


__all__ = ["drained_blocks", "state_of", "wait_until_empty"]
