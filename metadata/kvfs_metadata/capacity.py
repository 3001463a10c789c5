"""How much may be stored, and how much of it is."""

from __future__ import annotations

from kvfs_metadata import records
from kvfs_metadata.blocks import Blocks
from kvfs_metadata.cluster.cluster_state import CAPACITY_FRACTION, ClusterState
from kvfs_metadata.config import MetadataConfig
from kvfs_metadata.engines.engine import KVRead
from kvfs_metadata.messages import FilesystemStats, StatFs


class Capacity:
    def __init__(self, config: MetadataConfig, cluster: ClusterState) -> None:
        self._config = config
        self._cluster = cluster

    def total_bytes(self) -> int:
        """0 while no target has told what it holds and nothing is configured."""
        disks = self._cluster.targets.capacity_bytes()
        if self._config.capacity_bytes == 0:
            return int(disks * CAPACITY_FRACTION)
        return min(self._config.capacity_bytes, disks or self._config.capacity_bytes)

    def excess_bytes(self, used: int) -> int:
        """What the cache is to evict now: above the high watermark down to the low one, or what
        the fullest disk lacks of its reserve."""
        capacity = self.total_bytes()
        excess = 0
        if capacity and used > capacity * self._config.high_watermark:
            excess = int(used - capacity * self._config.low_watermark)
        return max(excess, self._cluster.missing_bytes())

    def statfs(self, kv: KVRead, request: StatFs, blocks: Blocks) -> FilesystemStats:
        usage = records.unpack_usage(kv.get(records.USAGE_KEY))
        used = blocks.used_bytes(kv)
        capacity = self.total_bytes()
        targets = self._cluster.targets
        if targets.capacity_bytes():
            # Somebody else may have filled the disks.
            capacity = min(capacity, used + targets.free_bytes())
        quota = blocks.quotas.find(kv, request.inode)
        if quota is None:
            inodes = usage.inodes + len(blocks.index.by_inode)
            return FilesystemStats(capacity, used, inodes)
        left = max(0, capacity - used)
        if quota.bytes_max:
            left = min(left, max(0, quota.bytes_max - quota.bytes_used))
        return FilesystemStats(
            capacity_bytes=quota.bytes_used + left,
            used_bytes=quota.bytes_used,
            inodes=quota.inodes,
            inodes_max=quota.inodes_max,
        )
